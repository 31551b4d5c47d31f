"""Units: what one task of a profile reads, runs of row groups of about UNIT_BYTES; and the folder that holds the tasks' results.

How files are cut depends on their footers alone, so results are the same whoever reads which unit. A row's number counts all files in
their order: a hash of it picks the rows of a sample.
"""

import hashlib
import json
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from data.engine import HERE, Engine, meet
from data.errors import InputError, first_line
from data.reading.columns import Place
from data.reading.fingerprint import FileMark, mark_files
from data.reading.keys import splitmix64
from data.reading.row_groups import stored_rows
from data.reading.storage import DAMAGE, LIST_ATTEMPTS, DataFile, for_each_file, open_parquet

UNIT_BYTES = 256 << 20  # as stored, of all columns
BATCH_ROWS = 65_536


Progress = Callable[[int], object]  # is told the number of rows so far
LARGEST_FLOAT32 = float(np.finfo(np.float32).max)
PIECE_CELLS = 8_000_000  # rows x columns decoded at a time


def unheard(_: object) -> None:
    """Take no notice: the default of progress and of notes."""


class Work(NamedTuple):
    """How the tasks of a job run, who hears of the rows that are done, and beside which path the results lie."""

    engine: Engine = HERE
    progress: Progress = unheard
    place: Path | None = None  # for the same job to go on where it failed; None: the job chooses


ALONE = Work()


class Span(NamedTuple):
    """Neighbouring row groups of one file, or the first rows of one."""

    file: DataFile
    mark: FileMark  # of the file when the job began
    groups: range
    first_row: int  # the number of its first row
    rows: int


class Unit(NamedTuple):
    """What one task reads."""

    spans: tuple[Span, ...]

    @property
    def rows(self) -> int:
        """Rows of all its row groups."""
        return sum(span.rows for span in self.spans)

    def key(self, *facts: object) -> str:
        """Names the result of a task: sixteen hex digits of what it reads, and of `facts`."""
        read = [(span.mark, span.groups.start, span.groups.stop, span.first_row) for span in self.spans]
        return hashlib.sha256(json.dumps([read, *facts]).encode()).hexdigest()[:16]


def units_of(files: Sequence[DataFile]) -> list[Unit]:
    """Cut files, in their order, into units; those without rows are left out. InputError if a file cannot be read as Parquet."""

    def footer(_: int, file: DataFile) -> list[tuple[int, int]]:
        with open_parquet(file) as parquet:
            groups = map(parquet.metadata.row_group, range(parquet.metadata.num_row_groups))
            return [(group.num_rows, group.total_byte_size) for group in groups]

    footers = for_each_file(files, footer, "not a readable Parquet file", LIST_ATTEMPTS)
    units: list[Unit] = []
    spans: list[Span] = []
    held = row = 0
    for file, mark, groups in zip(files, mark_files(files), footers, strict=True):
        start, first_row = 0, row
        for index, (rows, size) in enumerate(groups):
            row, held = row + rows, held + size
            if held >= UNIT_BYTES or index + 1 == len(groups):
                if row > first_row:
                    spans.append(Span(file, mark, range(start, index + 1), first_row, row - first_row))
                start, first_row = index + 1, row
            if held >= UNIT_BYTES:
                units, spans, held = [*units, Unit(tuple(spans))], [], 0
    return [each for each in (*units, Unit(tuple(spans))) if each.spans]


