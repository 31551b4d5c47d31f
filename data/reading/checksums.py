"""Whether a Parquet file's pages carry checksums: read from the header of a page.

A page begins with a Thrift struct in compact encoding: 1 type, 2 uncompressed size, 3 compressed size, 4 crc (optional), all int32; 5 and
on the kind's own header. Arrow verifies a checksum where there is one but does not tell where there is none.
"""

import re
from collections.abc import Container

import pyarrow as pa
import pyarrow.parquet as pq

from data.reading.storage import DataFile, read_bytes

# Fields 1 to 3, each the byte of "the next field, an int32" and a number of one or more bytes, and that byte of field 4.
CHECKSUM = re.compile(rb"(?:\x15[\x80-\xff]*[\x00-\x7f]){3}\x15")
HEADER_BYTES = 64


def column_without_checksum(file: DataFile, metadata: pq.FileMetaData, columns: frozenset[str]) -> str:
    """Name the first of the columns whose first page, in the file's first row group with rows, has no checksum; or an empty string.

    The footer must have been proved for these columns (see `data.reading.files.prove`).
    """
    index = first_row_group(metadata)
    if index < 0:
        return ""
    owners = columns_of_leaves(metadata)
    for number in leaves_of(metadata, columns):
        chunk = metadata.row_group(index).column(number)
        start = chunk.dictionary_page_offset or chunk.data_page_offset
        if not has_checksum(read_bytes(file, start, HEADER_BYTES)):
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
    return [field.name for field in schema for _ in range(_num_leaves(field.type))]


def _num_leaves(kind: pa.DataType) -> int:
    """Leaf columns that a type is stored in. Their paths do not tell: `user.id` may be a column, or a part of the column `user`."""
    return sum(_num_leaves(kind.field(place).type) for place in range(kind.num_fields)) or 1


def has_checksum(header: bytes) -> bool:
    """Whether the page whose first bytes these are carries a checksum."""
    return CHECKSUM.match(header) is not None
