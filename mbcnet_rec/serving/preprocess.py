"""Rows -> ids and numbers for the tables, by the encoder that training uses. Every artifact carries this file.

Shapes: B rows, D dense columns.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import chain, groupby
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from pyarrow import types as pt
from torch import Tensor

if __name__ == "mbcnet_rec.serving.preprocess":
    from data.errors import InputError, first_line
    from data.reading.column_types import check_columns
    from data.reading.columns import Columns, Place, offsets_of
    from data.reading.encode import Encoder
    from data.reading.ids import integers_of
    from data.reading.plain import Plain, PlainRows
    from data.schema import Schema, Table, load_schema
else:  # in an artifact, which carries these files
    from .data.errors import InputError, first_line  # type: ignore[import-not-found]
    from .data.reading.column_types import check_columns  # type: ignore[import-not-found]
    from .data.reading.columns import Columns, Place, offsets_of  # type: ignore[import-not-found]
    from .data.reading.encode import Encoder  # type: ignore[import-not-found]
    from .data.reading.ids import integers_of  # type: ignore[import-not-found]
    from .data.reading.plain import Plain, PlainRows  # type: ignore[import-not-found]
    from .data.schema import Schema, Table, load_schema  # type: ignore[import-not-found]

__all__ = ["REQUEST", "ZCH", "Inputs", "Preprocessor", "Rows", "Schema", "load_schema"]

ZCH = "zch/"  # before the name of a table of unbounded ids, among the tables' rows
REQUEST = "request"  # stands in messages where training has a file's name
SEQUENCES = (list, tuple, range)
NONE = np.zeros(0, np.int64)
MISSING = {"NoneType", "NAType", "NaTType"}  # Python's, and pandas' own
Rows = Any  # mapping of column -> list or array, an Arrow table or record batch, or what pyarrow.table takes, such as a DataFrame


class Inputs(NamedTuple):
    """Rows ready for the tables."""

    bags: dict[str, tuple[Tensor, Tensor, Tensor | None]]  # pooling -> ids, offsets, weights
    dense: Tensor  # (B, D + S) float32: the last S are lengths of sequences
    # of S owners, looked up once and added to their rows: what the rows have themselves is empty there
    shared: "Inputs | None" = None
    owners: Tensor | None = None  # (B,) int64, of each row


class Preprocessor:
    """Rows -> ids and numbers, by the encoder that training uses. Arguments are as ServingModel has them."""

    def __init__(
        self,
        schema: Schema,
        lookups: Mapping[str, Sequence[tuple[str, int]]],  # pooling -> (field, table) pairs
        vocabularies: Mapping[str, pa.Array],
        id_rows: Mapping[str, Tensor],
        encoder: Encoder | None = None,
    ) -> None:
        self.schema, self.columns = schema, schema.field_columns
        self.encoder = encoder or Encoder(schema, vocabularies=vocabularies, has_labels=False)
        self.plain = PlainRows(schema, self.encoder.num_embeddings)
        rest = tuple(each for each in schema.features if each.name not in self.plain.fields)
        self.rest = dataclasses.replace(schema, features=rest)
        self.sequences = [each.name for each in schema.features if each.is_sequence and not each.beside]
        self.arguments = lookups, vocabularies, id_rows
        singles = [feature for feature in schema.sparse if feature.is_single]
        lists = [feature for feature in schema.sparse if not feature.is_single]
        self.places = {  # of each field in Columns
            feature.name: (kind, index)
            for kind, features in (("single", singles), ("list", lists), ("weighted", schema.weighted))
            for index, feature in enumerate(features)
        }
        self.field_of = {column: each for each in schema.features for column in (each.source_column, each.weights)}
        self.dense_width = sum(feature.dense_width for feature in schema.dense)
        self.dense_columns: list[int] | None = None  # where a part's own stand among all D
        self._parts: dict[frozenset[str], Preprocessor] = {}
        self.checked: dict[str, pa.DataType] = {}  # the types that were last found right
        self.id_rows: dict[str, tuple[Table, np.ndarray, np.ndarray]] = {}
        for name, table in schema.table_of.items():
            if table.zch is not None:
                ids, rows = id_rows[ZCH + table.name].numpy()
                if len(rows) and not 0 <= rows.min() <= rows.max() < table.num_embeddings:
                    raise ValueError(f"field {name!r}: an id has a row that its table lacks; copy the artifact again")
                self.id_rows[name] = table, ids, rows
        self.runs = {pooling: self._runs(pooling, [field for field, _ in own]) for pooling, own in lookups.items()}

    def _runs(self, pooling: str, fields: Sequence[str]) -> list[tuple[str, int, list[int], str]]:
        """Lookups that are joined at once: kind, empty of another part's fields, lookups, places in Columns, and the first field.

        Fields of a kind share a run; a sequence has its own, and in it a lookup for each position.
        """
        kinds = {field: self.places.get(field, ("", 0))[0] for field in fields}
        alone = {field for field in fields if field in self.id_rows or (pooling, kinds[field]) == ("sequence", "list")}
        keys = [field if field in alone else kinds[field] for field in fields]
        runs = [[fields[at] for at in run] for _, run in groupby(range(len(fields)), key=keys.__getitem__)]
        return [
            (kinds[run[0]], len(run), [self.places[field][1] for field in run if kinds[field]], run[0]) for run in runs
        ]

    def spans(self, columns: frozenset[str]) -> bool:
        """Whether a cross combines fields of these columns with others, so that rows of either alone do not tell it."""
        column_of = {each.name: each.source_column for each in self.schema.features}
        inside = ([column_of[name] in columns for name in each.of] for each in self.schema.features)
        return any(any(each) and not all(each) for each in inside)

    def part(self, columns: frozenset[str]) -> "Preprocessor":
        """The same for fields of these columns alone, the others empty; InputError if weights come without their values, or the other way."""
        if columns in self._parts:
            return self._parts[columns]
        features, own, start = [], [], 0
        fields = {feature.name: feature for feature in self.schema.features}
        for feature in self.schema.features:
            parts = [fields[name] for name in feature.of] or [feature]
            reads = [name in columns for part in parts for name in (part.source_column, part.weights) if name]
            if any(reads) and not all(reads):
                words = "values and weights must stand together, shared or in the rows"
                words = f"{' and '.join(feature.of)}, which it combines, {words[19:]}" if feature.is_cross else words
                raise InputError(f"{REQUEST}: row 0, field {feature.name!r}: {words}; move one of them")
            if all(reads):
                features.append(feature)
                own += range(start, start + feature.dense_width)
            start += feature.dense_width
        names = {feature.name for feature in features}
        for feature in self.schema.features:
            if feature.beside and (feature.name in names) != (feature.beside in names):
                words = f"must stand with {feature.beside!r}, shared or in the rows"
                raise InputError(f"{REQUEST}: row 0, field {feature.name!r}: {words}; move one of them")
        schema = dataclasses.replace(self.schema, features=tuple(features))
        part = Preprocessor(schema, *self.arguments, self.encoder.of(schema))
        part.sequences = self.sequences
        part.dense_columns, part.dense_width = own, self.dense_width
        if len(self._parts) > 200:  # who sends requests chooses the columns
            self._parts.clear()
        self._parts[columns] = part
        return part

    def __call__(self, rows: Rows, place: str = REQUEST, first_row: int = 0) -> Inputs:
        """Check and encode rows; see ServingModel.predict. `place` and `first_row` name them in messages about a value."""
        return self.inputs(self.encode(rows, place, first_row))

    def encode(self, rows: Rows, place: str = REQUEST, first_row: int = 0) -> Columns:
        """Check and encode rows."""
        plain = self.plain.read(rows) if isinstance(rows, Mapping) else None
        return self.encoder.encode(self._arrays(rows, plain), Place(place, None, first_row), plain)

    def inputs(self, columns: Columns) -> Inputs:
        """Join encoded rows as the tables want them, each pooling's lookups one after the other."""
        joined = {}
        both = {"list": columns.lists, "weighted": columns.weighted_lists}
        counts = {kind: lists.offsets[:, 1:] - lists.offsets[:, :-1] for kind, lists in both.items()}
        for pooling, runs in self.runs.items():
            ids, weights, stop = [], [], 0
            total = sum(count for _, count, _, _ in runs)
            offsets = np.zeros(total * columns.num_rows + 1, np.int64)
            lengths = offsets[1:].reshape(total, columns.num_rows)
            for kind, count, places, field in runs:
                own, stop = lengths[stop : stop + count], stop + count
                if kind == "single":
                    rows = columns.single_ids[places]
                    np.greater_equal(rows, 0, out=own, casting="unsafe")
                    found = [rows[rows >= 0]]
                elif kind and pooling == "sequence":
                    # where the value at each position of each row's list stands, (L, B), and whether there is one
                    begins, positions = columns.lists.offsets[places[0]], np.arange(count)[:, None]
                    own[:] = positions < np.diff(begins)
                    found = [columns.lists.values[places[0]][(begins[:-1] + positions)[own > 0]]]
                elif kind:
                    lists, own[:] = both[kind], counts[kind][places]
                    found = [lists.values[place] for place in places]
                    weights += [lists.weights[place] for place in places if lists.weights]
                else:
                    continue
                if field in self.id_rows and pooling != "sequence":
                    found = [self._given_rows(field, each) for each in found]
                ids += found
            np.cumsum(offsets, out=offsets)
            joined[pooling] = (
                torch.from_numpy(np.concatenate([NONE, *ids], dtype=np.int64)),
                torch.from_numpy(offsets),
                torch.from_numpy(np.concatenate([NONE, *weights], dtype=np.float32)) if pooling == "weighted" else None,
            )
        dense = columns.dense
        if self.dense_columns is not None:
            dense = np.zeros((columns.num_rows, self.dense_width), np.float32)
            dense[:, self.dense_columns] = columns.dense
        if self.sequences:
            found = np.zeros((columns.num_rows, len(self.sequences)), np.float32)
            for place, field in enumerate(self.sequences):
                if field in self.places:
                    found[:, place] = np.diff(columns.lists.offsets[self.places[field][1]])
            dense = np.concatenate([dense, found], axis=1)
        return Inputs(joined, torch.from_numpy(dense))

    def _given_rows(self, field: str, hashed: np.ndarray) -> np.ndarray:
        """The row that training gave to each id of a table of encoding zch, or the last row of its bucket."""
        table, ids, rows = self.id_rows[field]
        assert table.zch is not None
        bucket_ids = -(-(2**63 - 1) // table.zch.buckets)
        own = (hashed // bucket_ids + 1) * (table.num_embeddings // table.zch.buckets) - 1
        if not len(ids):
            return own
        places = np.minimum(np.searchsorted(ids, hashed), len(ids) - 1)
        return np.where(ids[places] == hashed, rows[places], own)

    def without_row(self, field: str, hashed: np.ndarray) -> np.ndarray:
        """Which ids of a table of encoding zch have no row of their own."""
        _, ids, _ = self.id_rows[field]
        places = np.minimum(np.searchsorted(ids, hashed), len(ids) - 1)
        return ids[places] != hashed if len(ids) else np.ones(len(hashed), bool)

    def _arrays(self, rows: Rows, plain: Plain | None) -> dict[str, Any]:
        """The columns that fields read, but for plain ones, each as one array."""
        schema = self.schema if plain is None else self.rest
        found = self._columns_of(rows, schema.field_columns)
        arrays = {name: self._array(name, column) for name, column in found.items()}
        types = {name: array.type for name, array in arrays.items()}
        if types != self.checked:
            check_columns(pa.schema(list(types.items())), schema, REQUEST, has_label=False)
            self.checked = types
        num_rows = len(next(iter(arrays.values()), ())) if plain is None else plain.num_rows
        wrong = [name for name, array in arrays.items() if len(array) != num_rows]
        if wrong:
            raise InputError(
                f"{REQUEST}: field {self.field_of[wrong[0]].name!r}: {len(arrays[wrong[0]])} rows in column {wrong[0]!r}; "
                f"wanted {num_rows}, as the other columns have"
            )
        return arrays

    def _columns_of(self, rows: Rows, wanted: Sequence[str]) -> dict[str, Any]:
        """Column name -> what the caller gave, for the columns that are wanted."""
        if not isinstance(rows, Mapping):
            is_frame = hasattr(rows, "columns") and not isinstance(rows, (pa.Table, pa.RecordBatch))
            try:
                if is_frame:  # of pandas or Polars; other columns may hold what Arrow does not take
                    return {name: rows[name] for name in wanted if name in set(rows.columns)}
                table = rows if isinstance(rows, (pa.Table, pa.RecordBatch)) else pa.table(rows)
            except (TypeError, ValueError, KeyError, pa.ArrowException) as error:
                raise InputError(
                    f"{REQUEST}: a {type(rows).__name__} cannot be read ({first_line(error)}); wanted a dict that has the column of each "
                    "field as a list or an array, an Arrow table or record batch, or a DataFrame"
                ) from None
            names = table.schema.names
            if len(set(names)) < len(names):
                check_columns(table.schema, self.schema, REQUEST, has_label=False)
            rows = dict(zip(names, table.columns, strict=True))
        return {name: rows[name] for name in wanted if name in rows}

    def _array(self, name: str, column: Any) -> pa.Array:
        feature = self.field_of[name]
        try:
            return array_of(column, not feature.is_keyed or name == feature.weights)
        except (TypeError, ValueError, OverflowError, pa.ArrowException) as error:
            raise InputError(
                f"{REQUEST}: column {name!r} of field {feature.name!r} cannot be read ({first_line(error)}); "
                "wanted a list of values of one type, None where one is missing"
            ) from None


def array_of(column: Any, is_number: bool) -> pa.Array:
    """One column of a request as an array. `is_number`: integers and floats may stand side by side, since all become floats.

    Raises TypeError, ValueError, OverflowError or pa.ArrowException if it is no column, or its values have no type in common.
    """
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if isinstance(column, pa.Array):
        return pc.run_end_decode(column) if pt.is_run_end_encoded(column.type) else column
    if isinstance(column, SEQUENCES):
        return _of_values(column, is_number)
    if isinstance(column, np.ma.MaskedArray):
        return _of_values(column.tolist(), is_number)
    if not isinstance(column, np.ndarray):
        if type(column).__module__.split(".")[0] == "pandas" or hasattr(column, "__arrow_c_array__"):
            return array_of(pa.array(column), is_number)
        if hasattr(column, "__arrow_c_stream__"):
            return array_of(pa.chunked_array(column), is_number)
        if not hasattr(column, "__array__"):
            raise TypeError(f"a {type(column).__name__}")
        column = np.asarray(column)
    column = column.astype(column.dtype.newbyteorder("="), copy=False)  # Arrow takes this machine's order only
    if column.ndim == 2:
        offsets = np.arange(len(column) + 1) * column.shape[1]
        return _of_lists(array_of(column.reshape(-1), is_number), offsets)
    if column.ndim != 1:
        raise TypeError(f"an array of {column.ndim} dimensions")
    if column.dtype.kind in "OUT":  # Arrow cuts NumPy's text at a NUL
        return _of_values(column.tolist(), is_number)
    return pa.array(column)


def _of_values(values: Sequence[Any], is_number: bool) -> pa.Array:
    """A column of Python's values, or of lists of them."""
    kinds = set(map(type, values))
    if kinds == {int}:
        with suppress(OverflowError):  # in a fraction of the time that Arrow takes
            return pa.array(np.asarray(values, np.int64))
    missing = {kind for kind in kinds if kind.__name__ in MISSING}
    kinds -= missing
    if any(issubclass(kind, (*SEQUENCES, np.ndarray)) for kind in kinds):
        return _of_rows(values, is_number)
    if sets := [kind.__name__ for kind in kinds if issubclass(kind, (set, frozenset))]:
        raise TypeError(f"a {sets[0]} has no order")
    integer = {kind for kind in kinds if issubclass(kind, (int, np.integer)) and kind is not bool}
    others = kinds - integer
    if integer and all(issubclass(kind, (float, np.floating)) for kind in others):
        if others and not is_number:
            raise TypeError("integers and floats in one column")
        if not others:
            integers, bad = integers_of([None if type(each) in missing else int(each) for each in values])
            if bad is None:
                return integers
            if not is_number:
                row = int(np.flatnonzero(bad)[0])
                raise OverflowError(f"row {row} = {str(values[row])[:40]}: the column's integers need over 64 bits")
        return pa.array([None if type(each) in missing else _as_float(each) for each in values], pa.float64())
    return pa.array(values)


def _as_float(number: Any) -> float:
    try:
        return float(number)
    except OverflowError:  # an integer of more than 308 digits, which the encoder refuses by its row
        return math.inf if number > 0 else -math.inf


def _of_rows(rows: Sequence[Any], is_number: bool) -> pa.Array:
    lengths = np.zeros(len(rows), np.int64)
    valid = np.zeros(len(rows), bool)
    for row, each in enumerate(rows):
        if isinstance(each, (*SEQUENCES, np.ndarray)):
            lengths[row], valid[row] = len(each), True
        elif type(each).__name__ not in MISSING:
            raise TypeError(f"row {row} is a {type(each).__name__} among lists")
    present = [each for each, is_list in zip(rows, valid, strict=True) if is_list]
    if all(isinstance(each, np.ndarray) for each in present) and len({each.dtype for each in present}) == 1:
        values = array_of(np.concatenate(present), is_number)
    else:
        values = _of_values(list(chain.from_iterable(present)), is_number)
    return _of_lists(values, offsets_of(lengths), None if valid.all() else pa.array(~valid))


def _of_lists(values: pa.Array, offsets: np.ndarray, mask: pa.Array | None = None) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values, mask=mask)
