"""EnKD in one command: the teachers are trained and frozen, then the student learns from the labels and from their logits.

Every teacher is a run of its own, in RUN_teachers/KIND, on the same data with the same seed. While the student trains, each
batch passes through the teachers, which append their logits to its dense features: the student's own columns come before.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from data.errors import InputError
from data.reading.conditions import select_files
from data.reading.files import resolve_files
from data.reading.fingerprint import mark_files
from data.schema import Schema
from data.stream import Batch, ParquetStream
from mbcnet_rec.checkpoints.run_folder import DONE, storage_of
from mbcnet_rec.checkpoints.run_schema import other_ids, saved_run
from mbcnet_rec.config import RunConfig
from mbcnet_rec.model.models import needs_wide
from mbcnet_rec.resume import start_differences
from mbcnet_rec.run_start import LOST, check_folder
from mbcnet_rec.run_training import Report, run_training
from mbcnet_rec.runtime.lock import locked
from mbcnet_rec.runtime.process import Process
from mbcnet_rec.scoring.scorer import Scorer
from mbcnet_rec.scoring.trained_run import TrainedRun, find_best


def train_model(
    config: RunConfig, *, resume: bool = False, overwrite: bool = False, report: Report | None = None, **options: Any
) -> int:
    """`run_training`, with its options, for EnKD preceded by its teachers. One call per rank."""
    if config.model.teacher_kinds:
        if options.get("continues") or options.get("progressive"):
            raise InputError("--continue, --progressive: EnKD learns from teachers that know its rows; train it anew")
        teachers = [teacher_config(config, kind) for kind in config.model.teacher_kinds]
        with ExitStack() as held:
            # the student's folder is taken for as long as its teachers train, too
            if os.environ.get("RANK", "0") == "0":
                held.enter_context(locked(config.run_folder, "train"))
                check_folder(config, resume, overwrite)
            for teacher in teachers:
                if resume and (teacher.run_folder / DONE).is_file():
                    refuse_other_teacher(teacher)
                else:
                    run_training(teacher, resume=resume, overwrite=overwrite, report=report)
            teach = partial(taught_by, teachers)
            return run_training(config, resume=resume, overwrite=overwrite, report=report, teach=teach, **options)
    return run_training(config, resume=resume, overwrite=overwrite, report=report, **options)


def refuse_other_teacher(teacher: RunConfig) -> None:
    """Refuse a teacher that is done, but of other rows or another model than its config says now; InputError if it is so."""
    folder = teacher.run_folder
    storage = storage_of(teacher.train, folder)
    if not (steps := storage.steps()):
        raise InputError(LOST.format(folder))
    run = saved_run(storage.manifest(steps[-1]), folder)
    schema = TrainedRun(teacher, folder, steps[-1]).schema
    files = select_files(resolve_files(teacher.data.train), teacher.data.train_where, schema)
    marks = {"train": mark_files(files, teacher.data.attempts)}
    if found := start_differences(teacher, run, marks, ("model.", "optim.")):
        raise InputError(
            f"{folder}: this teacher is done, but {'; '.join(found)}; make them equal again, or begin anew with --overwrite"
        )


def teacher_config(config: RunConfig, kind: str) -> RunConfig:
    """Config of a teacher of an EnKD run; InputError if `kind` is no kind of model."""
    if kind not in config.model.kinds:
        where, known = f"model.{config.model.kind}.teachers", ", ".join(config.model.kinds)
        raise InputError(f"{where}: {kind!r} is no kind of model; wanted some of {known}")
    folder = config.run_folder.with_name(config.run_folder.name + "_teachers") / kind
    model = replace(config.model, kind=kind)
    # a plan file lists the student's tables; a teacher with a wide part has more
    plan = "" if needs_wide(model) else config.sharding.plan
    sharding = replace(config.sharding, plan=plan)
    train = replace(config.train, out=str(folder), checkpoint_folder="")
    return replace(config, name=f"{config.name}_{kind}", model=model, sharding=sharding, train=train)


def taught_by(teachers: Sequence[RunConfig], process: Process, stream: ParquetStream) -> ParquetStream:
    """Load the teachers with their best weights, and let them append their logits to a stream's rows."""
    scorers = [load_teacher(config, stream.schema, process) for config in teachers]
    return TaughtStream(stream, scorers)  # type: ignore[return-value]


def load_teacher(config: RunConfig, schema: Schema, process: Process) -> Scorer:
    """Build a teacher with its best weights, for evaluation only; InputError if it has learned rows that mean something else."""
    run = find_best(config, config.run_folder, process)
    differ = [f"table {name}: {why}" for name, why in other_ids(run.schema, schema).items()]
    if differ or run.schema.fingerprint() != schema.fingerprint():
        raise InputError(
            f"{config.run_folder}: this teacher was trained with another schema ({'; '.join(differ) or 'fields, tables or groups differ'}); "
            "train teachers and student anew with --overwrite"
        )
    return Scorer(run.build(process).model.eval())


class TaughtStream:
    """A stream of training rows whose batches end with the frozen teachers' logits; all else is the stream's own."""

    def __init__(self, stream: ParquetStream, teachers: Sequence[Scorer]) -> None:
        self._stream, self._teachers = stream, teachers

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __iter__(self) -> Iterator[Batch]:
        for each in self._stream:
            # once for all, and the logits stay there
            batch = each.to(self._teachers[0].model.device, non_blocking=True)
            logits = [teacher.score_batch(batch)[:, :1] for teacher in self._teachers]
            yield replace(batch, dense_features=torch.cat([batch.dense_features, *logits], dim=1))
