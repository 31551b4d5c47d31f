"""The rows of a row group, all of them.

Arrow takes a page's number of values from its header, which no checksum covers: without a word it cuts a list short where a flipped bit
made that smaller, and ends at a page of no values. So what was read is compared with what the footer says.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import types as pt

from data.reading.checksums import columns_of_leaves
from data.reading.column_types import is_list
from data.reading.ids import integers


def stored_rows(
    parquet: pq.ParquetFile, group: int, columns: Sequence[str], batch_rows: int, use_threads: bool = True
) -> Iterator[pa.RecordBatch]:
    """Yield the columns of a row group in batches of at most so many rows.

    Raises:
        pa.ArrowInvalid: there are fewer rows, or fewer values in a column's lists, than the footer says.
    """
    rows, entries = 0, Counter[str]()
    for batch in parquet.iter_batches(batch_rows, [group], list(columns), use_threads):
        rows += batch.num_rows
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            if is_list(column.type) and not pt.is_nested(column.type.value_type):
                entries[name] += _num_entries(column)
        yield batch
    footer = parquet.metadata.row_group(group)
    if rows != footer.num_rows:
        raise pa.ArrowInvalid(f"{rows} rows to read, but {footer.num_rows} by the footer")
    for leaf, name in enumerate(columns_of_leaves(parquet.metadata) if entries else ()):
        if name in entries and entries[name] != (stored := footer.column(leaf).num_values):
            raise pa.ArrowInvalid(
                f"column {name!r} has {entries[name]} values to read, but {stored} by the footer"
            )


def _num_entries(column: pa.Array) -> int:
    """Stored entries of a column of lists: its values, and one for each list without any."""
    return int(np.maximum(integers(pc.list_value_length(column)), 1).sum())
