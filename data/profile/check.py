"""All faults of Parquet files against a schema: from footers alone, or of every value.

Training stops at the first fault; here they are collected, one for each file, row group and column.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.errors import InputError, first_line
from data.reading.column_types import check_columns
from data.reading.encode import Encoder, Place, read_labels
from data.reading.storage import DataFile, open_parquet
from data.schema import Schema
from data.schema.feature import Feature

WHOLE_FILE = -1
PIECE_CELLS = 8_000_000  # rows x columns decoded at a time
FOOTER_THREADS = 8  # small reads, which mostly wait


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong.

    Attributes:
        file: as the user knows it.
        row_group: its number, or WHOLE_FILE.
        column: the Parquet column, or empty.
        message: what was found, what was wanted and how to fix it; of the first faulty row.
    """

    file: str
    row_group: int
    column: str
    message: str


@dataclass
class CheckReport:
    """What a check saw.

    Attributes:
        faults: at most as many as were asked for.
        num_faults: all of them.
        num_rows, num_row_groups, num_files: what was looked at.
        empty_files: files without rows, which are no fault.
    """

    faults: list[Fault] = field(default_factory=list)
    num_faults: int = 0
    num_files: int = 0
    num_row_groups: int = 0
    num_rows: int = 0
    empty_files: int = 0

    def add(self, faults: Sequence[Fault], max_faults: int) -> None:
        """Take in faults; those above `max_faults` are only counted."""
        self.num_faults += len(faults)
        self.faults += faults[: max(0, max_faults - len(self.faults))]


@dataclass
class _Footer:
    """What one file's footer says."""

    file: DataFile
    arrow_schema: pa.Schema | None
    row_groups: list[int]
    faults: list[Fault]


def check_files(
    files: Sequence[DataFile],
    schema: Schema,
    *,
    full: bool = False,
    max_faults: int = 100,
    threads: int = 2,
    progress: Callable[[int], object] | None = None,
) -> CheckReport:
    """Check Parquet files against a schema.

    Footers tell missing columns, wrong types, and ids and labels out of range where the writer left statistics.

    Args:
        files: Parquet files.
        schema: with `full` it must be fitted.
        full: whether to decode and check every value as well.
        max_faults: how many to report; all are counted.
        threads: of the full check.
        progress: called with the number of rows checked so far; with `full` only.

    Raises:
        InputError: `full` and the schema still says "fit", or a vocabulary cannot be read.
    """
    judge = _FooterJudge(schema)
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        footers = list(pool.map(judge.read, files))
    report = CheckReport(num_files=len(files))
    for footer in footers:
        report.num_row_groups += len(footer.row_groups)
        report.num_rows += sum(footer.row_groups)
        report.empty_files += footer.arrow_schema is not None and not sum(footer.row_groups)
        report.add(footer.faults, max_faults)
    if full:
        _check_values(footers, schema, report, max_faults, threads, progress or (lambda done: None))
    return report


def _alone(schema: Schema, *features: Feature) -> Schema:
    """The schema as if it had these fields only."""
    names = tuple(feature.name for feature in features)
    tables = tuple(
        replace(table, feature_names=names) for table in schema.tables if {*names} & {*table.feature_names}
    )
    return replace(schema, features=features, tables=tables, groups={}, group_column="")


class _FooterJudge:
    """Judges footers; files of equal columns are judged once."""

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self.alone = [_alone(schema, feature) for feature in schema.features]
        self.known: list[tuple[pa.Schema, list[tuple[str, str]]]] = []
        # column -> (lowest, highest) value that may stand in it, where a value outside is an error
        self.ranges = {schema.label: (0, 1)}
        for feature in schema.features:
            if feature.is_keyed and feature.encoding == "ids" and feature.on_invalid == "error":
                self.ranges[feature.source_column] = (0, schema.table_of[feature.name].num_embeddings - 1)

    def read(self, file: DataFile) -> _Footer:
        """Read and judge one file's footer."""
        try:
            with open_parquet(file) as parquet:
                arrow_schema, metadata = parquet.schema_arrow.remove_metadata(), parquet.metadata
        except (OSError, pa.ArrowException) as error:
            message = f"not a readable Parquet file ({first_line(error)}); write it again or remove it"
            return _Footer(file, None, [], [Fault(str(file), WHOLE_FILE, "", message)])
        faults = [
            Fault(str(file), WHOLE_FILE, column, message) for column, message in self._judge(arrow_schema)
        ]
        broken = {fault.column for fault in faults}
        rows = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
        faults += [fault for fault in self._out_of_range(str(file), metadata) if fault.column not in broken]
        return _Footer(file, arrow_schema, rows, faults)

    def _judge(self, arrow_schema: pa.Schema) -> list[tuple[str, str]]:
        for known, verdict in self.known:
            if known.equals(arrow_schema):
                return verdict
        verdict = []
        # The label is judged alone; every field, and a grouping column that is no field, beside a label that is right.
        index = arrow_schema.get_field_index(self.schema.label)
        right = pa.field(self.schema.label, pa.int8())
        with_label = arrow_schema.append(right) if index < 0 else arrow_schema.set(index, right)
        label_only, group = _alone(self.schema), self.schema.group_column
        parts = {part.features[0].name: (part.features[0].source_column, part) for part in self.alone}
        if group and group not in {column for column, _ in parts.values()}:
            parts[""] = (group, replace(label_only, group_column=group))
        for column, part in [(self.schema.label, label_only), *parts.values()]:
            try:
                check_columns(arrow_schema if part is label_only else with_label, part, "")
            except InputError as error:
                verdict.append((column, str(error).removeprefix(": ")))
        self.known.append((arrow_schema, verdict))
        return verdict

    def _out_of_range(self, file: str, metadata: pq.FileMetaData) -> Iterator[Fault]:
        leaf_of = {metadata.schema.column(index).path: index for index in range(metadata.num_columns)}
        wanted = [
            (leaf_of[path], column)
            for column in self.ranges
            for path in (column, f"{column}.list.element", f"{column}.list.item")
            if path in leaf_of
        ]
        for number in range(metadata.num_row_groups):
            row_group = metadata.row_group(number)
            for index, column in wanted:
                found = row_group.column(index).statistics
                if found is None or not found.has_min_max or not isinstance(found.min, int | float):
                    continue
                low, high = self.ranges[column]
                value = found.min if found.min < low else found.max
                if not low <= value <= high:
                    words = f"statistics tell of the value {value}: wanted {low} to {high}; fix the file or the schema"
                    yield Fault(file, number, column, words)


