"""Which rows a stream keeps: conditions on partitions and on time (see conditions.py), and sampling by label.

Partitions choose files. Time chooses row groups by their statistics, and rows in those that lie across a bound; `last N` is the first instant
of the last N days that the files hold. As in SQL, a row without a time meets no condition. Whether sampling keeps a row depends on
(seed, file, row group, row) only: neither on the world size, nor on the epoch, nor on which other files there are.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import types as pt

from data.errors import InputError
from data.reading import conditions
from data.reading.columns import Place
from data.reading.conditions import Condition, Form, Instant, form_of, parse_conditions, read_instant
from data.reading.config import StreamOptions
from data.reading.ids import is_text, value_type
from data.reading.keys import counter_keys, uniforms
from data.reading.numbers import read_labels
from data.reading.row_groups import leaves_of
from data.reading.storage import DataFile, path_parts
from data.schema import Schema

FOREVER = 10**40
INT64 = np.iinfo(np.int64)


class Span(NamedTuple):
    """Instants [low, high): of an integer column in its own numbers, of any other in nanoseconds since 1970."""

    low: int
    high: int


class Footer(NamedTuple):
    """What planning needs of one file's footer: by row group, its rows and, with conditions on time, its instants."""

    num_rows: list[int]
    spans: list[Span | None]  # of rows that have a time; None: none has, or no condition is on time
    untimed: list[bool]  # whether rows may lack a time
    time_type: pa.DataType | None


def read_footer(parquet: pq.ParquetFile, time_column: str, file: str) -> Footer:
    """Take what planning needs out of a footer, which must have been proved for the time column (see `data.reading.row_groups.prove`).

    Where the statistics do not tell the instants of a row group (text, int96, none written) its time column is read. `time_column` is empty
    if no condition names it. InputError if the time column is of a type that holds no time, or a text in it is no day or time.
    """
    metadata = parquet.metadata
    indices = range(metadata.num_row_groups)
    num_rows = [metadata.row_group(index).num_rows for index in indices]
    if not time_column:
        return Footer(num_rows, [None] * len(num_rows), [False] * len(num_rows), None)
    kind = parquet.schema_arrow.field(time_column).type
    if pt.is_null(kind):
        return Footer(num_rows, [None] * len(num_rows), [True] * len(num_rows), kind)
    if not (pt.is_integer(kind) or pt.is_timestamp(kind) or pt.is_date(kind) or is_text(value_type(kind))):
        raise InputError(
            f"{file}: time column {time_column!r} is {kind}: conditions on it want integers, timestamps, dates or texts such as "
            "2024-05-25; use partition folders instead"
        )
    stored = metadata.schema.to_arrow_schema().field(time_column).type
    (leaf,) = leaves_of(metadata, [time_column])
    spans: list[Span | None] = []
    untimed = []
    for index in indices:
        statistics = metadata.row_group(index).column(leaf).statistics
        if statistics is not None and statistics.has_min_max and not is_text(value_type(kind)):
            # Python's dates cannot hold nanoseconds: the stored integers can, and are in the unit of the stored type.
            raw = "" if pt.is_integer(stored) else "_raw"
            first, last = (getattr(statistics, end + raw) for end in ("min", "max"))
            spans.append(Span(first * _unit_of(stored), last * _unit_of(stored) + 1))
            untimed.append(not statistics.has_null_count or statistics.null_count > 0)
        else:
            column = parquet.read_row_group(index, columns=[time_column], use_threads=False).column(0)
            instants, valid = _instants(column.combine_chunks(), time_column, Place(file, index))
            times, unit = instants[valid], _unit_of(kind)
            spans.append(Span(int(times.min()) * unit, int(times.max()) * unit + 1) if len(times) else None)
            untimed.append(not valid.all())
    return Footer(num_rows, spans, untimed, kind)


def _unit_of(kind: pa.DataType) -> int:
    """Nanoseconds of one of the numbers by which a type holds time; texts are read in nanoseconds, and integers are numbers of their own."""
    if pt.is_timestamp(kind):
        return conditions.NANOSECONDS // {"s": 1, "ms": 10**3, "us": 10**6, "ns": conditions.NANOSECONDS}[kind.unit]
    return conditions.DAY if pt.is_date32(kind) else 10**6 if pt.is_date64(kind) else 1


def _instants(column: pa.Array, name: str, place: Place) -> tuple[np.ndarray, np.ndarray]:
    """Instants as (n,) int64 in the unit of the column's type, and which rows have one."""
    valid = np.asarray(column.is_valid())
    if is_text(value_type(column.type)):
        return _read_texts(column, name, place), valid
    column = column.fill_null(0) if column.null_count and pt.is_integer(column.type) else column
    whole = column.cast(pa.int32()) if pt.is_date32(column.type) else column
    return np.asarray(pc.fill_null(whole.cast(pa.int64()), 0)), valid


