"""Arrow record batch + Schema -> Columns: types checked, values checked and encoded, faults named by file, row, field and value.

FBGEMM on a CPU maps an id that is out of range to row 0 and trains row 0 without a word, so every id is checked here, while the row's
place in its file is still known.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import types as pt

from data.columns import ABSENT, Columns, Ragged
from data.errors import InputError
from data.schema import FIRST_VOCABULARY_ROW, MISSING_ROW, OUT_OF_VOCABULARY_ROW, Feature, Schema

SPLITMIX_GAMMA = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Place:
    """Where a record batch comes from, for messages."""

    file: str
    row_group: int
    first_row: int = 0

    def row(self, row: int) -> str:
        """Name one row of the record batch."""
        return f"{self.file}: row group {self.row_group}, row {self.first_row + row}"


def load_vocabularies(schema: Schema) -> dict[str, pa.Array]:
    """Read the value list of every vocabulary field: field name -> values in row order.

    Raises:
        InputError: a file is missing, or its length does not fit the table.
    """
    vocabularies = {}
    for feature in schema.features:
        if feature.encoding == "vocabulary" and feature.is_sparse and feature.kind != "numeric":
            path = schema.folder / feature.vocabulary
            try:
                values = pq.read_table(path, columns=["value"])["value"].combine_chunks()
            except (OSError, pa.ArrowException, KeyError) as error:
                raise InputError(
                    f"{path}: the vocabulary of field {feature.name!r} cannot be read ({_first_line(error)}); "
                    "run `mbcnet data prepare` again"
                ) from None
            wanted = schema.table_of[feature.name].num_embeddings
            if len(values) + FIRST_VOCABULARY_ROW > wanted:
                raise InputError(
                    f"{path}: {len(values)} values need {len(values) + FIRST_VOCABULARY_ROW} rows, but the table of field "
                    f"{feature.name!r} has num_embeddings = {wanted}; set it to {len(values) + FIRST_VOCABULARY_ROW}"
                )
            vocabularies[feature.name] = values
    return vocabularies


def check_columns(arrow_schema: pa.Schema, schema: Schema, file: str) -> None:
    """Check from a file's footer alone that every column is there with a type its field can take.

    Raises:
        InputError: naming the file, the column, its type and the type wanted.
    """
    names = set(arrow_schema.names)
    for column in schema.columns:
        if column not in names:
            users = [
                feature.name
                for feature in schema.features
                if column in (feature.source_column, feature.weights)
            ]
            role = "label" if column == schema.label else f"field {users[0]!r}" if users else "group_column"
            raise InputError(
                f"{file}: column {column!r} is missing, which is the schema's {role}; "
                "add the column to the file, or mend the schema"
            )
    _check_type(
        arrow_schema, schema.label, _is_number, "0 and 1 as integers, floats or booleans", file, "the label"
    )
    for feature in schema.features:
        accepts, wanted = _accepted(feature)
        _check_type(
            arrow_schema,
            feature.source_column,
            accepts,
            wanted,
            file,
            f"{feature.kind} field {feature.name!r}",
        )
        if feature.weights:
            _check_type(
                arrow_schema,
                feature.weights,
                _is_number_list,
                "lists of numbers",
                file,
                f"weights of {feature.name!r}",
            )


def _check_type(arrow_schema: pa.Schema, column: str, accepts, wanted: str, file: str, role: str) -> None:  # noqa: ANN001
    found = arrow_schema.field(column).type
    if not accepts(found):
        raise InputError(
            f"{file}: column {column!r} is {found}: {role} wants {wanted}; mend the file or the schema"
        )


def _is_number(kind: pa.DataType) -> bool:
    return pt.is_integer(kind) or pt.is_floating(kind) or pt.is_boolean(kind) or pt.is_decimal(kind)


def _is_key(kind: pa.DataType) -> bool:
    kind = kind.value_type if pt.is_dictionary(kind) else kind
    return pt.is_integer(kind) or pt.is_string(kind) or pt.is_large_string(kind)


def _is_list(kind: pa.DataType) -> bool:
    return pt.is_list(kind) or pt.is_large_list(kind) or pt.is_fixed_size_list(kind)


def _is_number_list(kind: pa.DataType) -> bool:
    return _is_list(kind) and _is_number(kind.value_type)


def _accepted(feature: Feature):  # noqa: ANN202
    """The type test of a field's column, and its description."""
    if feature.kind == "numeric":
        return _is_number, "numbers"
    if feature.kind == "vector":
        return _is_number_list, "lists of numbers"
    item, words = (
        (pt.is_integer, "integers") if feature.encoding == "ids" else (_is_key, "integers or strings")
    )
    mend = "" if feature.encoding != "ids" else " (strings need encoding = 'vocabulary' or 'hash')"
    if feature.kind == "categorical":
        return item, words + mend
    return lambda kind: _is_list(kind) and item(kind.value_type), f"lists of {words}{mend}"