def _check_values(
    footers: list[_Footer],
    schema: Schema,
    report: CheckReport,
    max_faults: int,
    threads: int,
    progress: Callable[[int], object],
) -> None:
    encoders = [Encoder(_alone(schema, feature)) for feature in schema.features]
    reported = {(fault.file, fault.row_group, fault.column) for footer in footers for fault in footer.faults}
    # what the footer refused cannot be decoded
    refused = {(file, column) for file, group, column in reported if group == WHOLE_FILE}
    jobs = iter((footer, group) for footer in footers for group, rows in enumerate(footer.row_groups) if rows)
    done = 0
    with ThreadPoolExecutor(threads) as pool:

        def start(job: tuple[_Footer, int]):  # noqa: ANN202
            footer, group = job
            broken = {column for file, column in refused if file == str(footer.file)}
            return pool.submit(_check_row_group, footer, group, schema, encoders, broken)

        running = [start(job) for job in islice(jobs, threads + 1)]
        while running:
            faults, rows = running.pop(0).result()
            running += [start(job) for job in islice(jobs, 1)]
            new = [each for each in faults if (each.file, each.row_group, each.column) not in reported]
            report.add(new, max_faults)
            done += rows
            progress(done)


def _check_row_group(
    footer: _Footer, group: int, schema: Schema, encoders: list[Encoder], broken: set[str]
) -> tuple[list[Fault], int]:
    """Decode and encode every value of a row group. Returns the first fault of each column, and the rows."""
    file = str(footer.file)
    names = [name for name in schema.columns if name not in broken and name in footer.arrow_schema.names]  # type: ignore[union-attr]
    faults: dict[str, Fault] = {}
    try:
        with open_parquet(footer.file) as parquet:
            start, size = 0, max(256, PIECE_CELLS // max(1, len(names)))
            for rows in parquet.iter_batches(size, row_groups=[group], columns=names):
                place = Place(file, group, start)
                for column, message in _faults_of(rows, schema, encoders, place, set(faults)):
                    faults[column] = Fault(file, group, column, message)
                start += rows.num_rows
    except (OSError, pa.ArrowException):
        for column, message in _unreadable(footer.file, group, names):
            faults.setdefault(column, Fault(file, group, column, message))
    return list(faults.values()), footer.row_groups[group]


def _faults_of(
    rows: pa.RecordBatch, schema: Schema, encoders: list[Encoder], place: Place, skip: set[str]
) -> Iterator[tuple[str, str]]:
    """The first fault of each column that is not in `skip`."""
    columns = dict(zip(rows.schema.names, rows.columns, strict=True))

    def fault_of(read: Callable[..., object], *arguments: Any) -> str:
        try:
            read(*arguments)
        except InputError as error:
            return str(error).removeprefix(f"{place.file}: row group {place.row_group}, ")
        return ""

    if schema.label in columns and schema.label not in skip:
        fault = fault_of(read_labels, columns[schema.label], schema.label, place)
        if fault:
            yield schema.label, fault
    good_labels = pa.array(np.zeros(rows.num_rows, np.int8))
    for encoder in encoders:
        feature = encoder.schema.features[0]
        needed = [name for name in (feature.source_column, feature.weights) if name]
        if feature.source_column in skip or any(name not in columns for name in needed):
            continue
        arrays = {name: columns[name] for name in needed} | {schema.label: good_labels}
        if fault := fault_of(encoder.encode, pa.RecordBatch.from_pydict(arrays), place):
            yield feature.source_column, fault


def _unreadable(file: DataFile, group: int, names: list[str]) -> Iterator[tuple[str, str]]:
    """Find the columns of a damaged row group that cannot be decoded."""
    found = False
    for name in names:
        try:
            with open_parquet(file) as parquet:
                parquet.read_row_group(group, columns=[name], use_threads=False)
        except (OSError, pa.ArrowException) as error:
            found = True
            yield name, f"cannot be decoded ({first_line(error)}): the file is damaged; write it again"
    if not found:
        yield "", "could not be read, yet each column alone could: try again"