def _read_texts(column: pa.Array, name: str, place: Place) -> np.ndarray:
    coded = column if pt.is_dictionary(column.type) else column.cast(pa.large_string()).dictionary_encode()
    codes = np.asarray(pc.fill_null(coded.indices, 0)).astype(np.int64)
    found: list[Instant | None] = [read_instant(text or "") for text in coded.dictionary.to_pylist()]
    bad = np.asarray([instant is None for instant in found] or [False])[codes] & np.asarray(column.is_valid())
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise InputError(
            f"{place.row(row)}, time column {name!r}: {str(column[row])[:80]!r} is no day or time: wanted texts such as 2024-05-25 or "
            "2024-05-25T12:00; fix the file, or use partition folders"
        )
    return np.asarray([instant.nanoseconds if instant else 0 for instant in found] or [0], np.int64)[codes]


class Selection:
    """Which rows of a row group are kept. `filters`: whether any can be left out at all."""

    def __init__(self, options: StreamOptions, schema: Schema, files: Sequence[DataFile]) -> None:
        self.options, self.schema, self.files = options, schema, files
        asked = (each for text in options.where for each in parse_conditions(text))
        self.conditions = [each for each in asked if each.name == schema.time_column]
        self.wants_null = any(each.operator == conditions.IS_NULL for each in self.conditions)
        self.bounds = [each for each in self.conditions if each.operator != conditions.IS_NULL]
        for each in self.conditions:
            if each.last > 1 and each.operator not in ("<", ">="):
                raise InputError(
                    f"where = {each.text!r}: with `last N` days of a time column wanted < or >=; write {each.name} >= last {each.last}, or "
                    f"add {each.name} < last {each.last - 1} for one day"
                )
        self.samples = options.keep_negatives < 1 or options.drop_positives > 0
        if self.samples:
            schema.require_one_label("data.keep_negatives and data.drop_positives")
        self.filters = self.samples or bool(self.conditions)
        # that `mask` reads
        self.columns = [schema.label] if self.samples else []
        self.columns += [schema.time_column] if self.conditions else []
        self.span, self.holes = Span(-FOREVER, FOREVER), list[Span]()  # kept, but for what != leaves out
        self.now = 0  # of the files' latest row, in nanoseconds

    def fix_span(self, footers: Sequence[Footer]) -> None:
        """Turn the conditions on time into instants, by the time column's type and the files' instants; InputError if a bound is of another form."""
        if not self.conditions:
            return
        typed = [each for each in zip(self.files, footers, strict=True) if any(each[1].spans)]
        if not typed:
            return  # no row has a time
        first = typed[0][1].time_type
        integers = pt.is_integer(first)
        for file, footer in typed:
            if pt.is_integer(footer.time_type) != integers:
                raise InputError(
                    f"{file}: time column {self.schema.time_column!r} is {footer.time_type}, but {first} in {typed[0][0]}; "
                    "write all files with one type"
                )
        latest = max(span.high - 1 for _, footer in typed for span in footer.spans if span is not None)
        self.now = latest
        if integers:
            self._check_forms(typed, form_of(latest))
            now = _instant_of_integer(latest)
            self.now = now.nanoseconds if now else 0
        bounds = [each for each in self.bounds if each.operator != conditions.IS_NOT_NULL]
        spans = [_span_of_integers(each, latest) if integers else _span_of_times(each, latest) for each in bounds]
        for condition, span in zip(bounds, spans, strict=True):
            if condition.operator in ("!=", "<>"):
                self.holes.append(span)
            else:
                self.span = Span(max(span.low, self.span.low), min(span.high, self.span.high))

    def dated(self) -> tuple[str, ...]:
        """The conditions on time, each by itself, with the day that `last N` of these files is; after `fix_span`."""
        day = self.now // conditions.DAY + 1
        return tuple(
            each.own.removesuffix(each.bound) + str(np.datetime64(day - each.last, "D")) if each.last else each.own
            for each in self.conditions
        )

    def _check_forms(self, typed: Sequence[tuple[DataFile, Footer]], form: Form) -> None:
        """Refuse integers that count time otherwise than the latest does; small ones, such as 0 and -1, stand for no time."""
        for file, footer in typed:
            for end in (end for span in footer.spans if span for end in (span.low, span.high - 1)):
                if form_of(end).name not in ("", form.name):
                    raise InputError(
                        f"{file}: time column {self.schema.time_column!r} holds {end}, which looks like {form_of(end).name}, and larger ones "
                        f"of these files like {form.name or 'no time'}; write all of them in one unit"
                    )

    def columns_to_count(self, stored: Span | None, untimed: bool) -> tuple[str, ...] | None:
        """Columns that must be read to know which rows of a row group are kept: () if all are, None if none is."""
        needed = list(self.columns)
        if self.wants_null and not untimed:
            return None
        if self.wants_null and stored is None and not self.bounds:
            needed.remove(self.schema.time_column)
        if self.bounds:
            if stored is None or stored.high <= self.span.low or stored.low >= self.span.high:
                return None
            cut = any(hole.low < stored.high and stored.low < hole.high for hole in self.holes)
            if self.span.low <= stored.low and stored.high <= self.span.high and not cut and not untimed:
                needed.remove(self.schema.time_column)
        return tuple(needed)

    def mask(self, rows: pa.RecordBatch, file: DataFile, place: Place) -> np.ndarray:
        """Which rows are kept: (n,) bool. Uses the label and the time column, where the options need them and the batch has them."""
        kept = np.ones(rows.num_rows, bool)
        if self.conditions and self.schema.time_column in rows.schema.names:
            column = rows.column(self.schema.time_column)
            instants, timed = _instants(column, self.schema.time_column, place)
            unit = _unit_of(column.type)
            kept &= ~timed if self.wants_null else True
            kept &= timed & _within(instants, self.span, unit) if self.bounds else True
            for hole in self.holes:
                kept &= ~_within(instants, hole, unit)
        if self.samples:
            labels = read_labels(rows.column(self.schema.label), self.schema.label, place)
            counter = np.arange(place.first_row, place.first_row + rows.num_rows)
            tag = "/".join(["sampling", *path_parts(file)[-2:], str(place.row_group)])
            draws, options = uniforms(counter_keys(self.options.seed, tag, counter)), self.options
            kept &= np.where(labels == 1, draws >= options.drop_positives, draws < options.keep_negatives)
        return kept


