"""The one encoder: Arrow record batches + Schema -> Columns; a faulty value is named by file, row group, row, field and value.

FBGEMM on a CPU maps an id that is out of range to row 0 and trains row 0 without a word, so every id is checked here, while the row's
place in its file is still known. An exported artifact carries this file and those it imports (mbcnet_rec/serving/artifact.py lists
them), so that serving encodes as training does.
"""

import copy
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from functools import wraps
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from pyarrow import types as pt

from ..errors import InputError, first_line  # relative: an exported artifact carries this file
from ..schema import MISSING_ROW, Feature, Schema
from ..schema.sequences import lengths_of
from .columns import ABSENT, NO_GROUP, Columns, Lists, Place, Ragged, join_lists, offsets_of
from .crosses import Part, cross
from .ids import as_lists, decoded, integers, is_id, is_valid, list_offsets, read_ids
from .keys import hash_values, make_vocabularies, read_vocabularies, remainder, splitmix64, unbounded_ids
from .numbers import buckets_of, read_labels, read_numbers, read_weights, write_numbers, write_vectors
from .plain import Plain

T = TypeVar("T")
Rows = pa.RecordBatch | Mapping[str, pa.Array]
# for each integer type: its unsigned twin, and the largest value that is the same in both
UNSIGNED = {
    dtype.char: (np.dtype(f"u{dtype.itemsize}"), int(np.iinfo(dtype).max))
    for dtype in map(np.dtype, ("b", "B", "h", "H", "i", "I", "l", "L", "q", "Q"))
}
MAX_INT32 = 2**31 - 1


class Encoder:
    """Encodes record batches by one schema. Holds the vocabularies, which are read once. Safe to use from many threads."""

    def __init__(
        self,
        schema: Schema,
        assemble: "Callable[..., Assembly] | None" = None,
        *,
        vocabularies: Mapping[str, pa.Array] | None = None,
        has_labels: bool = True,
    ) -> None:
        """Prepare the vocabularies.

        Args:
            schema: fitted.
            assemble: a kind of Assembly, which permutes rows; None: rows stay in their order.
            vocabularies: the schema's names of vocabulary files -> their values; None: read them from the schema's folder.
            has_labels: whether the rows have a label and a grouping column; without, labels are 0 and there are no groups.

        Raises:
            InputError: the schema is not fitted, or a vocabulary cannot be read.
        """
        schema.require_fitted()
        self.assemble, self.has_labels = assemble or Assembly, has_labels
        values = read_vocabularies(schema) if vocabularies is None else vocabularies
        self.vocabularies = make_vocabularies(schema, values)
        # what a field's ids are read as, "integer" or "text"; empty: as the type of their column says
        self.id_type = {each.name: "integer" if each.encoding == "ids" else each.type for each in schema.features}
        self.id_type |= {name: vocabulary.id_type for name, vocabulary in self.vocabularies.items()}
        fields = {each.name: each for each in schema.features}
        self.parts = {each.name: [fields[name] for name in each.of] for each in schema.features}  # of crosses
        self.num_embeddings = {name: table.num_embeddings for name, table in schema.table_of.items()}
        self.longest = lengths_of(schema.features)
        self._take_fields(schema)
        self.list_dtype = {
            name: np.int32 if table.zch is None and table.num_embeddings <= MAX_INT32 else np.int64
            for name, table in schema.table_of.items()
        }
        self.id_dtype = np.result_type(np.int32, *(self.list_dtype[each.name] for each in self.single))

    def of(self, schema: Schema) -> "Encoder":
        """The same for some of the fields, with the vocabularies that are already there."""
        part = copy.copy(self)
        part._take_fields(schema)
        return part

    def _take_fields(self, schema: Schema) -> None:
        self.schema, self.dense_width = schema, sum(feature.dense_width for feature in schema.dense)
        self.single = [feature for feature in schema.sparse if feature.is_single]
        self.lists = [feature for feature in schema.sparse if not feature.is_single]

    def encode(self, rows: Rows, place: Place, plain: Plain | None = None) -> Columns:
        """Check and encode rows; see `encode_all`. `plain`: what is read of them already."""
        return self.encode_all([(rows, place)], plain=plain)

    def encode_all(
        self, parts: Sequence[tuple[Rows, Place]], permutation: np.ndarray | None = None, *, plain: Plain | None = None
    ) -> Columns:
        """Check and encode the rows of several record batches.

        Args:
            parts: record batches and where they come from; none gives no rows.
            permutation: row i of the result is row permutation[i] of the parts in order.
            plain: fields of the only part that are read already; nothing is permuted then.

        Raises:
            InputError: naming file, row group, row, field, the value, what was wanted and how to fix it.
        """
        repaired: Counter[str] = Counter()
        readers, total = [], 0
        for rows, place in parts:
            readers.append(Reader(self, rows, total, place, repaired))
            total = readers[-1].rows.stop
        done: Container[str] = ()
        if plain is not None:  # what is left may have no column
            done, total = plain.fields, plain.num_rows
            readers[0].rows = slice(0, total)
        whole = self.assemble(self, readers, total, permutation)
        single_ids = np.empty((len(self.single), total), self.id_dtype)
        labels = np.zeros((total, len(self.schema.tasks)) if self.schema.tasks else total, np.float32)
        groups = np.empty(total, np.int64) if self.has_labels and self.schema.group_column else None
        weights = np.empty(total, np.float32) if self.has_labels and self.schema.weight_column else None
        if plain is not None:
            single_ids[plain.single_places], readers[0].absent = plain.single_ids, set(plain.absent)
        for index in range(len(self.single)) if plain is None else plain.other_singles:
            whole.single(self.single[index], single_ids[index])
        dense = whole.dense(done)
        if plain is not None:
            dense[:, plain.dense_columns] = plain.dense
        for reader in readers if self.has_labels else ():
            reader.targets(labels, groups, weights)
        read = {} if plain is None else plain.lists
        lists, weighted = whole.lists(self.lists, read), whole.lists(self.schema.weighted, read)
        absent = {name for reader in readers for name in reader.absent}
        nulls = sum((reader.nulls for reader in readers), Counter[str]())
        return Columns(
            single_ids=single_ids,
            absent=np.asarray(
                [each.name in absent for each in self.single] if absent else [False] * len(self.single), bool
            ),
            lists=lists,
            weighted_lists=weighted,
            dense=dense,
            labels=whole.reordered(labels),
            group_ids=None if groups is None else whole.reordered(groups),
            repaired=repaired,
            weights=None if weights is None else whole.reordered(weights),
            nulls=nulls if self.has_labels else None,
        )


