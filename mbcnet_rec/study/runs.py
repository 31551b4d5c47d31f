"""Runs of a study: where each one lives, which are done, and how the rest are trained on the machine's cores.

A run's folder is named by a hash of all that decides its result: config, schema, vocabularies and data; see dependencies.py.
So a study that is started again, or another study that needs the same run, finds it.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from data.engine import LOST_WORKERS, Engine, follow, meet, run_tasks
from data.errors import InputError
from data.schema import load_schema
from data.whole_folder import write_whole
from mbcnet_rec.checkpoints.run_folder import DONE
from mbcnet_rec.config import RunConfig
from mbcnet_rec.logs.metrics_log import METRICS
from mbcnet_rec.report.run_report import judged_line, read_metrics, write_run_report
from mbcnet_rec.runtime.exits import CannotWriteError, PreemptedError
from mbcnet_rec.runtime.ranks import alone
from mbcnet_rec.scoring.metrics import why_no_auc
from mbcnet_rec.study.dependencies import Known, dependencies, digest_of
from mbcnet_rec.teachers import train_model
from mbcnet_rec.training.state import Watch

KEY_DIGITS = 16
PRUNED = "PRUNED"  # in the folder of a run that was ended early, and so is none that its config describes
NO_NUMBERS = "some logits are not numbers"  # why a run that has ended has no scores
LOST = f"{LOST_WORKERS} processes that trained it died, perhaps for lack of memory; start again, with fewer --workers if so"
Train = Callable[[RunConfig, Watch | None], str]  # why it failed, or ""; see train_one


@dataclass(frozen=True)
class Run:
    """One training run of a study."""

    variant: str  # the row of the study's table that it belongs to
    seed: int  # of its weights and of the order of rows
    config: RunConfig  # train.out is the run's folder

    @property
    def folder(self) -> Path:
        """Where it is kept."""
        return self.config.run_folder

    @property
    def done(self) -> bool:
        """Whether it has been trained to its end."""
        return (self.folder / DONE).is_file() and not (self.folder / PRUNED).exists()


def place_run(config: RunConfig, seed: int, out: Path, known: Known | None = None) -> RunConfig:
    """Give a config its seed and its folder under `out`/runs; InputError if the schema or the data files are missing.

    A model with branches keeps an early checkpoint, that of the first line of the log.
    """
    early = config.train.log_every if config.model.branch_names else 0
    config = replace(config, train=replace(config.train, seed=seed, out="", keep_step=early))
    return replace(config, train=replace(config.train, out=str(out / "runs" / run_key(config, known))))


def run_key(config: RunConfig, known: Known | None = None) -> str:
    """Hash what decides a run's result (dependencies.py); InputError if the schema or the data files are missing."""
    return digest_of(dependencies(config, {} if known is None else known))[:KEY_DIGITS]


def train_one(config: RunConfig, watch: Watch | None = None) -> str:
    """Train one run, with `watch` as run_training has it; what it prints goes to a file beside its folder. Return why it failed, or "".

    Raises:
        PreemptedError: this process got a stop request, which is no fault of the run.
        CannotWriteError: the next run would not get further either.
    """
    folder = config.run_folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    for name in (DONE, PRUNED) if (folder / PRUNED).exists() else ():  # in this order: a crash leaves no whole run
        (folder / name).unlink(missing_ok=True)
    with folder.with_suffix(".log").open("w", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            load_schema(config.schema).require_one_label("study and tune")
            train_model(config, overwrite=True, watch=watch, report=write_run_report)
        except (PreemptedError, CannotWriteError) as error:  # the way out is the study's or the tuning's
            raise type(error)(str(error).replace("continue with --resume", "start the same command again")) from None
        except (InputError, RuntimeError) as error:  # a loss that is not finite is a RuntimeError
            return " ".join(str(error).split()) or type(error).__name__
    return ""


class TrainTask(NamedTuple):
    """One run for a worker."""

    config: RunConfig
    train: Train
    ended: Path  # file of why it failed, or of nothing


def train_task(task: TrainTask) -> None:
    """Train a run, and say how it ended."""
    with alone():
        failure = task.train(task.config, None)
    write_whole(task.ended, failure)


def train_all(runs: Sequence[Run], engine: Engine, train: Train = train_one) -> Iterator[tuple[Run, str]]:
    """Train what is not done yet, each run a task of the engine; yield each when it ends, and why it failed or "". It raises as `train_one` does.

    The same run wanted twice is trained once. A run that fails does not end the study: its row says so. 0 workers of the local engine are one
    for each core, or a single one where runs take a GPU. Of torchrun's ranks only the first hears of the others' runs.
    """
    wanted = {run.folder.with_suffix(".ended"): run for run in runs}
    tasks = {path: TrainTask(run.config, train, path) for path, run in wanted.items()}
    todo = {path for path, run in wanted.items() if not run.done}
    if not tasks:
        return
    if engine.name == "local":
        on_gpu = torch.cuda.is_available() and any(run.config.train.device != "cpu" for run in runs)
        workers = engine.workers or int(on_gpu) or len(os.sched_getaffinity(0))
        engine = engine._replace(workers=max(1, min(workers, len(todo))), cpus=0)
    folder = next(iter(tasks)).parent
    folder.mkdir(parents=True, exist_ok=True)
    for path in tasks if engine.is_first else ():
        path.unlink(missing_ok=True)  # of an earlier start
        if path not in todo:
            write_whole(path, "")
    follow(engine, folder)
    try:
        for path in run_tasks(engine, train_task, tasks, last=True, lost=lambda path: write_whole(path, LOST)):
            if path in todo:
                yield wanted[path], path.read_text(encoding="utf-8")
        meet(engine, folder)
    finally:
        for path in tasks if engine.is_first else ():
            path.unlink(missing_ok=True)


def scores(folder: Path, splits: Sequence[str] = ("test", "valid")) -> dict[str, Any]:
    """Read what a finished run is judged by: its metrics on the test rows, else those of its best validation; NaN where not defined.

    With them `disagreement`, the mean over directed pairs and the log, of a run with branches; `dead`, the outputs that were so at the end; and
    `note`, why there is no AUC, or "". InputError if these splits have no rows.
    """
    lines = read_metrics(folder)
    line = judged_line(lines, splits)
    if line is None:
        keys = " or ".join(f"data.{split}" for split in splits)
        raise InputError(f"{folder}/{METRICS}: no {' or '.join(splits)} rows were scored; name {keys} in the config")
    note = why_no_auc(line)
    if note not in ("", NO_NUMBERS):
        note = f"the AUC of the {line['split']} rows is not defined, since {note}; name others in data.{line['split']}"
    trained = lines.get("train", [{}])
    rates = [value for each in trained for key, value in each.items() if key.startswith("disagreement/")]
    disagreement = {"disagreement": sum(rates) / len(rates)} if rates else {}
    values = {key: math.nan if value is None else value for key, value in line.items()}
    return {**values, **disagreement, "dead": trained[-1].get("dead", []), "note": note}
