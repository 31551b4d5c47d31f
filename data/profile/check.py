"""All faults of Parquet files against a schema: from footers alone, or of every value.

Training stops at the first fault; here they are collected, one for each file, row group and column.
"""

import json
import math
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.engine import run_tasks, write_result
from data.errors import InputError, first_line
from data.profile.units import ALONE, PIECE_CELLS, Unit, Work, require_mark, results_folder, units_of, unreadable
from data.reading.column_types import column_faults
from data.reading.columns import Place
from data.reading.encode import Encoder, read_groups
from data.reading.numbers import read_labels
from data.reading.row_groups import columns_of_leaves, prove, stored_rows
from data.reading.storage import DAMAGE, DataFile, open_parquet
from data.schema import Schema, schema_to_toml

WHOLE_FILE = -1
FOOTER_THREADS = 8  # small reads, which mostly wait


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong."""

    file: str  # as the user knows it
    row_group: int  # or WHOLE_FILE
    column: str  # the Parquet column, or empty
    message: str  # what was found, what was wanted and how to fix it; of the first faulty row


@dataclass
class CheckReport:
    """What a check saw. Empty files, which have no rows, are no fault."""

    faults: list[Fault] = field(default_factory=list)  # at most as many as were asked for
    num_faults: int = 0  # all of them
    num_files: int = 0
    num_row_groups: int = 0
    num_rows: int = 0
    empty_files: int = 0
    labels: set[float] = field(default_factory=set, compare=False)  # that were seen; NaN where statistics do not tell

    def add(self, faults: Sequence[Fault], max_faults: int) -> None:
        """Take in faults; those above `max_faults` are only counted."""
        self.num_faults += len(faults)
        self.faults += faults[: max(0, max_faults - len(self.faults))]


@dataclass(frozen=True)
class _Footer:
    file: DataFile
    row_groups: list[int]  # rows of each
    columns: list[str]  # those of the schema that can be decoded
    faults: list[Fault]
    is_empty: bool = False
    labels: frozenset[float] = frozenset((math.nan,))  # by statistics; NaN: not told


def check_files(
    files: Sequence[DataFile], schema: Schema, *, full: bool = False, max_faults: int = 100, work: Work = ALONE
) -> CheckReport:
    """Check Parquet files against a schema by an engine's tasks; InputError if `full` and it still says "fit", or a vocabulary cannot be read.

    Footers tell missing columns, wrong types, and ids and labels out of range; `full` reads every value. Faults above `max_faults` are only counted.
    """
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        footers = list(pool.map(partial(_read_footer, schema, _ranges(schema)), files))
    report = CheckReport(num_files=len(files))
    for footer in footers:
        report.num_row_groups += len(footer.row_groups)
        report.num_rows += sum(footer.row_groups)
        report.empty_files += footer.is_empty
        report.labels |= footer.labels
        report.add(footer.faults, max_faults)
    if not full:
        return report
    report.labels.clear()
    reported = {(fault.file, fault.row_group, fault.column) for footer in footers for fault in footer.faults}
    columns = {footer.file: footer.columns for footer in footers if footer.row_groups}
    Encoder(schema)  # whose faults are the schema's
    with tempfile.TemporaryDirectory() as own:
        # the other hosts see the folder in which the command was given
        place = Path(own) if work.engine.name == "local" else Path.cwd()
        with results_folder(place / "check", work.engine, schema_to_toml(schema)) as folder:
            tasks = {}
            for unit in units_of(list(columns)):
                path = folder / f"{unit.key()}.json"
                tasks[path] = CheckUnit(path, schema, unit, {span.file: columns[span.file] for span in unit.spans})
            done = 0
            for path in run_tasks(work.engine, check_unit, tasks, last=True):
                done += tasks[path].unit.rows
                work.progress(done)
            for path in tasks if work.engine.is_first else ():
                found = json.loads(path.read_text(encoding="utf-8"))
                report.labels |= set(found["labels"])
                faults = [Fault(*fault) for fault in found["faults"]]
                new = [each for each in faults if (each.file, each.row_group, each.column) not in reported]
                report.add(new, max_faults)
    return report


class CheckUnit(NamedTuple):
    """A task: every value of a unit, its faults and labels written to `path`."""

    path: Path
    schema: Schema
    unit: Unit
    columns: dict[DataFile, list[str]]  # of each file: those of the schema that can be decoded


def check_unit(task: CheckUnit) -> None:
    """Check every value of a unit."""
    labels: set[float] = set()
    checks, faults = _checks(task.schema, labels), []
    for span in task.unit.spans:
        require_mark(span.file, span.mark)
        for group in span.groups:
            faults += _check_row_group(checks, span.file, group, task.columns[span.file])
    found = {"labels": sorted(labels), "faults": [astuple(fault) for fault in faults]}
    with write_result(task.path) as draft:
        draft.write_text(json.dumps(found), encoding="utf-8")


Ranges = dict[str, tuple[str, int]]


def _ranges(schema: Schema) -> Ranges:
    """Column -> whose values it holds, and the highest from 0 that may stand in it, where a value outside is an error."""
    ranges = {each: (f"label {each!r}", 1) for each in schema.labels}
    for feature in schema.features:
        if feature.is_keyed and feature.encoding == "ids" and feature.on_invalid == "error":
            column, high = feature.source_column, schema.table_of[feature.name].num_embeddings - 1
            if column not in ranges or high < ranges[column][1]:
                ranges[column] = (f"field {feature.name!r}", high)
    return ranges


def _read_footer(schema: Schema, ranges: Ranges, file: DataFile) -> _Footer:
    try:
        with open_parquet(file, pre_buffer=True) as parquet:
            arrow_schema, metadata = parquet.schema_arrow, parquet.metadata
            prove(parquet, range(metadata.num_row_groups), [each for each in ranges if each in arrow_schema.names])
    except DAMAGE as error:
        message = f"not a readable Parquet file ({first_line(error)}); write it again or remove it"
        return _Footer(file, [], [], [Fault(str(file), WHOLE_FILE, "", message)])
    broken: dict[str, str] = {}
    for column, message in column_faults(arrow_schema, schema):
        broken.setdefault(column, message)
    found = [(WHOLE_FILE, *fault) for fault in broken.items()]
    found += [fault for fault in _out_of_range(metadata, ranges) if fault[1] not in broken]
    rows = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
    names = [name for name in schema.columns if name in arrow_schema.names and name not in broken]
    labels = {end for _, _, ends in _ends(metadata, {schema.label}) for end in ends or (math.nan,)}
    faults = [Fault(str(file), *fault) for fault in found]
    return _Footer(file, rows, names, faults, not sum(rows), frozenset(map(float, labels)))


def _ends(metadata: pq.FileMetaData, names: Collection[str]) -> Iterator[tuple[int, str, tuple[Any, Any] | None]]:
    """Row group, column, and the least and the largest number in it by the statistics; None where they do not tell."""
    wanted = [(index, name) for index, name in enumerate(columns_of_leaves(metadata)) if name in names]
    for number in range(metadata.num_row_groups):
        row_group = metadata.row_group(number)
        for index, name in wanted if row_group.num_rows else ():
            found = row_group.column(index).statistics
            if found is None or not found.has_min_max or not isinstance(found.min, int | float):
                yield number, name, None
            else:
                yield number, name, (found.min, found.max)


def _out_of_range(metadata: pq.FileMetaData, ranges: Ranges) -> Iterator[tuple[int, str, str]]:
    """Row group, column and fault where statistics tell of a value out of range."""
    for number, column, ends in _ends(metadata, ranges.keys()):
        owner, high = ranges[column]
        for value in ends or ():
            if not 0 <= value <= high:
                words = f"statistics tell of {owner} = {value}: wanted 0 to {high}; fix it or the schema"
                yield number, column, words
                break


# source column, the columns needed, what raises InputError on a faulty value
Check = tuple[str, set[str], Callable[[dict[str, pa.Array], Place], object]]


def _checks(schema: Schema, labels: set[float]) -> list[Check]:
    """Each field is encoded alone, so that one's fault hides no other's; `labels` takes up those that are seen."""

    def check_labels(label: str, columns: dict[str, pa.Array], place: Place) -> None:
        found = np.unique(read_labels(columns[label], label, place, nulls=bool(schema.tasks))).tolist()
        labels.update(found if label == schema.label else ())

    checks: list[Check] = [(each, {each}, partial(check_labels, each)) for each in schema.labels]
    for feature in schema.features:
        if feature.is_cross:  # of values that are checked as its fields'
            continue
        used = [*(each for each in schema.features if each.name == feature.beside), feature]  # as long as the other
        own = ((each.name, schema.table_of.get(each.name)) for each in used)
        tables = tuple(replace(table, feature_names=(name,)) for name, table in own if table)
        alone = replace(schema, features=tuple(used), tables=tables, groups={}, group_column="")
        needed = {name for each in used for name in (each.source_column, each.weights) if name}
        checks.append((feature.source_column, needed, Encoder(alone, has_labels=False).encode))
    if group := schema.group_column:
        checks.append((group, {group}, lambda columns, place: read_groups(columns[group], schema, place)))
    return checks


def _check_row_group(checks: list[Check], file: DataFile, group: int, names: list[str]) -> list[Fault]:
    """Decode and encode every value of a file's row group; return the first fault of each column."""
    faults: dict[str, str] = {}
    start, size = 0, max(256, PIECE_CELLS // max(1, len(names)))
    try:
        with open_parquet(file) as parquet:
            for rows in stored_rows(parquet, [group], names, size):
                columns = dict(zip(rows.schema.names, rows.columns, strict=True))
                place = Place(str(file), group, start)
                for column, needed, check in checks:
                    if column in faults or not needed <= columns.keys():
                        continue
                    try:
                        check(columns, place)
                    except InputError as error:
                        faults[column] = str(error).removeprefix(f"{place}, ")
                start += rows.num_rows
    except (OSError, pa.ArrowException):
        for column, message in unreadable(file, group, names):
            faults.setdefault(column, message)
    return [Fault(str(file), group, *fault) for fault in faults.items()]
