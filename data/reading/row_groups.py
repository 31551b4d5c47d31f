"""Row groups of files that may be damaged: proved before they are asked for, read whole or not at all, and whether pages carry checksums.

Arrow takes a page's number of values from its header, which no checksum covers: without a word it cuts a list short where a flipped bit
made that smaller, and ends at a page of no values. So what was read is compared with what the footer says. A checksum is verified where
there is one, but Arrow does not tell where there is none: a page begins with a Thrift struct in compact encoding, 1 type, 2 uncompressed
size, 3 compressed size, 4 crc (optional), all int32; 5 and on the kind's own header.
"""

import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import types as pt

from data.reading.column_types import is_list
from data.reading.ids import list_offsets
from data.reading.storage import DataFile, read_bytes

# Fields 1 to 3, each the byte of "the next field, an int32" and a number of one or more bytes, and that byte of field 4.
CHECKSUM = re.compile(rb"(?:\x15[\x80-\xff]*[\x00-\x7f]){3}\x15")
HEADER_BYTES = 64


def prove(parquet: pq.ParquetFile, row_groups: Iterable[int], columns: Iterable[str]) -> None:
    """Raise an ordinary error if a damaged footer does not describe these column chunks, by planning to read them.

    `row_group(i).column(j)` may be called only after this: on a footer that Arrow finds inconsistent it does not raise but ends the
    process (seen in pyarrow 26 with flipped bits). The file must have been opened with pre_buffer, which looks at all chunks at once.
    """
    if parquet.metadata.num_rows:
        chosen = [index for index in row_groups if index >= 0]
        next(parquet.iter_batches(1, row_groups=chosen, columns=list(columns), use_threads=False), None)


def stored_rows(
    parquet: pq.ParquetFile, groups: Sequence[int], columns: Sequence[str], batch_rows: int, use_threads: bool = True
) -> Iterator[pa.RecordBatch]:
    """Yield the columns of row groups in batches of at most so many rows; pa.ArrowInvalid if they are not what the footer says."""
    rows, entries = 0, Counter[str]()
    lists: list[str] | None = None
    for batch in parquet.iter_batches(batch_rows, list(groups), list(columns), use_threads):
        rows += batch.num_rows
        if lists is None:
            kinds = {field.name: field.type for field in batch.schema}
            lists = [name for name, kind in kinds.items() if is_list(kind) and not pt.is_nested(kind.value_type)]
        for name in lists:
            offsets = list_offsets(batch.column(name))
            # a list without values has an entry too
            entries[name] += int(offsets[-1]) + int(np.count_nonzero(offsets[1:] == offsets[:-1]))
        yield batch
    footers = [parquet.metadata.row_group(group) for group in groups]
    if rows != (wanted := sum(footer.num_rows for footer in footers)):
        raise pa.ArrowInvalid(f"{rows} rows to read, but {wanted} by the footer")
    for leaf, name in enumerate(columns_of_leaves(parquet.metadata) if entries else ()):
        if name in entries and entries[name] != (stored := sum(each.column(leaf).num_values for each in footers)):
            raise pa.ArrowInvalid(f"column {name!r} has {entries[name]} values to read, but {stored} by the footer")


def column_without_checksum(file: DataFile, metadata: pq.FileMetaData, columns: frozenset[str]) -> str:
    """Name the first of the columns whose first page, in the file's first row group with rows, has no checksum; or an empty string.

    The footer must have been proved for these columns.
    """
    index = first_row_group(metadata)
    if index < 0 or not columns:
        return ""
    owners = columns_of_leaves(metadata)
    for number in leaves_of(metadata, columns):
        chunk = metadata.row_group(index).column(number)
        start = chunk.dictionary_page_offset or chunk.data_page_offset
        if not CHECKSUM.match(read_bytes(file, start, HEADER_BYTES)):
            return owners[number]
    return ""


def first_row_group(metadata: pq.FileMetaData) -> int:
    """The first row group with rows, or -1."""
    groups = range(metadata.num_row_groups)
    return next((index for index in groups if metadata.row_group(index).num_rows), -1)


def leaves_of(metadata: pq.FileMetaData, columns: Container[str]) -> list[int]:
    """The numbers of the leaf columns that the given columns consist of."""
    return [number for number, column in enumerate(columns_of_leaves(metadata)) if column in columns]


def columns_of_leaves(metadata: pq.FileMetaData) -> list[str]:
    """The column that each leaf column is a part of; a column's name may hold dots."""
    schema = metadata.schema.to_arrow_schema()
    return [name for name, kind in zip(schema.names, schema.types, strict=True) for _ in range(_num_leaves(kind))]


def _num_leaves(kind: pa.DataType) -> int:
    """Leaf columns that a type is stored in. Their paths do not tell: `user.id` may be a column, or a part of the column `user`."""
    return sum(_num_leaves(kind.field(place).type) for place in range(kind.num_fields)) if kind.num_fields else 1
