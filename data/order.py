"""Which rank reads which rows in which order: a pure function of files, options, epoch and step. Imports no torch.

All rows of a list of files form one sequence of row groups. `lanes` cuts an epoch into that many equal
streams; a global batch takes batch_size / lanes rows of each lane, and a rank owns lanes / world_size
neighbouring lanes. So every world size that divides `lanes` sees the same global batches, and a position is
two integers: epoch and step.

    shuffled       row groups permuted by (seed, epoch), cut into lanes; each lane's rows permuted in windows
                   of `window_rows`
    partitioned    file order, cut into lanes: each row is decoded once; for evaluation, where order does not
                   matter
    chronological  global batch t is rows [t * B, (t + 1) * B) of the files in order; each rank decodes every
                   row group it touches
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from data.errors import InputError

Order = Literal["shuffled", "partitioned", "chronological"]


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
        window_rows: rows that are permuted together, and kept decoded, in each lane.
        seed: of the permutations.
        prefetch: batches decoded ahead by a thread; 0 decodes in the caller.
    """

    batch_size: int = 1024
    lanes: int = 4
    order: Order = "shuffled"
    window_rows: int = 65_536
    seed: int = 0
    prefetch: int = 2

    def __post_init__(self) -> None:
        """Refuse sizes that cannot be dealt out evenly."""
        for name in ("batch_size", "lanes", "window_rows"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} = {getattr(self, name)}: wanted 1 or more; raise it")
        if self.batch_size % self.lanes:
            near = max(self.lanes, self.batch_size - self.batch_size % self.lanes)
            raise InputError(
                f"batch_size = {self.batch_size}: wanted a multiple of lanes = {self.lanes}; use {near}"
            )


class RowGroup(NamedTuple):
    """One row group of one file."""

    file: int
    index: int
    num_rows: int


class Segment(NamedTuple):
    """Rows [start, stop) of a row group."""

    row_group: RowGroup
    start: int
    stop: int


class Window(NamedTuple):
    """Neighbouring rows that are decoded, and in shuffled order permuted, together. `first_row`: place in the epoch's sequence."""

    first_row: int
    num_rows: int
    segments: tuple[Segment, ...]


def plan_windows(row_groups: Sequence[RowGroup], bounds: Sequence[int], window_rows: int) -> list[Window]:
    """Cut a sequence of row groups at `bounds` (ascending rows, from 0 to the total) and into windows of about `window_rows`.

    A window ends where a lane ends, or where a row group ends once it holds `window_rows`.
    """
    windows: list[Window] = []
    segments: list[Segment] = []
    position = first = 0
    cuts = list(bounds[1:])

    def close() -> None:
        nonlocal segments, first
        if segments:
            windows.append(Window(first, position - first, tuple(segments)))
        segments, first = [], position

    for row_group in row_groups:
        start = 0
        while start < row_group.num_rows:
            while cuts and cuts[0] <= position:
                cuts.pop(0)
            stop = min(
                row_group.num_rows,
                start + (cuts[0] - position),
                start + max(1, window_rows - (position - first)),
            )
            segments.append(Segment(row_group, start, stop))
            position += stop - start
            start = stop
            if (cuts and position == cuts[0]) or position - first >= window_rows:
                close()
    close()
    return windows


def rows_of_step(options: StreamOptions, total: int, step: int, lane: int) -> tuple[int, int]:
    """Return rows [start, stop) of the epoch's sequence that `lane` adds to global batch `step`."""
    lanes, share = options.lanes, options.batch_size // options.lanes
    if options.order == "chronological":
        first = step * options.batch_size
        rows = max(0, min(options.batch_size, total - first))
        return first + rows * lane // lanes, first + rows * (lane + 1) // lanes
    start, stop = total * lane // lanes, total * (lane + 1) // lanes
    return min(start + step * share, stop), min(start + (step + 1) * share, stop)
