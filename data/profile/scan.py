"""One pass over Parquet files in bounded memory: what each column holds.

Counts, ranges and distinct values are of every row read; quantiles and what a column says about the label come from a
row sample of fixed size. Rows are read in pieces, so memory depends on the number of columns and not on the number of rows.
"""

import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types as pt

from data.engine import run_tasks, write_result
from data.errors import InputError, first_line
from data.profile import units
from data.reading.column_types import is_list, is_number
from data.reading.fingerprint import mark_files
from data.reading.ids import WHOLE_BITS, as_ids, is_text
from data.reading.keys import hash_values
from data.reading.storage import DataFile, open_parquet

PIECE_CELLS = 4_000_000  # rows x columns read at a time
UNIT_CELLS = 2**25  # rows x columns that a task reads, at least one row group
ADDED = ("rows", "nulls", "values", "bad", "nan")  # what a profile counts
HASH = ".row hash"  # beside the columns of a unit's sample
SAMPLE_CELLS = 8_000_000  # rows x columns of the row sample
MAX_SAMPLE_ROWS = 50_000
MAX_TYPE_WORDS = 80  # letters of a type in a message: those of structs have no end
HASH_SPAN = 2.0**64
SPREAD = 64  # a sample is taken from at least so many row groups, if there are so many


class Distinct:
    """The `size` = k smallest hashes seen, of 8 bytes each, in any order or grouping (k minimum values; Bar-Yossef et al., 2002).

    Below k distinct values the count is exact, else (k - 1) / U_(k), U_(k) the k-th smallest hash as a share of the hash range, with a standard
    error of about 1 / sqrt(k - 2): 1.6 % for k = 4096.
    """

    def __init__(self, size: int = 4096) -> None:
        self.size = size
        self._smallest = np.zeros(0, np.uint64)  # ascending, no repeats
        self._new: list[np.ndarray] = []  # which are taken in together: each time costs as much as sorting all
        self._num_new = 0

    def add(self, hashes: np.ndarray) -> None:
        """Take in 64-bit hashes, uint64, of any number of values, with repeats."""
        if len(self._smallest) == self.size:
            hashes = hashes[hashes < self._smallest[-1]]  # most of a long column leaves here
        self._new.append(hashes)
        self._num_new += len(hashes)
        if self._num_new > self.size // 4:
            self._merge()

    def _merge(self) -> None:
        if self._new:
            # np.unique's hash table takes a hundred times longer
            hashes = np.sort(np.concatenate([self._smallest, *self._new]))
            self._smallest = hashes[np.append(hashes[1:] != hashes[:-1], True)[: len(hashes)]][: self.size]
        self._new, self._num_new = [], 0

    @property
    def smallest(self) -> np.ndarray:
        """The hashes kept, ascending, no repeats."""
        self._merge()
        return self._smallest

    @property
    def is_exact(self) -> bool:
        """Whether every distinct hash is kept."""
        return len(self.smallest) < self.size

    def estimate(self) -> int:
        """Number of distinct values."""
        if self.is_exact:
            return len(self.smallest)
        return round((self.size - 1) / ((float(self.smallest[-1]) + 1.0) / HASH_SPAN))


