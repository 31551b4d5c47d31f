"""Row groups -> checked, encoded rows: the one reader of rows, for training, scoring and serving's samples.

Scoring reads row groups in the file's order by `RowReader.scan`. Training decodes windows (see data/stream/order.py) with a `Decoder`,
permuted. Each lane reads its row groups in batches of a window's rows, and a row group in which a lane ends is read by both lanes: memory
stays near the windows that are in use, whatever the writer's row groups. Readers and decoders may be used by many threads.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.errors import InputError
from data.reading.columns import Columns, Place
from data.reading.config import StreamOptions
from data.reading.encode import Encoder
from data.reading.files import RowGroup
from data.reading.row_groups import stored_rows
from data.reading.selection import Selection
from data.reading.storage import DAMAGE, DataFile, open_parquet, read_or_name

IDLE_FILES, IDLE_COLUMN_CHUNKS = 64, 200_000  # of open files and their parsed footers: about 60 MB
Rows = tuple[pa.RecordBatch, Place]  # and where they come from


class RowReader:
    """Reads the kept rows of row groups of `files`: the columns of the encoder's schema, and `extra` ones to pass through as they are.

    With `dictionaries` strings are read as dictionary codes. Then a value is hashed or looked up once for each read: for long batches.
    """

    def __init__(
        self,
        files: Sequence[DataFile],
        encoder: Encoder,
        selection: Selection | None = None,
        *,
        extra: Sequence[str] = (),
        dictionaries: bool = False,
    ) -> None:
        self.files, self.encoder, self.extra = files, encoder, list(extra)
        schema = encoder.schema
        self.selection = selection or Selection(StreamOptions(), schema, files)
        read = schema.columns if encoder.has_labels else schema.field_columns
        self.columns = list(dict.fromkeys([*read, *self.selection.columns]))
        keys = [each for each in schema.features if each.kind == "categorical" and each.encoding != "ids"]
        names = [*(each.source_column for each in keys), schema.group_column]
        self.dictionaries = [name for name in names if name and dictionaries]
        self._idle: list[tuple[int, pq.ParquetFile]] = []  # open files that are not in use, the latest last
        self._lock = threading.Lock()

    def scan(self, row_group: RowGroup, batch_rows: int) -> Iterator[tuple[Columns, pa.RecordBatch]]:
        """Yield the kept rows of each `batch_rows` stored ones: encoded, and their extra columns; InputError if a value or the file is faulty."""
        for rows, place in self.batches(row_group, batch_rows, [*self.columns, *self.extra]):
            yield self.encoder.encode(rows, place), rows.select(self.extra)

    def batches(self, row_group: RowGroup, batch_rows: int, columns: Sequence[str]) -> Iterator[Rows]:
        """Yield the kept rows of each `batch_rows` stored ones, these columns of them, and their place; InputError if the file has changed."""
        file, selection = self.files[row_group.file], self.selection
        first_row = found = 0
        columns = list(dict.fromkeys([*columns, *selection.columns]))
        for rows in _of_exact_size(self._stored(row_group, batch_rows, columns), batch_rows):
            place = Place(str(file), row_group.index, first_row)
            first_row += rows.num_rows
            kept = selection.mask(rows, file, place) if selection.filters else np.ones(1, bool)
            if not kept.all():
                rows = _filtered(rows, kept)
                place = replace(place, rows=place.first_row + np.flatnonzero(kept))
            found += rows.num_rows
            yield rows, place
        if found != row_group.num_rows:
            raise InputError(
                f"{self.name(row_group)} has {found} rows to read, but had {row_group.num_rows} when the stream was opened; "
                "the file was changed or is damaged: write it again, and start again"
            )

    def whole(self, row_groups: Sequence[RowGroup]) -> Iterator[list[Rows]]:
        """Read whole row groups of one file at once, for Arrow sets every column up for each read: the rows of each, and their places.

        Where that fails they are read one at a time, which tries again where it may help and names the row group at fault.
        """
        try:
            parquet = self._open(row_groups[0])
            indices = [row_group.index for row_group in row_groups]
            is_same = all(parquet.metadata.row_group(each.index).num_rows == each.num_rows for each in row_groups)
            num_rows = sum(row_group.num_rows for row_group in row_groups)
            read = [*stored_rows(parquet, indices, self.columns, num_rows, use_threads=False)] if is_same else []
            self._leave(row_groups[0], parquet)
        except (InputError, *DAMAGE):
            read = []
        rest = deque(read)
        for each in row_groups:
            place = Place(str(self.files[each.file]), each.index)
            yield _taken(rest, each.num_rows, place) if read else [*self.batches(each, each.num_rows, self.columns)]

    def name(self, row_group: RowGroup) -> str:
        """File and row group, for messages."""
        return f"{self.files[row_group.file]}: row group {row_group.index}"

    def _stored(self, row_group: RowGroup, batch_rows: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """Yield the stored rows as Arrow cuts them. A remote read that fails is begun anew, behind what has been read."""
        file, attempts = self.files[row_group.file], self.selection.options.attempts
        taken = 0
        source: tuple[pq.ParquetFile, Iterator[pa.RecordBatch]] | None = None

        def read() -> pa.RecordBatch | None:
            nonlocal source
            if source:
                parquet, batches = source
            else:
                parquet = self._open(row_group)
                batches = stored_rows(parquet, [row_group.index], columns, batch_rows, use_threads=False)
                batches = islice(batches, taken, None)
            source = None  # until the read has gone well
            batch = next(batches, None)
            source = parquet, batches
            return batch

        guarded = partial(read_or_name, read, file, self.name(row_group), "cannot be decoded", attempts)
        while (batch := guarded()) is not None and source:
            taken += 1
            yield batch
        if source:
            self._leave(row_group, source[0])

    def _open(self, row_group: RowGroup) -> pq.ParquetFile:
        """Open the file of a row group, or take an open one that is not in use. The caller owns it."""
        with self._lock:
            for at, (file, parquet) in enumerate(self._idle):
                if file == row_group.file:
                    del self._idle[at]
                    return parquet
        return open_parquet(self.files[row_group.file], read_dictionary=self.dictionaries)

    def _leave(self, row_group: RowGroup, parquet: pq.ParquetFile) -> None:
        """Give an open file back, for the next row group of it."""
        with self._lock:
            self._idle.append((row_group.file, parquet))
            footers = [idle.metadata for _, idle in self._idle]
            chunks = sum(footer.num_row_groups * footer.num_columns for footer in footers)
            is_full = len(self._idle) > (1 if chunks > IDLE_COLUMN_CHUNKS else IDLE_FILES)
            left = self._idle.pop(0)[1] if is_full else None
        if left is not None:
            left.close()


def _of_exact_size(batches: Iterable[pa.RecordBatch], batch_rows: int) -> Iterator[pa.RecordBatch]:
    """Batches of `batch_rows` rows, the last one of what is left: Arrow may make smaller ones than it was asked for."""
    parts: list[pa.RecordBatch] = []
    held = 0
    for rows in batches:
        parts.append(rows)
        held += rows.num_rows
        while held >= batch_rows:
            joined = _joined(parts)
            yield joined.slice(0, batch_rows)
            parts, held = [joined.slice(batch_rows)], held - batch_rows
    if held:
        yield _joined(parts)


def _taken(rest: deque[pa.RecordBatch], num_rows: int, place: Place) -> list[Rows]:
    """Take the first rows off record batches; of each part its place."""
    parts: list[Rows] = []
    while num_rows:
        rows = rest.popleft()
        if rows.num_rows > num_rows:
            rest.appendleft(rows.slice(num_rows))
            rows = rows.slice(0, num_rows)
        parts.append((rows, place))
        place = replace(place, first_row=place.first_row + rows.num_rows)
        num_rows -= rows.num_rows
    return parts


def _filtered(rows: pa.RecordBatch, kept: np.ndarray) -> pa.RecordBatch:
    """The rows that are kept. Arrow filters no columns of views, but joins slices of them."""
    try:
        return rows.filter(pa.array(kept))
    except pa.ArrowNotImplementedError:
        edges = np.flatnonzero(np.diff(kept, prepend=False, append=False)).tolist()
        runs = zip(edges[::2], edges[1::2], strict=True)
        return pa.concat_batches([rows.slice(0, 0), *(rows.slice(start, stop - start) for start, stop in runs)])


def _joined(parts: list[pa.RecordBatch]) -> pa.RecordBatch:
    return pa.concat_batches(parts) if len(parts) > 1 else parts[0]  # which it would copy


class Window(NamedTuple):
    """Neighbouring rows of one lane that are decoded, and in shuffled order permuted, together."""

    lane: int
    first_row: int  # place in the epoch's sequence
    num_rows: int  # of all segments
    segments: tuple[tuple[RowGroup, int, int], ...]  # row groups, and which of their kept rows: [start, stop)


class Decoder:
    """Decodes the windows of one epoch of one stream."""

    def __init__(
        self,
        files: Sequence[DataFile],
        encoder: Encoder,
        selection: Selection,
        on_rows: Callable[[], None] = lambda: None,
    ) -> None:
        self.reader, self.on_rows = RowReader(files, encoder, selection, dictionaries=True), on_rows
        self.reading: dict[int, str] = {}  # thread -> what it reads, for messages about stuck ones
        self._sources: dict[int, _LaneRowGroup] = {}  # lane -> the row group that it has come to

    def task(self, window: Window, seed: list[int] | None) -> Callable[[], Columns]:
        """Return what reads and encodes a window's rows, permuted if there is a seed.

        The windows of a lane must be asked for in their order, and their tasks begun in that order.

        Raises:
            InputError: by the task: a file is damaged or has changed, or a value is faulty.
        """
        whole: dict[int, list[RowGroup]] = {}  # by file
        cut: dict[RowGroup, Callable[[], list[Rows]]] = {}
        for row_group, start, stop in window.segments:
            if stop - start == row_group.stored_rows:
                whole.setdefault(row_group.file, []).append(row_group)
                continue
            source = self._sources.get(window.lane)
            if source is None or source.row_group != row_group:
                source = self._sources.get(window.lane - 1)
                # a lane goes on in the row group that the one before ends in, where both are asked for at once
                if source is None or (source.row_group, source.stop) != (row_group, start):
                    source = _LaneRowGroup(self.reader, row_group)
                self._sources[window.lane] = source
            cut[row_group] = source.expect(start, stop)
        return partial(self._decode, window, [*whole.values()], cut, seed)

    def _decode(
        self,
        window: Window,
        whole: list[list[RowGroup]],
        cut: dict[RowGroup, Callable[[], list[Rows]]],
        seed: list[int] | None,
    ) -> Columns:
        thread = threading.get_ident()
        parts: dict[RowGroup, list[Rows]] = {}
        reads = [(each, partial(self.reader.whole, each)) for each in whole]
        reads += [([row_group], lambda read=read: [read()]) for row_group, read in cut.items()]
        try:
            for row_groups, read in reads:
                self.reading[thread] = self.reader.name(row_groups[0])
                for _ in row_groups:
                    self.on_rows()
                parts.update(zip(row_groups, read(), strict=True))
        finally:
            self.reading.pop(thread, None)
        rows = [part for row_group, _, _ in window.segments for part in parts[row_group]]
        permutation = None if seed is None else np.random.default_rng(seed).permutation(window.num_rows)
        return self.reader.encoder.encode_all(rows, permutation)


class _LaneRowGroup:
    """A row group as one lane reads it: as a stream, for its windows can cut it. Rows that are not expected are passed over."""

    def __init__(self, reader: RowReader, row_group: RowGroup) -> None:
        self.row_group = row_group
        self.expected: deque[tuple[int, int]] = deque()  # rows [start, stop)
        self.ready: dict[int, list[Rows]] = {}  # by start
        self.batches = reader.batches(row_group, reader.selection.options.window_rows, reader.columns)
        self.position = self.stop = 0  # kept rows passed so far, and asked for
        self.rest: Rows | None = None  # read, and not yet passed
        self.lock = threading.Lock()

    def expect(self, start: int, stop: int) -> Callable[[], list[Rows]]:
        """Return what reads the kept rows [start, stop), which come after those asked for before."""
        self.expected.append((start, stop))
        self.stop = stop
        return partial(self._take, start)

    def _take(self, start: int) -> list[Rows]:
        """Read expected rows. The thread that comes first reads those before them too."""
        with self.lock:
            while start not in self.ready:
                self.ready[self.expected[0][0]] = self._pull(*self.expected[0])
                self.expected.popleft()
            return self.ready.pop(start)

    def _pull(self, start: int, stop: int) -> list[Rows]:
        parts: list[Rows] = []
        while self.position < stop:
            rows, place = self.rest or next(self.batches)
            skipped = min(max(0, start - self.position), rows.num_rows)
            passed = min(stop - self.position, rows.num_rows)
            if passed > skipped:
                parts.append(_cut(rows, place, skipped, passed))
            self.position += passed
            self.rest = None if passed == rows.num_rows else _cut(rows, place, passed, rows.num_rows)
        if self.position == self.row_group.num_rows:
            deque(self.batches, maxlen=0)  # to the end, where the rows are counted
        return parts


def _cut(rows: pa.RecordBatch, place: Place, start: int, stop: int) -> Rows:
    if start == 0 and stop == rows.num_rows:
        return rows, place
    numbers = None if place.rows is None else place.rows[start:stop]
    return rows.slice(start, stop - start), replace(place, first_row=place.first_row + start, rows=numbers)
