"""Windows -> decoded, checked and permuted rows. Imports no torch; one decoder serves many threads.

A row group is read whole and its rows are gone through once, except one that a lane ends in, which each of the two lanes reads, and
one longer than a window, which is read as a stream: memory stays near the windows that are in use, whatever the writer's row groups.
"""

import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import types as pt

from data.errors import InputError
from data.reading.checksums import leaves_of
from data.reading.columns import Columns
from data.reading.encode import Encoder, Place
from data.reading.files import one_batch
from data.reading.keys import first_line
from data.reading.order import RowGroup, Segment, Window
from data.reading.selection import Selection
from data.reading.storage import DAMAGE, DataFile, RemoteFile, open_parquet, retried

T = TypeVar("T")
IDLE_FILES = 4
CACHED_COLUMN_CHUNKS = 200_000  # of parsed footers kept: about 60 MB
Part = tuple[pa.RecordBatch, Place]


class Decoded(NamedTuple):
    """A window's rows in the epoch's order, and the values mended in them."""

    columns: Columns
    mended: Counter[str]


class _Footer(NamedTuple):
    """A file's parsed footer, and which of its leaf columns belong to list fields."""

    metadata: pq.FileMetaData
    list_leaves: list[int]

    @property
    def chunks(self) -> int:
        return self.metadata.num_row_groups * self.metadata.num_columns


