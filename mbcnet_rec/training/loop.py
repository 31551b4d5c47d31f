"""The training loop: steps between evaluations, what is logged, when it stops, what a checkpoint holds.

Everything a checkpoint must keep is in TrainState, the model's and optimizers' tensors and the data cursor;
random numbers are drawn afresh for each (seed, step, rank), so there is no generator state to keep.
"""

import json
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.batch import Batch
from data.errors import InputError
from data.order import Cursor
from data.stream import ParquetStream
from mbcnet_rec.build import Built
from mbcnet_rec.config import RunConfig
from mbcnet_rec.model.losses import branch_pairs
from mbcnet_rec.model.objective import Outputs
from mbcnet_rec.training import checkpoint
from mbcnet_rec.training.metrics import evaluate_predictions
from mbcnet_rec.training.pipeline import CheckedPipeline, clip_gradients, evaluate_batches
from mbcnet_rec.training.process import (
    Process,
    any_rank,
    average_buffers,
    broadcast_value,
    gather_rows,
    mean_over_ranks,
)
from mbcnet_rec.training.progress import Progress
from mbcnet_rec.training.records import Records

PLATEAU_FACTOR = 0.1
PLATEAU_FLOOR = 1e-6  # of the learning-rate scale, as in the BARS protocol
CHECKPOINTS = "checkpoints"
BEST = "best.json"


@dataclass
class TrainState:
    """Where training stands. `step` steps are done; the next batch is `cursor`."""

    step: int = 0
    cursor: Cursor = Cursor()
    best_auc: float = float("-inf")
    best_step: int = -1
    bad_evaluations: int = 0
    lr_scale: float = 1.0
    stopped: bool = False

    def to_json(self) -> dict[str, Any]:
        """JSON values of all fields."""
        values = asdict(self)
        return values | {"best_auc": None if self.best_step < 0 else self.best_auc}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "TrainState":
        """Inverse of to_json."""
        best = values["best_auc"]
        fixed = {"cursor": Cursor(**values["cursor"]), "best_auc": float("-inf") if best is None else best}
        return cls(**(values | fixed))


@dataclass
class Window:
    """What has come in since the last line of metrics.jsonl."""

    outputs: list[Outputs] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    grad_norm: Tensor | None = None


class Feed:
    """Batches of a stream, epoch after epoch, with the time that the trainer waits for them.

    TorchRec's pipeline takes batches before it trains them; `trained` hands out their cursors in order.
    """

    def __init__(self, stream: ParquetStream, process: Process) -> None:
        self._stream = stream
        self._rank = process.rank
        self._cursors: deque[Cursor] = deque()
        self.waited = 0.0
        self._batches = self._endless()

    def _endless(self) -> Iterator[Batch]:
        while True:
            yield from self._stream

    def take(self, steps: int) -> Iterator[Batch]:
        """Yield the next `steps` batches."""
        for _ in range(steps):
            start = time.perf_counter()
            try:
                batch = next(self._batches)
            except InputError as error:
                error.add_note(f"rank {self._rank}")  # a fault of this rank's rows: this rank says it
                raise
            self.waited += time.perf_counter() - start
            self._cursors.append(batch.cursor)
            yield batch

    def trained(self) -> Cursor:
        """Return the cursor behind the batch that was just trained."""
        return self._cursors.popleft()


class NonFiniteLossError(RuntimeError):
    """The loss of a step is NaN or infinite on some rank; no row has been written."""


