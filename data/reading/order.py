"""Which rank reads which rows in which order: a pure function of files, options, epoch and step. Imports no torch.

All rows of a list of files form one sequence of row groups. `lanes` cuts an epoch into that many equal
streams; a global batch takes batch_size / lanes rows of each lane, and a rank owns lanes / world_size
neighbouring lanes. So every world size that divides `lanes` sees the same global batches, and a position is
two integers: epoch and step.

    shuffled       row groups permuted by (seed, epoch), cut into lanes; each lane's rows permuted in windows
                   of about `window_rows`
    partitioned    file order, cut into lanes: each row is decoded once; for evaluation, where order does not
                   matter
    chronological  global batch t is rows [t * B, (t + 1) * B) of the files in order; each rank decodes every
                   row group it touches

"Rows" are the rows that the options keep (`where`, `keep_negatives`, `drop_positives`): which ones a row group keeps is
a pure function too (data/reading/selection.py), and counted before the first batch.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from data.errors import InputError

Order = Literal["shuffled", "partitioned", "chronological"]
NegativeWeights = Literal["none", "importance"]
DEPTH = 2  # batches that are made ahead where nothing else is asked for
SMALL_BATCH = 2**16  # values; see StreamOptions.prefetch
LONGEST_WAIT_SECONDS = 30 * 24 * 3600  # Python's clocks take no more than some centuries


@dataclass(frozen=True)
class Cursor:
    """A position in a stream: batches of this epoch that come before it. The next batch to read, or to train."""

    epoch: int = 0
    step: int = 0


@dataclass(frozen=True)
class StreamOptions:
    """How files become batches.

    Attributes:
        batch_size: rows of a global batch, over all ranks.
        lanes: independent streams that a global batch is made of; a multiple of every world size that shall see the same batches.
        order: shuffled, partitioned or chronological.
        window_rows: rows that are permuted together, and kept decoded, in each lane. A window ends with a row group, so it may be
            longer by less than one row group; only row groups longer than this are cut.
        seed: of the permutations and of the sampling.
        prefetch: batches made ahead by a thread; 0 makes them in the caller. -1 chooses DEPTH; but 0 where workers decode and a
            rank's batch has fewer than SMALL_BATCH values: two threads that want the interpreter's lock are no faster at it than one.
        workers: threads that decode windows ahead of their use; 0 decodes each window when its first row is needed. Threads and not
            processes: Arrow and NumPy release the interpreter's lock, and decoded rows need no copy between processes.
        where: conditions `NAME OP BOUND`, all of which a row must meet: see data/reading/selection.py.
        keep_negatives: share of the rows of label 0 that are kept, in (0, 1].
        negative_weights: what makes up for dropped negatives: "importance" weighs each kept one by 1 / keep_negatives
            (weights average 1 over the epoch), "none" leaves predictions too high by a constant: see `logit_correction`.
        drop_positives: share of the rows of label 1 that are left out, in [0, 1): positives that were never observed (Table 7).
        require_checksum: refuse files whose pages carry no checksum; without it they are read after one warning.
        timeout_seconds: how long a batch may keep its reader waiting before the stream gives up, naming what it waits for.
        attempts: how often a remote read is tried, with growing pauses, before the stream gives up.
    """

    batch_size: int = 1024
    lanes: int = 4
    order: Order = "shuffled"
    window_rows: int = 65_536
    seed: int = 0
    prefetch: int = -1
    workers: int = 0
    where: tuple[str, ...] = ()
    keep_negatives: float = 1.0
    negative_weights: NegativeWeights = "none"
    drop_positives: float = 0.0
    require_checksum: bool = False
    timeout_seconds: float = 600.0
    attempts: int = 5

    def __post_init__(self) -> None:
        """Refuse sizes that cannot be dealt out evenly, and shares that are none."""
        for name in ("batch_size", "lanes", "window_rows", "attempts"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} = {getattr(self, name)}: wanted 1 or more; raise it")
        for name, least in (("seed", 0), ("prefetch", -1), ("workers", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} = {getattr(self, name)}: wanted {least} or more; raise it")
        if not 0 < self.keep_negatives <= 1:
            raise InputError(f"keep_negatives = {self.keep_negatives}: wanted a share in (0, 1]; 1 keeps all")
        if not 0 <= self.drop_positives < 1:
            raise InputError(
                f"drop_positives = {self.drop_positives}: wanted a share in [0, 1); 0 drops none"
            )
        if self.negative_weights == "importance" and self.keep_negatives == 1:
            raise InputError(
                "negative_weights = 'importance': keep_negatives = 1 drops no negative that a weight could make up for; "
                "lower keep_negatives, or use negative_weights = 'none'"
            )
        if not 0 < self.timeout_seconds <= LONGEST_WAIT_SECONDS:
            raise InputError(
                f"timeout_seconds = {self.timeout_seconds}: wanted more than 0 and at most {LONGEST_WAIT_SECONDS:,}; change it"
            )
        if self.batch_size % self.lanes:
            near = max(self.lanes, self.batch_size - self.batch_size % self.lanes)
            raise InputError(
                f"batch_size = {self.batch_size}: wanted a multiple of lanes = {self.lanes}; use {near}"
            )

    def depth(self, values: int) -> int:
        """Batches made ahead. `values`: fields times rows of a rank's batch."""
        if self.prefetch >= 0:
            return self.prefetch
        return 0 if self.workers and values < SMALL_BATCH else DEPTH

    @property
    def logit_correction(self) -> float:
        """What to add to a logit learned from sampled rows to get the logit of the full log.

        Keeping a share w of the negatives divides the odds' denominator by w, so the true logit is z + log(w); importance weights have
        made up for that already. Dropped positives are taken as never observed: their share needs no correction.
        """
        return 0.0 if self.negative_weights == "importance" else math.log(self.keep_negatives)