class Memory:
    """Memory of windows that are no longer used, for the next ones: fresh pages cost as much as filling them."""

    def __init__(self) -> None:
        self.free: list[np.ndarray] = []
        self.lock = threading.Lock()

    def empty(self, shape: tuple[int, int], dtype: np.dtype) -> np.ndarray:
        """Return a matrix of undefined content."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        with self.lock:
            fits = [at for at, block in enumerate(self.free) if size <= block.nbytes <= 2 * size]
            block = self.free.pop(fits[0]) if fits else None
        if block is None:
            block = np.empty(size, np.uint8)
        return block[:size].view(dtype).reshape(shape)

    def give_back(self, matrix: np.ndarray) -> None:
        """Take back a matrix that nobody reads any more."""
        block = matrix
        while isinstance(block.base, np.ndarray):
            block = block.base
        with self.lock:
            self.free = [*self.free[-1:], block]  # two at most: windows come and go one at a time


class Decoder:
    """Reads windows of one epoch of one stream."""

    def __init__(self, files: Sequence[DataFile], encoder: Encoder, selection: Selection) -> None:
        self.files, self.encoder, self.selection = files, encoder, selection
        schema = encoder.schema
        self.columns = list(schema.columns)
        if selection.conditions and schema.time_column not in self.columns:
            self.columns.append(schema.time_column)
        # Strings come as dictionary codes: then a value is hashed or looked up once for each row group.
        self.dictionaries = [
            feature.source_column
            for feature in schema.features
            if feature.kind == "categorical" and feature.encoding != "ids"
        ] + ([schema.group_column] if schema.group_column else [])
        self.lists = frozenset(
            column
            for feature in schema.features
            if feature.kind in ("multi_valued", "weighted_multi_valued", "vector")
            for column in (feature.source_column, feature.weights)
            if column
        )
        self.footers: OrderedDict[int, _Footer] = OrderedDict()
        self.memory = Memory()
        self.idle: list[tuple[int, pq.ParquetFile]] = []  # open files that nobody reads, the latest last
        self.long: dict[tuple[RowGroup, int], _LongRowGroup] = {}
        self.lock = threading.Lock()
        self.reading: dict[int, str] = {}  # thread -> what it reads, for messages about stuck ones

    def expect(self, window: Window) -> None:
        """Say that `window` will be decoded. The windows of a lane must be announced in their order, before they are decoded."""
        for segment in window.segments:
            if segment.row_group.num_rows <= self.selection.options.window_rows:
                continue
            key = (segment.row_group, window.lane)
            with self.lock:
                if key not in self.long:
                    # the lane has moved on: what it leaves behind goes when its last expected rows are taken
                    for other, long in list(self.long.items()):
                        if other[1] == window.lane:
                            long.is_last = True
                            if long.is_idle():
                                del self.long[other]
                    self.long[key] = _LongRowGroup(self, segment.row_group)
                self.long[key].expected.append(segment)

    def decode(self, window: Window, seed: list[int] | None) -> Decoded:
        """Read and encode a window's rows, permuted if there is a seed.

        Raises:
            InputError: a file is damaged or has changed, or a value is faulty.
        """
        thread = threading.get_ident()
        try:
            parts: list[Part] = []
            for segment in window.segments:
                self.reading[thread] = self.name(segment.row_group)
                parts += self._read(segment, window.lane)
        finally:
            self.reading.pop(thread, None)
        mended: Counter[str] = Counter()
        permutation = None if seed is None else np.random.default_rng(seed).permutation(window.num_rows)
        return Decoded(self.encoder.encode_all(parts, mended, permutation, self.memory.empty), mended)

    def name(self, row_group: RowGroup) -> str:
        """File and row group, for messages."""
        return f"{self.files[row_group.file]}: row group {row_group.index}"

    def _read(self, segment: Segment, lane: int) -> list[Part]:
        row_group = segment.row_group
        key = (row_group, lane)
        with self.lock:
            long = self.long.get(key)
        if long is not None:
            parts = long.take(segment)
            with self.lock:
                if long.is_last and long.is_idle():
                    self.long.pop(key, None)
            return parts

        def read() -> tuple[pa.RecordBatch, dict[str, int]]:
            parquet = self.open(row_group)
            table = parquet.read_row_group(row_group.index, columns=self.columns, use_threads=False)
            read = one_batch(table), self.list_entries(parquet, row_group)
            self.leave(row_group, parquet)
            return read

        stored, entries = self.guarded(row_group, read)
        self.check_lists(row_group, self.count_lists(stored), entries)
        rows, place = self.keep(stored, row_group, 0)
        if rows.num_rows != row_group.num_rows:
            raise self.changed(row_group, rows.num_rows)
        return [_cut(rows, place, segment.start, segment.stop)]

    def open(self, row_group: RowGroup) -> pq.ParquetFile:
        """Open the file of a row group, or take an open one that nobody uses. The caller owns it."""
        with self.lock:
            idle = next((at for at, (file, _) in enumerate(self.idle) if file == row_group.file), None)
            if idle is not None:
                return self.idle.pop(idle)[1]
            footer = self.footers.get(row_group.file)
            if footer is not None:
                self.footers.move_to_end(row_group.file)
        parquet = open_parquet(
            self.files[row_group.file],
            metadata=footer and footer.metadata,
            read_dictionary=self.dictionaries,
        )
        if footer is None:
            footer = _Footer(parquet.metadata, leaves_of(parquet.metadata, self.lists) if self.lists else [])
            with self.lock:
                self.footers[row_group.file] = footer
                held = sum(known.chunks for known in self.footers.values())
                while held > CACHED_COLUMN_CHUNKS and len(self.footers) > 1:
                    held -= self.footers.popitem(last=False)[1].chunks
        return parquet

    def leave(self, row_group: RowGroup, parquet: pq.ParquetFile) -> None:
        """Give an open file back, for the next row group of it."""
        with self.lock:
            self.idle.append((row_group.file, parquet))
            left = self.idle.pop(0)[1] if len(self.idle) > IDLE_FILES else None
        if left is not None:
            left.close()

    def list_entries(self, parquet: pq.ParquetFile, row_group: RowGroup) -> dict[str, int]:
        """Entries of each list column by the footer. The columns must have been read: see `data.reading.files.prove`."""
        if not self.lists:
            return {}
        with self.lock:
            footer = self.footers.get(row_group.file)
        leaves = footer.list_leaves if footer else leaves_of(parquet.metadata, self.lists)
        group = parquet.metadata.row_group(row_group.index)
        chunks = [group.column(leaf) for leaf in leaves]
        return {chunk.path_in_schema.split(".")[0]: chunk.num_values for chunk in chunks}

    def guarded(self, row_group: RowGroup, read: Callable[[], T]) -> T:
        """Run a read, a remote one again if it fails. Failures become one line that names file and row group."""
        name = self.name(row_group)
        if isinstance(self.files[row_group.file], RemoteFile):
            return retried(read, name, self.selection.options.attempts)
        try:
            return read()
        except DAMAGE as error:
            raise InputError(
                f"{name} cannot be decoded ({first_line(error)}); the file is damaged: write it again"
            ) from None

    def keep(self, rows: pa.RecordBatch, row_group: RowGroup, first_row: int) -> Part:
        """Leave out the rows that the selection does not keep."""
        file = self.files[row_group.file]
        place = Place(str(file), row_group.index, first_row)
        if not self.selection.filters:
            return rows, place
        kept = self.selection.mask(rows, file, place)
        if kept.all():
            return rows, place
        return rows.filter(pa.array(kept)), replace(place, rows=first_row + np.flatnonzero(kept))

    def count_lists(self, rows: pa.RecordBatch) -> Counter[str]:
        """Stored entries of each list column: its values, and one for each list without any."""
        counts: Counter[str] = Counter()
        for name in self.lists:
            counts[name] = _count_entries(rows.column(rows.schema.names.index(name)))
        return counts

    def check_lists(self, row_group: RowGroup, found: Counter[str], stored: dict[str, int]) -> None:
        """Compare the entries of list columns that were read with those that the footer says are stored.

        Arrow takes a page's number of values from its header, which no checksum covers, and cuts the last list short without a word
        if a flipped bit made it smaller. Columns without lists would end early, which Arrow reports.
        """
        for name, wanted in stored.items():
            if wanted != found[name]:
                raise InputError(
                    f"{self.name(row_group)}: column {name!r} has {found[name]} values to read, but {wanted} by the footer; "
                    "the file is damaged: write it again"
                )

    def changed(self, row_group: RowGroup, found: int) -> InputError:
        """A row group that does not hold what was counted at the start."""
        return InputError(
            f"{self.name(row_group)} has {found} rows to read, but had {row_group.num_rows} when the stream was opened; "
            "the file was changed or is damaged: write it again, and start again"
        )


class _LongRowGroup:
    """A row group that is read as a stream, because one lane's windows cut it. Rows that are not expected are passed over."""

    def __init__(self, decoder: Decoder, row_group: RowGroup) -> None:
        self.decoder, self.row_group = decoder, row_group
        self.expected: deque[Segment] = deque()
        self.ready: dict[Segment, list[Part]] = {}
        self.is_last = False  # nothing more will be expected
        self.lock = threading.Lock()
        self.batches: Iterator[pa.RecordBatch] | None = None
        self.stored = 0  # rows read from the file so far
        self.position = 0  # kept rows passed so far
        self.rest: Part | None = None  # read, and not yet passed
        self.lists: Counter[str] = Counter()  # entries of list columns read so far
        self.entries: dict[str, int] = {}  # and how many there are by the footer

    def is_idle(self) -> bool:
        """Whether all that was expected has been taken."""
        return not self.expected and not self.ready

    def take(self, segment: Segment) -> list[Part]:
        """Return the rows of an expected segment. Whoever comes first reads for those before it too."""
        with self.lock:
            while segment not in self.ready:
                following = self.expected[0]
                self.ready[following] = self._pull(following.start, following.stop)
                self.expected.popleft()
            return self.ready.pop(segment)

    def _pull(self, start: int, stop: int) -> list[Part]:
        parts: list[Part] = []
        while self.position < stop:
            if self.rest is None:
                batch = self.decoder.guarded(self.row_group, self._next)
                if batch is None:
                    raise self.decoder.changed(self.row_group, self.position)
                self.rest = self.decoder.keep(batch, self.row_group, self.stored)
                self.stored += batch.num_rows
                self.lists += self.decoder.count_lists(batch)
                if self.stored == self.row_group.stored_rows:
                    self.decoder.check_lists(self.row_group, self.lists, self.entries)
            rows, place = self.rest
            skipped = min(max(0, start - self.position), rows.num_rows)
            taken = min(stop - self.position - skipped, rows.num_rows - skipped)
            if taken:
                parts.append(_cut(rows, place, skipped, skipped + taken))
            passed = skipped + taken
            self.position += passed
            self.rest = None if passed == rows.num_rows else _cut(rows, place, passed, rows.num_rows)
        return parts

    def _next(self) -> pa.RecordBatch | None:
        parquet = None
        batches, self.batches = self.batches, None  # so that a read that fails begins anew
        if batches is None:
            parquet = self.decoder.open(self.row_group)
            batches = parquet.iter_batches(
                self.decoder.selection.options.window_rows,
                row_groups=[self.row_group.index],
                columns=self.decoder.columns,
                use_threads=False,
            )
            passed = 0
            while passed < self.stored:
                passed += next(batches).num_rows
        batch = next(batches, None)
        if parquet is not None:
            self.entries = self.decoder.list_entries(parquet, self.row_group)
        self.batches = batches
        return batch


def _count_entries(column: pa.Array) -> int:
    if pt.is_fixed_size_list(column.type):
        return len(column.flatten()) + column.null_count
    offsets = column.offsets.to_numpy()
    empty = int(np.count_nonzero(offsets[1:] == offsets[:-1]))
    if not column.null_count:
        return int(offsets[-1] - offsets[0]) + empty
    # a null list may lie over values that are not part of the column
    null_but_full = (offsets[1:] != offsets[:-1]) & column.is_null().to_numpy(zero_copy_only=False)
    return len(column.flatten()) + empty + int(np.count_nonzero(null_but_full))


def _cut(rows: pa.RecordBatch, place: Place, start: int, stop: int) -> Part:
    if start == 0 and stop == rows.num_rows:
        return rows, place
    numbers = None if place.rows is None else place.rows[start:stop]
    return rows.slice(start, stop - start), replace(place, first_row=place.first_row + start, rows=numbers)
