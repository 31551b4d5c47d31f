"""The one encoder: Arrow record batches + Schema -> Columns; a faulty value is named by file, row group, row, field and value.

FBGEMM on a CPU maps an id that is out of range to row 0 and trains row 0 without a word, so every id is checked here, while the row's
place in its file is still known. An exported artifact carries this file and those it imports (mbcnet_rec/serving/artifact.py lists
them), so that serving encodes as training does.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types as pt

from ..errors import InputError, first_line  # relative: an exported artifact carries this file
from ..schema import MISSING_ROW, Feature, Schema
from .columns import ABSENT, Columns, Lists, Permute, Ragged, join_lists, offsets_of
from .ids import as_ids, decoded, integers, is_id, is_text, is_valid, value_type
from .keys import (
    hash_values,
    make_vocabularies,
    read_vocabularies,
    remainder,
    unbounded_ids,
)

T = TypeVar("T")
# NumPy's: a flat column of int64, uint64 or float64 without nulls, which needs no Arrow
Column = pa.Array | np.ndarray
Rows = pa.RecordBatch | Mapping[str, Column]
# for each integer type: its unsigned twin, and the largest value that is the same in both
UNSIGNED = {
    dtype.char: (np.dtype(f"u{dtype.itemsize}"), int(np.iinfo(dtype).max))
    for dtype in map(np.dtype, ("b", "B", "h", "H", "i", "I", "l", "L", "q", "Q"))
}
MAX_INT32 = 2**31 - 1
LARGEST = float(np.finfo(np.float32).max)  # what the model takes
LARGEST_DOUBLE, LEAST_NORMAL = float(np.finfo(np.float64).max), float(np.finfo(np.float32).tiny)
MOST_COMPARED, LEAST_COMPARED = 32, 256  # boundaries, numbers


@dataclass(frozen=True)
class Place:
    """Where a record batch comes from, for messages."""

    file: str  # path of the file, or what else holds the rows
    row_group: int | None  # its index; None where there are none
    first_row: int = 0  # of the record batch, in its row group
    rows: np.ndarray | None = None  # instead of first_row: each row's number, where only some were kept

    def __str__(self) -> str:
        return self.file if self.row_group is None else f"{self.file}: row group {self.row_group}"

    def row(self, row: int) -> str:
        """Name one row of the record batch."""
        number = self.first_row + row if self.rows is None else int(self.rows[row])
        return f"{self}{':' if self.row_group is None else ','} row {number}"


class Encoder:
    """Encodes record batches by one schema. Holds the vocabularies, which are read once. Safe to use from many threads."""

    def __init__(
        self,
        schema: Schema,
        permute: Permute | None = None,
        *,
        vocabularies: Mapping[str, pa.Array] | None = None,
        has_labels: bool = True,
    ) -> None:
        """Prepare the vocabularies.

        Args:
            schema: fitted.
            permute: permutes the rows of a list field; needed where rows are permuted.
            vocabularies: the schema's names of vocabulary files -> their values; None: read them from the schema's folder.
            has_labels: whether the rows have a label and a grouping column; without, labels are 0 and there are no groups.

        Raises:
            InputError: the schema is not fitted, or a vocabulary cannot be read.
        """
        schema.require_fitted()
        self.schema, self.permute, self.has_labels = schema, permute, has_labels
        values = read_vocabularies(schema) if vocabularies is None else vocabularies
        self.vocabularies = make_vocabularies(schema, values)
        self.id_type = {each.name: self._id_type(each) for each in schema.features if each.is_keyed}
        self.num_embeddings = {name: table.num_embeddings for name, table in schema.table_of.items()}
        self.single = [feature for feature in schema.sparse if feature.is_single]
        self.lists = [feature for feature in schema.sparse if not feature.is_single]
        self.dense_width = sum(feature.dense_width for feature in schema.dense)
        self.list_dtype = {
            name: np.int32 if table.zch is None and table.num_embeddings <= MAX_INT32 else np.int64
            for name, table in schema.table_of.items()
        }
        self.id_dtype = np.result_type(np.int32, *(self.list_dtype[each.name] for each in self.single))

    def _id_type(self, feature: Feature) -> str:
        """What a field's ids are read as, "integer" or "text"; empty: as the type of their column says."""
        if feature.encoding == "vocabulary":
            return self.vocabularies[feature.name].id_type
        return "integer" if feature.encoding == "ids" else feature.type

    def encode(self, rows: Rows, place: Place) -> Columns:
        """Check and encode rows; see `encode_all`."""
        return self.encode_all([(rows, place)])

    def encode_all(
        self,
        parts: Sequence[tuple[Rows, Place]],
        permutation: np.ndarray | None = None,
        allocate: Callable[..., np.ndarray] = np.empty,
    ) -> Columns:
        """Check and encode the rows of several record batches.

        Args:
            parts: record batches and where they come from; none gives no rows.
            permutation: row i of the result is row permutation[i] of the parts in order.
            allocate: makes the matrix of single-valued ids, by shape and dtype.

        Raises:
            InputError: naming file, row group, row, field, the value, what was wanted and how to fix it.
        """
        repaired: Counter[str] = Counter()
        readers, total = [], 0
        for rows, place in parts:
            readers.append(_Reader(self, rows, total, place, repaired))
            total = readers[-1].rows.stop

        def in_new_order(array: np.ndarray) -> np.ndarray:
            return array if permutation is None else array.take(permutation, axis=0, mode="clip")

        def lists_of(features: Sequence[Feature]) -> Lists:
            fields = [[reader.list(each) for reader in readers] or [_no_lists(each)] for each in features]
            return join_lists(fields, permutation, total, self.permute)

        single_ids = allocate((len(self.single), total), self.id_dtype)
        in_order = np.empty(total, self.id_dtype)  # one field, before it is permuted
        dense = np.zeros((total, self.dense_width), np.float32)
        labels, groups = np.zeros(total, np.float32), np.empty(total, np.int64)
        has_groups = self.has_labels and bool(self.schema.group_column)
        for index, feature in enumerate(self.single):
            out = single_ids[index] if permutation is None else in_order
            for reader in readers:
                reader.single(feature, out[reader.rows])
            if permutation is not None:
                in_order.take(permutation, out=single_ids[index], mode="clip")
        for reader in readers:
            reader.dense(dense[reader.rows])
            if self.has_labels:
                labels[reader.rows] = reader.labels()
            if has_groups:
                groups[reader.rows] = reader.groups()
        absent = {name for reader in readers for name in reader.absent}
        return Columns(
            single_ids=single_ids,
            absent=np.asarray([feature.name in absent for feature in self.single], bool),
            lists=lists_of(self.lists),
            weighted_lists=lists_of(self.schema.weighted),
            dense=in_new_order(dense),
            labels=in_new_order(labels),
            group_ids=in_new_order(groups) if has_groups else None,
            repaired=repaired,
        )