class Assembly:
    """How the rows of several record batches, n in all, become columns: here one after the other."""

    def __init__(
        self, encoder: Encoder, readers: "Sequence[Reader]", num_rows: int, permutation: np.ndarray | None
    ) -> None:
        self.encoder, self.readers, self.num_rows = encoder, readers, num_rows
        self.permutation = permutation

    def single(self, feature: Feature, out: np.ndarray) -> None:
        """Write the ids of a single-valued field, (n,)."""
        for reader in self.readers:
            reader.single(feature, out[reader.rows])

    def dense(self, done: Container[str]) -> np.ndarray:
        """Read numbers and vectors, but for fields that are done: (n, D) float32, 0 where they are missing."""
        dense = np.empty((self.num_rows, self.encoder.dense_width), np.float32)
        # field by field, and turned at the end: a number written into its row would fetch a cache line of its own
        numbers = np.empty((self.encoder.dense_width, self.num_rows), np.float32)
        owners: list[int] = []
        stop = 0
        for feature in self.encoder.schema.dense:
            start, stop = stop, stop + feature.dense_width
            if feature.kind == "vector" and feature.name not in done:
                self.vector(feature, dense[:, start:stop])
            elif feature.name not in done:
                self.number(feature, numbers[len(owners)])
                owners.append(start)
        self.turn(numbers[: len(owners)], np.asarray(owners, np.int64), dense)
        return dense

    def vector(self, feature: Feature, out: np.ndarray) -> None:
        """Write the vectors of a field, (n, W)."""
        out[:] = 0
        for reader in self.readers:
            reader.dense(feature, out[reader.rows])

    def number(self, feature: Feature, out: np.ndarray) -> None:
        """Write the numbers of a field, (n,)."""
        for reader in self.readers:
            reader.dense(feature, out[reader.rows])

    def turn(self, columns: np.ndarray, owners: np.ndarray, dense: np.ndarray) -> None:
        """Write numbers to their columns of (n, D)."""
        dense[:, owners] = columns.T

    def lists(self, features: Sequence[Feature], read: Mapping[str, Ragged]) -> Lists:
        """Read list fields, but for those that are read already."""
        fields = [
            [read[each.name]]
            if each.name in read
            else [reader.list(each) for reader in self.readers] or [_no_lists(each)]
            for each in features
        ]
        return join_lists(fields, self.num_rows)

    def reordered(self, array: np.ndarray) -> np.ndarray:
        """Rows that were read one after the other, in the order of the result."""
        return array


