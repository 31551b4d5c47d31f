"""Paths -> Parquet files and their row groups: columns checked and kept rows counted, before the first batch."""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.errors import InputError, some_of
from data.reading.column_types import check_columns
from data.reading.columns import Place
from data.reading.conditions import partition_of
from data.reading.numbers import read_labels
from data.reading.row_groups import column_without_checksum, first_row_group, prove
from data.reading.selection import Footer, Selection, read_footer
from data.reading.snapshots import is_snapshot, open_snapshot
from data.reading.storage import DataFile, FileList, for_each_file, list_files, local_path, open_parquet
from data.schema import Schema

SHOWN = 3  # names of what is left out
TABLE_LOGS = {"_delta_log": "Delta", ".hoodie": "Hudi"}  # which we do not read
NOT_PARQUET = "not a readable Parquet file"


class RowGroup(NamedTuple):
    """One row group of one file. `num_rows`: the rows that are kept; `stored_rows`: all of them."""

    file: int
    index: int
    num_rows: int
    stored_rows: int


class Contents(NamedTuple):
    """What the files hold: row groups with at least one kept row, and kept rows by label (0, 1) where rows are sampled."""

    row_groups: list[RowGroup]
    label_counts: tuple[int, int]


def resolve_files(paths: Sequence[str]) -> FileList:
    """Turn folders, globs, files and URIs into a sorted list of Parquet files; a file that has two names is there once.

    In a folder, and by a pattern without an ending, a file is taken if it has an ending of Parquet, or none and begins as Parquet files do
    (Hive writes 000000_0). InputError if a path leads to no Parquet file, or cannot be read.
    """
    identities: dict[DataFile, object] = {}
    others: set[DataFile] = set()
    versions: list[int] = []
    for text in paths:
        if not text.strip():
            raise InputError(f"{text!r}: is no path; name files, folders, globs or URIs")
        if is_snapshot(text):
            snapshot = open_snapshot(text)
            if snapshot.field_ids:
                raise InputError(
                    f"{text}: the files of an Iceberg table are read by `mbcnet data convert`; name what it has written"
                )
            versions.append(snapshot.version)
            identities |= {file: (file,) for file in snapshot.files}
            continue
        listed = list_files(text)
        found = {each.file: each.identity for each in listed if each.is_data}
        identities |= found
        others |= {each.file for each in listed} - found.keys()
        if not found:
            raise InputError(
                f"{text}: no Parquet file there{_other_files(text)}; check the path, or write the data first (`mbcnet data synth`, "
                "`mbcnet data prepare`)"
            )
    names: dict[object, list[DataFile]] = {}
    for file in sorted(identities, key=_rank):
        if str(file).encode(errors="ignore").decode() != str(file):
            raise InputError(f"{file}: the name is not UTF-8, by which Arrow opens files; rename it")
        names.setdefault(identities[file], []).append(file)
    kept = (own[0] if len(own) == 1 else min(own, key=_is_link) for own in names.values())
    return FileList(sorted(kept, key=_rank), sorted(others - identities.keys(), key=_rank), versions)


def _rank(file: DataFile) -> tuple[bool, DataFile]:
    return not isinstance(file, Path), file


def _is_link(file: DataFile) -> bool:
    """Whether a link leads to a file, so that its folders may not say its partition."""
    return isinstance(file, Path) and os.path.realpath(file) != os.path.abspath(file)


def files_in_words(files: FileList) -> str:
    """How many files a command took, and what it left out where it found them."""
    count, left = len(files), [str(file) for file in files.others]
    words = "1 file" if count == 1 else f"{count:,} files"
    folders = {folder for file in files if isinstance(file, Path) for folder in file.absolute().parents}
    if files.versions:
        return f"{words} (of a Delta table's version {some_of([*map(str, files.versions)], SHOWN, ', ')})"
    for folder in sorted(folders):
        for log, kind in TABLE_LOGS.items():
            if (folder / log).is_dir():
                words += f" ({folder} is a {kind} table: rows that it has deleted or replaced are read too)"
    return words + (f" (no Parquet, by name, and left out: {some_of(left, SHOWN, ', ')})" if left else "")


def _other_files(text: str) -> str:
    """What lies in a folder without Parquet files, in words."""
    path = local_path(text)
    if "{" in text:
        return " (globs know *, ?, [..] and **: name what stands in braces one by one)"
    if path is None or not os.path.isdir(path):
        return ""
    names = sorted(os.listdir(path))
    return f" (it holds {some_of(names, SHOWN, ', ')})" if names else " (it is empty)"


