"""Cuts rows into slices by the values of columns, for `mbcnet evaluate --by`: the same slices on every rank and at any world size.

One pass over just these columns, before any scoring, counts their values. The MAX_SLICES most frequent values of a column are slices
of their own; all others are one slice together.
"""

import math
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import torch.distributed as dist

from data.errors import InputError
from data.reading.decode import RowReader
from data.reading.storage import DataFile, open_parquet
from data.schema import Schema
from mbcnet_rec.runtime.process import Process, agreed
from mbcnet_rec.scoring.chunks import Chunk

MAX_SLICES = 50  # of one column
MAX_VALUES = 1_000_000  # different ones of one column, which are counted
COUNTED_ROWS = 65_536  # at a time
BYTES_OF = {
    pa.string(): pa.binary(), pa.large_string(): pa.large_binary(),
    pa.string_view(): pa.large_binary(), pa.binary_view(): pa.large_binary(),
}  # fmt: skip
REST, NULL = "(other)", "(null)"


def slice_codes(slices: dict[str, list[str]], rows: pa.RecordBatch) -> np.ndarray:
    """(n, columns) int64: each row's place in the list of slices of each column, which are those of `count_slices`."""
    codes = np.zeros((rows.num_rows, len(slices)), np.int64)
    for index, names in enumerate(slices.values()):
        place_of = {name: place for place, name in enumerate(names)}
        values, places = distinct(rows.column(index))
        numbers = np.asarray([place_of.get(value, len(names) - 1) for value in values], np.int64)
        codes[:, index] = numbers[places] if len(values) else 0
    return codes


def slice_columns(files: Sequence[DataFile], by: Sequence[str], schema: Schema) -> dict[str, str]:
    """Names of slices -> columns of the files; a field's name stands for its column. InputError if one is missing, there twice, or nested."""
    columns = {name: next((f.source_column for f in schema.features if f.name == name), name) for name in by}
    for file in files if by else ():
        with open_parquet(file) as parquet:
            found = parquet.schema_arrow
        for name, column in columns.items():
            if (count := found.names.count(column)) != 1:
                problem = f"{count} columns of this name" if count else "no such column"
                raise InputError(f"{file}: --by {name}: {problem}; it has {', '.join(found.names[:8])}, ...")
            if pa.types.is_nested(found.field(column).type):
                raise InputError(
                    f"{file}: --by {name}: column {column!r} is {found.field(column).type}; wanted one value a row: "
                    "choose another column"
                )
    return columns


def count_slices(
    by: Sequence[str], reader: RowReader, own: Sequence[Chunk], process: Process, max_slices: int = MAX_SLICES
) -> dict[str, list[str]]:
    """Count every column's values over all ranks and choose the slices. Every rank calls it.

    `by` names the reader's extra columns, in their order, as the user did; `own` are this rank's chunks. Returns for each of `by` the names
    of its slices, by falling frequency; REST, where there is one, is the last.

    Raises:
        InputError: on every rank, where a file is damaged or a column has more than MAX_VALUES values.
    """
    counts: list[Counter[str]] = [Counter() for _ in by]
    with agreed(process):
        for group in (group for chunk in own if by for group in chunk.row_groups):
            for rows, _ in reader.batches(group, COUNTED_ROWS, reader.extra):
                for name, counter, column in zip(by, counts, rows.select(reader.extra).columns, strict=True):
                    values, places = distinct(column)
                    frequency = np.bincount(places, minlength=len(values)).tolist()
                    for value, count in zip(values, frequency, strict=True):
                        counter[value] += count
                    if len(counter) > MAX_VALUES:
                        raise InputError(f"--by {name}: more than {MAX_VALUES:,} different values; choose another")
    everyone: list[Any] = [counts]
    if process.world_size > 1 and by:
        everyone = [None] * process.world_size
        dist.all_gather_object(everyone, counts)
    slices = {}
    for name, *each in zip(by, *everyone, strict=True):
        counter = sum(each, Counter())
        ordered = sorted(counter, key=lambda value: (-counter[value], value))  # equal ones by name
        slices[name] = ordered[:max_slices] + ([REST] if len(ordered) > max_slices else [])
    return slices


def distinct(column: pa.Array) -> tuple[list[str], np.ndarray]:
    """The different values of a column as text, and each row's place among them; a text may be there twice, as for 0.0 and -0.0."""
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    # bytes, which Python takes even where they are no UTF-8; a null of a view would become an empty text
    column = column.cast(BYTES_OF.get(column.type, column.type))
    encoded = column.dictionary_encode(null_encoding="encode")
    values = encoded.dictionary
    if getattr(values.type, "unit", "") == "ns" and not pa.types.is_duration(values.type):
        values = values.cast(pa.string())  # Python's times end with microseconds
    return [_text(value) for value in values.to_pylist()], encoded.indices.to_numpy().astype(np.int64)


def _text(value: Any) -> str:
    """One name for one value, whatever type the column has in a file: 7 for 7.0, and text for its bytes."""
    if value is None:
        return NULL
    if isinstance(value, (float, Decimal)) and math.isfinite(value) and value == int(value):
        return str(int(value))
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else str(value)