@dataclass
class ColumnProfile:
    """What one column holds."""

    name: str
    kind: pa.DataType  # as `joined_type` gives it: of a list column the list's
    largest_id: float = 2.0**53  # up to which each file's type of floats holds every integer
    rows: int = 0  # rows read
    nulls: int = 0  # rows that are null
    values: int = 0  # ids or numbers that are not null: of a list column those inside the lists
    bad: int = 0  # values that are NaN, infinite, or beyond float32
    nan: int = 0  # of these, NaN
    low: float | None = None  # of the other numbers
    high: float | None = None
    is_integral: bool = True  # whether every number but NaN is an integer, in decimals one of 64 bits
    distinct: Distinct = field(default_factory=Distinct)  # values
    min_length: int | None = None  # of the lists that are not null
    max_length: int = 0

    def facts(self) -> dict[str, Any]:
        """What was counted, for JSON."""
        names = (*ADDED, "low", "high", "is_integral", "min_length", "max_length")
        return {name: getattr(self, name) for name in names} | {"hashes": self.distinct.smallest.tolist()}

    def join(self, facts: Mapping[str, Any]) -> None:
        """Take in what another has counted of other rows."""
        for name in ADDED:
            setattr(self, name, getattr(self, name) + facts[name])
        ends = {"low": min, "high": max, "min_length": min, "max_length": max, "is_integral": min}
        for name, choose in ends.items():
            both = [value for value in (getattr(self, name), facts[name]) if value is not None]
            setattr(self, name, choose(both, default=None))
        self.distinct.add(np.asarray(facts["hashes"], np.uint64))

    @property
    def is_list(self) -> bool:
        """Whether a row holds several values."""
        return is_list(self.kind)

    @property
    def item(self) -> pa.DataType:
        """Type of one value."""
        return self.kind.value_type if self.is_list else self.kind

    @property
    def null_share(self) -> float:
        """Nulls among the rows."""
        return self.nulls / self.rows if self.rows else 0.0

    @property
    def mean_length(self) -> float:
        """Values per row, the pooling factor."""
        return self.values / self.rows if self.rows else 0.0

    def add(self, column: pa.Array) -> None:
        """Take in a piece of the column."""
        self.rows += len(column)
        self.nulls += column.null_count
        values = column
        if self.is_list:
            lengths = pc.min_max(pc.list_value_length(column)).as_py()
            if lengths["min"] is not None:
                least = lengths["min"] if self.min_length is None else self.min_length
                self.min_length = min(lengths["min"], least)
                self.max_length = max(self.max_length, lengths["max"])
            values = column.flatten()
        values = values.drop_null()
        self.values += len(values)
        if not len(values):
            return
        if is_number(self.item):
            self._add_numbers(values)
        elif is_text(self.item):
            self.distinct.add(hash_values(values))

    def _add_numbers(self, values: pa.Array) -> None:
        if pt.is_decimal(values.type):
            ids, beyond = as_ids(values, "")
            self.is_integral &= beyond is None
            values = ids if beyond is None else values
        if pt.is_integer(values.type):
            numbers = values.to_numpy(zero_copy_only=False)
            self.distinct.add(hash_values(values))
        else:
            numbers = values.cast(pa.float64()).to_numpy(zero_copy_only=False)
            is_nan, is_good = np.isnan(numbers), np.abs(numbers) <= units.LARGEST_FLOAT32
            self.bad += int((~is_good).sum())
            self.nan += int(is_nan.sum())
            numbers = numbers[is_good] + 0.0  # one zero, not two
            self.is_integral &= bool((numbers == np.floor(numbers)).all() and (is_good | is_nan).all())
            self.distinct.add(hash_values(pa.array(numbers.view(np.int64))))
        if len(numbers):
            self.low = min(float(numbers.min()), float("inf") if self.low is None else self.low)
            self.high = max(float(numbers.max()), float("-inf") if self.high is None else self.high)


@dataclass
class Profile:
    """What the files hold."""

    columns: dict[str, ColumnProfile]  # those that can be a field or have a role, in the files' order
    unfit: dict[str, str]  # any other -> why not
    footers: list[tuple[DataFile, pa.Schema]]  # each schema that a file has, and the first file that has it
    total_rows: int
    num_files: int
    missing: dict[str, int]  # column -> number of files that lack it
    rows: int = 0  # read
    sample: pa.Table = field(default_factory=lambda: pa.table({}))  # every k-th row read