class Trainer:
    """Drives a built model over a stream.

    Args:
        config: of the run.
        process: this rank.
        built: model, optimizers, plan.
        stream: of training rows.
        valid: makes a fresh stream of validation rows; None if there are none.
    """

    def __init__(
        self,
        config: RunConfig,
        process: Process,
        built: Built,
        stream: ParquetStream,
        valid: Callable[[], ParquetStream] | None,
    ) -> None:
        self.config, self.process, self.built, self.valid = config, process, built, valid
        self.stream = stream
        self.state = TrainState()
        self.folder = config.run_folder
        steps = stream.steps_per_epoch * config.train.epochs
        self.total_steps = min(steps, config.train.max_steps) if config.train.max_steps else steps
        self.window = Window()
        self.base_rates = [group["lr"] for group in built.optimizer.param_groups]
        self.autocast = autocast_of(config.train.autocast, process.device)
        self._last_auc = float("nan")

    def restore(self, folder: Path) -> None:
        """Continue from a checkpoint.

        Raises:
            InputError: it is damaged or belongs to another run.
        """
        extra = load_model(folder, self.built)
        self.state = TrainState.from_json(extra["state"])
        self.stream.load_state_dict(extra["stream"])
        self._scale_rates()

    def train(self) -> TrainState:
        """Train until the last step or an early stop.

        Raises:
            InputError: a row is faulty.
            NonFiniteLossError: before a loss that is not finite writes a row.
        """
        process = self.process
        records = Records(self.folder, self.state.step) if process.is_first else None
        bar = Progress(self.total_steps, self.state.step, self.config.data.batch_size, shown=process.is_first)
        pipeline = CheckedPipeline(
            self.built.model, self.built.optimizer, self.autocast, self._verdict, self._after_backward
        )
        feed = Feed(self.stream, process)
        self.built.model.train()
        try:
            while self.state.step < self.total_steps and not self.state.stopped:
                self._segment(pipeline, feed, bar, records)
                pipeline.detach()
                self._evaluate_and_decide(bar, records)
        finally:
            bar.close()
            if records is not None:
                records.close()
        return self.state

    def _segment(self, pipeline: CheckedPipeline, feed: Feed, bar: Progress, records: Records | None) -> None:
        """Train up to the next evaluation."""
        train = self.config.train
        batches = feed.take(self._next_boundary() - self.state.step)
        self.window = Window(waited=feed.waited)
        while True:
            seed_step(train.seed, self.state.step, self.process.rank)
            try:
                outputs = pipeline.progress(batches)
            except StopIteration:
                break
            self.state.step += 1
            self.state.cursor = feed.trained()
            self.window.outputs.append(outputs)
            shown = {}
            if self.state.step % train.log_every == 0:
                shown = self._log(feed, records)
            bar.step(**shown)
            if train.checkpoint_every and self.state.step % train.checkpoint_every == 0:
                self.save()

    def _next_boundary(self) -> int:
        """The step at which the next evaluation is due."""
        every = self.config.train.eval_every or self.stream.steps_per_epoch
        return min(self.total_steps, (self.state.step // every + 1) * every)

    def _verdict(self, losses: Tensor) -> None:
        if any_rank(not bool(torch.isfinite(losses).all())):
            raise NonFiniteLossError(
                f"step {self.state.step + 1}: the loss is not finite; no row was written by this step. Lower "
                "optim.dense_lr or optim.embedding.lr, or look for extreme numbers in the data"
            )

    def _after_backward(self) -> None:
        limit = self.config.train.max_grad_norm
        if limit > 0 or (self.state.step + 1) % self.config.train.log_every == 0:
            self.window.grad_norm = clip_gradients(self.built.dense, limit or float("inf"))

    def _log(self, feed: Feed, records: Records | None) -> dict[str, float]:
        """Write a line of metrics.jsonl; return what the bar shows."""
        window, now = self.window, time.perf_counter()
        steps, seconds = len(window.outputs), now - window.started
        terms = average_terms(window.outputs)
        values: dict[str, Any] = dict(terms)
        if self.process.is_first:
            logits, labels = own_rows(window.outputs)
            values |= evaluate_predictions(logits, labels, self.built.branch_names)
            values |= diagnostics(window.outputs, self.built.branch_names)
            values |= {
                "samples_per_second": steps * self.config.data.batch_size / seconds,
                "step_seconds": seconds / steps,
                "input_wait_share": (feed.waited - window.waited) / seconds,
                "lr_scale": self.state.lr_scale,
                "grad_norm": float("nan") if window.grad_norm is None else float(window.grad_norm),
            }
            values |= {
                f"mended/{name}": count
                for name, count in getattr(self.stream, "counters", {}).items()
                if count
            }
            assert records is not None
            records.add(self.state.step, "train", values)
        self.window = Window(waited=feed.waited)
        shown = {"loss": values["loss"], "auc": values.get("auc", float("nan"))}
        return shown | ({} if np.isnan(self._last_auc) else {"valid_auc": self._last_auc})

    def _evaluate_and_decide(self, bar: Progress, records: Records | None) -> None:
        """Evaluate, keep the best checkpoint, slow down or stop."""
        train, state = self.config.train, self.state
        if self.valid is None:
            self.save()
            return
        metrics = evaluate_stream(self.built, self.valid(), self.process, self.autocast)
        auc = metrics["auc"]
        better = auc > state.best_auc or state.best_step < 0
        if better:
            state.best_auc, state.best_step, state.bad_evaluations = auc, state.step, 0
        else:
            state.bad_evaluations += 1
            if train.schedule == "plateau":
                state.lr_scale = max(state.lr_scale * PLATEAU_FACTOR, PLATEAU_FLOOR)
                self._scale_rates()
            state.stopped = bool(train.patience) and state.bad_evaluations >= train.patience
        self._last_auc = auc
        if records is not None:
            records.add(state.step, "valid", metrics)
        mark = "best so far" if better else f"{state.bad_evaluations} without a better one"
        bar.say(f"step {state.step}: valid AUC {auc:.4f}, log-loss {metrics['log_loss']:.4f} ({mark})")
        self.save()

    def _scale_rates(self) -> None:
        groups: list[Any] = list(self.built.optimizer.param_groups)
        for group, rate in zip(groups, self.base_rates, strict=True):
            group["lr"] = rate * self.state.lr_scale

    def save(self) -> None:
        """Write a checkpoint of this step, and remove those that are neither recent nor the best."""
        folder = self.folder / CHECKPOINTS
        average_buffers(self.built.model)
        target = checkpoint.step_folder(folder, self.state.step)
        extra = {
            "state": self.state.to_json(),
            "stream": self.stream.state_dict(self.state.cursor),
            "schema": self.built.plan.schema,
        }
        if not broadcast_value(target.exists(), self.process):
            pieces = checkpoint.pieces_of(self.built.model, self.built.optimizer)
            checkpoint.save(target, pieces, extra, self.process.rank, self.process.world_size)
        if self.process.is_first:
            if self.state.best_step == self.state.step:
                best = {"step": self.state.step, "auc": self.state.best_auc}
                (folder / BEST).write_text(json.dumps(best) + "\n")
            for step in checkpoint.saved_steps(folder)[: -self.config.train.keep_last]:
                if step != self.state.best_step:
                    shutil.rmtree(checkpoint.step_folder(folder, step), ignore_errors=True)


def autocast_of(dtype: str, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """Return what makes the context of a forward pass: bf16 matrix products, or float32."""
    if dtype == "bf16":
        return lambda: torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch for one step of one rank: dropout of a resumed run draws what it would have drawn."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1))


def average_terms(outputs: list[Outputs]) -> dict[str, float]:
    """Average each loss term over steps and ranks."""
    names = list(outputs[0].terms)
    stacked = torch.stack([torch.stack([each.terms[name] for name in names]) for each in outputs])
    means = mean_over_ranks(stacked.double().mean(0).cpu())
    return dict(zip(names, means.tolist(), strict=True))


def own_rows(outputs: list[Outputs]) -> tuple[np.ndarray, np.ndarray]:
    """Join logits (B, 1 + K) and labels (B,) of this rank's real rows."""
    logits = torch.cat([each.logits for each in outputs])
    labels = torch.cat([each.labels for each in outputs])
    real = torch.cat([each.weights for each in outputs]) > 0
    return logits[real].float().cpu().numpy(), labels[real].cpu().numpy()


def diagnostics(outputs: list[Outputs], names: tuple[str, ...]) -> dict[str, float]:
    """Disagreement rates of each directed pair and the transforms' distance from the identity."""
    if len(names) < 2:
        return {}
    rates = torch.stack([each.disagreement for each in outputs]).mean(0).cpu()
    values = {
        f"disagreement/{names[i]}>{names[j]}": float(rates[i, j])
        for i in range(len(names))
        for j in range(len(names))
        if i != j
    }
    distances = outputs[-1].transform_distance.cpu()
    for (i, j), distance in zip(branch_pairs(len(names)), distances, strict=False):
        values[f"transform_distance/{names[i]}-{names[j]}"] = float(distance)
    return values


def evaluate_stream(
    built: Built, stream: ParquetStream, process: Process, autocast: Callable[[], Any]
) -> dict[str, Any]:
    """Score every row of a stream once; return its metrics, equal on every rank."""
    average_buffers(built.model)
    rows, groups = [], []
    batches = _with_groups(iter(stream), groups)
    for outputs in evaluate_batches(built.model, built.optimizer, batches, autocast):
        columns = [outputs.logits.float(), outputs.labels[:, None], outputs.weights[:, None]]
        rows.append(torch.cat(columns, dim=1).cpu().numpy())
    width = 3 + len(built.branch_names)
    gathered = gather_rows(np.concatenate(rows) if rows else np.zeros((0, width), np.float32), process)
    ids = gather_rows(np.concatenate(groups)[:, None], process) if stream.schema.group_column else None
    metrics: dict[str, Any] = {}
    if gathered is not None:
        real = gathered[:, -1] > 0
        metrics = evaluate_predictions(
            gathered[real, :-2],
            gathered[real, -2],
            built.branch_names,
            None if ids is None else ids[real, 0],
        )
        metrics["rows"] = int(real.sum())
    return broadcast_value(metrics, process)


def _with_groups(batches: Iterator[Batch], groups: list[np.ndarray]) -> Iterator[Batch]:
    """Note each batch's group ids on the way: the model has no use for them."""
    for batch in batches:
        if batch.group_ids is not None:
            groups.append(batch.group_ids.numpy())
        yield batch


def load_model(folder: Path, built: Built) -> dict[str, Any]:
    """Load a checkpoint into a built model and its optimizers.

    Returns:
        What the checkpoint keeps besides tensors.

    Raises:
        InputError: it is damaged or belongs to another model.
    """
    for name, optimizer in built.optimizer.optimizers:
        if name != "fused":
            optimizer.init_state()  # torch makes it at the first step; what does not exist is not loaded
    return checkpoint.load(folder, checkpoint.pieces_of(built.model, built.optimizer))
