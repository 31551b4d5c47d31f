"""The training loop: steps between evaluations, what is logged, when it stops, when a checkpoint is due."""

import math
import time
from collections.abc import Callable
from typing import Any, NoReturn

from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from data.errors import InputError
from data.stream import ParquetStream
from data.stream.order import Cursor
from mbcnet_rec.checkpoints.compatibility import RowsAnew, describe_run, load_checked
from mbcnet_rec.checkpoints.shards import Saved, shards_of
from mbcnet_rec.checkpoints.writer import Keep, Saver
from mbcnet_rec.checkpoints.zch_state import history_shards, restore_history, zch_counters, zch_unseen
from mbcnet_rec.logs.metrics_log import Records, written
from mbcnet_rec.logs.progress import Progress
from mbcnet_rec.model.objective import LossArch
from mbcnet_rec.runtime.exits import NonFiniteLossError, PreemptedError
from mbcnet_rec.runtime.process import agreed, any_rank, vote
from mbcnet_rec.scoring.metrics import evaluate_predictions
from mbcnet_rec.scoring.ranking import require_groups
from mbcnet_rec.scoring.scorer import autocast_of, real_rows
from mbcnet_rec.scoring.tasks import Judge, by_task, joined, output_names
from mbcnet_rec.training.built import Built
from mbcnet_rec.training.config import TrainConfig
from mbcnet_rec.training.dense_part import DensePart, Rates, branch_parameters, gradient_shares
from mbcnet_rec.training.evaluation import (
    EvaluationStoppedError,
    average_terms,
    dead_outputs,
    disagreements,
    evaluate_stream,
    latent_measures,
    read_first,
)
from mbcnet_rec.training.faults import dump_batch, loss_spike
from mbcnet_rec.training.pipeline import CheckedStep, Pipeline
from mbcnet_rec.training.plan_check import PlanWatch
from mbcnet_rec.training.profile import StepProfile
from mbcnet_rec.training.state import Feed, RunContext, TrainState, Window, invalid_value_counts, seed_step
from sharding.bridge.zch import collisions_of

SECONDS_PER_MINUTE = 60.0


