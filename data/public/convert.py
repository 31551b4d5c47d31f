"""Logs in CSV, JSON lines, Parquet, Delta or Iceberg -> day-partitioned Parquet with page checksums, a task for each file.

    OUT/ds=2024-05-01/part-00000.parquet ...  OUT/rejects.jsonl  OUT/converted.json

A part is what one file has of a day, its rows in the file's order, so the bytes depend on the files alone.
"""

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import types as pt

from data.engine import HERE, meet, run_tasks
from data.errors import InputError, first_line
from data.profile.scan import as_plain
from data.profile.units import ALONE, BATCH_ROWS, Work, naming, require_mark, results_folder
from data.public.first_types import Source, find_sources, types_of
from data.public.text_rows import FaultyValueError, Form, Reject, TextFile
from data.reading.column_types import check_columns
from data.reading.conditions import HIVE_NULL, HIVE_NULLS, NANOSECONDS, form_of, partition_of, read_instant
from data.reading.fingerprint import mark_files
from data.reading.ids import is_text
from data.reading.row_groups import stored_rows
from data.reading.snapshots import FIELD_ID
from data.reading.storage import open_parquet
from data.schema import Schema, schema_to_toml
from data.whole_folder import earlier_summary, whole_folder

ROW_GROUP_ROWS = 65_536
HELD_BYTES = 512 << 20  # of rows that wait for their day's row group to be full
KEY, DAY = "ds", "@day"  # of the partitions; of the rows that a task holds
NO_DAY = "no day or time"
YEARS = (1980, 2200)  # beyond which a time is taken for a mistake
SUMMARY, REJECTS, FOUND = "converted.json", "rejects.jsonl", "found.json"


class Request(NamedTuple):
    """How files are to be converted."""

    day: str = ""  # the column that tells each row's day; empty: no partitions
    schema: Schema | None = None
    types: Mapping[str, str] = {}  # of columns, by Arrow's names
    form: Form = Form()


class ConvertFile(NamedTuple):
    """A task: one file, whose parts, rejects and what became of its rows go to a folder."""

    folder: Path
    number: int
    source: Source
    types: pa.Schema
    day: str
    form: Form


class Converted(NamedTuple):
    """What a conversion came to."""

    rows: int
    rejected: int
    days: int
    first: str  # of the rejects, in words
    unread: list[str]  # columns of JSON that no file's beginning has


def convert(inputs: Sequence[str], out: str | Path, request: Request, work: Work = ALONE) -> Converted:
    """Convert files; `out` appears when it is complete. Of torchrun's ranks only the first says what came of it.

    InputError if a file cannot be read, the types do not fit the schema, more rows are rejected than kept, or `out` holds something else.
    """
    out, day, engine = Path(out), request.day, work.engine
    sources = find_sources(inputs)
    types = types_of(sources, request.schema, request.types, request.form, {KEY} if day not in ("", KEY) else ())
    if day and day not in types.names:
        raise InputError(f"--day {day}: no such column; the files have {', '.join(types.names)}")
    if request.schema:
        check_columns(types, request.schema, str(sources[0].file))
    marks = mark_files([source.file for source in sources])
    schema = schema_to_toml(request.schema) if request.schema else {}
    facts = [marks, str(types), day, schema, request.form]
    asked = json.loads(json.dumps({"types": str(types), "day": day, "form": request.form, "files": marks}))
    earlier = earlier_summary(out, SUMMARY, "converted log")
    if earlier is not None:
        if {key: earlier.get(key) for key in asked} != asked:
            raise InputError(f"{out}: was converted from other files or otherwise; remove it or choose another")
        return Converted(*(earlier[name] for name in Converted._fields))
    with results_folder(out, HERE if engine.is_first else engine, *facts) as folder:  # the first meets the others here
        tasks, rows = {}, 0
        for number, (source, mark) in enumerate(zip(sources, marks, strict=True)):
            own = folder / f"{number:05d}"
            tasks[own] = ConvertFile(own, number, source._replace(mark=mark), types, day, request.form)
        for own in run_tasks(engine, convert_file, tasks, last=True):
            rows += _found(own)["rows"]
            work.progress(rows)
        if not engine.is_first:
            return Converted(0, 0, 0, "", [])
        meet(engine, folder)  # no rank may still have to find that there is no result yet
        return _joined(list(tasks), folder, out, asked)


def _found(folder: Path) -> dict[str, Any]:
    return json.loads((folder / FOUND).read_text(encoding="utf-8"))