def _named(read: Callable[..., T]) -> Callable[..., T]:
    """Turn what Arrow raises on damaged values into one line that names file and row group."""

    @wraps(read)
    def reads(self: "Reader", *arguments: Any) -> T:
        try:
            return read(self, *arguments)
        except (pa.ArrowException, UnicodeError) as error:
            raise InputError(
                f"{self.place} cannot be encoded ({first_line(error)}); the file is damaged: write it again"
            ) from None

    return reads


class Reader:
    """The columns of one record batch, read field by field. `rows`: where they go among the rows of all record batches."""

    def __init__(self, encoder: Encoder, rows: Rows, start: int, place: Place, repaired: Counter[str]) -> None:
        self.encoder, self.place, self.repaired = encoder, place, repaired
        self.columns: Mapping[str, pa.Array] = (
            rows if isinstance(rows, Mapping) else dict(zip(rows.schema.names, rows.columns, strict=True))
        )
        self.rows = slice(start, start + len(next(iter(self.columns.values()), ())))
        self.absent: set[str] = set()  # fields in which an ABSENT was written
        self.nulls: Counter[str] = Counter()  # by field
        self.hashes: dict[str, Part] = {}  # of fields that crosses combine

    def _column(self, feature: Feature) -> pa.Array:
        column = self.columns[feature.source_column]
        if column.null_count:
            self.nulls[feature.name] = column.null_count
        return column

    @_named
    def targets(self, labels: np.ndarray, groups: np.ndarray | None, weights: np.ndarray | None) -> None:
        """Write what a row has besides its fields: its label, the hash of its grouping column and its weight."""
        schema, columns, place = self.encoder.schema, self.columns, self.place
        if not schema.tasks:
            labels[self.rows] = read_labels(columns[schema.label], schema.label, place)
        for task, name in enumerate(schema.tasks):
            labels[self.rows, task] = read_labels(columns[name], name, place, nulls=True)
        if groups is not None:
            groups[self.rows] = read_groups(columns[schema.group_column], schema, place)
        if weights is not None:
            weights[self.rows] = read_weights(columns[schema.weight_column], schema.weight_column, place)

    @_named
    def dense(self, feature: Feature, out: np.ndarray) -> None:
        """Write the numbers of a field, (n,), 0 where they are missing, or its vectors, (n, W); missing ones are left as they are."""
        column = self._column(feature)
        if feature.kind == "vector":
            write_vectors(column, feature, self.place, self.repaired, out)
        else:
            write_numbers(column, feature, self.place, self.repaired, out, self.encoder.schema.transforms)

    @_named
    def single(self, feature: Feature, out: np.ndarray) -> None:
        """Write one row of the table, or ABSENT, for each row of the log."""
        if feature.is_cross:
            out[:] = self._cross(feature).values
            return
        column = self._column(feature)
        if feature.kind == "numeric":
            numbers, valid = read_numbers(column, feature, self.place, self.repaired)
            out[:] = buckets_of(numbers, np.asarray(feature.boundaries, np.float64))
        else:
            out[:], valid = self._ids(column, feature)
        if valid is not None:
            is_absent = feature.encoding in ("ids", "zch") and feature.is_keyed
            out[~valid] = ABSENT if is_absent else MISSING_ROW
            if is_absent:
                self.absent.add(feature.name)

    @_named
    def list(self, feature: Feature) -> Ragged:
        """Read a list column; a null list is an empty one, a null inside a list is no value."""
        if feature.is_cross:
            return self._cross(feature)
        column = as_lists(self._column(feature))
        offsets = list_offsets(column)
        if feature.is_sequence:
            return self._sequence(feature, column.flatten(), offsets)
        ids, valid = self._ids(column.flatten(), feature, offsets)
        ids = ids.astype(self.encoder.list_dtype[feature.name], copy=False)
        weights = self._weights(feature, offsets) if feature.weights else None
        if valid is not None or (feature.on_invalid == "null" and ids.size > 0 and ids.min() < 0):
            keep = ids >= 0 if valid is None else valid & (ids >= 0)
            ids = ids[keep]
            weights = None if weights is None else weights[keep]
            offsets = offsets_of(keep)[offsets]
        return Ragged(ids, np.diff(offsets), weights)

    def _cross(self, feature: Feature) -> Ragged:
        parts = self.encoder.parts[feature.name]
        for part in parts:
            if part.name not in self.hashes:
                self.hashes[part.name] = self._hashes(part)
        num_embeddings = self.encoder.num_embeddings[feature.name]
        found = cross([self.hashes[each.name] for each in parts], num_embeddings, feature.max_length or 1)
        if found.cut:
            self.repaired[feature.name] += found.cut
        return Ragged(found.rows.astype(self.encoder.list_dtype[feature.name], copy=False), found.lengths, None)

    def _hashes(self, part: Feature) -> Part:
        """Hash what a column holds; what its field takes for missing is no value."""
        column, offsets = self.columns[part.source_column], None
        if part.is_bucketised:
            # the field itself counts what is repaired
            numbers, valid = read_numbers(column, part, self.place, Counter())
            hashes = splitmix64(buckets_of(numbers, np.asarray(part.boundaries, np.float64)).astype(np.uint64))
        else:
            if not part.is_single:
                column = as_lists(column)
                offsets, column = list_offsets(column), column.flatten()
            owner, wanted = f"field {part.name!r}", self.encoder.id_type[part.name]
            ids = read_ids(column, owner, wanted, self.place, offsets)
            hashes, valid = hash_values(ids), is_valid(ids) if ids.null_count else None
            if part.encoding == "ids" and part.on_invalid == "null":
                numbers = integers(decoded(ids))
                inside = (numbers >= 0) & (numbers < self.encoder.num_embeddings[part.name])
                valid = inside if valid is None else valid & inside
        keep = np.ones(len(hashes), bool) if valid is None else valid
        if offsets is None:
            return Part(hashes, keep.astype(np.int64), False)
        return Part(hashes[keep], np.diff(offsets_of(keep)[offsets]), True)

    def _sequence(self, feature: Feature, values: pa.Array, offsets: np.ndarray) -> Ragged:
        """Read the newest events, which are the last ones; an event without a value reads the missing row."""
        first = next((each for each in self.encoder.schema.features if each.name == feature.beside), None)
        if first is not None:
            self._check_lengths(first, offsets, f"values in column {feature.source_column!r}, which is beside it")
        lengths = np.minimum(np.diff(offsets), self.encoder.longest[feature.name])
        kept = offsets_of(lengths)
        if kept[-1] < offsets[-1]:
            places = np.repeat(offsets[1:] - kept[1:], lengths)
            values = values.take(pa.array(places + np.arange(len(places))))
        ids, valid = self._ids(values, feature, kept)
        ids = ids.astype(self.encoder.list_dtype[feature.name], copy=False)
        if valid is not None:
            if feature.encoding == "ids":
                wanted = "an id: a sequence keeps a place for each event; use encoding = 'vocabulary' or 'hash', which have a row for it"
                raise self.place.fault(f"field {feature.name!r}", values, ~valid, wanted, kept)
            ids = np.where(valid, ids, MISSING_ROW).astype(ids.dtype)
        return Ragged(ids, lengths, None)

    def _check_lengths(self, feature: Feature, offsets: np.ndarray, others: str) -> None:
        """Refuse lists that are not as long as the field's own."""
        own_offsets = list_offsets(as_lists(self.columns[feature.source_column]))
        if not np.array_equal(own_offsets, offsets):
            found, wanted = np.diff(offsets), np.diff(own_offsets)
            row = int((found != wanted).argmax())
            raise InputError(
                f"{self.place.row(row)}, field {feature.name!r}: {wanted[row]} values but {found[row]} {others}; the lists must be "
                "equally long: fix the writer of this file"
            )

    def _weights(self, feature: Feature, offsets: np.ndarray) -> np.ndarray:
        column = as_lists(self.columns[feature.weights])
        self._check_lengths(feature, list_offsets(column), f"weights in column {feature.weights!r}")
        weights, _ = read_numbers(column.flatten(), feature, self.place, self.repaired, offsets)
        return weights.astype(np.float32)

    def _ids(
        self, column: pa.Array, feature: Feature, offsets: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Rows of the table for each value, undefined where it is null, and where it is not (None: nowhere).

        `offsets`: of the lists that hold the values.
        """
        num_embeddings = self.encoder.num_embeddings[feature.name]
        if feature.encoding == "gap":
            gaps, valid = read_numbers(column, feature, self.place, self.repaired, offsets)
            if gaps.size and gaps.min() < 0:
                wanted = "a time since the event, 0 or more; fix the file"
                raise self.place.fault(f"field {feature.name!r}", gaps, gaps < 0, wanted, offsets)
            return np.minimum(1 + np.log2(1.0 + gaps.astype(np.float64)).astype(np.int64), num_embeddings - 1), valid
        if feature.encoding == "ids" and pt.is_integer(column.type) and not column.null_count:
            return self._in_range(integers(column), feature, num_embeddings, offsets), None
        wanted = self.encoder.id_type[feature.name]
        ids = read_ids(column, f"field {feature.name!r}", wanted, self.place, offsets)
        if feature.encoding == "ids":
            ids = decoded(ids)
            rows = self._in_range(integers(ids), feature, num_embeddings, offsets)
        elif feature.encoding == "hash":
            rows = remainder(hash_values(ids), num_embeddings - 1).view(np.int64) + 1
        elif feature.encoding == "zch":
            rows = unbounded_ids(ids)
        else:
            rows = self.encoder.vocabularies[feature.name].rows_of(ids)
        return rows, is_valid(ids) if ids.null_count else None

    def _in_range(
        self, ids: np.ndarray, feature: Feature, num_embeddings: int, offsets: np.ndarray | None
    ) -> np.ndarray:
        """Ids that are rows themselves; what is outside of the table as `on_invalid` says."""
        # Seen as unsigned, a negative id is a huge one: one pass checks both ends of the range.
        (unsigned, largest), limit = UNSIGNED[ids.dtype.char], num_embeddings - 1
        if ids.size == 0 or np.maximum.reduce(ids.view(unsigned)) <= (limit if limit < largest else largest):
            return ids
        bad = (ids < 0) | (ids >= num_embeddings)
        if feature.on_invalid == "error":
            able = "'modulo'" if feature.is_sequence else "'null' or 'modulo'"
            fix = f"fix the file, raise num_embeddings, or set on_invalid = {able} for this field"
            wanted = f"an id in [0, {num_embeddings}); {fix}"
            raise self.place.fault(f"field {feature.name!r}", ids, bad, wanted, offsets)
        self.repaired[feature.name] += int(bad.sum())
        if feature.on_invalid == "null":
            self.absent.add(feature.name)
            return np.where(bad, ABSENT, ids.astype(np.int64))
        # Python's modulo: -1 becomes the last row. Small types cannot hold the divisor.
        wide = ids if ids.dtype == np.uint64 else ids.astype(np.int64)
        return (wide % num_embeddings).astype(np.int64)


def read_groups(column: pa.Array, schema: Schema, place: Place) -> np.ndarray:
    """Hashes of the grouping column, (n,) int64, NO_GROUP where null; InputError if a value of a column of ids is none."""
    if is_id(column.type):
        column = read_ids(column, f"group_column {schema.group_column!r}", schema.group_type, place)
    elif pt.is_dictionary(column.type) and column.dictionary.null_count:
        column = decoded(column)
    # the least number is no hash: the one that it would be is moved off it
    hashes = np.maximum(hash_values(column).view(np.int64), NO_GROUP + 1)
    return np.where(is_valid(column), hashes, NO_GROUP) if column.null_count else hashes


def _no_lists(feature: Feature) -> Ragged:
    """A list field of no rows."""
    weights = np.zeros(0, np.float32) if feature.is_weighted else None
    return Ragged(np.zeros(0, np.int64), np.zeros(0, np.int64), weights)