def _within(instants: np.ndarray, span: Span, unit: int) -> np.ndarray:
    """Which instants, in units of so many nanoseconds, a span holds."""
    low, high = (min(max(-(-end // unit), INT64.min), INT64.max) for end in span)
    return (instants >= low) & (instants < high)


def _instant_of(condition: Condition, latest: int) -> Instant | None:
    """The day or time that a bound names; of `last N` the N-th last day before `latest`, in nanoseconds. None if it names none."""
    if condition.last:
        return Instant((latest // conditions.DAY + 1 - condition.last) * conditions.DAY, conditions.DAY)
    return read_instant(condition.bound)


def _instant_of_integer(number: int) -> Instant | None:
    """What an integer of a time column stands for, by its form; None if it is no day of any calendar."""
    form = form_of(number)
    return read_instant(str(number)) if form.digits else Instant(number * form.step, 1)


def _span_of_times(condition: Condition, latest: int) -> Span:
    """Instants that one condition allows, in nanoseconds. `latest`: that the files hold."""
    instant = _instant_of(condition, latest)
    if instant is None:
        raise InputError(
            f"where = {condition.text!r}: {condition.bound!r} is no day or time; write a day such as 2024-05-25, a time such as "
            "2024-05-25T12:00, or `last N`"
        )
    return _span(condition, instant.nanoseconds, instant.nanoseconds + instant.length)


def _span_of_integers(condition: Condition, latest: int) -> Span:
    """Instants that one condition allows, in the numbers of the column. `latest`: the largest that the files hold, which tells their unit."""
    form, where = form_of(latest), f"where = {condition.text!r}"
    holds = f"time column {condition.name!r} holds integers up to {latest}" + (f" ({form.name})" if form.name else "")
    if condition.last and not form.name:
        raise InputError(f"{where}: {holds}, which are no times: `last N` cannot be told; bound by an integer")
    number = int(condition.bound) if conditions.INTEGER.fullmatch(condition.bound) else None
    if number is not None and (not number or form_of(number) == form):
        return _span(condition, number, number + 1)
    now = _instant_of_integer(latest)
    instant = _instant_of(condition, now.nanoseconds) if form.name and now else None
    # a day as an integer is the whole day: a time in it lies on neither side
    if instant is None or (form.digits and instant.nanoseconds % form.step and not condition.last):
        wanted = "a day such as 2024-05-25" if form.name else "an integer of their form"
        raise InputError(f"{where}: {holds}, and {condition.bound!r} is nothing to compare them with; write {wanted}")
    first, last = instant.nanoseconds, instant.nanoseconds + instant.length
    return _span(condition, form.first_from(first), form.first_from(last))


def _span(condition: Condition, first: int, last: int) -> Span:
    """What an operator allows, or != leaves out, compared with the instants [first, last) of a bound."""
    spans = {"<": (-FOREVER, first), "<=": (-FOREVER, last), ">": (last, FOREVER), ">=": (first, FOREVER)}
    return Span(*spans.get(condition.operator, (first, last)))