def _joined(results: Sequence[Path], folder: Path, out: Path, asked: dict[str, Any]) -> Converted:
    """Give the parts of all files the name of the result. Those that an earlier start has moved stay where they are."""
    found = [_found(each) for each in results]
    rejected, rows = (sum(each[name] for each in found) for name in ("rejected", "rows"))
    first = next((each["first"] for each in found if each["first"]), "")
    if rejected > rows or not rows:
        shutil.rmtree(folder)
        told = f"{rejected:,} of {rejected + rows:,} rows cannot be read, the first at {first}"
        raise InputError(
            f"{told if rejected else 'the files hold no rows'}; check --delimiter, --names, --type and the schema"
        )
    whole = folder / "whole"
    for part in (part for each in results for part in each.rglob("*.parquet")):
        place = whole / part.relative_to(folder).relative_to(part.relative_to(folder).parts[0])
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(part, place)
    with open(whole / REJECTS, "wb") as joined:
        for each in results:
            joined.write((each / REJECTS).read_bytes())
    days = len({part.parent for part in whole.rglob("*.parquet")})
    made = Converted(rows, rejected, days, first, sorted({name for each in found for name in each["unread"]}))
    (whole / SUMMARY).write_text(json.dumps(asked | made._asdict(), indent=2) + "\n", encoding="utf-8")
    os.replace(whole, out)
    return made


def convert_file(task: ConvertFile) -> None:
    """Write one file's parts, its rejects and what became of its rows."""
    source, types, day = task.source, task.types, task.day
    names = [name for name in types.names if not (name == KEY == day)]
    partition = partition_of(source.file)
    found: dict[str, Any] = {"rows": 0, "rejected": 0, "first": ""}
    unread: set[str] = set()

    def reject(one: Reject) -> None:
        found["rejected"] += 1
        column = f", column {one.column}" if one.column else ""
        found["first"] = found["first"] or f"{one.file}: line {one.line}{column}: {one.value[:80]!r} ({one.reason})"
        rejects.write(json.dumps(one._asdict(), ensure_ascii=False) + "\n")

    def make(table: pa.Table) -> pa.Table:
        unread.update(set(table.column_names) - set(types.names))
        columns = [_column_of(table, field, partition.get(field.name, "")) for field in types]
        return with_day(pa.table(columns, schema=types), day)

    with (
        whole_folder(task.folder) as folder,
        open(folder / REJECTS, "w", encoding="utf-8") as rejects,
        ExitStack() as stack,
    ):
        parts = _Parts(folder, f"part-{task.number:05d}.parquet", stack)
        if source.kind == "parquet":
            tables = parquet_rows(source, types, make)
        else:
            text = TextFile(source.file, task.form)
            # Arrow's reader of JSON would make nulls of those that the file has not
            own = types if text.is_csv else pa.schema([field for field in types if field.name not in partition])
            tables = text.tables(own, reject, make)
        for table in tables:
            found["rows"] += len(table)
            days = table[DAY].to_numpy(zero_copy_only=False) if day else np.zeros(len(table), "datetime64[D]")
            for each in np.unique(days):
                chosen = np.isnat(days) if np.isnat(each) else days == each
                own = table if chosen.all() else table.filter(pa.array(chosen))
                parts.add(f"{KEY}={HIVE_NULL if np.isnat(each) else each}" if day else "", own.select(names))
        parts.end()
        require_mark(source.file, source.mark)
        (folder / FOUND).write_text(json.dumps(found | {"unread": sorted(unread)}), encoding="utf-8")


def _column_of(table: pa.Table, field: pa.Field, folder: str) -> pa.ChunkedArray | pa.Array:
    """The rows' own column; without one what a folder `column=value` on the way to the file says, or nulls."""
    if field.name in table.column_names:
        return table[field.name].cast(field.type)
    if folder in HIVE_NULLS:
        return pa.nulls(len(table), field.type)
    return pa.repeat(pa.scalar(folder).cast(field.type), len(table))