def batches_of(
    unit: Unit, columns: Iterable[str], batch_rows: int = BATCH_ROWS
) -> Iterator[tuple[Place, int, pa.RecordBatch]]:
    """Some columns of a unit, those that a file has, in pieces of a row group: where each is from, the number of its first row, and its rows.

    InputError if a file is damaged, or another one than when the job began.
    """
    wanted = list(dict.fromkeys(columns))
    for span in unit.spans:
        require_mark(span.file, span.mark)
        row = span.first_row
        with naming(span.file), open_parquet(span.file, pre_buffer=True) as parquet:
            names = [name for name in wanted if name in parquet.schema_arrow.names]
            for group in span.groups:
                start = row
                try:
                    # nested columns of a whole row group are more than Arrow can join
                    for rows in stored_rows(parquet, [group], names, batch_rows):
                        rows = rows.slice(0, span.first_row + span.rows - row)
                        if not rows.num_rows:
                            break
                        yield Place(str(span.file), group, row - start), row, rows
                        row += rows.num_rows
                except DAMAGE:
                    column, message = next(unreadable(span.file, group, names))
                    raise InputError(f"{Place(str(span.file), group)}, column {column!r} {message}") from None


@contextmanager
def naming(file: DataFile, fault: str = "cannot be read as Parquet", cure: str = "fix or remove it") -> Iterator[None]:
    """Turn damage of what is read in the block into an InputError that names the file, what is wrong and how to fix it."""
    try:
        yield
    except DAMAGE as error:
        raise InputError(f"{file}: {fault} ({first_line(error)}); {cure}") from None


def unreadable(file: DataFile, group: int, names: list[str]) -> Iterator[tuple[str, str]]:
    """Find the columns of a damaged row group that cannot be decoded."""
    found = False
    for name in names:
        try:
            with open_parquet(file) as parquet:
                deque(stored_rows(parquet, [group], [name], PIECE_CELLS, use_threads=False), maxlen=0)
        except DAMAGE as error:
            found = True
            yield name, f"cannot be decoded ({first_line(error)}): the file is damaged; write it again"
    if not found:
        yield "", "could not be read, yet each column alone could: try again"


class RowSample:
    """The rows whose numbers have the smallest hashes: at most `limit`, all of them if there are no more, in the order in which they came."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.parts: list[pa.Table] = []
        self.hashes = np.zeros(0, np.uint64)
        self.highest: np.uint64 | None = None  # of a hash that may stay

    def add(self, hashes: np.ndarray, rows: pa.Table) -> None:
        """Take in rows, and the hashes of their numbers."""
        if self.highest is not None:
            low = hashes <= self.highest
            hashes, rows = hashes[low], rows.filter(pa.array(low))
        self.hashes = np.append(self.hashes, hashes)
        self.parts.append(rows)
        if len(self.hashes) > 2 * self.limit:
            self.rows()

    def rows(self) -> pa.Table:
        """The sample of at least one piece."""
        rows = pa.concat_tables(self.parts)
        if len(rows) > self.limit:
            kept = np.sort(np.argpartition(self.hashes, self.limit)[: self.limit])
            self.hashes, rows = self.hashes[kept], rows.take(pa.array(kept))
            self.highest = self.hashes.max()
        self.parts = [rows.combine_chunks()]
        return self.parts[0]


def require_mark(file: DataFile, mark: FileMark) -> None:
    """Raise InputError if a file is another one than when the job began."""
    if mark_files([file]) != [mark]:
        raise InputError(f"{file}: was changed while its rows were counted; run the command again")


def row_hashes(first_row: int, rows: int) -> np.ndarray:
    """Hashes of row numbers, (rows,) uint64: the rows of the k smallest are a sample of k rows, whatever read them."""
    return splitmix64(np.arange(first_row, first_row + rows, dtype=np.uint64))


@contextmanager
def results_folder(out: Path, engine: Engine, *facts: Any) -> Iterator[Path]:
    """The folder beside `out` of the results of a job's tasks, for `facts`: it stays where the job fails, and the same command goes on there."""
    folder = out.with_name(f".{out.name}.work")
    own = folder / hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    own.mkdir(parents=True, exist_ok=True)
    try:
        yield own
    except BaseException:
        if not any(own.glob("*")):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    meet(engine, own)
    if engine.is_first:
        shutil.rmtree(folder, ignore_errors=True)