class Encoder:
    """Encodes record batches by one schema. Holds the vocabularies, which are read once."""

    def __init__(self, schema: Schema) -> None:
        """Read the vocabularies.

        Raises:
            InputError: the schema is not fitted, or a vocabulary cannot be read.
        """
        schema.require_fitted()
        self.schema = schema
        self.vocabularies = load_vocabularies(schema)

    def encode(self, rows: pa.RecordBatch, place: Place) -> Columns:
        """Check and encode rows.

        Raises:
            InputError: naming file, row group, row, field, the value, what was wanted and the mend.
        """
        schema = self.schema
        n = rows.num_rows
        single = [feature for feature in schema.sparse if feature.is_single]
        single_ids = np.empty((len(single), n), np.int64)
        for index, feature in enumerate(single):
            single_ids[index] = self._single(rows.column(feature.source_column), feature, place)
        dense = np.zeros((n, sum(feature.dense_width for feature in schema.dense)), np.float32)
        start = 0
        for feature in schema.dense:
            column = rows.column(feature.source_column)
            if feature.kind == "vector":
                dense[:, start : start + feature.width] = _vector(column, feature, place)
            else:
                dense[:, start] = _numeric(column, feature, place)
            start += feature.dense_width
        return Columns(
            single_ids=single_ids,
            lists=tuple(
                self._list(rows, feature, place) for feature in schema.sparse if not feature.is_single
            ),
            weighted_lists=tuple(self._list(rows, feature, place) for feature in schema.weighted),
            dense=dense,
            labels=_labels(rows.column(schema.label), schema.label, place),
            group_ids=hash_values(rows.column(schema.group_column)).view(np.int64)
            if schema.group_column
            else None,
        )

    def _single(self, column: pa.Array, feature: Feature, place: Place) -> np.ndarray:
        if feature.kind == "numeric":
            numbers, valid = _numbers(column, feature, place)
            rows = np.searchsorted(np.asarray(feature.boundaries), numbers, side="right") + 1
            return np.where(valid, rows, MISSING_ROW)
        valid = None if column.null_count == 0 else np.asarray(column.is_valid())
        ids = self._ids(column, feature, place, np.arange(len(column)))
        if valid is not None:
            ids = np.where(valid, ids, ABSENT if feature.encoding == "ids" else MISSING_ROW)
        return ids

    def _list(self, rows: pa.RecordBatch, feature: Feature, place: Place) -> Ragged:
        column = rows.column(feature.source_column)
        lengths = _list_lengths(column)
        owners = np.repeat(np.arange(len(column)), lengths)  # the row of each value
        items = column.flatten()
        ids = self._ids(items, feature, place, owners)
        weights = (
            self._weights(rows.column(feature.weights), lengths, feature, place) if feature.weights else None
        )
        keep = ids >= 0
        if items.null_count:  # a null inside a list is no value
            keep &= np.asarray(items.is_valid())
        if not keep.all():
            ids = ids[keep]
            lengths = np.bincount(owners[keep], minlength=len(column))
            weights = None if weights is None else weights[keep]
        offsets = np.zeros(len(column) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        return Ragged(ids, offsets, weights)

    def _weights(self, column: pa.Array, lengths: np.ndarray, feature: Feature, place: Place) -> np.ndarray:
        found = _list_lengths(column)
        if not np.array_equal(found, lengths):
            row = int(np.flatnonzero(found != lengths)[0])
            raise InputError(
                f"{place.row(row)}, field {feature.name!r}: {lengths[row]} values but {found[row]} weights in column "
                f"{feature.weights!r}; the lists must be equally long: mend the writer of this file"
            )
        weights, valid = _numbers(
            column.flatten(), feature, place, np.repeat(np.arange(len(column)), lengths)
        )
        return np.where(valid, weights, 0.0).astype(np.float32)

    def _ids(self, column: pa.Array, feature: Feature, place: Place, owners: np.ndarray) -> np.ndarray:
        """Rows of the table for each value, int64; what stands at nulls means nothing. `owners`: the row of each value."""
        num_embeddings = self.schema.table_of[feature.name].num_embeddings
        if feature.encoding == "hash":
            hashed = hash_values(column) % np.uint64(num_embeddings - 1)
            return hashed.astype(np.int64) + 1
        if feature.encoding == "vocabulary":
            values = self.vocabularies[feature.name]
            if column.type != values.type:
                column = _cast(column, values.type, feature, place)
            found = pc.index_in(column, value_set=values)
            return pc.fill_null(found, OUT_OF_VOCABULARY_ROW - FIRST_VOCABULARY_ROW).to_numpy(False).astype(
                np.int64
            ) + (FIRST_VOCABULARY_ROW)
        ids = (pc.fill_null(column, 0) if column.null_count else column).to_numpy(zero_copy_only=False)
        if ids.size == 0:
            return ids.astype(np.int64)
        if ids.min() < 0 or ids.max() >= num_embeddings:
            bad = (ids < 0) | (ids >= num_embeddings)
            if feature.on_invalid == "error":
                first = int(np.flatnonzero(bad)[0])
                raise InputError(
                    f"{place.row(int(owners[first]))}, field {feature.name!r} = {ids[first]}: wanted an id in [0, {num_embeddings}); "
                    "mend the file, raise num_embeddings, or set on_invalid = 'null' or 'modulo' for this field"
                )
            # Python's modulo: -1 becomes the last row
            ids = (
                np.where(bad, ABSENT, ids.astype(np.int64))
                if feature.on_invalid == "null"
                else ids % num_embeddings
            )
        return ids.astype(np.int64, copy=False)


def hash_values(column: pa.Array) -> np.ndarray:
    """64-bit hashes, uint64, equal on every machine: splitmix64 of integers, BLAKE2b of strings; of null, 0."""
    if pt.is_integer(column.type):
        numbers = (pc.fill_null(column, 0) if column.null_count else column).to_numpy(zero_copy_only=False)
        if numbers.dtype != np.uint64:
            numbers = numbers.astype(np.int64).view(np.uint64)
        hashed = splitmix64(numbers)
    else:
        encoded = column if pt.is_dictionary(column.type) else column.dictionary_encode()
        unique = [
            int.from_bytes(hashlib.blake2b(str(value).encode(), digest_size=8).digest(), "little")
            for value in encoded.dictionary.to_pylist()
        ]
        codes = pc.fill_null(encoded.indices, 0).to_numpy(zero_copy_only=False)
        hashed = np.asarray(unique or [0], np.uint64)[codes]
    if column.null_count:
        hashed = np.where(np.asarray(column.is_valid()), hashed, np.uint64(0))
    return hashed


def splitmix64(numbers: np.ndarray) -> np.ndarray:
    """Mix uint64 numbers so that each input bit changes half of the output bits (Steele, Lea and Flood, 2014)."""
    with np.errstate(over="ignore"):
        mixed = numbers + SPLITMIX_GAMMA
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _list_lengths(column: pa.Array) -> np.ndarray:
    return pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)


