"""Exact counts of values in bounded memory: counted unit by unit, split by the hash of the value, and merged one share at a time.

    one unit        value -> count; what is more than HELD_BYTES is written, and counting begins anew
    its result      an Arrow file, a record batch of one row for each owner (a table of the schema) and time of writing, its values in the
                    order of their hashes' first byte; `ends` says where each of these BUCKETS ends
    one merge       the same buckets of all units together: every count is final, rare values go, the rest is sorted
    a vocabulary    merges joined in order, a stretch at a time

The result depends neither on how rows were cut into units nor on who counted or merged them.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types as pt

from data.engine import write_result
from data.errors import InputError
from data.reading.ids import decoded
from data.reading.keys import hash_values

BUCKETS = 256
HELD_BYTES = 32 << 20  # of values and counts that a unit holds; summing them takes several times as much
COUNTED_ROWS = 1 << 18  # values that are counted together
DENSE_SPAN = 4  # integers that lie so close, places for each, are counted in an array of all places
MERGE_ROWS = 4_000_000  # values of all units that a merge takes at once; at least a bucket
TEXT_ROWS = 8  # integers that a merge could take in the place of one text
STRETCH_ROWS = 1 << 20  # of a vocabulary that are sorted together, and of its file's row groups
STEP_ROWS = 1 << 16  # of a merge that a stretch takes whole, or not
KINDS = {"integer": pa.int64(), "unsigned": pa.uint64(), "text": pa.large_string()}
_LISTS = KINDS | {"counts": pa.int64(), "ends": pa.int64(), "moments": pa.float64(), "hashes": pa.uint64()}
_LISTS |= {"numbers": pa.float64()}  # what data/profile/fit.py measures of them, of a unit
RESULT = pa.schema({"owner": pa.string()} | {name: pa.large_list(each) for name, each in _LISTS.items()})  # one row
Order = list[tuple[str, str]]
BY_COUNT: Order = [("count", "descending"), ("value", "ascending")]
BY_VALUE: Order = [("value", "ascending")]
Write = Callable[..., object]  # of an owner and columns of RESULT


def result_writer(path: Path) -> pa.RecordBatchFileWriter:
    """A result to write, row by row with `write_row`."""
    return pa.ipc.new_file(str(path), RESULT)


def write_row(writer: pa.RecordBatchFileWriter, owner: str, **columns: pa.Array | np.ndarray) -> None:
    """Add a row to a result."""
    arrays = [pa.array([owner])]
    for name, kind in zip(RESULT.names[1:], RESULT.types[1:], strict=True):
        if (values := columns.get(name)) is None:
            arrays.append(pa.nulls(1, kind))
        else:
            values = pa.array(values) if isinstance(values, np.ndarray) else values
            ends = pa.array([0, len(values)])
            arrays.append(pa.LargeListArray.from_arrays(ends, values.cast(kind.value_type)))
    writer.write_batch(pa.record_batch(arrays, schema=RESULT))


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, pa.Array]]]:
    """The rows of a result: owner, and what each column that is there holds, without a copy."""
    with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as reader:
        for number in range(reader.num_record_batches):
            row = reader.get_batch(number)
            yield (
                row["owner"][0].as_py(),
                {name: row[name][0].values for name in RESULT.names[1:] if row[name].null_count == 0},
            )


class Counts:
    """How often each value of each owner occurs in a unit."""

    def __init__(self, write: Write, held_bytes: int = HELD_BYTES) -> None:
        self.write_row, self.held_bytes = write, held_bytes
        self.new: dict[str, list[pa.Array]] = {}  # not counted yet
        self.places: dict[str, tuple[int, np.ndarray]] = {}  # the lowest integer, and counts of it and of all above it
        self.held: dict[str, list[pa.Table]] = {}
        self.new_bytes = self.merged_bytes = 0  # of what is held

    def add(self, owner: str, values: pa.Array) -> None:
        """Take in ids (integers or text); nulls are ignored."""
        new = self.new.setdefault(owner, [])
        new.append(decoded(values))
        if owner in self.places or sum(map(len, new)) >= COUNTED_ROWS:
            self._count(owner)

    def _count(self, owner: str) -> None:
        by_type: dict[pa.DataType, list[pa.Array]] = {}
        for values in self.new.pop(owner, ()):
            by_type.setdefault(values.type, []).append(values)
        for kind, arrays in by_type.items():
            values = pa.chunked_array(arrays).drop_null()
            if pt.is_integer(kind):
                numbers = _int64(values.to_numpy())
                if self._placed(owner, numbers):
                    continue
                found, counts = np.unique(numbers, return_counts=True)
                table = pa.table({"value": found, "count": counts})
            else:
                counted = values.value_counts()
                table = pa.table({"value": counted.field(0).cast(pa.large_string()), "count": counted.field(1)})
            self.held.setdefault(owner, []).append(table)
            self.new_bytes += table.nbytes
        # As much new as old: the work then grows with the values and not with the values times the number of merges.
        if self.new_bytes > max(self.held_bytes // 8, self.merged_bytes):
            self.held = {owner: summed(tables) for owner, tables in self.held.items()}
            self.merged_bytes = sum(table.nbytes for tables in self.held.values() for table in tables)
            self.new_bytes = 0
            if self.merged_bytes > self.held_bytes:
                self._write_held()

    def _placed(self, owner: str, numbers: np.ndarray) -> bool:
        """Count integers that lie close together, and so need neither a sort nor a hash table; False, and nothing is done, if they do not."""
        if not len(numbers) or numbers.dtype == np.uint64:
            return not len(numbers)
        low, high = int(numbers.min()), int(numbers.max())
        first, counts = self.places.get(owner, (low, np.zeros(0, np.int64)))
        if not first <= low <= high < first + len(counts):
            low, high = min(low, first), max(high, first + len(counts) - 1)
            size = 1 << (high - low).bit_length()  # twice as many at least when it grows again
            held = sum(each.nbytes for _, each in self.places.values()) - counts.nbytes
            if size > DENSE_SPAN * max(len(numbers), len(counts)) or held + 8 * size > 2 * self.held_bytes:
                return False
            start = first - low if len(counts) else 0
            wider = np.zeros(size, np.int64)
            wider[start : start + len(counts)] = counts
            first, counts = self.places[owner] = low, wider
        np.add.at(counts, numbers - first if first else numbers, 1)
        return True

    def write(self) -> None:
        """Write all that was counted."""
        for owner in list(self.new):
            self._count(owner)
        self._write_held()

    def _write_held(self) -> None:
        for owner, (low, counts) in self.places.items():
            found = np.flatnonzero(counts)
            self.held.setdefault(owner, []).append(pa.table({"value": found + low, "count": counts[found]}))
        for owner, tables in self.held.items():
            for table in summed(tables):
                values = table["value"].combine_chunks()
                bucket = (hash_values(values) >> np.uint64(56)).astype(np.uint8)
                order = pa.array(np.argsort(bucket, kind="stable"))
                ends = np.cumsum(np.bincount(bucket, minlength=BUCKETS))
                counts = table["count"].combine_chunks().take(order)
                self.write_row(owner, **{kind_of(table): values.take(order)}, counts=counts, ends=ends)
        self.places, self.held, self.new_bytes, self.merged_bytes = {}, {}, 0, 0


def _int64(numbers: np.ndarray) -> np.ndarray:
    """Integers as int64, or as uint64 where one is above its range."""
    is_unsigned = numbers.dtype == np.uint64 and len(numbers) and int(numbers.max()) >= 2**63
    return numbers if is_unsigned else numbers.astype(np.int64, copy=False)


def summed(tables: Sequence[pa.Table]) -> list[pa.Table]:
    """Tables of values and counts as one for each type of values, in which each value is once, if so it is in each of them."""
    found = []
    for kind in KINDS.values():
        own = [table for table in tables if table["value"].type == kind]
        if len(own) > 1 and pt.is_integer(kind):
            own = [_summed_integers(own)]
        elif len(own) > 1:
            both = pa.concat_tables(own)
            coded = both["value"].combine_chunks().dictionary_encode()  # in half the memory of a group_by
            sums = np.bincount(
                np.asarray(coded.indices), weights=both["count"].to_numpy(), minlength=len(coded.dictionary)
            )
            own = [pa.table({"value": coded.dictionary, "count": sums.astype(np.int64)})]
        found += own
    return found


def _summed_integers(tables: Sequence[pa.Table]) -> pa.Table:
    """As `summed`, values in ascending order: by NumPy's vectorised sorts, in a tenth of the time of Arrow's hash table."""
    values, counts = (np.concatenate([table[name].to_numpy() for table in tables]) for name in ("value", "count"))
    low = values.min() if len(values) else values.dtype.type(0)
    if len(values) and int(values.max()) - int(low) < DENSE_SPAN * len(values):
        # float64 sums are exact up to 2^53
        sums = np.bincount((values - low).astype(np.int64, copy=False), weights=counts)
        found = np.flatnonzero(sums)
        return pa.table({"value": found.astype(values.dtype) + low, "count": sums[found].astype(np.int64)})
    order = np.argsort(values)
    values = values[order]
    starts = np.flatnonzero(np.append(True, values[1:] != values[:-1])[: len(values)])
    sums = np.add.reduceat(counts[order], starts) if len(starts) else counts
    return pa.table({"value": values[starts], "count": sums})


def _sorted(table: pa.Table, min_count: int) -> Iterator[pa.Table]:
    """Values seen often enough, by BY_COUNT, and the others, by BY_VALUE."""
    counts = table["count"].to_numpy()
    if not pt.is_integer(table["value"].type):
        often = pa.array(counts >= min_count)
        yield table.filter(often).sort_by(BY_COUNT)
        yield table.filter(pc.invert(often)).sort_by(BY_VALUE)
        return
    values = table["value"].to_numpy()
    order = np.argsort(values)
    values, counts = values[order], counts[order]
    often = counts >= min_count
    high, many = counts[often], min(int(counts.max(initial=0)), 2**16 - 1)
    # Counts below 2^16, nearly all, are sorted by their digits; the few above them, which come first, by themselves
    order = np.argsort((many - np.minimum(high, many)).astype(np.uint16), kind="stable")
    most = int((high >= many).sum())
    order[:most] = order[:most][np.argsort(-high[order[:most]], kind="stable")]
    yield pa.table({"value": values[often][order], "count": high[order]})
    yield pa.table({"value": values[~often], "count": counts[~often]})


class Share(NamedTuple):
    """Buckets `start` to `stop` - 1 of an owner's values."""

    owner: str
    start: int
    stop: int


