"""RunConfig: the owners' configs together, read from TOML, overridden by `--set`, checked across parts. Imports no torchrec."""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tomli_w

from data.errors import InputError
from data.reading.config import LONGEST_WAIT_SECONDS, DataConfig
from data.schema.parse import parse_dataclass, read_toml, to_toml_value
from mbcnet_rec.model.models import ModelConfig
from mbcnet_rec.training.optim_config import OptimConfig
from sharding.plan.constraints import ShardingConfig


@dataclass(frozen=True)
class TrainConfig:
    """How long, where, and what to write.

    Attributes:
        out: the run folder; empty: runs/NAME.
        seed: of weights, tables and the order of rows.
        device: auto (cuda where there is one), cpu or cuda.
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
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    autocast: Literal["none", "bf16"] = "none"
    epochs: int = 1
    max_steps: int = 0
    log_every: int = 20
    eval_every: int = 0
    patience: int = 0
    schedule: Literal["constant", "plateau"] = "constant"
    checkpoint_every: int = 0
    checkpoint_minutes: float = 0.0
    checkpoint_folder: str = ""
    keep_last: int = 2
    keep_best: int = 1
    max_grad_norm: float = 0.0
    on_nonfinite: Literal["stop", "skip"] = "stop"
    max_skipped: int = 10
    spike_sigmas: float = 6.0
    timeout_seconds: float = 600.0
    stall_seconds: float = 300.0
    warm_start: str = ""
    warm_start_tables: tuple[str, ...] = ()
    tracking: str = ""

    def __post_init__(self) -> None:
        """Refuse counts that train nothing."""
        for key, least in (("epochs", 1), ("log_every", 1), ("keep_last", 1), ("keep_best", 1), ("seed", 0)):
            if getattr(self, key) < least:
                raise InputError(f"{key} = {getattr(self, key)}: wanted {least} or more; raise it")
        for key in (
            "max_steps", "eval_every", "patience", "checkpoint_every", "checkpoint_minutes", "max_grad_norm",
            "max_skipped", "spike_sigmas",
        ):  # fmt: skip
            if getattr(self, key) < 0:
                raise InputError(f"{key} = {getattr(self, key)}: wanted 0 (off) or more; raise it")
        for key in ("timeout_seconds", "stall_seconds"):
            if not 0 < getattr(self, key) <= LONGEST_WAIT_SECONDS:
                raise InputError(
                    f"{key} = {getattr(self, key)}: wanted more than 0 and at most {LONGEST_WAIT_SECONDS:,}; change it"
                )
        if self.tracking and not self.tracking.startswith(("http://", "https://")):
            raise InputError(
                f"tracking = {self.tracking!r}: wanted the address of an MLflow server; write http://HOST:5000, or leave it empty"
            )
        if self.warm_start_tables and not self.warm_start:
            raise InputError(
                "warm_start_tables names tables, but warm_start names no run; set both or neither"
            )


@dataclass(frozen=True)
class RunConfig:
    """One run: what it reads, what it learns with, where tables live, how long.

    Attributes:
        name: of the run; names its folder.
        schema: the schema file, fitted, relative to the working directory.
    """

    name: str
    schema: str
    data: DataConfig
    model: ModelConfig = ModelConfig()
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()

    def __post_init__(self) -> None:
        """Check what no part can check alone."""
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise InputError(f"name = {self.name!r}: wanted a plain word, since it names a folder; change it")
        if self.train.patience and not self.data.valid:
            raise InputError(
                f"train.patience = {self.train.patience}: early stop reads the validation AUC, but data.valid is "
                "empty; name the validation files or set train.patience = 0"
            )
        if self.train.schedule == "plateau" and not self.data.valid:
            raise InputError(
                "train.schedule = 'plateau': it reads the validation AUC, but data.valid is empty; name the "
                "validation files or use 'constant'"
            )

    @property
    def run_folder(self) -> Path:
        """Where the run writes."""
        return Path(self.train.out or f"runs/{self.name}")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's TOML file and apply `key.path=value` overrides.

    Args:
        path: the file.
        overrides: each `a.b=v`; v is a TOML value, or a bare string.

    Raises:
        InputError: naming the file or override, the key's path, the value, what was wanted and the mend.
    """
    table = read_toml(Path(path))
    for override in overrides:
        apply_override(table, override)
    return parse_dataclass(RunConfig, table, str(path))


def apply_override(table: dict[str, Any], override: str) -> None:
    """Set one dotted key of a parsed TOML table in place.

    Raises:
        InputError: the override is not `key.path=value`, or its path leads through a value.
    """
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise InputError(
            f"--set {override!r}: wanted key.path=value, for example train.epochs=2; write it so"
        )
    for name in names[:-1]:
        child = table.setdefault(name, {})
        if not isinstance(child, dict):
            raise InputError(f"--set {override}: {name!r} is {child!r}, not a table of keys; check the path")
        table = child
    table[names[-1]] = _toml_value(text.strip())


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, KeyError):
        return text


def config_text(config: RunConfig) -> str:
    """The resolved config as TOML: every key with the value that the run uses."""
    return tomli_w.dumps(to_toml_value(config))
