"""ParquetStream: row groups -> batches of one rank, in the order that data/reading/order.py fixes, from a cursor on."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from data.errors import InputError
from data.reading.columns import Run, gather
from data.reading.config import StreamOptions
from data.reading.decode import Decoded, Decoder
from data.reading.encode import Encoder
from data.reading.files import read_contents
from data.reading.order import (
    Cursor,
    Window,
    lane_bounds,
    plan_windows,
    spans_of_rank,
    steps_per_epoch,
    windows_of_spans,
)
from data.reading.prefetch import Ahead, Patience, prefetched
from data.reading.selection import Selection, select_files
from data.reading.storage import DataFile
from data.schema import Schema
from data.stream.batch import Batch, Keys, permuted_by_fbgemm, to_batch


class ParquetStream:
    """Iterates the batches of one rank, one epoch for each `iter()`, from the cursor on.

    Every rank yields the same number of batches. The last global batch holds what is left: each rank gets the same number of rows,
    padded with rows of weight 0 (see `Batch.weights`), so nothing is dropped and no collective waits for a missing rank.

    Attributes:
        num_rows: kept rows of all files.
        counters: field -> values that its `on_invalid` mended, in the windows that this rank has decoded for its batches.
    """

    def __init__(
        self,
        files: Sequence[DataFile],
        schema: Schema,
        options: StreamOptions,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Read all footers; with sampling or conditions on time, also the label or the time column, once.

        Raises:
            InputError: a file or the schema is faulty, no row is kept, or world_size does not divide `options.lanes`.
        """
        if options.lanes % world_size:
            raise InputError(
                f"data.lanes = {options.lanes}: wanted a multiple of world_size = {world_size}; set data.lanes to "
                f"{world_size * max(1, round(options.lanes / world_size))}"
            )
        self.files = select_files(files, options.where, schema)
        self.schema, self.options = schema, options
        self.rank, self.world_size = rank, world_size
        self.encoder = Encoder(schema, permuted_by_fbgemm)
        self.selection = Selection(options, schema, self.files)
        self.row_groups, label_counts = read_contents(self.files, schema, self.selection, warn=rank == 0)
        self.num_rows = sum(row_group.num_rows for row_group in self.row_groups)
        self.label_weights = _label_weights(options, *label_counts)
        self.keys = Keys(
            [feature.name for feature in schema.sparse], [feature.name for feature in schema.weighted]
        )
        self.cursor = Cursor()
        self.counters: Counter[str] = Counter()

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one epoch, equal for all ranks."""
        return steps_per_epoch(self.options, self.num_rows)

    def fingerprint(self) -> str:
        """Twelve hex digits of what fixes the order: options, file names and kept rows. World size and workers are not part of it."""
        groups = [(self.files[group.file].name, group.index, group.num_rows) for group in self.row_groups]
        options = self.options
        fixed = (options.batch_size, options.lanes, options.order, options.window_rows, options.seed)
        chosen = (options.where, options.keep_negatives, options.drop_positives)
        return hashlib.sha256(repr((groups, fixed, chosen)).encode()).hexdigest()[:12]

    def state_dict(self, cursor: Cursor | None = None) -> dict[str, int | str]:
        """The position as two integers and a fingerprint. Pass the cursor of the last trained batch where a pipeline reads ahead."""
        cursor = cursor or self.cursor
        return {"epoch": cursor.epoch, "step": cursor.step, "fingerprint": self.fingerprint()}

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Continue from a saved position.

        Raises:
            InputError: the position belongs to other files or options.
        """
        found = state.get("fingerprint")
        if found != self.fingerprint():
            raise InputError(
                f"stream state {str(found)[:80]}: this run's files or data options give {self.fingerprint()}; "
                "resume with the same files, batch_size, lanes, order, window_rows, seed, where and sampling"
            )
        try:
            self.cursor = Cursor(int(state["epoch"]), int(state["step"]))
        except (KeyError, TypeError, ValueError):
            raise InputError("stream state: epoch and step are no numbers; use another checkpoint") from None

    def __iter__(self) -> Iterator[Batch]:
        """Yield the rest of the current epoch; afterwards the cursor stands at the next epoch's start.

        With prefetch or workers no batch is waited for longer than `timeout_seconds`; without both, the caller reads and waits itself.

        Raises:
            InputError: a file is damaged, a value is faulty, or no rows came in time; named by file and row group.
        """
        decoder = Decoder(self.files, self.encoder, self.selection)
        patience = Patience(
            self.options.timeout_seconds, lambda: sorted(set(decoder.reading.copy().values()))
        )
        batches = self._batches(self.cursor, decoder, patience)
        depth = self.options.depth(self.options.batch_size // self.world_size * len(self.schema.features))
        for batch in prefetched(batches, depth, patience) if depth else batches:
            self.cursor = batch.cursor
            yield batch
        self.cursor = Cursor(self.cursor.epoch + 1, 0)

    def _batches(self, cursor: Cursor, decoder: Decoder, patience: Patience) -> Iterator[Batch]:
        options = self.options
        row_groups = self.row_groups
        if options.order == "shuffled":
            order = np.random.default_rng([options.seed, cursor.epoch]).permutation(len(row_groups))
            row_groups = [row_groups[index] for index in order]
        windows = plan_windows(row_groups, lane_bounds(options, self.num_rows), options.window_rows)
        feed = _WindowFeed(self, windows, cursor, decoder, Ahead(options.workers, patience))
        try:
            for step in range(cursor.step, self.steps_per_epoch):
                runs = feed.runs(step)
                per_rank = [
                    sum(stop - start for start, stop in self._spans(step, rank))
                    for rank in range(self.world_size)
                ]
                num_rows = max(per_rank)
                weight = self.world_size * num_rows / sum(per_rank)
                rows = gather(runs or [Run(self.encoder.encode_all([]), 0, 0)], num_rows)
                weights = np.zeros(num_rows, np.float32)
                real = per_rank[self.rank]
                negative, positive = self.label_weights
                weights[:real] = np.where(rows.labels[:real] == 1, weight * positive, weight * negative)
                yield to_batch(rows, self.keys, weights=weights, cursor=Cursor(cursor.epoch, step + 1))
        finally:
            feed.ahead.close()

    def _spans(self, step: int, rank: int) -> list[tuple[int, int]]:
        return spans_of_rank(self.options, self.num_rows, step, rank, self.world_size)


def _label_weights(options: StreamOptions, negatives: int, positives: int) -> tuple[float, float]:
    """Weights of a negative and of a positive row: 1 / keep_negatives and 1, scaled to average 1 over the kept rows."""
    if options.negative_weights == "none":
        return 1.0, 1.0
    scale = (negatives + positives) / (negatives / options.keep_negatives + positives)
    return scale / options.keep_negatives, scale


class _WindowFeed:
    """The decoded windows that a rank's batches are gathered from: those in use, and a few that workers decode ahead."""

    def __init__(
        self,
        stream: ParquetStream,
        windows: list[Window],
        cursor: Cursor,
        decoder: Decoder,
        ahead: Ahead[Decoded],
    ) -> None:
        self.stream, self.windows, self.epoch, self.decoder, self.ahead = (
            stream,
            windows,
            cursor.epoch,
            decoder,
            ahead,
        )
        self.starts = [window.first_row for window in windows]
        self.upcoming = self._first_uses(cursor.step)
        self.given: set[int] = set()  # to be decoded, and not yet used
        self.decoded: dict[int, Decoded] = {}  # in use
        self.over: list[Decoded] = []  # no longer, after this step
        self.next: tuple[int, list[tuple[int, int, int]]] = -1, []  # a step and its cuts

    def runs(self, step: int) -> list[Run]:
        """Return the rows that this rank trains at `step`."""
        while self.over:  # their rows have been copied into the last batch
            self.decoder.memory.give_back(self.over.pop().columns.single_ids)
        cuts = self._cut(step)
        used = list(dict.fromkeys(index for index, _, _ in cuts))
        for index in used:
            while index not in self.given and index not in self.decoded:
                self._give(next(self.upcoming))
        while self.ahead.threads and len(self.given.difference(used)) <= self.ahead.threads:
            following = next(self.upcoming, None)
            if following is None:
                break
            self._give(following)
        kept = {}
        for index in used:
            if index not in self.decoded:
                self.decoded[index] = self.ahead.take(index)
                self.given.discard(index)
                self.stream.counters.update(self.decoded[index].mended)
            kept[index] = self.decoded[index]
        runs = [
            Run(kept[index].columns, start - self.starts[index], stop - self.starts[index])
            for index, start, stop in cuts
        ]
        # A lane moves on and never back: what the next step does not use is never used again.
        self.next = step + 1, list(self._cuts(step + 1))
        following = {index for index, _, _ in self.next[1]}
        for index in [index for index in self.decoded if index not in following]:
            self.over.append(self.decoded.pop(index))
        return runs

    def _give(self, index: int) -> None:
        window, options = self.windows[index], self.stream.options
        seed = [options.seed, self.epoch, window.first_row] if options.order == "shuffled" else None
        self.decoder.expect(window)
        self.given.add(index)
        self.ahead.give(index, lambda: self.decoder.decode(window, seed))

    def _cut(self, step: int) -> list[tuple[int, int, int]]:
        known, cuts = self.next
        return cuts if known == step else list(self._cuts(step))

    def _cuts(self, step: int) -> Iterator[tuple[int, int, int]]:
        if step >= self.stream.steps_per_epoch:
            return iter(())
        return windows_of_spans(self.starts, self.stream._spans(step, self.stream.rank))

    def _first_uses(self, step: int) -> Iterator[int]:
        """Windows in the order in which this rank's batches first need them."""
        before: set[int] = set()
        for later in range(step, self.stream.steps_per_epoch):
            used = {index: None for index, _, _ in self._cuts(later)}
            yield from (index for index in used if index not in before)
            before = set(used)