class Merge(NamedTuple):
    """A task: the final counts of some shares, of the units' results, written to `path`."""

    path: Path
    shares: tuple[Share, ...]
    units: tuple[Path, ...]
    unsigned: frozenset[str]  # owners with an id of 2^63 or more
    min_count: Mapping[str, int]  # by owner
    field: Mapping[str, str]  # by owner: a field, for messages


def shares_of(units: Iterable[Path]) -> tuple[list[tuple[Share, ...]], frozenset[str]]:
    """Cut what the units have counted into the shares of merges; and the owners that have an id of 2^63 or more."""
    sizes: dict[str, np.ndarray] = {}
    unsigned = set()
    for path in units:
        for owner, row in read_rows(path):
            if "ends" in row:
                rows = np.diff(row["ends"].to_numpy(), prepend=0)
                sizes[owner] = sizes.get(owner, 0) + (rows * TEXT_ROWS if "text" in row else rows)
                unsigned |= {owner} if "unsigned" in row else set()
    merges: list[tuple[Share, ...]] = []
    shares: list[Share] = []
    held = 0
    for owner, size in sizes.items():
        start = 0
        for bucket, rows in enumerate(size.tolist()):
            if held + rows > MERGE_ROWS and held:
                shares += [Share(owner, start, bucket)] if bucket > start else []
                merges, shares, held, start = [*merges, tuple(shares)], [], 0, bucket
            held += rows
        shares.append(Share(owner, start, BUCKETS))
    return [*merges, tuple(shares)] if shares else merges, frozenset(unsigned)


