"""How long a run trains and what it writes; which optimizers it uses, and their rates."""

from dataclasses import dataclass
from typing import Any, Literal

from data.errors import InputError
from data.reading.config import LONGEST_WAIT_SECONDS
from data.schema.bounds import Bounded, bounded


@dataclass(frozen=True)
class EmbeddingOptimConfig(Bounded):
    """Optimizer of the tables: w -= lr * g / (sqrt(state) + eps).

    Attributes:
        name: rowwise_adagrad (one state a row: the mean of squared gradients over the row), adagrad (one an element), sgd, or adam:
            dense Adam over whole tables, rows that no batch looked up included, as FuxiCTR and BARS train. It wants every table
            data_parallel (sharding.sharding_types = ["data_parallel"]), and so small tables.
        lr: learning rate.
        eps: of adagrad, rowwise_adagrad and adam.
        init_std: standard deviation of the initial rows.
        l2: lambda of lambda / 2 ||E||^2 over whole tables at every step, FuxiCTR's embedding_regularizer; of adam only, since the
            others touch the rows of a batch only.
    """

    name: Literal["rowwise_adagrad", "adagrad", "sgd", "adam"] = "rowwise_adagrad"
    lr: float = bounded(0.02, above=0)
    eps: float = bounded(1e-8, at_least=0)
    init_std: float = bounded(0.02, at_least=0)
    l2: float = bounded(0.0, at_least=0, wanted="0 (none) or more")

    def __post_init__(self) -> None:
        """Refuse a penalty that only some rows would feel."""
        super().__post_init__()
        if self.l2 > 0 and self.name != "adam":
            raise InputError(
                f"l2 = {self.l2}: name = {self.name!r} touches only the rows of a batch, so the penalty would not be that of whole "
                "tables; use name = 'adam' with sharding.sharding_types = ['data_parallel'], or l2 = 0"
            )


@dataclass(frozen=True)
class OptimConfig(Bounded):
    """Optimizers of a run.

    Attributes:
        dense_lr: learning rate of Adam on the dense part.
        dense_eps: of that Adam. 1e-8 is torch's default; with it parameters whose gradient is mostly rounding
            noise move as fast as any other, and runs on other world sizes drift apart.
        weight_decay: decoupled decay of the dense part, where it is above 0.
        embedding: of the tables.
    """

    dense_lr: float = bounded(1e-3, above=0)
    dense_eps: float = bounded(1e-6, at_least=0)
    weight_decay: float = bounded(0.0, at_least=0)
    embedding: EmbeddingOptimConfig = EmbeddingOptimConfig()


def _or_off(default: float) -> Any:
    return bounded(default, at_least=0, wanted="0 (off) or more")


def _wait(default: float) -> Any:
    return bounded(default, above=0, at_most=LONGEST_WAIT_SECONDS)


@dataclass(frozen=True)
class TrainConfig(Bounded):
    """How long, where, and what to write.

    Attributes:
        out: the run folder; empty: runs/NAME.
        seed: of weights, tables and the order of rows.
        device: auto (cuda where there is one), cpu or cuda.
        cpu_fast_path: on a CPU, take shorter ways to the same numbers (mbcnet_rec/cpu); nothing changes on cuda.
        autocast: dtype of matrix products; none is float32.
        epochs: passes over the training rows.
        max_steps: stop after that many steps; 0: no limit.
        log_every: steps between lines of metrics.jsonl.
        eval_every: steps between evaluations on the validation rows; 0: at the end of each epoch.
        patience: evaluations without a better validation AUC before training stops; 0: never.
        schedule: constant, or plateau: dense and table rates x 0.1 at every evaluation that does not improve.
        checkpoint_every: steps between checkpoints besides those at evaluations; 0: none.
        checkpoint_minutes: minutes between checkpoints besides the others; 0: none.
        checkpoint_folder: a folder or URI (s3://bucket/prefix) for checkpoints; empty: RUN/checkpoints.
        keep_last: checkpoints kept besides the best ones.
        keep_best: checkpoints kept for the best validation AUCs.
        max_grad_norm: of the dense part, over all its parameters; 0: not clipped.
        on_nonfinite: what a NaN or infinite loss does: stop with the batch kept in RUN/faults, or skip the step on every rank.
        max_skipped: steps of a run that may be skipped so.
        spike_sigmas: standard deviations above the running mean at which a logged loss is an alarm; 0: never.
        timeout_seconds: after which a collective that a rank does not join fails on the others.
        stall_seconds: a step that takes longer has the stacks of all ranks written to RUN/stacks.
        warm_start: a run folder whose tables are this run's initial ones; empty: none.
        warm_start_tables: which of them; empty: all that both runs have.
        tracking: an MLflow server, http://HOST:PORT, that gets every number besides TensorBoard; empty: none.
    """

    out: str = ""
    seed: int = bounded(0, at_least=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cpu_fast_path: bool = True
    autocast: Literal["none", "bf16"] = "none"
    epochs: int = bounded(1, at_least=1)
    max_steps: int = _or_off(0)
    log_every: int = bounded(20, at_least=1)
    eval_every: int = _or_off(0)
    patience: int = _or_off(0)
    schedule: Literal["constant", "plateau"] = "constant"
    checkpoint_every: int = _or_off(0)
    checkpoint_minutes: float = _or_off(0.0)
    checkpoint_folder: str = ""
    keep_last: int = bounded(2, at_least=1)
    keep_best: int = bounded(1, at_least=1)
    max_grad_norm: float = _or_off(0.0)
    on_nonfinite: Literal["stop", "skip"] = "stop"
    max_skipped: int = _or_off(10)
    spike_sigmas: float = _or_off(6.0)
    timeout_seconds: float = _wait(600.0)
    stall_seconds: float = _wait(300.0)
    warm_start: str = ""
    warm_start_tables: tuple[str, ...] = ()
    tracking: str = ""

    def __post_init__(self) -> None:
        """Refuse values out of their bounds, and a tracking server or warm start that is only half said."""
        super().__post_init__()
        if self.tracking and not self.tracking.startswith(("http://", "https://")):
            raise InputError(
                f"tracking = {self.tracking!r}: wanted the address of an MLflow server; write http://HOST:5000, or leave it empty"
            )
        if self.warm_start_tables and not self.warm_start:
            raise InputError(
                "warm_start_tables names tables, but warm_start names no run; set both or neither"
            )