def profile_files(files: Sequence[DataFile], rows: int = 0, work: units.Work = units.ALONE) -> Profile:
    """Profile every column of about `rows` rows spread over all files, or of all if 0; InputError if one cannot be read, or types do not fit."""
    profile, groups = _read_footers(files)
    if not profile.total_rows:
        raise InputError(f"{files[0]} and {len(files) - 1} more files hold no rows; nothing can be inferred")
    schema = pa.schema([(name, column.kind) for name, column in profile.columns.items()])
    sample_rows = max(1_000, min(MAX_SAMPLE_ROWS, SAMPLE_CELLS // max(1, len(schema))))
    tasks = {}
    with (
        tempfile.TemporaryDirectory() as own,
        units.results_folder(work.place or Path(own) / "infer", work.engine, "infer", rows) as folder,
    ):
        for unit in _units(_spread(groups, rows or profile.total_rows), len(schema)):
            path = folder / f"{unit.key(str(schema))}.arrow"
            tasks[path] = ProfileUnit(path, unit, schema, sample_rows)
        for path in run_tasks(work.engine, profile_unit, tasks, last=True):
            profile.rows += tasks[path].unit.rows
            work.progress(profile.rows)
        sample = units.RowSample(sample_rows)
        for path in tasks if work.engine.is_first else ():
            with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as reader:
                part, found = reader.read_all(), json.loads(reader.schema.metadata[b"columns"])
            sample.add(part[HASH].to_numpy(), part.drop_columns([HASH]))
            for name, column in profile.columns.items():
                column.join(found[name])
        profile.sample = sample.rows() if work.engine.is_first else schema.empty_table()
    return profile


class ProfileUnit(NamedTuple):
    """A task: what the columns of some row groups hold, written to `path`."""

    path: Path
    unit: units.Unit
    schema: pa.Schema
    sample_rows: int


def profile_unit(task: ProfileUnit) -> None:
    """Profile every column of a unit, and take a sample of its rows."""
    columns = {name: ColumnProfile(name, kind) for name, kind in zip(task.schema.names, task.schema.types, strict=True)}
    sample = units.RowSample(task.sample_rows)
    piece_rows = max(256, min(65_536, PIECE_CELLS // max(1, len(task.schema))))
    for place, first_row, batch in units.batches_of(task.unit, task.schema.names, piece_rows):
        table = _conform(batch, task.schema, place.file)
        for name, column in columns.items():
            for chunk in table.column(name).chunks:
                column.add(chunk)
        sample.add(units.row_hashes(first_row, table.num_rows), table)
    rows = sample.rows().append_column(HASH, pa.array(sample.hashes))
    found = {name: column.facts() for name, column in columns.items()}
    rows = rows.replace_schema_metadata({"columns": json.dumps(found)})
    with write_result(task.path) as draft, pa.ipc.new_file(str(draft), rows.schema) as writer:
        writer.write_table(rows)


def _units(groups: Sequence[units.Span], columns: int) -> Iterator[units.Unit]:
    held: list[units.Span] = []
    for group in groups:
        held.append(group)
        if sum(each.rows for each in held) * columns >= UNIT_CELLS:
            yield units.Unit(tuple(held))
            held = []
    if held:
        yield units.Unit(tuple(held))


def _read_footers(files: Sequence[DataFile]) -> tuple[Profile, list[units.Span]]:
    """What the footers of all files say together, before any row is read; and the row groups that have rows, a span each."""
    found: dict[pa.Schema, DataFile] = {}
    seen: Counter[str] = Counter()
    groups: list[units.Span] = []
    total = 0
    for file, mark in zip(files, mark_files(files), strict=True):
        with units.naming(file), open_parquet(file) as parquet:
            names, metadata = parquet.schema_arrow.remove_metadata(), parquet.metadata
            counts = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
        found.setdefault(names, file)
        seen.update(set(names.names))
        for index, count in enumerate(counts):
            groups += [units.Span(file, mark, range(index, index + 1), total, count)] if count else []
            total += count
    kinds: dict[str, pa.DataType] = {}
    unfit: dict[str, str] = {}
    largest_id: dict[str, float] = defaultdict(lambda: 2.0**53)
    for schema, file in found.items():
        times = Counter(schema.names)
        for name, kind in zip(schema.names, schema.types, strict=True):
            if times[name] > 1:
                unfit[name] = f"{file} has {times[name]} columns of this name"
            elif (plain := plain_type(kind)) is None:
                unfit[name] = f"{str(kind)[:MAX_TYPE_WORDS]}: no kind of field takes it"
            elif (joined := joined_type(kinds.get(name, plain), plain)) is None:
                unfit[name] = f"{kind} in {file}, {kinds[name]} in another file: write it with one type"
            else:
                kinds[name] = joined
                item = plain.value_type if is_list(plain) else plain
                if pt.is_floating(item):
                    largest_id[name] = min(largest_id[name], 2.0 ** WHOLE_BITS[item.bit_width])
    order = dict.fromkeys(name for schema in found for name in schema.names)
    missing = {name: len(files) - seen[name] for name in order if seen[name] < len(files)}
    columns = {name: ColumnProfile(name, kinds[name], largest_id[name]) for name in order if name not in unfit}
    schemas = [(file, schema) for schema, file in found.items()]
    return Profile(columns, unfit, schemas, total, len(files), missing), groups


def _spread(groups: list[units.Span], rows: int) -> list[units.Span]:
    """Choose row groups evenly, and how many rows of each, so that about `rows` are read."""
    total = sum(group.rows for group in groups)
    if rows >= total:
        return groups
    number = min(len(groups), max(SPREAD, -(-rows * len(groups) // total)))
    chosen = [groups[index * len(groups) // number] for index in range(number)]
    share = -(-rows // number)
    return [group._replace(rows=min(group.rows, share)) for group in chosen]


def _conform(batch: pa.RecordBatch, schema: pa.Schema, file: str) -> pa.Table:
    """Give a batch the columns of the joined schema, and no others."""
    columns = []
    for name, kind in zip(schema.names, schema.types, strict=True):
        column = batch.column(name) if name in batch.schema.names else pa.nulls(batch.num_rows, kind)
        try:
            columns.append(as_plain(column, kind))
        except pa.ArrowException as error:
            raise InputError(
                f"{file}: column {name!r} is {column.type} and cannot be read as {kind} ({first_line(error)}); write it with one type"
            ) from None
    return pa.Table.from_arrays(columns, schema=schema)


ANY_INTEGER = pa.decimal128(38, 0)  # as databases write unsigned ids: of 20 digits
LARGEST_EXACT_DIGITS = 18  # of decimals without a fraction: int64 holds them all


def plain_type(kind: pa.DataType) -> pa.DataType | None:
    """The type without dictionaries and views; decimals are int64, ANY_INTEGER or doubles. None: neither a field nor a role takes it."""
    if pt.is_dictionary(kind):
        return plain_type(kind.value_type)
    if pt.is_string_view(kind):
        return pa.string()
    if pt.is_decimal(kind):
        if kind.scale or kind.precision > ANY_INTEGER.precision:
            return pa.float64()
        return pa.int64() if kind.precision <= LARGEST_EXACT_DIGITS else ANY_INTEGER
    if is_list(kind):
        item = plain_type(kind.value_type)
        is_empty = pt.is_fixed_size_list(kind) and not kind.list_size  # Arrow cannot read these back
        if is_empty or item is None or is_list(item) or pt.is_temporal(item):
            return None
        if pt.is_fixed_size_list(kind):
            return pa.list_(item, kind.list_size)
        is_large = pt.is_large_list(kind) or pt.is_large_list_view(kind)
        return pa.large_list(item) if is_large else pa.list_(item)
    if is_number(kind) or is_text(kind) or pt.is_null(kind) or pt.is_timestamp(kind) or pt.is_date(kind):
        return kind
    return None


def joined_type(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """A plain type that holds the values of two, or None: integers beside text are text, any other numbers together are doubles."""
    if one == other or pt.is_null(other):
        return one
    if pt.is_null(one):
        return other
    if is_list(one) and is_list(other):
        item = joined_type(one.value_type, other.value_type)
        is_large = pt.is_large_list(one) or pt.is_large_list(other)
        return None if item is None else pa.large_list(item) if is_large else pa.list_(item)
    if any(map(is_text, both := (one, other))) and all(is_text(kind) or _is_whole(kind) for kind in both):
        return pa.large_string() if pt.is_large_string(one) or pt.is_large_string(other) else pa.string()
    if is_number(one) and is_number(other):
        if all(pt.is_boolean(kind) or (pt.is_integer(kind) and kind != pa.uint64()) for kind in both):
            return pa.int64()
        return ANY_INTEGER if all(map(_is_whole, both)) else pa.float64()
    if pt.is_timestamp(one) and pt.is_timestamp(other):
        return pa.timestamp("us", one.tz)
    return None


def as_plain(column: pa.Array, kind: pa.DataType) -> pa.Array:
    """The column as a plain type; pa.ArrowException if a value cannot become so. As an integer NaN is missing, and no other value changes."""
    if column.type == kind:
        return column
    if pt.is_floating(column.type) and pt.is_integer(kind):
        column = pc.if_else(pc.is_nan(column), None, column)
    if pt.is_list_view(column.type) or pt.is_large_list_view(column.type):
        # pyarrow 26 casts a view of lists to lists with an offset too few
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]))
        column = pa.LargeListArray.from_arrays(offsets, column.flatten(), mask=column.is_null())
    is_rounded = pt.is_floating(kind.value_type if is_list(kind) else kind)
    return column.cast(options=pc.CastOptions(kind, allow_time_truncate=True, allow_float_truncate=is_rounded))


def _is_whole(kind: pa.DataType) -> bool:
    return pt.is_integer(kind) or kind == ANY_INTEGER