class _Parts:
    """Writes rows to a file for each day, in row groups of ROW_GROUP_ROWS unless they take too much memory."""

    def __init__(self, folder: Path, name: str, stack: ExitStack) -> None:
        self.folder, self.name, self.stack = folder, name, stack
        self.writers: dict[str, pq.ParquetWriter] = {}
        self.held: dict[str, list[pa.Table]] = defaultdict(list)

    def add(self, day: str, rows: pa.Table) -> None:
        self.held[day].append(rows)
        if sum(map(len, self.held[day])) >= ROW_GROUP_ROWS:
            self._write(day, ROW_GROUP_ROWS)
        if sum(table.nbytes for tables in self.held.values() for table in tables) > HELD_BYTES:
            self.end()

    def end(self) -> None:
        for day in list(self.held):
            self._write(day, 1)

    def _write(self, day: str, least: int) -> None:
        """Write row groups of a day until fewer than `least` rows wait."""
        rows = pa.concat_tables(self.held.pop(day))
        if day not in self.writers and len(rows):
            (self.folder / day).mkdir(exist_ok=True)
            path = self.folder / day / self.name
            writer = pq.ParquetWriter(path, rows.schema, compression="zstd", write_page_checksum=True)
            self.writers[day] = self.stack.enter_context(writer)
        while len(rows) >= least:
            self.writers[day].write_table(rows.slice(0, ROW_GROUP_ROWS))
            rows = rows.slice(ROW_GROUP_ROWS)
        if len(rows):
            self.held[day] = [rows]


def parquet_rows(source: Source, types: pa.Schema, make: Callable[[pa.Table], pa.Table]) -> Iterator[pa.Table]:
    """A Parquet file's rows as columns of `types`; InputError if it is damaged, or a value is not of its type, or no day."""
    with naming(source.file), open_parquet(source.file, pre_buffer=True) as parquet:
        numbered = [field for field in parquet.schema_arrow if FIELD_ID in (field.metadata or {})]
        ids = {field.metadata[FIELD_ID]: field.name for field in numbered}
        names = {name: ids.get(number) for name, number in source.field_ids.items()} if ids and source.field_ids else {}
        wanted = {name: names.get(name, name) for name in types.names}
        wanted = {name: own for name, own in wanted.items() if own and own in parquet.schema_arrow.names}
        for group in range(parquet.metadata.num_row_groups):
            for batch in stored_rows(parquet, [group], list(wanted.values()), BATCH_ROWS):
                try:
                    columns = {name: _as_type(batch, own, types.field(name)) for name, own in wanted.items()}
                    # of no column a table would have no rows
                    table = make(pa.table(columns) if columns else pa.Table.from_batches([batch.select([])]))
                except pa.ArrowInvalid as error:
                    words = "fix the file, or name another column or --type"
                    raise InputError(f"{source.file}, row group {group}: {error}; {words}") from None
                yield table


def _as_type(batch: pa.RecordBatch, name: str, field: pa.Field) -> pa.Array:
    column = batch.column(name)
    try:
        return as_plain(column, field.type)
    except pa.ArrowException as error:
        raise pa.ArrowInvalid(f"column {field.name!r}: {column.type} as {field.type}: {first_line(error)}") from None


def with_day(table: pa.Table, column: str) -> pa.Table:
    """Add each row's day, null without one, of dates, times, text or integers as conditions on time take them; FaultyValueError if there is none."""
    if not column:
        return table
    values = table[column]
    days = _days(values, column)
    years = pc.year(days)
    if len(wrong := values.filter(pc.fill_null(pc.or_(pc.less(years, YEARS[0]), pc.greater(years, YEARS[1])), False))):
        raise FaultyValueError(column, wrong[0].as_py(), NO_DAY)
    return table.append_column(DAY, days)


def _days(values: pa.ChunkedArray, column: str) -> pa.ChunkedArray:
    kind = values.type
    if pt.is_integer(kind) and len(known := values.drop_null()):
        # one that is no time, such as 0, does not tell the form
        middle = np.sort(known.to_numpy())[len(known) // 2].item()
        form = form_of(middle)
        if form.digits:
            values, kind = pc.utf8_slice_codeunits(values.cast(pa.string()), 0, 8), pa.string()
        elif form.name:
            days = pc.divide(values.cast(pa.int64()), 86_400 * NANOSECONDS // form.step)
            return days.cast(pa.int32()).cast(pa.date32())
        else:
            raise FaultyValueError(column, middle, NO_DAY)
    if pt.is_timestamp(kind) and kind.tz:  # else Arrow takes the zone's days
        values = values.cast(pa.timestamp(kind.unit))
    with suppress(pa.ArrowInvalid):
        return (values.cast(pa.timestamp("us")) if is_text(kind) else values).cast(pa.date32(), safe=False)
    found: list[int | None] = []
    coded = values.cast(pa.string()).combine_chunks().dictionary_encode()
    for text in coded.dictionary.to_pylist():
        if (instant := read_instant(text)) is None:
            raise FaultyValueError(column, text, NO_DAY)
        found.append(instant.nanoseconds // (86_400 * NANOSECONDS))
    return pa.chunked_array([pa.array(found, pa.int32()).cast(pa.date32()).take(coded.indices)])
