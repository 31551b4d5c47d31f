"""ParquetStream: row groups -> batches of one rank, in the order that data/stream/order.py fixes, from a cursor on."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import islice

import numpy as np

from data.errors import InputError
from data.reading.columns import Columns
from data.reading.conditions import select_files
from data.reading.config import StreamOptions
from data.reading.decode import Decoder
from data.reading.encode import Encoder
from data.reading.files import read_contents
from data.reading.selection import Selection
from data.reading.storage import DataFile
from data.schema import Schema
from data.stream.batch import Batch, Run, gather
from data.stream.order import (
    Cursor,
    first_uses,
    lane_bounds,
    plan_windows,
    spans_of_rank,
    steps_per_epoch,
    windows_of_spans,
)
from data.stream.permuted import Permuted
from data.stream.prefetch import TimeLimit, Workers, prefetched


class ParquetStream:
    """Iterates the batches of one rank, one epoch for each `iter()`, from the cursor on.

    Every rank yields the same number of batches. The last global batch holds what is left: each rank gets the same number of rows,
    padded with rows of weight 0 (see `Batch.weights`), so nothing is dropped and no collective waits for a missing rank.

    Attributes:
        num_rows: kept rows of all files.
        on_rows: called before rows are read, in the thread that reads them; tests inject faults there.
        on_batch: returns the batch to use for each that was made, in the thread that makes it: for a GPU, in pinned memory.
        counters: field -> values that its `on_invalid` changed, in the windows that this rank has decoded for its batches.
        nulls: field -> rows without a value, in the same windows.
    """

    def __init__(
        self, files: Sequence[DataFile], schema: Schema, options: StreamOptions, rank: int = 0, world_size: int = 1
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
        self.encoder = Encoder(schema, Permuted)
        self.selection = Selection(options, schema, self.files)
        self.row_groups, label_counts = read_contents(self.files, schema, self.selection)
        self.num_rows = sum(row_group.num_rows for row_group in self.row_groups)
        self.label_weights = _label_weights(options, *label_counts)
        self.cursor = Cursor()
        self.on_rows: Callable[[], None] = lambda: None
        self.on_batch: Callable[[Batch], Batch] = lambda batch: batch
        self.counters: Counter[str] = Counter()
        self.nulls: Counter[str] = Counter()

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one epoch, equal for all ranks."""
        return steps_per_epoch(self.options, self.num_rows)

    def fingerprint(self) -> str:
        """Twelve hex digits of what fixes the order: options, file names, kept rows and the versions of tables. World size and workers are not part of it."""
        groups = [(self.files[group.file].name, group.index, group.num_rows) for group in self.row_groups]
        options = self.options
        fixed = (options.batch_size, options.lanes, options.order, options.window_rows, options.seed)
        chosen = (options.where, options.keep_negatives, options.drop_positives)
        versions = (tuple(self.files.versions),) if self.files.versions else ()
        return hashlib.sha256(repr((groups, fixed, chosen, *versions)).encode()).hexdigest()[:12]

    def state_dict(self, cursor: Cursor | None = None) -> dict[str, int | str]:
        """The position as two integers and a fingerprint. Pass the cursor of the last trained batch where a pipeline reads ahead."""
        cursor = cursor or self.cursor
        return {"epoch": cursor.epoch, "step": cursor.step, "fingerprint": self.fingerprint()}

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Continue from a saved position; InputError if the position belongs to other files or options."""
        found = state.get("fingerprint")
        if found != self.fingerprint():
            raise InputError(
                f"stream state {str(found)[:80]}: this run's files or data options give {self.fingerprint()}; "
                "resume with the same files, batch_size, lanes, order, window_rows, seed, where and sampling"
            )
        try:
            self.cursor = Cursor(int(state["epoch"]), int(state["step"]))
        except (KeyError, TypeError, ValueError):
            raise InputError("stream state: epoch and step are not integers; use another checkpoint") from None

    def __iter__(self) -> Iterator[Batch]:
        """Yield the rest of the current epoch; afterwards the cursor stands at the next epoch's start.

        With prefetch or workers no batch is waited for longer than `timeout_seconds`; without both, the caller reads and waits itself.
        InputError if a file is damaged, a value is faulty, or no rows came in time; named by file and row group.
        """
        decoder = Decoder(self.files, self.encoder, self.selection, self.on_rows)
        limit = TimeLimit(self.options.timeout_seconds, lambda: sorted(set(decoder.reading.copy().values())))
        batches = map(self.on_batch, self._batches(self.cursor, decoder, limit))
        depth = self.options.depth(self.options.batch_size // self.world_size * len(self.schema.features))
        for batch in prefetched(batches, depth, limit) if depth else batches:
            self.cursor = batch.cursor
            yield batch
        self.cursor = Cursor(self.cursor.epoch + 1, 0)

    def _batches(self, cursor: Cursor, decoder: Decoder, limit: TimeLimit) -> Iterator[Batch]:
        options, row_groups = self.options, self.row_groups
        is_shuffled = options.order == "shuffled"
        if is_shuffled:
            order = np.random.default_rng([options.seed, cursor.epoch]).permutation(len(row_groups))
            row_groups = [row_groups[index] for index in order]
        windows = plan_windows(row_groups, lane_bounds(options, self.num_rows), options.window_rows)
        starts = [window.first_row for window in windows]

        def cuts_of(step: int) -> list[tuple[int, int, int]]:
            """The rows that this rank trains at a step, cut at windows: (window, start, stop)."""
            spans = self._spans(step, self.rank) if step < self.steps_per_epoch else []
            return list(windows_of_spans(starts, spans))

        upcoming = first_uses(map(cuts_of, range(cursor.step, self.steps_per_epoch)))
        results: dict[int, Callable[[], Columns]] = {}  # of windows that are not in use yet
        decoded: dict[int, Columns] = {}  # windows in use
        cuts = cuts_of(cursor.step)
        with closing(Workers(options.workers, limit)) as workers:
            for step in range(cursor.step, self.steps_per_epoch):
                used = dict.fromkeys(index for index, _, _ in cuts)
                missing = len(used.keys() - decoded.keys() - results.keys())
                ahead = workers.threads + 1 - len(results.keys() - used.keys()) if workers.threads else 0
                for index in islice(upcoming, missing + max(0, ahead)):
                    window = windows[index]
                    seed = [options.seed, cursor.epoch, window.first_row] if is_shuffled else None
                    results[index] = workers.begin(decoder.task(window, seed))
                for index in [index for index in used if index not in decoded]:
                    decoded[index] = results.pop(index)()
                    self.counters.update(decoded[index].repaired)
                    self.nulls.update(decoded[index].nulls or ())
                runs = [(decoded[index], start - starts[index], stop - starts[index]) for index, start, stop in cuts]
                yield self._batch(runs, step, Cursor(cursor.epoch, step + 1))
                # A lane moves on and never back: what the next step does not use is never used again.
                cuts = cuts_of(step + 1)
                for index in decoded.keys() - {index for index, _, _ in cuts}:
                    del decoded[index]

    def _batch(self, runs: list[Run], step: int, cursor: Cursor) -> Batch:
        """Join rows to this rank's batch of a step, padded where another rank has more rows."""
        per_rank = [sum(stop - start for start, stop in self._spans(step, rank)) for rank in range(self.world_size)]
        num_rows, real = max(per_rank), per_rank[self.rank]
        weight = self.world_size * num_rows / sum(per_rank)
        negative, positive = self.label_weights
        batch = gather(runs or [(self.encoder.encode_all([]), 0, 0)], num_rows, self.schema, cursor)
        if (weight * negative, weight * positive) != (1.0, 1.0):
            labels = batch.labels.numpy().reshape(num_rows, -1)[:, 0]  # of several labels no row has a weight by label
            batch.weights.numpy()[:real] *= np.where(labels[:real] == 1, weight * positive, weight * negative)
        return batch

    def _spans(self, step: int, rank: int) -> list[tuple[int, int]]:
        return spans_of_rank(self.options, self.num_rows, step, rank, self.world_size)


def _label_weights(options: StreamOptions, negatives: int, positives: int) -> tuple[float, float]:
    """Weights of a negative and of a positive row: 1 / keep_negatives and 1, scaled to average 1 over the kept rows."""
    if options.negative_weights == "none":
        return 1.0, 1.0
    scale = (negatives + positives) / (negatives / options.keep_negatives + positives)
    return scale / options.keep_negatives, scale