def _cast(column: pa.Array, kind: pa.DataType, feature: Feature, place: Place) -> pa.Array:
    try:
        return column.cast(kind)
    except pa.ArrowException as error:
        raise InputError(
            f"{place.file}: row group {place.row_group}, field {feature.name!r}: column is {column.type}, the vocabulary is {kind} "
            f"({_first_line(error)}); write the column with the type it had when the vocabulary was fitted"
        ) from None


def _numbers(
    column: pa.Array, feature: Feature, place: Place, owners: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Float64 numbers and their validity. NaN and infinity are errors, or missing if on_invalid = 'null'."""
    valid = np.ones(len(column), bool) if column.null_count == 0 else np.asarray(column.is_valid())
    numbers = np.array(pc.fill_null(column.cast(pa.float64()), 0.0).to_numpy(zero_copy_only=False))
    finite = np.isfinite(numbers)
    if not finite.all():
        if feature.on_invalid != "null":
            first = int(np.flatnonzero(~finite)[0])
            row = first if owners is None else int(owners[first])
            raise InputError(
                f"{place.row(row)}, field {feature.name!r} = {numbers[first]}: wanted a finite number or null; "
                "mend the file, or set on_invalid = 'null' to read it as missing"
            )
        numbers = np.where(finite, numbers, 0.0)
        valid = valid & finite
    return numbers, valid


def _numeric(column: pa.Array, feature: Feature, place: Place) -> np.ndarray:
    numbers, valid = _numbers(column, feature, place)
    if feature.transform == "log1p":
        numbers = np.sign(numbers) * np.log1p(np.abs(numbers))
    elif feature.transform == "standardise":
        numbers = (numbers - float(feature.mean)) / float(feature.std)
    return np.where(valid, numbers, 0.0)


def _vector(column: pa.Array, feature: Feature, place: Place) -> np.ndarray:
    present = np.asarray(column.is_valid())
    lengths = _list_lengths(column)
    wrong = present & (lengths != feature.width)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise InputError(
            f"{place.row(row)}, field {feature.name!r}: a vector of length {lengths[row]}: wanted width = {feature.width}; "
            "mend the file or the schema's width"
        )
    items = column.filter(column.is_valid()).flatten() if column.null_count else column.flatten()
    owners = np.repeat(np.flatnonzero(present), feature.width)
    numbers, _ = _numbers(items, feature, place, owners)
    out = np.zeros((len(column), feature.width), np.float32)
    out[present] = numbers.reshape(-1, feature.width)
    return out


def _labels(column: pa.Array, name: str, place: Place) -> np.ndarray:
    if column.null_count:
        row = int(np.flatnonzero(~np.asarray(column.is_valid()))[0])
        raise InputError(
            f"{place.row(row)}, label {name!r} is null: wanted 0 or 1; drop the row or mend the file"
        )
    labels = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
    bad = (labels != 0) & (labels != 1)
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise InputError(
            f"{place.row(row)}, label {name!r} = {labels[row]:g}: wanted 0 or 1; mend the file or choose another label"
        )
    return labels.astype(np.float32)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