def merge(task: Merge) -> None:
    """Sum shares' counts and sort: frequent values by count, then the others by value; InputError if no integer type holds an owner's."""
    found: dict[Share, list[pa.Table]] = {share: [] for share in task.shares}
    for path in task.units:
        for owner, row in read_rows(path):
            for share in [share for share in task.shares if share.owner == owner and "ends" in row]:
                ends = [0, *row["ends"].to_pylist()]
                part = counted(row).slice(ends[share.start], ends[share.stop] - ends[share.start])
                found[share] += [_of_one_type(part, owner in task.unsigned, task.field[owner])] if len(part) else []
    with write_result(task.path) as draft, result_writer(draft) as writer:
        for share, tables in found.items():
            for table in summed(tables):
                for part in _sorted(table, task.min_count[share.owner]):
                    part = part.combine_chunks()
                    if len(part):
                        write_row(
                            writer,
                            share.owner,
                            counts=part["count"].chunk(0),
                            **{kind_of(part): part["value"].chunk(0)},
                        )


def counted(row: Mapping[str, pa.Array]) -> pa.Table:
    """A row of a result as a table of values and counts."""
    return pa.table({"value": next(row[kind] for kind in KINDS if kind in row), "count": row["counts"]})


def kind_of(table: pa.Table) -> str:
    """The column of a result that a table's values are of."""
    return next(name for name, kind in KINDS.items() if kind == table["value"].type)


