"""ParquetStream: row groups -> batches of one rank, in the order that data/order.py fixes, from a cursor on."""

import hashlib
import queue
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.arrow import Encoder, Place
from data.batch import Batch, Keys, to_batch
from data.columns import Columns, concatenate, take
from data.errors import InputError
from data.files import read_footers
from data.order import Cursor, Segment, StreamOptions, Window, plan_windows, rows_of_step
from data.schema import Schema


class ParquetStream:
    """Iterates the batches of one rank, one epoch for each `iter()`, from the cursor on.

    Every rank yields the same number of batches. The last global batch holds what is left: each rank gets the same number of rows,
    padded with rows of weight 0 (see `Batch.weights`), so nothing is dropped and no collective waits for a missing rank.
    """

    def __init__(
        self,
        files: Sequence[Path],
        schema: Schema,
        options: StreamOptions,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Read all footers.

        Raises:
            InputError: a file or the schema is faulty, or world_size does not divide `options.lanes`.
        """
        if options.lanes % world_size:
            raise InputError(
                f"data.lanes = {options.lanes}: wanted a multiple of world_size = {world_size}; set data.lanes to "
                f"{world_size * max(1, round(options.lanes / world_size))}"
            )
        self.files = list(files)
        self.options = options
        self.rank, self.world_size = rank, world_size
        self.encoder = Encoder(schema)
        self.schema = schema
        self.row_groups = read_footers(self.files, schema)
        self.num_rows = sum(row_group.num_rows for row_group in self.row_groups)
        self.keys = Keys(
            [feature.name for feature in schema.sparse], [feature.name for feature in schema.weighted]
        )
        self.cursor = Cursor()

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one epoch, equal for all ranks."""
        lane_rows = -(-self.num_rows // self.options.lanes)
        share = self.options.batch_size // self.options.lanes
        if self.options.order == "chronological":
            return -(-self.num_rows // self.options.batch_size)
        return -(-lane_rows // share)

    def fingerprint(self) -> str:
        """Twelve hex digits of what fixes the order: options, file names and rows. World size is not part of it."""
        groups = [(self.files[group.file].name, group.index, group.num_rows) for group in self.row_groups]
        options = (
            self.options.batch_size,
            self.options.lanes,
            self.options.order,
            self.options.window_rows,
            self.options.seed,
        )
        return hashlib.sha256(repr((groups, options)).encode()).hexdigest()[:12]

    def state_dict(self, cursor: Cursor | None = None) -> dict[str, int | str]:
        """The position as two integers and a fingerprint. Pass the cursor of the last trained batch where a pipeline reads ahead."""
        cursor = cursor or self.cursor
        return {"epoch": cursor.epoch, "step": cursor.step, "fingerprint": self.fingerprint()}

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Continue from a saved position.

        Raises:
            InputError: the position belongs to other files or options.
        """
        if state["fingerprint"] != self.fingerprint():
            raise InputError(
                f"stream state {state['fingerprint']}: this run's files or data options give {self.fingerprint()}; "
                "resume with the same files, batch_size, lanes, window_rows and seed"
            )
        self.cursor = Cursor(int(state["epoch"]), int(state["step"]))

    def __iter__(self) -> Iterator[Batch]:
        """Yield the rest of the current epoch; afterwards the cursor stands at the next epoch's start."""
        batches = self._batches(self.cursor)
        for batch in _prefetched(batches, self.options.prefetch) if self.options.prefetch else batches:
            self.cursor = batch.cursor
            yield batch
        self.cursor = Cursor(self.cursor.epoch + 1, 0)

    def _batches(self, cursor: Cursor) -> Iterator[Batch]:
        options = self.options
        row_groups = self.row_groups
        if options.order == "shuffled":
            order = np.random.default_rng([options.seed, cursor.epoch]).permutation(len(row_groups))
            row_groups = [row_groups[index] for index in order]
        lane_bounds = [self.num_rows * lane // options.lanes for lane in range(options.lanes + 1)]
        bounds = [0, self.num_rows] if options.order == "chronological" else lane_bounds
        own = options.lanes // self.world_size
        reader = _WindowReader(
            self, plan_windows(row_groups, bounds, options.window_rows), cursor.epoch, capacity=own + 1
        )
        for step in range(cursor.step, self.steps_per_epoch):
            spans = [rows_of_step(options, self.num_rows, step, lane) for lane in range(options.lanes)]
            per_rank = [
                sum(stop - start for start, stop in spans[rank * own : (rank + 1) * own])
                for rank in range(self.world_size)
            ]
            num_rows = max(per_rank)
            parts = [
                part
                for start, stop in spans[self.rank * own : (self.rank + 1) * own]
                for part in reader.rows(start, stop)
            ]
            columns = concatenate(parts) if parts else reader.no_rows(spans)
            weight = self.world_size * num_rows / sum(per_rank)
            next_cursor = Cursor(cursor.epoch, step + 1)
            yield to_batch(columns, self.keys, num_rows=num_rows, weight=weight, cursor=next_cursor)


class _WindowReader:
    """Decodes windows on demand and keeps the last few, one for each lane."""

    def __init__(self, stream: ParquetStream, windows: list[Window], epoch: int, capacity: int) -> None:
        self.stream, self.windows, self.epoch, self.capacity = stream, windows, epoch, capacity
        self.starts = [window.first_row for window in windows]
        self.decoded: OrderedDict[int, tuple[Columns, np.ndarray]] = OrderedDict()

    def rows(self, start: int, stop: int) -> Iterator[Columns]:
        """Yield rows [start, stop) of the epoch's sequence."""
        while start < stop:
            index = bisect_right(self.starts, start) - 1
            window = self.windows[index]
            columns, permutation = self._window(index)
            last = min(stop, window.first_row + window.num_rows)
            yield take(columns, permutation[start - window.first_row : last - window.first_row])
            start = last

    def no_rows(self, spans: list[tuple[int, int]]) -> Columns:
        """Return zero rows with the right fields, for a rank that the last global batch leaves without any."""
        start = next(start for start, stop in spans if stop > start)
        columns, _ = self._window(bisect_right(self.starts, start) - 1)
        return take(columns, np.zeros(0, np.int64))

    def _window(self, index: int) -> tuple[Columns, np.ndarray]:
        if index in self.decoded:
            self.decoded.move_to_end(index)
            return self.decoded[index]
        window = self.windows[index]
        columns = concatenate([self._decode(segment) for segment in window.segments])
        permutation = np.arange(window.num_rows)
        if self.stream.options.order == "shuffled":
            permutation = np.random.default_rng(
                [self.stream.options.seed, self.epoch, window.first_row]
            ).permutation(window.num_rows)
        self.decoded[index] = (columns, permutation)
        while len(self.decoded) > self.capacity:
            self.decoded.popitem(last=False)
        return columns, permutation

    def _decode(self, segment: Segment) -> Columns:
        file = self.stream.files[segment.row_group.file]
        try:
            with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
                table = parquet.read_row_group(
                    segment.row_group.index, columns=list(self.stream.schema.columns), use_threads=False
                )
        except (OSError, pa.ArrowException) as error:
            reason = (str(error).splitlines() or ["unreadable"])[0]
            raise InputError(
                f"{file}: row group {segment.row_group.index} cannot be decoded ({reason}); the file is damaged: write it again"
            ) from None
        rows = table.slice(segment.start, segment.stop - segment.start).combine_chunks()
        batch = rows.to_batches()[0]
        return self.stream.encoder.encode(batch, Place(str(file), segment.row_group.index, segment.start))


def _prefetched(batches: Iterator[Batch], depth: int) -> Iterator[Batch]:
    """Decode ahead in a thread; Arrow and NumPy release the interpreter's lock while they work. Errors are raised in the caller."""
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=depth)
    abandoned = threading.Event()

    def put(item: Batch | BaseException | None) -> bool:
        while not abandoned.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        try:
            for batch in batches:
                if not put(batch):
                    return
            put(None)
        except BaseException as error:
            put(error)

    threading.Thread(target=produce, daemon=True, name="parquet-prefetch").start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        abandoned.set()
