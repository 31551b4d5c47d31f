"""EnKD in one command: the teachers are trained and frozen, then the student learns from labels and from them.

Every teacher is a run of its own, in RUN_teachers/KIND, on the same data with the same seed. While the student trains, each
batch passes through the teachers, which append their logits to its dense features: the student's own columns come before.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data.errors import InputError
from data.reading.order import Cursor
from data.schema import Schema, load_schema
from data.stream import Batch, ParquetStream
from mbcnet_rec.config import RunConfig
from mbcnet_rec.model.models import ModelKind, needs_wide
from mbcnet_rec.runtime.process import Process
from mbcnet_rec.scoring.trained_run import find_step, load_built
from mbcnet_rec.train import DONE, Report, run_training
from mbcnet_rec.training.built import Built
from mbcnet_rec.training.trainer import Watch


def train_model(
    config: RunConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    allow_partial: bool = False,
    watch: Watch | None = None,
    report: Report | None = None,
) -> int:
    """`run_training`, for EnKD preceded by its teachers. One call per rank.

    Raises:
        InputError: see run_training.
    """
    if config.model.kind != "enkd":
        return run_training(
            config,
            resume=resume,
            overwrite=overwrite,
            allow_partial=allow_partial,
            watch=watch,
            report=report,
        )
    teachers = [teacher_config(config, kind) for kind in config.model.enkd.teachers]
    for teacher in teachers:
        if not (resume and (teacher.run_folder / DONE).is_file()):
            run_training(teacher, resume=resume, overwrite=overwrite, report=report)
    return run_training(
        config,
        resume=resume,
        overwrite=overwrite,
        allow_partial=allow_partial,
        watch=watch,
        teach=partial(taught_by, teachers),
        report=report,
    )


def teacher_config(config: RunConfig, kind: str) -> RunConfig:
    """Config of a teacher of an EnKD run.

    Raises:
        InputError: `kind` is no kind of model.
    """
    if not hasattr(config.model, kind) or kind == "kind":
        raise InputError(
            f"model.enkd.teachers: {kind!r} is no kind of model; wanted some of dcnv2, crossnet, wide_deep, .."
        )
    chosen: ModelKind = kind  # type: ignore[assignment]
    folder = config.run_folder.with_name(config.run_folder.name + "_teachers") / kind
    model = replace(config.model, kind=chosen)
    # a plan file lists the student's tables; a teacher with a wide part has more
    plan = "" if needs_wide(model) else config.sharding.plan
    return replace(
        config,
        name=f"{config.name}_{kind}",
        model=model,
        sharding=replace(config.sharding, plan=plan),
        train=replace(config.train, out=str(folder), checkpoint_folder=""),
    )


def taught_by(teachers: Sequence[RunConfig], process: Process, stream: ParquetStream) -> ParquetStream:
    """Load the teachers' best weights and let them mark the rows of a stream."""
    loaded = [
        load_teacher(config, load_schema(config.schema), config.run_folder, process) for config in teachers
    ]
    return TaughtStream(stream, loaded, process)  # type: ignore[return-value]


def load_teacher(config: RunConfig, schema: Schema, folder: Path, process: Process) -> Built:
    """Build a teacher with its best weights, for evaluation only."""
    built = load_built(config, schema, folder, find_step(config, folder, process), process)
    built.model.eval()
    return built


class TaughtStream:
    """A stream whose batches end with the teachers' logits; position and schema are the stream's own.

    Args:
        stream: of training rows.
        teachers: frozen.
        process: this rank.
    """

    def __init__(self, stream: ParquetStream, teachers: Sequence[Built], process: Process) -> None:
        self._stream, self._teachers, self._process = stream, teachers, process
        self.schema, self.options = stream.schema, stream.options
        self.steps_per_epoch = stream.steps_per_epoch

    @property
    def counters(self) -> Any:
        """The stream's counters."""
        return self._stream.counters

    def state_dict(self, cursor: Cursor | None = None) -> dict[str, Any]:
        """The stream's position."""
        return self._stream.state_dict(cursor)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a position."""
        self._stream.load_state_dict(state)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._stream:
            logits = teacher_logits(self._teachers, batch, self._process.device)  # (B, T)
            yield replace(batch, dense_features=torch.cat([batch.dense_features, logits], dim=1))


def teacher_logits(teachers: Sequence[Built], batch: Batch, device: torch.device) -> torch.Tensor:
    """Score a batch by each teacher: (B, T) on the CPU, without gradient."""
    placed = batch.to(device)
    with torch.no_grad():
        scored = [teacher.model(placed)[1].logits[:, 0] for teacher in teachers]
    return torch.stack(scored, dim=1).float().cpu()
