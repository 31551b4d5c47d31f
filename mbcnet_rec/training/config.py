"""How long a run trains and what it writes; which optimizers it uses, and their rates."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from data.errors import InputError
from data.reading.config import LONGEST_WAIT_SECONDS
from data.schema.bounds import Bounded, bounded


@dataclass(frozen=True)
class ScheduleConfig(Bounded):
    """How a learning rate moves with the steps of a run's whole life: a function of the step alone, so resume and continue keep to it."""

    warmup_steps: int = bounded(0, at_least=0)  # in which the rate rises in equal parts to all of it
    decay: Literal["constant", "linear", "cosine", "polynomial"] = "constant"  # what comes after
    decay_steps: int = bounded(0, at_least=0)  # from the end of the warm-up until the rate is at its floor
    floor: float = bounded(0.0, at_least=0, at_most=1, wanted="a share of the rate in [0, 1]")
    power: float = bounded(2.0, above=0)  # of polynomial: (1 - t) ^ power

    def __post_init__(self) -> None:
        """Refuse a decay without an end, and an end without a decay."""
        super().__post_init__()
        if (self.decay == "constant") != (self.decay_steps == 0):
            raise InputError(
                f"decay_steps = {self.decay_steps} with decay = {self.decay!r}: wanted 1 or more steps for linear, cosine and polynomial, "
                "and 0 for constant; set both"
            )

    def share(self, done: int) -> float:
        """The share of the rate that the step after `done` steps has."""
        if done < self.warmup_steps:
            return (done + 1) / self.warmup_steps
        if self.decay == "constant":
            return 1.0
        left = max(0.0, 1 - (done - self.warmup_steps) / self.decay_steps)
        shapes = {"linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2, "polynomial": left**self.power}
        return self.floor + (1 - self.floor) * shapes[self.decay]


@dataclass(frozen=True)
class EmbeddingOptimConfig(Bounded):
    """Optimizer of the tables: w -= lr * g / (sqrt(state) + eps)."""

    # rowwise_adagrad (one state a row: the mean of squared gradients over the row), adagrad (one an element), sgd, or adam: dense Adam
    # over whole tables, rows that no batch looked up included, as FuxiCTR and BARS train. It wants every table data_parallel
    # (sharding.sharding_types = ["data_parallel"]), and so small tables.
    name: Literal["rowwise_adagrad", "adagrad", "sgd", "adam"] = "rowwise_adagrad"
    lr: float = bounded(0.02, above=0)  # learning rate
    eps: float = bounded(1e-8, at_least=0)  # of adagrad, rowwise_adagrad and adam
    init_std: float = bounded(0.02, at_least=0)  # standard deviation of the initial rows
    # lambda of lambda / 2 ||E||^2 over whole tables at every step, FuxiCTR's embedding_regularizer; of adam only, since the others
    # touch the rows of a batch only
    l2: float = bounded(0.0, at_least=0, wanted="0 (none) or more")
    schedule: ScheduleConfig = ScheduleConfig()  # of lr

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
    """Optimizers of a run."""

    dense_lr: float = bounded(1e-3, above=0)  # of Adam on the dense part
    # of that Adam. 1e-8 is torch's default; with it parameters whose gradient is mostly rounding noise move as fast as any other, and
    # runs on other world sizes drift apart.
    dense_eps: float = bounded(1e-6, at_least=0)
    weight_decay: float = bounded(0.0, at_least=0)  # decoupled decay of the dense part, where it is above 0
    dense_schedule: ScheduleConfig = ScheduleConfig()  # of dense_lr
    # batches whose mean gradient is one step of the dense part. Tables move at every batch, inside its backward pass
    accumulate: int = bounded(1, at_least=1)
    # of the moving average of the dense part, which evaluation and export take in place of its weights; 0: none
    dense_average: float = bounded(0.0, at_least=0, below=1, wanted="0 (none), or a share in (0, 1) such as 0.999")
    embedding: EmbeddingOptimConfig = EmbeddingOptimConfig()  # of the tables


def _or_off(default: float) -> Any:
    return bounded(default, at_least=0, wanted="0 (off) or more")


def _wait(default: float) -> Any:
    return bounded(default, above=0, at_most=LONGEST_WAIT_SECONDS)


@dataclass(frozen=True)
class TrainConfig(Bounded):
    """How long, where, and what to write."""

    out: str = ""  # the run folder; empty: runs/NAME
    seed: int = bounded(0, at_least=0)  # of weights, tables and the order of rows
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    cpu_fast_path: bool = True  # on a CPU, take shorter ways to the same numbers (mbcnet_rec/cpu)
    # on a GPU, replay the dense part of a full batch as CUDA graphs, in training and its evaluations: no launch of single kernels
    cuda_graph: bool = False
    autocast: Literal["none", "bf16"] = "none"  # dtype of matrix products; none is float32
    epochs: int = bounded(1, at_least=1)  # passes over the training rows
    max_steps: int = _or_off(0)  # stop after that many steps; 0: no limit
    log_every: int = bounded(20, at_least=1)  # steps between lines of metrics.jsonl
    eval_every: int = _or_off(0)  # steps between evaluations on the validation rows; 0: at the end of each epoch
    # the metric of the validation rows by which one evaluation is better than another: the best checkpoint, patience and plateau go by it.
    # log_loss and ne are better where lower, others where higher; of several labels METRIC/LABEL, or METRIC for the first
    early_stop: str = "auc"
    # evaluations without a better one before training stops; 0: never
    patience: int = _or_off(0)
    # places k at which evaluations also measure the ranking inside each group of the schema's group_column: ndcg@k, recall@k, hit_rate@k,
    # and mrr; empty: none
    ranking_k: tuple[int, ...] = bounded(
        (), at_least=1, wanted="places, each 1 or more", fix="write [5, 10], or [] for none"
    )
    # plateau: dense and table rates x 0.1 at every evaluation that does not improve
    schedule: Literal["constant", "plateau"] = "constant"
    checkpoint_every: int = _or_off(0)  # steps between checkpoints besides those at evaluations; 0: none
    checkpoint_minutes: float = _or_off(0.0)  # minutes between checkpoints besides the others; 0: none
    # a folder or URI (s3://bucket/prefix) for checkpoints; empty: RUN/checkpoints
    checkpoint_folder: str = ""
    # a step whose checkpoint is written and kept to the end; 0: none. Studies compare its latents with those of the last one
    keep_step: int = _or_off(0)
    keep_last: int = bounded(2, at_least=1)  # checkpoints kept besides the best ones
    keep_best: int = bounded(1, at_least=1)  # checkpoints kept for the best evaluations
    max_grad_norm: float = _or_off(0.0)  # of the dense part, over all its parameters; 0: not clipped
    # what a NaN or infinite loss does: stop with the batch kept in RUN/faults, or skip the step on every rank
    on_nonfinite: Literal["stop", "skip"] = "stop"
    max_skipped: int = _or_off(10)  # steps of a run that may be skipped so
    # standard deviations above the running mean at which a logged loss is an alarm; 0: never
    spike_sigmas: float = _or_off(6.0)
    timeout_seconds: float = _wait(600.0)  # after which a collective that a rank does not join fails on the others
    stall_seconds: float = _wait(300.0)  # a step that takes longer has the stacks of all ranks written to RUN/stacks
    # steps of which RUN/profile gets a Chrome trace, and the screen what each line of code asks of the device; 0: none
    profile: int = _or_off(0)
    warm_start: str = ""  # a run folder whose tables are this run's initial ones; empty: none
    warm_start_tables: tuple[str, ...] = ()  # which of them; empty: all that both runs have
    # an MLflow server, http://HOST:PORT, that gets every number besides TensorBoard; empty: none
    tracking: str = ""

    def __post_init__(self) -> None:
        """Refuse values out of their bounds, and a tracking server or warm start that is only half said."""
        super().__post_init__()
        if self.tracking and not self.tracking.startswith(("http://", "https://")):
            raise InputError(
                f"tracking = {self.tracking!r}: wanted the address of an MLflow server; write http://HOST:5000, or leave it empty"
            )
        if self.warm_start_tables and not self.warm_start:
            raise InputError("warm_start_tables names tables, but warm_start names no run; set both or neither")