def _of_one_type(table: pa.Table, is_unsigned: bool, field: str) -> pa.Table:
    if not is_unsigned or table["value"].type != pa.int64():
        return table
    try:
        return table.set_column(0, "value", table["value"].cast(pa.uint64()))
    except pa.ArrowInvalid:
        raise InputError(
            f"field {field!r}: some ids are below 0 and some are 2^63 or more, which no type of integers holds: "
            'set type = "text" for the field'
        ) from None


def merged(merges: Iterable[Path]) -> dict[str, list[pa.Table]]:
    """The tables of values and counts of each owner that merges have written, without a copy."""
    found: dict[str, list[pa.Table]] = {}
    for path in merges:
        for owner, row in read_rows(path):
            found.setdefault(owner, []).append(counted(row))
    return found


def in_order(runs: Sequence[pa.Table], order: Order, kind: pa.DataType) -> Iterator[pa.Table]:
    """Sorted tables as the row groups of one, however values were shared among merges; `kind`: the values' type where there are none."""
    schema = pa.schema([("value", kind), ("count", pa.int64())])
    held = schema.empty_table()
    for table in _joined(runs, order):
        held = pa.concat_tables([held, table.cast(schema)])
        while len(held) >= STRETCH_ROWS:
            yield held.slice(0, STRETCH_ROWS).combine_chunks()
            held = held.slice(STRETCH_ROWS)
    if len(held):
        yield held.combine_chunks()


def _joined(runs: Sequence[pa.Table], order: Order) -> Iterator[pa.Table]:
    def key(run: pa.Table, row: int) -> tuple[Any, ...]:
        value = run["value"][row].as_py()
        return (value,) if order == BY_VALUE else (-run["count"][row].as_py(), value)

    def rows_before(run: pa.Table, cut: tuple[Any, ...]) -> int:
        return bisect_left(range(len(run)), cut, key=lambda row: key(run, row))

    steps = STRETCH_ROWS // STEP_ROWS
    keys = sorted(key(run, row) for run in runs for row in range(0, len(run), STEP_ROWS))
    cuts = [[rows_before(run, cut) for run in runs] for cut in keys[steps::steps]]
    for low, high in pairwise([[0] * len(runs), *cuts, [len(run) for run in runs]] if runs else ()):
        parts = [run.slice(start, stop - start) for run, start, stop in zip(runs, low, high, strict=True)]
        yield pa.concat_tables(parts).sort_by(order) if len(parts) > 1 else parts[0]
