"""Whether a Parquet file's pages carry checksums: read from the header of a page. Imports no torch.

A page begins with a Thrift struct in compact encoding: 1 type, 2 uncompressed size, 3 compressed size, 4 crc (optional), 5 and on
the kind's own header. Arrow verifies a checksum where there is one but does not tell where there is none.
"""

import pyarrow.parquet as pq

from data.storage import DataFile, read_bytes

CRC_FIELD = 4
THRIFT_I32 = 5
HEADER_BYTES = 64


def column_without_checksum(file: DataFile, metadata: pq.FileMetaData, columns: frozenset[str]) -> str:
    """Name the first of the columns whose first page, in the file's first row group with rows, has no checksum; or an empty string."""
    for index in range(metadata.num_row_groups):
        row_group = metadata.row_group(index)
        if row_group.num_rows == 0:
            continue
        for number in range(row_group.num_columns):
            column = row_group.column(number)
            name = column.path_in_schema.split(".")[0]
            if name in columns:
                start = column.dictionary_page_offset or column.data_page_offset
                if not has_checksum(read_bytes(file, start, HEADER_BYTES)):
                    return name
        return ""
    return ""


def has_checksum(header: bytes) -> bool:
    """Whether the page whose first bytes these are carries a checksum."""
    position = field = 0
    while position < len(header):
        byte = header[position]
        position += 1
        field += byte >> 4
        if field == CRC_FIELD:
            return byte & 15 == THRIFT_I32
        if field > CRC_FIELD or byte & 15 != THRIFT_I32:
            return False
        while position < len(header) and header[position] & 128:  # a number of several bytes
            position += 1
        position += 1
    return False
