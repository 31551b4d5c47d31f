"""Paths -> Parquet files and their row groups, checked from footers alone. Imports no torch."""

import glob
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data.arrow import check_columns
from data.errors import InputError
from data.order import RowGroup
from data.schema import Schema


def resolve_files(paths: Sequence[str]) -> list[Path]:
    """Turn folders, globs and files into a sorted list of Parquet files.

    Raises:
        InputError: a path leads to no Parquet file.
    """
    files: set[Path] = set()
    for text in paths:
        path = Path(text)
        found = [path] if path.is_file() else sorted(path.rglob("*.parquet")) if path.is_dir() else []
        found = found or [
            Path(name) for name in sorted(glob.glob(text, recursive=True)) if Path(name).is_file()
        ]
        if not found and not path.is_dir():
            for folder in sorted(glob.glob(text)):
                found += sorted(Path(folder).rglob("*.parquet"))
        if not found:
            raise InputError(
                f"{text}: no Parquet file there; check the path, or write the data first (`mbcnet data synth`, `mbcnet data prepare`)"
            )
        files |= set(found)
    return sorted(files)


def read_footers(files: Sequence[Path], schema: Schema) -> list[RowGroup]:
    """List the row groups of all files and check each file's columns, from footers alone.

    Raises:
        InputError: a file is no Parquet file, or a column is missing or of a wrong type; or there is no row at all.
    """
    row_groups = []
    for number, file in enumerate(files):
        try:
            with pq.ParquetFile(file) as parquet:
                check_columns(parquet.schema_arrow, schema, str(file))
                metadata = parquet.metadata
                rows = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
        except (OSError, pa.ArrowException) as error:
            reason = (str(error).splitlines() or ["unreadable"])[0]
            raise InputError(
                f"{file}: not a readable Parquet file ({reason}); write it again or remove it"
            ) from None
        row_groups += [RowGroup(number, index, num_rows) for index, num_rows in enumerate(rows) if num_rows]
    if not row_groups:
        raise InputError(
            f"{files[0]} and {len(files) - 1} more files hold no rows; check the paths of this split"
        )
    return row_groups