class Trainer:
    """Drives a built model over a stream of training rows; `valid` makes a fresh stream of validation rows, if there are any."""

    def __init__(
        self,
        config: TrainConfig,
        context: RunContext,
        built: Built,
        stream: ParquetStream,
        valid: Callable[[], ParquetStream] | None,
    ) -> None:
        self.config, self.context, self.built, self.valid = config, context, built, valid
        self.process, self.stream = context.process, stream
        self.state = TrainState()
        steps = stream.steps_per_epoch * config.epochs
        self.steps = min(steps, config.max_steps) if config.max_steps else steps  # of the day
        self.eval_every = config.eval_every or stream.steps_per_epoch
        self.branches = branch_parameters(built.model)
        self.losses = [module for module in built.model.modules() if isinstance(module, LossArch)]
        self.collisions = collisions_of(built.model)
        self.rates, self.dense = Rates(built), DensePart(built)
        self.autocast = autocast_of(config.autocast, self.process.device)
        on_write, seconds = context.hooks.on_write, config.timeout_seconds
        self.saver = Saver(context.storage, self.process, seconds, on_write, context.folder)
        self.feed = Feed(stream, self.process)
        self.window = Window()
        self.records: Records | None = None
        self._saved_at = time.monotonic()
        self._stop_wanted = self._save_wanted = False
        require_groups(stream.schema, config.ranking_k)
        ks = config.ranking_k if stream.schema.group_column else None
        self.judge = Judge(config.early_stop, built.tasks, built.branch_names, ranking_k=ks)
        self._last_value = float("nan")
        self._told_no_auc = False
        self._told_dead: set[str] = set()
        self._labels_seen: dict[str, set[int]] = {}  # by task, on rank 0, in lines of the log
        self.faults: list[str] = []  # of rows that were to be scored at the end; the model is trained
        self._readable: set[str] = set()  # fingerprints of streams that every rank has read to their ends

    @property
    def total_steps(self) -> int:
        """The step with which training ends."""
        return self.state.first_step + self.steps

    def restore(
        self, saved: Saved, *, begins_day: bool = False, allow_partial: bool = False, anew: RowsAnew | None = None
    ) -> list[str]:
        """Continue from a checkpoint, with `begins_day` at the first row of other files; every rank calls it. `anew`: see `load_checked`.

        Returns:
            What a partial load did; empty where everything fits.

        Raises:
            InputError: it is damaged or belongs to another run.
        """
        extra = saved.manifest.extra
        state = TrainState.from_json(extra.get("state", {}))
        self.saver.hold(state.step, saved.manifest.copies)
        lines = load_checked(saved, self.built, self.process, allow_partial=allow_partial, anew=anew)
        if lines:  # the best evaluations were another model's
            state.best, state.bad_evaluations = [], 0
        else:
            with agreed(self.process):
                restore_history(saved, self.collisions)
        with agreed(self.process):
            self.dense.restore(saved, state.step)
        if begins_day:
            state.begin_day()
            self.state = state
            return lines
        try:
            self.stream.load_state_dict(extra.get("stream", {}))
        except InputError as error:
            if not allow_partial:
                raise
            lines.append(f"partial load: the position in the data starts fresh ({error})")
            state.cursor = Cursor()
        self.state = state
        return lines

    def train(self) -> TrainState:
        """Train until the last step or an early stop.

        Raises:
            InputError: a row is faulty.
            NonFiniteLossError: before a loss that is not finite writes a row.
            PreemptedError: some rank was asked to stop; a checkpoint of the last step is written.
            CannotWriteError: a checkpoint or a line could not be written.
        """
        process, start, batch_size = self.process, self.state.step, self.stream.options.batch_size
        if process.is_first:
            self.records = self.context.open_records(self.state)
        self.bar = Progress(self.total_steps, start, batch_size, shown=process.is_first)
        self.checked = CheckedStep(
            self.built.model, self.built.optimizer, self.autocast, self._verdict, self._after_backward
        )
        self.checked.on_loss = self.context.hooks.on_loss
        self.planned = PlanWatch(self.built, batch_size, process, self.total_steps - start)
        folder, rank = self.context.folder, process.rank
        self.profile = StepProfile(self.config.profile, folder, rank, start, self.total_steps)
        pipeline = self.built.pipeline(self.checked)
        self.built.model.train()
        self._open_window()
        try:
            while True:
                if self._evaluation_due():
                    pipeline.detach()
                    self._evaluate_and_decide()
                if self.state.step >= self.total_steps or self.state.stopped:
                    break
                self._segment(pipeline)
            for task, labels in self._labels_seen.items():
                if len(labels) > 1:
                    continue
                found = f"are all of one class, label {min(labels)}" if labels else "have no label"
                of_task = f" of {task}" if task else ""
                self.bar.say(
                    f"data.train: the rows {found}{of_task}: nothing can be learned from them; check the label column"
                )
            # resumed at its end: the start before may have ended between its last checkpoint and this note
            if self.saver.saved_step is None and process.is_first:
                with written(folder):
                    self.saver.note_best(self.state.best)
            self.saver.finish()
        finally:
            self.profile.close(self.state.step)
            self.saver.cancel()
            self.feed.close()
            self.bar.close()
            if self.records is not None:
                self.records.close()
        return self.state

    def _segment(self, pipeline: Pipeline) -> None:
        """Train up to the next evaluation."""
        train, state = self.config, self.state
        done = state.step - state.first_step
        boundary = state.first_step + min(self.steps, (done // self.eval_every + 1) * self.eval_every)
        batches = self.feed.take(boundary - state.step)
        while True:
            seed_step(train.seed, state.step, self.process.rank)
            self.rates.set(state.step, state.lr_scale)
            self.checked.begins = state.step % self.dense.every == 0
            self.checked.moves_dense = self.dense.is_due(state.step)
            if state.step < boundary:
                self.context.watchdog.beat(f"step {state.step + 1}")
                self.profile.begin(state.step)
            for losses in self.losses:
                losses.measures = self._logs_step
            start = time.perf_counter()
            try:
                outputs = pipeline.progress(batches)
            except StopIteration:
                break
            for line in self.profile.end(state.step):
                self.bar.say(line)
            if compared := self.planned.after_step(time.perf_counter() - start):
                self.bar.say(compared)
            state.step += 1
            state.cursor = self.feed.trained()
            if self.checked.skipped:
                state.skipped += 1
            else:
                self.window.outputs.append(outputs)
            if self.checked.moved_dense:
                self.dense.note_step()
            logs = state.step % train.log_every == 0 and self.window.outputs
            self.bar.step(**(self._log() if logs else {}))
            due = state.step == train.keep_step or (train.checkpoint_every and state.step % train.checkpoint_every == 0)
            if self._stop_wanted:
                self._stop()
            elif (due or self._save_wanted) and not self._evaluation_due():
                self.save()

    @property
    def _logs_step(self) -> bool:
        """Whether the step that is running ends with a line of the log."""
        return (self.state.step + 1) % self.config.log_every == 0

    def _evaluation_due(self) -> bool:
        """Whether this step ends with an evaluation that has not been made."""
        done = self.state.step - self.state.first_step
        boundary = done > 0 and (done % self.eval_every == 0 or done >= self.steps)
        return boundary and self.state.evaluated_step != self.state.step

    def _verdict(self, losses: Tensor) -> bool:
        """Decide with all ranks, before backward writes a row: is the loss finite, shall we stop, is a checkpoint due?

        Returns:
            Whether to skip this step.
        """
        minutes = self.config.checkpoint_minutes
        late = 0 < minutes * SECONDS_PER_MINUTE <= time.monotonic() - self._saved_at
        faulty, stop, failed, due = vote(
            [~losses.isfinite(), self.context.stop.requested, self.saver.failed, late and self.process.is_first],
            losses.device,
        )
        if failed is not None:
            self.saver.finish()
        self._stop_wanted, self._save_wanted = stop is not None, due is not None
        if faulty is None:
            return False
        self.checked.take_back()
        finite = math.isfinite(losses.item())
        done, cap = self.state.step, self.config.max_skipped
        where = self._dump(losses) if not finite else ""
        if self.config.on_nonfinite == "skip" and self.state.skipped < cap:
            self.bar.say(
                f"step {done + 1}: loss not finite on rank {faulty}{where}; passed over, no row written "
                f"({self.state.skipped + 1} of at most {cap})"
            )
            return True
        self.save()
        self.saver.finish()
        raise NonFiniteLossError(
            f"rank {self.process.rank}: step {done + 1}: the loss is not finite{where}; no row was written, and a "
            f"checkpoint of step {done} is kept. Lower optim.dense_lr or optim.embedding.lr, fix the rows, or pass "
            "over such steps with --set train.on_nonfinite=skip",
            reported=not finite,
        )

    def _dump(self, losses: Tensor) -> str:
        step, batch = self.state.step + 1, self.checked.batch
        assert batch is not None
        try:
            path = dump_batch(self.context.folder, step, self.process.rank, batch, losses)
        except OSError as error:
            return f" (its batch could not be kept: {error.strerror})"
        return f" (its batch is in {path})"

    def _after_backward(self) -> None:
        self.dense.divide()
        limit = self.config.max_grad_norm
        if limit > 0 or self._logs_step:
            grads = [each.grad for each in self.built.dense if each.grad is not None]
            norm = self.window.grad_norm = get_total_norm(grads, foreach=True)
            # spares the multiplication by 1; on a GPU the host would have to wait for the norm
            short = norm.device.type == "cpu" and norm + 1e-6 <= limit
            if limit > 0 and not short:
                clip_grads_with_norm_(self.built.dense, limit, norm.double(), foreach=True)
        if self._logs_step:
            self.window.gradient_shares = gradient_shares(self.branches)

    def _log(self) -> dict[str, Any]:
        """Write a line of metrics.jsonl; return what the bar shows."""
        window, state, names = self.window, self.state, self.built.branch_names
        steps, seconds = state.step - window.first_step, time.perf_counter() - window.started
        terms = average_terms(window.outputs)
        replaced = invalid_value_counts(self.stream, self.stream.options.order, self.process)
        values: dict[str, Any] = terms | zch_counters(self.collisions, self.process)
        spike = loss_spike(state, terms["loss"], self.config.spike_sigmas)
        if spike is not None:
            self.bar.say(
                f"step {state.step}: ALARM: loss {terms['loss']:.4f} stands {spike:.1f} standard deviations above the lines before"
            )
        after_first = window.outputs[1:] if window.first_step == 0 else window.outputs  # some weights are 0 at first
        dead = dead_outputs(after_first, [each or "fused" for each in output_names(self.built.tasks, names)])
        if new := sorted(set(dead) - self._told_dead):
            self._told_dead |= set(new)
            more = (
                "A lower model.mbcnet.differentiation.weight, model.mbcnet.top_activation = 'none' or " if names else ""
            )
            self.bar.say(
                f"step {state.step}: ALARM: {', '.join(new)} dead: latents of 0, or one logit for all rows; training continues. {more}a "
                "lower optim.dense_lr may help"
            )
        if self.records is not None:
            logits, labels = real_rows(window.outputs)[:2]
            threshold = self.losses[0].coteaching.threshold if self.losses else 0.0
            scored = {}
            for task, _, own, y in by_task(self.built.tasks, logits, labels):
                self._labels_seen.setdefault(task, set()).update({int(y.min()), int(y.max())} if len(y) else ())
                scored[task] = evaluate_predictions(own, y, names) | disagreements(own, y, names, threshold)
            values |= joined(scored) | latent_measures(window.outputs[-1], names)
            values |= {"dead": dead} if dead else {}
            values |= {
                "samples_per_second": steps * self.stream.options.batch_size / seconds,
                "step_seconds": seconds / steps,
                "input_wait_share": (self.feed.waited - window.waited) / seconds,
                "checkpoint_stall_seconds": self.saver.stalled_seconds - window.stalled,
                "checkpoint_seconds": self.saver.written_seconds,
                "lr_scale": state.lr_scale,
                "grad_norm": float("nan") if window.grad_norm is None else float(window.grad_norm),
            }
            shares = window.gradient_shares.items()
            values |= {f"gradient_share/{name}": float(share) for name, share in shares}
            values |= {} if spike is None else {"loss_spike": spike}
            values |= {} if not state.skipped else {"skipped_steps": state.skipped}
            values |= {f"invalid/{name}": count for name, count in replaced.items()}
            self.records.add(state.step, "train", values)
        self._open_window()
        shown = {"loss": terms["loss"], "auc": values.get("auc", float("nan")), "valid_auc": self._last_value}
        kept = {name: value for name, value in shown.items() if name == "loss" or not math.isnan(value)}
        return kept | ({"dead": ",".join(dead)} if dead else {})

    def _open_window(self) -> None:
        self.window = Window(self.state.step, self.feed.waited, self.saver.stalled_seconds)

    def _evaluate_and_decide(self) -> None:
        """Evaluate, keep the best checkpoint, slow down or stop."""
        state = self.state
        if self.valid is None:
            state.evaluated_step = state.step
            self.save()
            return
        start = time.perf_counter()
        try:
            metrics = self.evaluate(self.valid())
        except EvaluationStoppedError:
            self._stop()
        except InputError as error:
            state.evaluated_step = state.step
            self.save()
            if state.step < self.total_steps:
                self.saver.finish()
                raise InputError(
                    f"data.valid: {error}; the checkpoint of step {state.step} is written: fix the rows, or leave data.valid empty, and "
                    "continue with --resume"
                ) from None
            self.faults.append(f"data.valid: {error}")
            return
        self.window.started += time.perf_counter() - start  # an evaluation is no part of a training step
        state.evaluated_step = state.step
        judge = self.judge
        self._last_value = metrics[judge.key]
        better = state.note_evaluation(judge.value(metrics), self.config)
        log_loss = f"log-loss {judge.log_loss(metrics):.4f}"
        if self.records is not None:
            self.records.add(state.step, "valid", metrics)
        if math.isnan(self._last_value):
            self.bar.say(f"step {state.step}: valid {judge.title} not defined, {log_loss}")
            if not self._told_no_auc:
                self.bar.say(
                    f"data.valid: {judge.why_none(metrics)}, so their {judge.title} is not defined: no checkpoint is better than another, "
                    "the last one counts, and patience and plateau do not act; name validation rows with clicks and without"
                )
            self._told_no_auc = True
        else:
            if self.context.watch is not None and any_rank(self.context.watch(state.step, judge.value(metrics))):
                state.stopped = True
            mark = "best so far" if better else f"{state.bad_evaluations} without a better one"
            self.bar.say(f"step {state.step}: valid {judge.title} {self._last_value:.4f}, {log_loss} ({mark})")
        self.save()

    def evaluate(self, stream: ParquetStream) -> dict[str, Any]:
        """Score a stream; its metrics are equal on every rank, as are the numbers of values that `on_invalid` changed, and zch ids without a row.

        Raises:
            EvaluationStoppedError: some rank was asked to stop.
            InputError: a row is faulty, on every rank.
        """

        def asked(doing: str = "reading rows to score") -> bool:
            self.context.watchdog.beat(f"{doing} at step {self.state.step}")
            return self.context.stop.requested

        if stream.fingerprint() not in self._readable:
            read_first(stream, self.process, asked)
            self._readable.add(stream.fingerprint())
        self.context.watchdog.beat(f"evaluation at step {self.state.step}")
        for each in self.collisions:
            each.looked_up.zero_()
        with self.dense.averaged():
            stop, ks = lambda: any_rank(asked("evaluation")), self.config.ranking_k
            metrics = evaluate_stream(self.built, stream, self.process, self.autocast, stop, ranking_k=ks)
        invalid = invalid_value_counts(stream, "partitioned", self.process).items()
        return metrics | {f"invalid/{name}": n for name, n in invalid} | zch_unseen(self.collisions, self.process)

    def _stop(self) -> NoReturn:
        self.save()
        self.saver.finish()
        raise self.preempted()

    def preempted(self) -> PreemptedError:
        """The end of a run that was asked to stop and whose last step has a checkpoint."""
        return PreemptedError(
            f"stopped by {self.context.stop.signal_name or 'a signal to another rank'} after step {self.state.step}; its "
            "checkpoint is written: continue with --resume",
            reported=self.process.is_first,
        )

    def save(self) -> None:
        """Begin a checkpoint of this step; those that are neither recent nor among the best go when it is whole.

        Raises:
            CannotWriteError: the one before could not be written.
        """
        self.context.watchdog.beat(f"checkpoint of step {self.state.step}")
        if self.records is not None:
            self.records.sync()
        rows, clicks = self.feed.counts()
        self.state.rows, self.state.clicks = self.state.rows + rows, self.state.clicks + clicks
        extra = {
            "state": self.state.to_json(),
            "stream": self.stream.state_dict(self.state.cursor),
            "run": describe_run(self.built) | dict(self.context.facts),
        }
        shards = shards_of(self.built.model, self.built.optimizer) + history_shards(self.collisions)
        shards += self.dense.shards(self.state.step)
        keep = Keep(self.config.keep_last, tuple(self.state.best), self.config.keep_step)
        self.saver.save(self.state.step, shards, extra, keep)
        self._saved_at = time.monotonic()