def _named(read: Callable[..., T]) -> Callable[..., T]:
    """Turn what Arrow raises on damaged values into one line that names file and row group."""

    @wraps(read)
    def reads(self: "_Reader", *arguments: Any) -> T:
        try:
            return read(self, *arguments)
        except (pa.ArrowException, UnicodeError) as error:
            raise InputError(
                f"{self.place} cannot be encoded ({first_line(error)}); the file is damaged: write it again"
            ) from None

    return reads


class _Reader:
    """The columns of one record batch, read field by field. `rows`: where they go among the rows of all record batches."""

    def __init__(
        self, encoder: Encoder, rows: Rows, start: int, place: Place, repaired: Counter[str]
    ) -> None:
        self.encoder, self.place, self.repaired = encoder, place, repaired
        self.columns: Mapping[str, Column] = (
            rows if isinstance(rows, Mapping) else dict(zip(rows.schema.names, rows.columns, strict=True))
        )
        self.rows = slice(start, start + len(next(iter(self.columns.values()))))
        self.absent: set[str] = set()  # fields in which an ABSENT was written

    @_named
    def labels(self) -> np.ndarray:
        """Labels, 0 and 1."""
        label = self.encoder.schema.label
        return read_labels(_as_arrow(self.columns[label]), label, self.place)

    @_named
    def groups(self) -> np.ndarray:
        """Hashes of the grouping column, int64."""
        schema = self.encoder.schema
        column = _as_arrow(self.columns[schema.group_column])
        if is_id(column.type):
            column = self._converted(column, f"group_column {schema.group_column!r}", schema.group_type)
        return hash_values(column).view(np.int64)

    @_named
    def single(self, feature: Feature, out: np.ndarray) -> None:
        """Write one row of the table, or ABSENT, for each row of the log."""
        if feature.kind == "numeric":
            numbers, valid = self._numbers(self.columns[feature.source_column], feature)
            out[:] = _buckets(numbers, np.asarray(feature.boundaries, np.float64))
            if valid is not None:
                out[~valid] = MISSING_ROW
            return
        column = self._id_column(self.columns[feature.source_column], feature)
        out[:] = self._ids(column, feature, None)
        if not isinstance(column, np.ndarray) and column.null_count:
            is_absent = feature.encoding in ("ids", "zch")
            out[~is_valid(column)] = ABSENT if is_absent else MISSING_ROW
            if is_absent:
                self.absent.add(feature.name)

    @_named
    def list(self, feature: Feature) -> Ragged:
        """Read a list column; a null list is an empty one, a null inside a list is no value."""
        column = _as_lists(self.columns[feature.source_column])
        offsets = _list_offsets(column)
        items = self._id_column(column.flatten(), feature, offsets)
        ids = self._ids(items, feature, offsets)
        ids = ids.astype(self.encoder.list_dtype[feature.name], copy=False)
        weights = self._weights(feature, offsets) if feature.weights else None
        absent = items.null_count > 0 or (feature.on_invalid == "null" and ids.size > 0 and ids.min() < 0)
        if absent:
            keep = ids >= 0
            if items.null_count:
                keep &= is_valid(items)
            ids = ids[keep]
            weights = None if weights is None else weights[keep]
            offsets = offsets_of(keep)[offsets]
        return Ragged(ids, offsets, weights)

    def _weights(self, feature: Feature, offsets: np.ndarray) -> np.ndarray:
        column = _as_lists(self.columns[feature.weights])
        own_offsets = _list_offsets(column)
        if not np.array_equal(own_offsets, offsets):
            found, wanted = np.diff(own_offsets), np.diff(offsets)
            row = int(np.flatnonzero(found != wanted)[0])
            raise InputError(
                f"{self.place.row(row)}, field {feature.name!r}: {wanted[row]} values but {found[row]} weights in column "
                f"{feature.weights!r}; the lists must be equally long: fix the writer of this file"
            )
        weights, _ = self._numbers(column.flatten(), feature, offsets)
        return weights.astype(np.float32)

    def _id_column(self, column: Column, feature: Feature, offsets: np.ndarray | None = None) -> Column:
        """The ids in the type that the field reads. `offsets`: of the lists that hold them."""
        if isinstance(column, np.ndarray) and feature.encoding == "ids":
            return column
        wanted = self.encoder.id_type[feature.name]
        ids = self._converted(_as_arrow(column), f"field {feature.name!r}", wanted, offsets)
        return decoded(ids) if feature.encoding == "ids" else ids

    def _converted(
        self, column: pa.Array, owner: str, wanted: str, offsets: np.ndarray | None = None
    ) -> pa.Array:
        ids, bad = as_ids(column, wanted)
        if bad is None:
            return ids
        first = int(np.flatnonzero(bad)[0])
        found = column[first].as_py()
        if is_text(value_type(column.type)):
            words = f"{str(found)[:80]!r}: wanted an integer of 64 bits in plain digits, since its ids are integers in training"
            fix = "fix the file, or train anew on ids that are text"
        else:
            words = f"{found}: wanted an id, an integer of 64 bits (as a float, a whole number that its type holds exactly)"
            fix = "write the column as integers or text"
        raise InputError(f"{self.place.row(_row_of(first, offsets))}, {owner} = {words}; {fix}")

    def _ids(self, column: Column, feature: Feature, offsets: np.ndarray | None) -> np.ndarray:
        """Rows of the table for each value, undefined at nulls. `offsets`: of the lists that hold the values."""
        num_embeddings = self.encoder.num_embeddings[feature.name]
        if feature.encoding != "ids":
            return self._encoded(_as_arrow(column), feature, num_embeddings)
        ids = column if isinstance(column, np.ndarray) else integers(column)
        # Seen as unsigned, a negative id is a huge one: one pass checks both ends of the range.
        (unsigned, largest), limit = UNSIGNED[ids.dtype.char], num_embeddings - 1
        if ids.size == 0 or np.maximum.reduce(ids.view(unsigned)) <= (limit if limit < largest else largest):
            return ids
        bad = (ids < 0) | (ids >= num_embeddings)
        if feature.on_invalid == "error":
            wanted = f"an id in [0, {num_embeddings})"
            fix = "raise num_embeddings, or set on_invalid = 'null' or 'modulo' for this field"
            raise self._fault(feature, ids, bad, offsets, f"{wanted}; fix the file, {fix}")
        self.repaired[feature.name] += int(bad.sum())
        if feature.on_invalid == "null":
            self.absent.add(feature.name)
            return np.where(bad, ABSENT, ids.astype(np.int64))
        # Python's modulo: -1 becomes the last row. Small types cannot hold the divisor.
        wide = ids if ids.dtype == np.uint64 else ids.astype(np.int64)
        return (wide % num_embeddings).astype(np.int64)

    def _encoded(self, column: pa.Array, feature: Feature, num_embeddings: int) -> np.ndarray:
        """Rows of values that are not rows themselves."""
        if feature.encoding == "hash":
            return remainder(hash_values(column), num_embeddings - 1).view(np.int64) + 1
        if feature.encoding == "zch":
            return unbounded_ids(column)
        return self.encoder.vocabularies[feature.name].rows_of(column)

    @_named
    def dense(self, out: np.ndarray) -> None:
        """Fill (n, D) with numbers and vectors; missing ones are left 0."""
        start = 0
        for feature in self.encoder.schema.dense:
            name = feature.source_column
            if feature.kind == "vector":
                self._vector(_as_lists(self.columns[name]), feature, out[:, start : start + feature.width])
            else:
                self._numeric(self.columns[name], feature, out[:, start])
            start += feature.dense_width

    def _numeric(self, column: Column, feature: Feature, out: np.ndarray) -> None:
        numbers, valid = self._numbers(column, feature)
        if feature.transform == "log1p":
            # log(1 + x) in float64 differs from log1p(x) by less than 2^-52, and is vectorised
            negative = numbers.size > 0 and numbers.min() < 0
            logs = np.log(np.add(1.0, np.abs(numbers) if negative else numbers, dtype=np.float64))
            numbers = np.copysign(logs, numbers) if negative else logs
        elif feature.transform == "standardise":
            numbers = (_wide_enough(numbers, feature) - float(feature.mean)) / float(feature.std)
        out[:] = numbers if valid is None else np.where(valid, numbers, 0.0)

    def _vector(self, column: pa.Array, feature: Feature, out: np.ndarray) -> None:
        present = is_valid(column) if column.null_count else None
        offsets = _list_offsets(column)
        lengths = np.diff(offsets)
        wrong = lengths != feature.width if present is None else present & (lengths != feature.width)
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            raise InputError(
                f"{self.place.row(row)}, field {feature.name!r}: a vector of length {lengths[row]}: wanted width = {feature.width}; "
                "fix the file or the schema's width"
            )
        numbers, _ = self._numbers(column.flatten(), feature, offsets)
        out[slice(None) if present is None else present] = numbers.reshape(-1, feature.width)

    def _numbers(
        self, column: Column, feature: Feature, offsets: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Numbers, 0 where invalid, and their validity (None: all). NaN and infinity are errors, or missing if on_invalid = 'null'."""
        valid = None
        if isinstance(column, np.ndarray):
            numbers = column
        else:
            column = decoded(column)
            if pt.is_null(column.type):
                column = column.cast(pa.float64())
            if column.null_count:
                valid = is_valid(column)
                zero = False if pt.is_boolean(column.type) else pa.scalar(0, column.type)
                column = pc.fill_null(column, zero)
            if not (pt.is_floating(column.type) or pt.is_integer(column.type)) or pt.is_float16(column.type):
                column = column.cast(pa.float64())
            numbers = column.to_numpy(zero_copy_only=False)
        low, high = _limits(feature)
        if numbers.dtype.kind in "iu":
            # as float32, integers beyond 2^24 would lose digits before the transform
            numbers = numbers.astype(np.float64)
        # a NaN is the least and the largest, and in no range
        if not numbers.size or (float(numbers.min()) >= low and float(numbers.max()) <= high):
            return numbers, valid
        wide = numbers.astype(np.float64)
        good = (wide >= low) & (wide <= high)
        if feature.on_invalid != "null":
            raise self._number_fault(feature, numbers, ~good, offsets)
        self.repaired[feature.name] += int((~good).sum())
        return np.where(good, numbers, 0.0), good if valid is None else valid & good

    def _number_fault(
        self, feature: Feature, numbers: np.ndarray, bad: np.ndarray, offsets: np.ndarray | None
    ) -> InputError:
        wanted = "a finite number or null"
        fix = "set on_invalid = 'null' to read it as missing"
        if np.isfinite(numbers[bad][0]):
            wanted = f"a number up to {LARGEST:.1e}, the largest of float32"
            wanted += ", after (x - mean) / std" if feature.transform == "standardise" else ""
            fix = "write null where it marks a missing value, " + (
                fix if feature.kind != "numeric" else f"set transform = 'log1p', or {fix}"
            )
        return self._fault(feature, numbers, bad, offsets, f"{wanted}; fix the file, or {fix}")

    def _fault(
        self, feature: Feature, values: np.ndarray, bad: np.ndarray, offsets: np.ndarray | None, wanted: str
    ) -> InputError:
        """The error that names the first bad value. `offsets`: of the lists that hold the values."""
        first = int(np.flatnonzero(bad)[0])
        row = self.place.row(_row_of(first, offsets))
        return InputError(f"{row}, field {feature.name!r} = {values[first]}: wanted {wanted}")


def read_labels(column: pa.Array, name: str, place: Place) -> np.ndarray:
    """Labels as a NumPy array of 0 and 1.

    Raises:
        InputError: a label is null or another number.
    """
    column = decoded(column)
    if column.null_count:
        row = int(np.flatnonzero(~is_valid(column))[0])
        raise InputError(
            f"{place.row(row)}, label {name!r} is null: wanted 0 or 1; drop the row or fix the file"
        )
    if not pt.is_integer(column.type):
        column = column.cast(pa.float64())
    labels = column.to_numpy(zero_copy_only=False)
    bad = (labels != 0) & (labels != 1)
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise InputError(
            f"{place.row(row)}, label {name!r} = {labels[row]:g}: wanted 0 or 1; fix the file or choose another label"
        )
    return labels


def _as_arrow(column: Column) -> pa.Array:
    return pa.array(column) if isinstance(column, np.ndarray) else column


def _limits(feature: Feature) -> tuple[float, float]:
    """The least and the largest number of a field that are finite in float32 after the transform; buckets are found in float64."""
    if feature.transform in ("log1p", "bucketise"):
        return -LARGEST_DOUBLE, LARGEST_DOUBLE
    if feature.transform != "standardise":
        return -LARGEST, LARGEST
    mean, reach = float(feature.mean), LARGEST * float(feature.std)
    return max(-LARGEST_DOUBLE, mean - reach), min(LARGEST_DOUBLE, mean + reach)


def _wide_enough(numbers: np.ndarray, feature: Feature) -> np.ndarray:
    """Numbers to standardise: as float64 where float32 could not hold the mean, std or a difference."""
    if numbers.dtype != np.float32 or not numbers.size:
        return numbers
    mean, std = float(feature.mean), float(feature.std)
    largest = max(float(numbers.max()) - mean, mean - float(numbers.min()))
    fits = max(abs(mean), std, largest) <= LARGEST and std >= LEAST_NORMAL
    return numbers if fits else numbers.astype(np.float64)


def _as_lists(column: Column) -> pa.Array:
    """A column of lists; one of type null holds null lists only."""
    column = _as_arrow(column)
    return column.cast(pa.list_(pa.null())) if pt.is_null(column.type) else column


def _row_of(value: int, offsets: np.ndarray | None) -> int:
    """The row of a value. `offsets`: of the lists that hold the values."""
    return value if offsets is None else int(np.searchsorted(offsets, value, side="right")) - 1


def _no_lists(feature: Feature) -> Ragged:
    """A list field of no rows."""
    weights = np.zeros(0, np.float32) if feature.is_weighted else None
    return Ragged(np.zeros(0, np.int64), np.zeros(1, np.int64), weights)


def _buckets(numbers: np.ndarray, boundaries: np.ndarray) -> np.ndarray:
    """1 + the number of boundaries <= x. Of many numbers, a few boundaries are faster compared one by one than searched."""
    if len(boundaries) > MOST_COMPARED or len(numbers) < LEAST_COMPARED:
        return np.searchsorted(boundaries, numbers, side="right") + 1
    rows = np.ones(len(numbers), np.uint8)
    above = np.empty(len(numbers), bool)
    for boundary in boundaries:
        np.greater_equal(numbers, boundary, out=above)
        rows += above.view(np.uint8)
    return rows


def _list_offsets(column: pa.Array) -> np.ndarray:
    """(n + 1,) int64, from 0: where each row's values lie in `column.flatten()`."""
    if column.null_count == 0 and (pt.is_list(column.type) or pt.is_large_list(column.type)):
        offsets = column.offsets.to_numpy().astype(np.int64)
        return offsets - offsets[0]
    return offsets_of(integers(pc.list_value_length(column)))
