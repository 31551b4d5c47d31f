"""Rows -> ids and numbers for the tables, by the encoder that training uses. Every artifact carries this file.

Shapes: B rows, D dense columns.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

if __name__ == "mbcnet_rec.serving.preprocess":
    from data.errors import InputError
    from data.reading.column_types import check_columns
    from data.reading.columns import Columns
    from data.reading.encode import Encoder, Place
    from data.reading.keys import first_line
    from data.schema import Schema, Table, load_schema
else:  # in an artifact, which carries these files
    from .data.errors import InputError  # type: ignore[import-not-found]
    from .data.reading.column_types import check_columns  # type: ignore[import-not-found]
    from .data.reading.columns import Columns  # type: ignore[import-not-found]
    from .data.reading.encode import Encoder, Place  # type: ignore[import-not-found]
    from .data.reading.keys import first_line  # type: ignore[import-not-found]
    from .data.schema import Schema, Table, load_schema  # type: ignore[import-not-found]

__all__ = ["ZCH", "Inputs", "Preprocessor", "Rows", "Schema", "load_schema"]

ZCH = "zch/"  # before the name of a table of unbounded ids, among the tables' rows
REQUEST = "request"  # stands in messages where training has a file's name
NUMBERS = {np.dtype(kind): pa.from_numpy_dtype(kind) for kind in ("int64", "uint64", "float64")}
Rows = Any  # mapping of column -> list or array, an Arrow table or record batch, or what pyarrow.table takes, such as a DataFrame


class Inputs(NamedTuple):
    """Rows ready for the tables."""

    bags: dict[str, tuple[Tensor, Tensor, Tensor | None]]  # pooling -> ids, offsets, weights
    dense: Tensor  # (B, D) float32


class Preprocessor:
    """Rows -> ids and numbers, by the encoder that training uses. Arguments are as ServingModel has them."""

    def __init__(
        self,
        schema: Schema,
        lookups: Mapping[str, Sequence[tuple[str, int]]],  # pooling -> (field, table) pairs
        vocabularies: Mapping[str, pa.Array],
        id_rows: Mapping[str, Tensor],
    ) -> None:
        self.schema, self.columns = schema, schema.field_columns
        self.encoder = Encoder(schema, vocabularies=vocabularies, has_labels=False)
        self.lookups = {pooling: [field for field, _ in pairs] for pooling, pairs in lookups.items()}
        singles = [feature for feature in schema.sparse if feature.is_single]
        lists = [feature for feature in schema.sparse if not feature.is_single]
        self.places = {  # of each field in Columns
            feature.name: (kind, index)
            for kind, features in (("single", singles), ("list", lists), ("weighted", schema.weighted))
            for index, feature in enumerate(features)
        }
        self.field_of = {
            column: feature
            for feature in schema.features
            for column in (feature.source_column, feature.weights)
        }
        self.keys = {feature.source_column for feature in schema.features if feature.is_keyed}
        self.checked: dict[str, pa.DataType] = {}  # the types that were last found right
        self.id_rows: dict[str, tuple[Table, np.ndarray, np.ndarray]] = {}
        for name, table in schema.table_of.items():
            if table.zch is not None:
                ids, rows = id_rows[ZCH + table.name].numpy()
                if len(rows) and not 0 <= rows.min() <= rows.max() < table.num_embeddings:
                    raise ValueError(
                        f"field {name!r}: an id has a row that its table lacks; copy the artifact again"
                    )
                self.id_rows[name] = table, ids, rows

    def __call__(self, rows: Rows) -> Inputs:
        """Check and encode rows; see ServingModel.predict."""
        return self.inputs(self.encoder.encode(self._arrays(rows), Place(REQUEST, None)))

    def inputs(self, columns: Columns) -> Inputs:
        """Join encoded rows as the tables want them, each pooling's lookups one after the other."""
        joined = {}
        for pooling, fields in self.lookups.items():
            ids, weights = [], []
            offsets = np.zeros(len(fields) * columns.num_rows + 1, np.int64)
            lengths = offsets[1:].reshape(len(fields), columns.num_rows)
            for field, own_lengths in zip(fields, lengths, strict=True):
                kind, index = self.places[field]
                if kind == "single":
                    found = columns.single_ids[index]
                    if columns.absent[index]:
                        own_lengths[:] = found >= 0
                        found = found[found >= 0]
                    else:
                        own_lengths[:] = 1
                else:
                    lists = columns.lists if kind == "list" else columns.weighted_lists
                    found = lists.values[index]
                    own_lengths[:] = np.diff(lists.offsets[index])
                    if lists.weights:
                        weights.append(lists.weights[index])
                ids.append(self._given_rows(field, found) if field in self.id_rows else found)
            np.cumsum(offsets, out=offsets)
            joined[pooling] = (
                torch.from_numpy(np.concatenate(ids, dtype=np.int64)),
                torch.from_numpy(offsets),
                torch.from_numpy(np.concatenate(weights)) if weights else None,
            )
        return Inputs(joined, torch.from_numpy(columns.dense))

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

    def _arrays(self, rows: Rows) -> dict[str, Any]:
        """The columns that fields read, each as one array of a type that training takes: Arrow's, or NumPy's of plain numbers."""
        if not isinstance(rows, Mapping):
            table = rows if isinstance(rows, (pa.Table, pa.RecordBatch)) else pa.table(rows)
            rows = dict(zip(table.schema.names, table.columns, strict=True))
        arrays = {name: self._array(name, rows[name]) for name in self.columns if name in rows}
        types = {
            name: NUMBERS[array.dtype] if isinstance(array, np.ndarray) else array.type
            for name, array in arrays.items()
        }
        if types != self.checked:
            check_columns(pa.schema(list(types.items())), self.schema, REQUEST, has_label=False)
            self.checked = types
        num_rows = len(next(iter(arrays.values()), ()))
        wrong = [name for name, array in arrays.items() if len(array) != num_rows]
        if wrong:
            raise InputError(
                f"{REQUEST}: field {self.field_of[wrong[0]].name!r}: {len(arrays[wrong[0]])} rows in column {wrong[0]!r}; "
                f"wanted {num_rows}, as the other columns have"
            )
        return arrays

    def _array(self, name: str, column: Any) -> pa.Array | np.ndarray:
        if isinstance(column, pa.Array):
            return column
        if isinstance(column, pa.ChunkedArray):
            return column.combine_chunks()
        numbers = self._numbers(name, column)
        if numbers is not None:
            return numbers
        try:
            if isinstance(column, np.ndarray) and column.ndim == 2:
                return pa.FixedSizeListArray.from_arrays(column.reshape(-1), column.shape[1])
            return pa.array(column)
        except (TypeError, ValueError, OverflowError, pa.ArrowException) as error:
            raise InputError(
                f"{REQUEST}: column {name!r} of field {self.field_of[name].name!r} cannot be read ({first_line(error)}); "
                "wanted a list of values of one type, None where one is missing"
            ) from None

    def _numbers(self, name: str, column: Any) -> np.ndarray | None:
        """Python's numbers, in a fraction of the time that Arrow takes; None for anything else."""
        if not isinstance(column, list) or not column or type(column[0]) not in (int, float):
            return None
        try:
            numbers = np.asarray(column)
        except (ValueError, OverflowError):
            return None
        # as a float, a large id would lose digits
        is_taken = numbers.dtype in NUMBERS and not (name in self.keys and numbers.dtype.kind == "f")
        return numbers if is_taken and numbers.ndim == 1 else None
