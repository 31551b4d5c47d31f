"""Which rows a stream keeps: conditions on partitions and on time, and sampling by label.

A condition is `NAME OP BOUND`. NAME is the key of a partition folder (`ds` in `ds=2024-05-01/`) or the schema's time column; OP is
one of = != < <= > >= (!= for partitions only); BOUND is a value, a day such as 2024-05-25 (in UTC), or `last N`: the N-th last
partition, or the first instant of the last N days that the files hold. So the last seven days held out:

    train  where = ["ds < last 7"]         or  ["timestamp < last 7"]
    valid  where = ["ds >= last 7"]        or  ["timestamp >= last 7"]

Partitions choose files. Time chooses row groups by their statistics, and rows in those that lie across a bound. Whether sampling keeps a
row depends on (seed, file, row group, row) only: neither on the world size, nor on the epoch, nor on which other files there are.
"""

import datetime
import operator
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import types as pt

from data.errors import InputError
from data.reading.checksums import leaves_of
from data.reading.config import StreamOptions
from data.reading.encode import Place, read_labels
from data.reading.hashed import keys, uniforms
from data.reading.keys import is_valid
from data.reading.storage import DataFile, path_parts
from data.schema import Schema

CONDITION = re.compile(r"^\s*([^\s<>=!]+)\s*(<=|>=|!=|<|>|=)\s*(.+?)\s*$")
OPERATORS = {
    "=": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
SECONDS_OF_A_DAY = 86_400
FOREVER = 2**63 - 1


class Condition(NamedTuple):
    """One condition, as written and taken apart; `last`: N of `last N`, or 0."""

    text: str
    name: str
    operator: str
    bound: str
    last: int


class Span(NamedTuple):
    """Instants [low, high) in the unit of the time column."""

    low: int
    high: int


def parse_condition(text: str) -> Condition:
    """Take a condition apart.

    Raises:
        InputError: it is not of the form NAME OP BOUND.
    """
    match = CONDITION.match(text)
    if not match:
        raise InputError(f"where = {text!r}: wanted NAME OP BOUND, for example 'ds < last 7'; write it so")
    name, sign, bound = match.groups()
    last = re.fullmatch(r"last\s+(\d+)", bound)
    return Condition(text, name, sign, bound, int(last.group(1)) if last else 0)


def partition_of(file: DataFile) -> dict[str, str]:
    """The `key=value` folders on the way to a file."""
    return dict(part.split("=", 1) for part in path_parts(file)[:-1] if "=" in part)


def select_files(files: Sequence[DataFile], where: Sequence[str], schema: Schema) -> list[DataFile]:
    """Keep the files whose partitions meet the conditions.

    Raises:
        InputError: a condition is malformed, names nothing known, or leaves no file.
    """
    kept = list(files)
    partitions = {file: partition_of(file) for file in files}
    for condition in map(parse_condition, where):
        if condition.name == schema.time_column:
            continue
        missing = [file for file in files if condition.name not in partitions[file]]
        if missing:
            known = sorted({key for values in partitions.values() for key in values})
            known += [schema.time_column] if schema.time_column else []
            raise InputError(
                f"where = {condition.text!r}: {missing[0]} lies in no folder {condition.name}=..., and it is not the schema's "
                f"time_column; known here: {', '.join(known) or 'nothing'}"
            )
        values = sorted({partitions[file][condition.name] for file in files}, key=_sort_key)
        bound = condition.bound
        if condition.last:
            if condition.last > len(values):
                raise InputError(
                    f"where = {condition.text!r}: the files have {len(values)} values of {condition.name}; lower the number"
                )
            bound = values[-condition.last]
        meets = OPERATORS[condition.operator]
        kept = [file for file in kept if meets(_sort_key(partitions[file][condition.name]), _sort_key(bound))]
    if not kept:
        raise InputError(
            f"where = {list(where)}: none of {len(files)} files is left; the first is {files[0]}; change the conditions"
        )
    return kept


def _sort_key(value: str) -> tuple[bool, int, str]:
    whole = value.lstrip("-").isdigit()
    return (not whole, int(value) if whole else 0, value)


class Footer(NamedTuple):
    """What planning needs of one file's footer: by row group, its rows and, with conditions on time, its instants."""

    num_rows: list[int]
    spans: list[Span | None]
    time_type: pa.DataType | None


def read_footer(metadata: pq.FileMetaData, time_column: str) -> Footer:
    """Take what planning needs out of a footer, which must have been proved for the time column (see `data.reading.files.prove`).

    `time_column` is empty if no condition names it.
    """
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    num_rows = [group.num_rows for group in groups]
    if not time_column:
        return Footer(num_rows, [None] * len(groups), None)
    kind = metadata.schema.to_arrow_schema().field(time_column).type
    (leaf,) = leaves_of(metadata, [time_column])
    return Footer(num_rows, [_stored_span(group.column(leaf), kind) for group in groups], kind)


def _stored_span(column: pq.ColumnChunkMetaData, kind: pa.DataType) -> Span | None:
    """The instants of one row group from its statistics; None where it has none."""
    statistics = column.statistics
    if statistics is None or not statistics.has_min_max:
        return None
    # Python's dates cannot hold nanoseconds: the stored integers can, and are in the unit of the type.
    if pt.is_integer(kind):
        return Span(statistics.min, statistics.max + 1)
    return Span(statistics.min_raw, statistics.max_raw + 1)


class Selection:
    """Which rows of a row group are kept. `filters`: whether any can be left out at all."""

    def __init__(self, options: StreamOptions, schema: Schema, files: Sequence[DataFile]) -> None:
        self.options, self.schema, self.files = options, schema, files
        conditions = map(parse_condition, options.where)
        self.conditions = [each for each in conditions if each.name == schema.time_column]
        self.samples = options.keep_negatives < 1 or options.drop_positives > 0
        self.filters = self.samples or bool(self.conditions)
        # that `mask` reads
        self.columns = [schema.label] if self.samples else []
        self.columns += [schema.time_column] if self.conditions else []
        self.span, self.time_type = Span(-FOREVER, FOREVER), pa.int64()

    def fix_span(self, footers: Sequence[Footer]) -> None:
        """Turn the conditions on time into instants, by the time column's type and the files' statistics.

        Raises:
            InputError: a bound cannot be read as an instant of the time column's type.
        """
        if not self.conditions:
            return
        kind = footers[0].time_type
        for file, footer in zip(self.files, footers, strict=True):
            if footer.time_type != kind:
                raise InputError(
                    f"{file}: time column {self.schema.time_column!r} is {footer.time_type}, but {kind} in {self.files[0]}; "
                    "write all files with one type"
                )
        relative = any(each.last or not each.bound.lstrip("-").isdigit() for each in self.conditions)
        latest = self._latest(footers) if relative else None
        low, high = -FOREVER, FOREVER
        for condition in self.conditions:
            span = _span_of(condition, kind, latest, str(self.files[0]))
            low, high = max(low, span.low), min(high, span.high)
        self.span, self.time_type = Span(low, high), kind

    def _latest(self, footers: Sequence[Footer]) -> int:
        latest = -FOREVER
        for file, footer in zip(self.files, footers, strict=True):
            for index, (rows, span) in enumerate(zip(footer.num_rows, footer.spans, strict=True)):
                if rows and span is None:
                    raise InputError(
                        f"{file}: row group {index} has no statistics of the time column {self.schema.time_column!r}, which a bound "
                        "relative to the last day or given as a day needs; write statistics, or bound by a plain value"
                    )
                if rows and span:
                    latest = max(latest, span.high - 1)
        return latest

    def columns_to_count(self, stored: Span | None) -> tuple[str, ...] | None:
        """Columns that must be read to know which rows of a row group are kept: () if all are, None if none is."""
        needed = list(self.columns)
        if self.conditions and stored:
            if stored.high <= self.span.low or stored.low >= self.span.high:
                return None
            if self.span.low <= stored.low and stored.high <= self.span.high:
                needed.remove(self.schema.time_column)
        return tuple(needed)

    def mask(self, rows: pa.RecordBatch, file: DataFile, place: Place) -> np.ndarray:
        """Which rows are kept: (n,) bool. Uses the label and the time column, where the options need them and the batch has them."""
        kept = np.ones(rows.num_rows, bool)
        if self.conditions and self.schema.time_column in rows.schema.names:
            column = rows.column(self.schema.time_column)
            if column.null_count:
                row = int(np.flatnonzero(~is_valid(column))[0])
                raise InputError(
                    f"{place.row(row)}, time column {self.schema.time_column!r} is null: it cannot be compared with where = "
                    f"{[condition.text for condition in self.conditions]}; fix the file"
                )
            instants = _instants(column, self.time_type)
            kept &= (instants >= self.span.low) & (instants < self.span.high)
        if self.samples:
            labels = read_labels(rows.column(self.schema.label), self.schema.label, place)
            counter = np.arange(place.first_row, place.first_row + rows.num_rows)
            tag = "/".join(["sampling", *path_parts(file)[-2:], str(place.row_group)])
            draws, options = uniforms(keys(self.options.seed, tag, counter)), self.options
            kept &= np.where(labels == 1, draws >= options.drop_positives, draws < options.keep_negatives)
        return kept


def _instants(column: pa.Array, kind: pa.DataType) -> np.ndarray:
    """Instants as int64 in the unit of `kind`."""
    column = column.cast(kind)
    if pt.is_date32(kind):
        column = column.cast(pa.int32())
    return column.cast(pa.int64()).to_numpy(zero_copy_only=False)


def _units_of_a_day(kind: pa.DataType, latest: int | None) -> int:
    if pt.is_date32(kind):
        return 1
    if pt.is_date64(kind):
        return SECONDS_OF_A_DAY * 10**3
    if pt.is_timestamp(kind):
        return SECONDS_OF_A_DAY * {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[kind.unit]
    # integers since 1970: their size tells the unit (until the year 5138)
    size = abs(latest or 0)
    scale = 1 if size < 10**11 else 10**3 if size < 10**14 else 10**6 if size < 10**17 else 10**9
    return SECONDS_OF_A_DAY * scale


def _span_of(condition: Condition, kind: pa.DataType | None, latest: int | None, file: str) -> Span:
    """The instants that one condition on time allows."""
    if kind is None or not (pt.is_integer(kind) or pt.is_timestamp(kind) or pt.is_date(kind)):
        raise InputError(
            f"{file}: time column {condition.name!r} is {kind}: where = {condition.text!r} wants integers, timestamps or dates; "
            "use partition folders instead"
        )
    if condition.operator == "!=":
        raise InputError(f"where = {condition.text!r}: != is for partitions only; use < and >")
    day = _units_of_a_day(kind, latest)
    if condition.last:
        first = ((latest or 0) // day + 1 - condition.last) * day
        last = first + (1 if condition.operator in ("<", ">=") else condition.last * day)
    else:
        first, last = _interval(condition, kind, day)
    return {
        "=": Span(first, last),
        "<": Span(-FOREVER, first),
        "<=": Span(-FOREVER, last),
        ">": Span(last, FOREVER),
        ">=": Span(first, FOREVER),
    }[condition.operator]


def _interval(condition: Condition, kind: pa.DataType, day: int) -> tuple[int, int]:
    """The instants that a bound names: one unit for a number or a time of day, all of a day for a day."""
    if pt.is_integer(kind) and condition.bound.lstrip("-").isdigit():
        return int(condition.bound), int(condition.bound) + 1
    try:
        instant = datetime.datetime.fromisoformat(condition.bound)
    except ValueError:
        raise InputError(
            f"where = {condition.text!r}: {condition.bound!r} is not an instant of a column of {kind}; write a day such as 2024-05-25, "
            "a time such as 2024-05-25T12:00, or `last N`"
        ) from None
    if instant.tzinfo is None:
        instant = instant.replace(tzinfo=datetime.UTC)
    microseconds = round(instant.timestamp() * 10**6)
    first = microseconds * day // (SECONDS_OF_A_DAY * 10**6)
    return first, first + (day if len(condition.bound) == len("2024-05-25") else 1)