class RowGroup(NamedTuple):
    """One row group of one file. `num_rows`: the rows that are kept; `stored_rows`: all of them."""

    file: int
    index: int
    num_rows: int
    stored_rows: int


class Segment(NamedTuple):
    """Kept rows [start, stop) of a row group."""

    row_group: RowGroup
    start: int
    stop: int


class Window(NamedTuple):
    """Neighbouring rows that are decoded, and in shuffled order permuted, together. `first_row`: place in the epoch's sequence."""

    lane: int
    first_row: int
    num_rows: int
    segments: tuple[Segment, ...]


def lane_bounds(options: StreamOptions, total: int) -> list[int]:
    """Return the rows of the epoch's sequence where lanes begin, and the total."""
    if options.order == "chronological":
        return [0, total]
    return [total * lane // options.lanes for lane in range(options.lanes + 1)]


def plan_windows(row_groups: Sequence[RowGroup], bounds: Sequence[int], window_rows: int) -> list[Window]:
    """Cut a sequence of row groups at `bounds` (ascending rows, from 0 to the total) and into windows of about `window_rows`.

    A window ends where a lane ends, or where a row group ends once it holds `window_rows`; row groups longer than that are cut.
    The first window of each lane is shorter by another amount, so that lanes do not all need a new window at the same step.
    """
    windows: list[Window] = []
    segments: list[Segment] = []
    position = first = lane = 0

    def target() -> int:
        starts = first == bounds[lane]
        return max(1, int(window_rows * (1 - _van_der_corput(lane)))) if starts else window_rows

    def close() -> None:
        nonlocal segments, first
        if segments:
            windows.append(Window(lane, first, position - first, tuple(segments)))
        segments, first = [], position

    for row_group in row_groups:
        start = 0
        while start < row_group.num_rows:
            while bounds[lane + 1] <= position:
                lane += 1
            stop = min(row_group.num_rows, start + bounds[lane + 1] - position)
            if row_group.num_rows > window_rows:
                stop = min(stop, start + max(1, target() - (position - first)))
            segments.append(Segment(row_group, start, stop))
            position += stop - start
            start = stop
            if position == bounds[lane + 1] or position - first >= target():
                close()
    close()
    return windows


def _van_der_corput(index: int) -> float:
    """Reverse the bits of `index` behind the point: 0, 1/2, 1/4, 3/4, 1/8, ... Neighbours lie far apart."""
    value, unit = 0.0, 0.5
    while index:
        value += unit * (index & 1)
        index, unit = index >> 1, unit / 2
    return value


def steps_per_epoch(options: StreamOptions, total: int) -> int:
    """Return the number of global batches that hold `total` rows."""
    if options.order == "chronological":
        return -(-total // options.batch_size)
    lane_rows = -(-total // options.lanes)
    return -(-lane_rows // (options.batch_size // options.lanes))


def rows_of_step(options: StreamOptions, total: int, step: int, lane: int) -> tuple[int, int]:
    """Return rows [start, stop) of the epoch's sequence that `lane` adds to global batch `step`."""
    lanes, share = options.lanes, options.batch_size // options.lanes
    if options.order == "chronological":
        first = step * options.batch_size
        rows = max(0, min(options.batch_size, total - first))
        return first + rows * lane // lanes, first + rows * (lane + 1) // lanes
    start, stop = total * lane // lanes, total * (lane + 1) // lanes
    return min(start + step * share, stop), min(start + (step + 1) * share, stop)


def spans_of_rank(
    options: StreamOptions, total: int, step: int, rank: int, world_size: int
) -> list[tuple[int, int]]:
    """Return the rows of the epoch's sequence that `rank` trains at `step`, one [start, stop) for each of its lanes."""
    own = options.lanes // world_size
    return [rows_of_step(options, total, step, lane) for lane in range(rank * own, (rank + 1) * own)]


def windows_of_spans(
    starts: Sequence[int], spans: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, int, int]]:
    """Cut spans at windows: yield (window, start, stop), for windows that begin at the ascending rows `starts`."""
    for start, stop in spans:
        while start < stop:
            index = bisect_right(starts, start) - 1
            end = min(stop, starts[index + 1]) if index + 1 < len(starts) else stop
            yield index, start, end
            start = end
