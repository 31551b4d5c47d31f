"""Which rank reads which rows in which order: a pure function of files, options, epoch and step.

All rows of a list of files form one sequence of row groups. `lanes` cuts an epoch into that many equal streams; a global batch takes
batch_size / lanes rows of each lane, and a rank owns lanes / world_size neighbouring lanes. So every world size that divides `lanes` sees
the same global batches, and a position is two integers: epoch and step.

    shuffled       row groups permuted by (seed, epoch), cut into lanes; each lane's rows permuted in windows of about `window_rows`
    partitioned    file order, cut into lanes: each row is decoded once; for evaluation, where order does not matter
    chronological  global batch t is rows [t * B, (t + 1) * B) of the files in order; each rank decodes every row group it touches

"Rows" are the rows that the options keep (`where`, `keep_negatives`, `drop_positives`): which ones a row group keeps is a pure function too
(data/reading/selection.py), and counted before the first batch.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from data.reading.config import StreamOptions
from data.reading.decode import Window
from data.reading.files import RowGroup


@dataclass(frozen=True)
class Cursor:
    """A position in a stream: batches of this epoch that come before it. The next batch to read, or to train."""

    epoch: int = 0
    step: int = 0


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
    segments: list[tuple[RowGroup, int, int]] = []
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
            segments.append((row_group, start, stop))
            position += stop - start
            start = stop
            if position == bounds[lane + 1] or position - first >= target():
                close()
    close()
    return windows


def _van_der_corput(index: int) -> float:
    """Reverse the bits of `index` behind the point: 0, 1/2, 1/4, 3/4, 1/8, ... Neighbours lie far apart."""
    return int(f"{index:b}"[::-1], 2) / 2 ** index.bit_length()


def steps_per_epoch(options: StreamOptions, total: int) -> int:
    """Return the number of global batches that hold `total` rows."""
    if options.order == "chronological":
        return -(-total // options.batch_size)
    lane_rows = -(-total // options.lanes)
    return -(-lane_rows // (options.batch_size // options.lanes))


def spans_of_rank(options: StreamOptions, total: int, step: int, rank: int, world_size: int) -> list[tuple[int, int]]:
    """Return the rows of the epoch's sequence that `rank` trains at `step`, one [start, stop) for each of its lanes."""
    lanes, share, bounds = options.lanes, options.batch_size // options.lanes, lane_bounds(options, total)

    def span(lane: int) -> tuple[int, int]:
        if options.order == "chronological":
            first = step * options.batch_size
            rows = max(0, min(options.batch_size, total - first))
            return first + rows * lane // lanes, first + rows * (lane + 1) // lanes
        start, stop = bounds[lane], bounds[lane + 1]
        return min(start + step * share, stop), min(start + (step + 1) * share, stop)

    own = lanes // world_size
    return [span(lane) for lane in range(rank * own, (rank + 1) * own)]


def windows_of_spans(starts: Sequence[int], spans: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """Cut spans at windows: yield (window, start, stop), for windows that begin at the ascending rows `starts`."""
    for start, stop in spans:
        while start < stop:
            index = bisect_right(starts, start) - 1
            end = min(stop, starts[index + 1]) if index + 1 < len(starts) else stop
            yield index, start, end
            start = end


def first_uses(cuts: Iterable[Sequence[tuple[int, int, int]]]) -> Iterator[int]:
    """Yield the windows that the cuts of one step after the other use, each once, in the order of its first use."""
    before: set[int] = set()
    for step in cuts:
        used = dict.fromkeys(index for index, _, _ in step)
        yield from (index for index in used if index not in before)
        before = set(used)