def read_contents(files: Sequence[DataFile], schema: Schema, selection: Selection) -> Contents:
    """List the row groups of all files, check each file's columns from its footer, and count the rows that the selection keeps.

    Without sampling and conditions on time only footers are read; else also, once, the label or the time column.
    InputError if a file is not a Parquet file, a column is missing or of a wrong type, or no row is left.
    """
    attempts = selection.options.attempts
    time_column = schema.time_column if selection.conditions else ""
    checked = frozenset(schema.columns if selection.options.require_checksum else ())
    inspect = partial(_inspect, schema, time_column, checked)
    inspected = for_each_file(files, lambda _, file: inspect(file), NOT_PARQUET, attempts)
    footers = [footer for footer, _ in inspected]
    bare = [(file, column) for file, (_, column) in zip(files, inspected, strict=True) if column]
    if bare:
        file, column = bare[0]
        raise InputError(
            f"{file}: the pages of column {column!r} carry no checksum (so in {len(bare)} of {len(files)} files): require_checksum = true "
            "wants them; write the files with page checksums (pyarrow: write_page_checksum=True), or set require_checksum = false"
        )
    selection.fix_span(footers)
    count = partial(_count_rows, selection, footers)
    if selection.filters:
        counted = for_each_file(files, count, "cannot be read while counting rows", attempts)
    else:  # nothing is read
        counted = [count(number, file) for number, file in enumerate(files)]
    row_groups = [row_group for groups, _ in counted for row_group in groups]
    if not row_groups:
        kept = f" that where = {list(selection.options.where)} and sampling keep" if selection.filters else ""
        raise InputError(f"{files[0]} and {len(files) - 1} more files hold no rows{kept}; check the paths")
    negatives, positives = np.sum([counts for _, counts in counted], axis=0)
    return Contents(row_groups, (int(negatives), int(positives)))


def column_sets(files: Sequence[DataFile], attempts: int) -> dict[pa.Schema, DataFile]:
    """Each set of columns that files have, by their footers, and the first file that has it; InputError if a file is not a Parquet file."""
    known: dict[pa.Schema, pa.Schema] = {}  # so that no set is held twice

    def read(_: int, file: DataFile) -> pa.Schema:
        with open_parquet(file) as parquet:
            columns = parquet.schema_arrow.remove_metadata()
        return known.setdefault(columns, columns)

    found: dict[pa.Schema, DataFile] = {}
    for file, columns in zip(files, for_each_file(files, read, NOT_PARQUET, attempts), strict=True):
        found.setdefault(columns, file)
    return found


def _inspect(schema: Schema, time_column: str, checked: frozenset[str], file: DataFile) -> tuple[Footer, str]:
    """Check one file's footer; return what planning needs of it, and a column without checksums."""
    with open_parquet(file, pre_buffer=True) as parquet:
        check_columns(parquet.schema_arrow, schema, str(file))
        if time_column and time_column not in parquet.schema_arrow.names:
            way_out = "add the column to the file, or change the conditions"
            if time_column in partition_of(file):
                way_out = (
                    "it is a partition folder: remove time_column from the schema, and conditions compare the folders"
                )
            missing = f"column {time_column!r} is missing, which is the schema's time_column and named by where"
            raise InputError(f"{file}: {missing}; {way_out}")
        metadata = parquet.metadata
        groups = range(metadata.num_row_groups)
        if sum(metadata.row_group(index).num_rows for index in groups) != metadata.num_rows:
            raise pa.ArrowInvalid("the row groups of the footer do not add up to its number of rows")
        prove(parquet, [first_row_group(metadata)], checked or {schema.label})
        if time_column:
            prove(parquet, groups, {time_column})
        return read_footer(parquet, time_column, str(file)), column_without_checksum(file, metadata, checked)


def _count_rows(
    selection: Selection, footers: Sequence[Footer], number: int, file: DataFile
) -> tuple[list[RowGroup], np.ndarray]:
    """Kept rows of each row group of a file, and of each label."""
    row_groups, label_counts, footer = [], np.zeros(2, np.int64), footers[number]
    with ExitStack() as stack:
        parquet: pq.ParquetFile | None = None
        for index, stored_rows in enumerate(footer.num_rows):
            columns = selection.columns_to_count(footer.spans[index], footer.untimed[index]) if stored_rows else None
            num_rows = 0 if columns is None else stored_rows
            if columns:
                parquet = parquet or stack.enter_context(open_parquet(file))
                table = parquet.read_row_group(index, columns=list(columns), use_threads=False)
                (rows,) = table.combine_chunks().to_batches()
                place = Place(str(file), index)
                kept = selection.mask(rows, file, place)
                num_rows = int(kept.sum())
                if selection.samples:
                    label = selection.schema.label
                    labels = read_labels(rows.column(label), label, place)
                    label_counts += np.bincount(labels[kept].astype(np.int64), minlength=2)
            if num_rows:
                row_groups.append(RowGroup(number, index, num_rows, stored_rows))
    return row_groups, label_counts
