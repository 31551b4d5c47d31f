"""Runs of a study: where each one lives, which are done, and how the rest are trained on the machine's cores.

A run's folder is named by a hash of all that decides its result: config, schema, vocabularies and data; see dependencies.py.
So a study that is started again, or another study that needs the same run, finds it.
"""

import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import torch

from data.errors import InputError
from data.schema import load_schema
from mbcnet_rec.checkpoints.run_folder import DONE
from mbcnet_rec.config import RunConfig
from mbcnet_rec.logs.metrics_log import METRICS
from mbcnet_rec.report.run_report import judged_line, read_metrics, write_run_report
from mbcnet_rec.runtime.exits import CannotWriteError, PreemptedError
from mbcnet_rec.scoring.metrics import why_no_auc
from mbcnet_rec.study.dependencies import Known, dependencies, digest_of
from mbcnet_rec.teachers import train_model
from mbcnet_rec.training.trainer import Watch

KEY_DIGITS = 16
PRUNED = "PRUNED"  # in the folder of a run that was ended early, and so is none that its config describes
NO_NUMBERS = "some logits are not numbers"  # why a run that has ended has no scores
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


def train_all(runs: Sequence[Run], workers: int = 0, train: Train = train_one) -> Iterator[tuple[Run, str]]:
    """Train what is not done yet, several at a time; yield each run when it ends, and why it failed or "". It raises as `train_one` does.

    The same run wanted twice is trained once. A run that fails does not end the study: its row says so. With 0 workers there is one for
    each core, or a single one where runs take a GPU.
    """
    pending = {run.folder: run for run in runs if not run.done}
    if not pending:
        return
    on_gpu = torch.cuda.is_available() and any(run.config.train.device != "cpu" for run in runs)
    cores = len(os.sched_getaffinity(0))
    processes = min(workers or int(on_gpu) or cores, len(pending))
    if processes == 1:  # here, where torch is imported already
        for run in pending.values():
            yield run, train(run.config, None)
        return
    with (
        _child_threads(max(1, cores // processes)),
        ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_end_with_parent) as pool,
    ):
        waiting = {pool.submit(train, run.config, None): run for run in pending.values()}
        try:
            for future in as_completed(waiting):
                try:
                    failure = future.result()
                except BrokenProcessPool:  # every run that had not ended says so, and the next start trains them
                    failure = "a process of the pool died, perhaps for lack of memory; start again, with fewer --workers if so"
                yield waiting[future], failure
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _end_with_parent() -> None:
    """In a worker: leave when the process that started it is gone, however it went."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _child_threads(threads: int) -> Iterator[None]:
    """Children started inside read OMP_NUM_THREADS before they import anything."""
    before = dict(os.environ)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    try:
        yield
    finally:
        os.environ.pop("OMP_NUM_THREADS")
        os.environ.update(before)


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
