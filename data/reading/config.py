"""DataConfig and StreamOptions: how files become batches, as `[data]` of a run's TOML says it and as one stream takes it."""

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from data.errors import InputError
from data.schema.bounds import Bounded, bounded

Order = Literal["shuffled", "partitioned", "chronological"]
NegativeWeights = Literal["none", "importance"]
DEPTH = 2  # batches that are made ahead where nothing else is asked for
SMALL_BATCH = 2**16  # values; see StreamOptions.prefetch
LONGEST_WAIT_SECONDS = 30 * 24 * 3600  # Python's clocks take no more than some centuries


@dataclass(frozen=True)
class StreamOptions(Bounded):
    """How files become batches.

    Attributes:
        batch_size: rows of a global batch, over all ranks.
        lanes: independent streams that a global batch is made of; a multiple of every world size that shall see the same batches.
        order: shuffled, partitioned or chronological, see data/stream/order.py.
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
        require_checksum: refuse files whose pages carry no checksum, so that damage to them could go unseen (Spark and pyarrow write none unless told to).
        timeout_seconds: how long a batch may keep its reader waiting before the stream fails, naming what it waits for.
        attempts: how often a remote read is tried, with growing pauses, before the stream fails.
    """

    batch_size: int = bounded(1024, at_least=1)
    lanes: int = bounded(4, at_least=1)
    order: Order = "shuffled"
    window_rows: int = bounded(65_536, at_least=1)
    seed: int = bounded(0, at_least=0)
    prefetch: int = bounded(-1, at_least=-1)
    workers: int = bounded(0, at_least=0)
    where: tuple[str, ...] = ()
    keep_negatives: float = bounded(1.0, above=0, at_most=1, wanted="a share in (0, 1]")
    negative_weights: NegativeWeights = "none"
    drop_positives: float = bounded(0.0, at_least=0, below=1, wanted="a share in [0, 1)")
    require_checksum: bool = False
    timeout_seconds: float = bounded(600.0, above=0, at_most=LONGEST_WAIT_SECONDS)
    attempts: int = bounded(5, at_least=1)

    def __post_init__(self) -> None:
        """Refuse sizes that cannot be dealt out evenly, and a weight for what is not dropped."""
        super().__post_init__()
        if self.negative_weights == "importance" and self.keep_negatives == 1:
            raise InputError(
                "negative_weights = 'importance': keep_negatives = 1 drops no negative that a weight could make up for; "
                "lower keep_negatives, or use negative_weights = 'none'"
            )
        self._check_lanes("batch_size")

    def _check_lanes(self, name: str) -> None:
        rows = getattr(self, name)
        if rows % self.lanes:
            near = max(self.lanes, rows - rows % self.lanes)
            raise InputError(f"{name} = {rows}: wanted a multiple of lanes = {self.lanes}; use {near}")

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


@dataclass(frozen=True, kw_only=True)
class DataConfig(StreamOptions):
    """The keys of `[data]`: which rows, in which order. What it shares with StreamOptions is declared there; sampling is of training rows.

    Attributes:
        train, valid, test: Parquet files, folders, globs or URIs (s3://bucket/folder), relative to the working directory. valid
            and test may be empty.
        train_where, valid_where, test_where: conditions on the rows of each split, such as "ds < last 7": see data/reading/selection.py.
        eval_batch_size: rows of a global evaluation batch; 0: batch_size.
    """

    train: tuple[str, ...]
    valid: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    eval_batch_size: int = bounded(0, at_least=0)
    train_where: tuple[str, ...] = ()
    valid_where: tuple[str, ...] = ()
    test_where: tuple[str, ...] = ()
    workers: int = bounded(1, at_least=0)
    # Not keys of [data]: the seed is train.seed, and each split has conditions of its own.
    seed: int = field(default=0, init=False)
    where: tuple[str, ...] = field(default=(), init=False)

    def __post_init__(self) -> None:
        """Refuse what StreamOptions refuses, and a run without training files."""
        if not self.train:
            raise InputError("train = []: wanted at least one Parquet file or folder; add it")
        super().__post_init__()
        self._check_lanes("eval_batch_size")

    def train_options(self, seed: int) -> StreamOptions:
        """Options of the training stream."""
        return self._stream_options(seed=seed, where=self.train_where)

    def eval_options(self, where: tuple[str, ...] = ()) -> StreamOptions:
        """Options of an evaluation stream: every row that meets the conditions, once, in file order."""
        return self._stream_options(
            where=where,
            batch_size=self.eval_batch_size or self.batch_size,
            order="partitioned",
            keep_negatives=1.0,
            negative_weights="none",
            drop_positives=0.0,
        )

    def _stream_options(self, **changes: Any) -> StreamOptions:
        own = {option.name: getattr(self, option.name) for option in fields(StreamOptions)}
        return StreamOptions(**own | changes)
