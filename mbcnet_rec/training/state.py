"""Where training stands: what a checkpoint keeps besides the model's and optimizers' tensors.

Random numbers are drawn afresh for each (seed, step, rank), so there is no generator state among it.
"""

import hashlib
import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data.errors import InputError
from data.reading.config import Order
from data.schema.parse import parse_dataclass, parse_value
from data.stream import Batch, ParquetStream
from data.stream.order import Cursor
from mbcnet_rec.checkpoints.storage import CheckpointStorage
from mbcnet_rec.logs.metrics_log import Records
from mbcnet_rec.model.objective import Outputs
from mbcnet_rec.runtime.exits import StopRequest
from mbcnet_rec.runtime.process import Process, blamed_on
from mbcnet_rec.runtime.watchdog import Watchdog
from mbcnet_rec.training.config import TrainConfig
from mbcnet_rec.training.hooks import Hooks

PLATEAU_FACTOR = 0.1
# evaluations in a row without a better one, as in the BARS protocol, unless train.patience says otherwise
PLATEAU_PATIENCE = 2


@dataclass
class TrainState:
    """`step` steps are done; the next batch is `cursor`."""

    step: int = 0
    first_step: int = 0  # of the day: that of the first of these training files
    cursor: Cursor = Cursor()
    rows: int = 0  # trained since the day began, of all ranks, that have the first label; `Trainer.save` counts
    clicks: int = 0  # of these
    # (validation AUC or what train.early_stop names, step) of the best evaluations, best first; one without an AUC is none of them
    best: list[tuple[float, int]] = field(default_factory=list)
    bad_evaluations: int = 0  # in a row that did not improve
    lr_scale: float = 1.0  # factor on every learning rate
    stopped: bool = False  # early stop
    evaluated_step: int = -1  # of the last evaluation; a checkpoint may be older than the evaluation of its step
    skipped: int = 0  # steps whose loss was not finite and that were passed over
    # running moments of the logged losses, for the alarm
    loss_mean: float = 0.0
    loss_variance: float = 0.0
    loss_lines: int = 0

    @property
    def best_auc(self) -> float:
        """Of the best evaluation; minus infinity before the first."""
        return self.best[0][0] if self.best else float("-inf")

    @property
    def best_step(self) -> int:
        """Of the best evaluation; -1 before the first."""
        return self.best[0][1] if self.best else -1

    def begin_day(self) -> None:
        """Go on with other training files: their first row is next, and which evaluation is the best begins anew."""
        self.first_step, self.cursor, self.rows, self.clicks = self.step, Cursor(), 0, 0
        self.best, self.bad_evaluations, self.stopped = [], 0, False

    def note_evaluation(self, auc: float, train: TrainConfig) -> bool:
        """Put an evaluation of this step among the best; slow down and stop as the config says; return whether it is the best so far.

        Where the AUC is NaN, because it is not defined, nothing is decided.
        """
        if math.isnan(auc):
            return False
        better = not self.best or auc > self.best_auc
        ranked = sorted([*self.best, (auc, self.step)], key=lambda pair: (pair[0], -pair[1]))[::-1]
        self.best = ranked[: train.keep_best]
        if better:
            self.bad_evaluations = 0
            return True
        self.bad_evaluations += 1
        plateau = train.schedule == "plateau"
        if plateau:
            self.lr_scale *= PLATEAU_FACTOR
        patience = train.patience or (PLATEAU_PATIENCE if plateau else 0)
        self.stopped = bool(patience) and self.bad_evaluations >= patience
        return False

    def to_json(self) -> dict[str, Any]:
        """JSON values of all fields."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "TrainState":
        """Inverse of to_json. The values are untrusted input.

        Raises:
            InputError: they are not a state of training.
        """
        where = "state of training"
        try:
            plain = {key: value for key, value in values.items() if key != "best"}
            state = parse_dataclass(cls, plain, where)
            # earlier versions ranked evaluations without an AUC too, as null
            ranked = [(auc, step) for auc, step in values["best"] if auc is not None]
            state.best = [
                (parse_value(float, auc, where, "best"), parse_value(int, step, where, "best")) for auc, step in ranked
            ]
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise InputError(f"{where}: {str(error)[:200]}; use another checkpoint") from None
        return state


@dataclass
class Window:
    """What has come in since the last line of metrics.jsonl, or since this start: a checkpoint does not keep it."""

    first_step: int = 0
    waited: float = 0.0
    stalled: float = 0.0
    started: float = field(default_factory=time.perf_counter)
    outputs: list[Outputs] = field(default_factory=list)
    grad_norm: Tensor | None = None
    gradient_shares: dict[str, Tensor] = field(default_factory=dict)


class Feed:
    """Batches of a stream, epoch after epoch, with the time that the trainer waits for them.

    TorchRec's pipeline takes batches before it trains them; `trained` hands out their cursors in order.
    """

    def __init__(self, stream: ParquetStream, process: Process) -> None:
        self._stream = stream
        self._process = process
        self._ahead: deque[tuple[Cursor, Tensor, Tensor]] = deque()  # of batches that are not trained yet
        self._rows = self._clicks = torch.zeros((), dtype=torch.int64)
        self.waited = 0.0
        self._batches = self._endless()

    def _endless(self) -> Generator[Batch, None, None]:
        while True:
            yield from self._stream

    def take(self, steps: int) -> Iterator[Batch]:
        """Yield the next `steps` batches."""
        for _ in range(steps):
            start = time.perf_counter()
            with blamed_on(self._process):
                batch = next(self._batches)
            self.waited += time.perf_counter() - start
            first, weights = batch.labels, batch.weights
            if first.ndim > 1:  # of several labels, which may be null
                first = first[:, 0]
                weights = weights.where(first.isfinite(), 0)
            self._ahead.append((batch.cursor, weights.count_nonzero(), first.nansum(dtype=torch.float64)))
            yield batch

    def close(self) -> None:
        """End the threads that read ahead."""
        self._batches.close()

    def trained(self) -> Cursor:
        """Return the cursor behind the batch that was just trained."""
        cursor, rows, clicks = self._ahead.popleft()
        # EnKD's batches are on the GPU already; torch adds scalars of two devices without waiting for it
        self._rows, self._clicks = rows + self._rows, clicks + self._clicks
        return cursor

    def counts(self) -> tuple[int, int]:
        """Rows that have the first label and clicks that all ranks have trained since the last call. Every rank calls it."""
        counts = torch.tensor([int(self._rows), int(self._clicks)])
        self._rows = self._clicks = torch.zeros((), dtype=torch.int64)
        if self._process.world_size > 1:
            dist.all_reduce(counts)
        rows, clicks = counts.tolist()
        return rows, clicks


def invalid_value_counts(stream: ParquetStream, order: Order, process: Process) -> dict[str, int]:
    """Field -> values that its `on_invalid` replaced, or rows that its `max_length` cut, since this start, where there are any.

    Every rank calls it, and gets the counts of all ranks. In chronological order every rank decodes all rows, so there the count is
    one rank's and not the sum.
    """
    names = [feature.name for feature in stream.schema.features if feature.on_invalid != "error" or feature.max_length]
    counts = torch.tensor([stream.counters[name] for name in names], dtype=torch.int64)
    if names and process.world_size > 1:
        dist.all_reduce(counts, dist.ReduceOp.MAX if order == "chronological" else dist.ReduceOp.SUM)
    return {name: count for name, count in zip(names, counts.tolist(), strict=True) if count}


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch for one step of one rank: dropout of a resumed run draws what it would have drawn."""
    # a hash: numpy's SeedSequence takes thirty times as long, and every step would wait for it
    digest = hashlib.blake2b(f"{seed} {step} {rank}".encode(), digest_size=8).digest()
    value = int.from_bytes(digest, "little") >> 1
    # torch.manual_seed keeps the caller's stack for each accelerator that is not in use: a tenth of a small model's step
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(value)


# (step, what train.early_stop names, larger is better) of an evaluation -> stop now?
Watch = Callable[[int, float], bool]


@dataclass(frozen=True)
class RunContext:
    """What a trainer runs in."""

    process: Process
    folder: Path  # RUN
    storage: CheckpointStorage
    stop: StopRequest  # whether this process was asked to stop
    watchdog: Watchdog  # is told of every step
    open_records: Callable[[TrainState], Records]  # opens the run's log to continue from there; rank 0 calls it
    watch: Watch | None = None  # is told of every evaluation; may end training there
    hooks: Hooks = Hooks()  # where tests inject faults
    facts: Mapping[str, Any] = field(default_factory=dict)  # of the run's start, for its checkpoints
