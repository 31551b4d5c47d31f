"""Runs of a study: what each one depends on, where it lives, which are done, and how the rest are trained on the machine's cores.

A run's folder is named by a hash of all that decides its result: config, schema, vocabularies, data, other runs and plans, the models' code.
So a study that is started again, or another study that needs the same run, finds it. Tuning keeps the same facts beside its trials, and says
what differs when it is started again.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import mbcnet_rec.model
from data.engine import LOST_WORKERS, Engine, meet, run_tasks, write_result
from data.errors import InputError, some_of
from data.reading.files import resolve_files
from data.reading.fingerprint import mark_differences, mark_files
from data.reading.storage import path_parts
from data.schema import format_schema, load_schema
from data.schema.parse import to_toml_value
from data.whole_folder import write_whole
from mbcnet_rec.checkpoints.manifest import sha256_of
from mbcnet_rec.checkpoints.run_folder import DONE, storage_of
from mbcnet_rec.checkpoints.storage import best_step
from mbcnet_rec.config import RunConfig, flat
from mbcnet_rec.doctor import installed
from mbcnet_rec.logs.metrics_log import METRICS, read_metrics
from mbcnet_rec.report.run_report import judged_line, write_run_report
from mbcnet_rec.runtime.exits import CannotWriteError, PreemptedError
from mbcnet_rec.runtime.process import joined_process
from mbcnet_rec.runtime.ranks import alone
from mbcnet_rec.scoring.evaluate import Question, score_rows
from mbcnet_rec.scoring.metrics import why_no_auc
from mbcnet_rec.scoring.trained_run import TrainedRun, find_best, load_run
from mbcnet_rec.teachers import train_model
from mbcnet_rec.training.state import Watch

# Keys that change no number, and paths whose content counts instead
APART = (
    "name", "schema", "data.train", "data.valid", "data.test", "data.attempts", "data.timeout_seconds", "sharding.plan", "train.out",
    "train.warm_start", "train.checkpoint_folder", "train.tracking", "train.timeout_seconds", "train.stall_seconds", "train.profile",
    "train.cuda_graph",
)  # fmt: skip
SHOWN = 3
LONGEST_SHOWN = 120  # characters of a value before and after
Known = dict[tuple[Any, ...], Any]  # what one command has read already: its runs share schema and data
KEY_DIGITS = 16
ROW_SCORES = "row_scores.npz"  # what a run says of each test row, so that models can be compared row by row
PRUNED = "PRUNED"  # in the folder of a run that was ended early, and so is none that its config describes
NO_NUMBERS = "some logits are not numbers"  # why a run that has ended has no scores
LOST = f"{LOST_WORKERS} processes that trained it died, perhaps for lack of memory; start again, with fewer --workers if so"
Train = Callable[[RunConfig, Watch | None], str]  # why it failed, or ""; see train_one


def dependencies(config: RunConfig, known: Known) -> dict[str, Any]:
    """All that decides what a run of this config learns; InputError if the schema, a vocabulary, the data or the run of a warm start is missing."""

    def once(key: tuple[Any, ...], read: Callable[[], Any]) -> Any:
        if key not in known:
            known[key] = read()
        return known[key]

    splits = {split: getattr(config.data, split) for split in ("train", "valid", "test")}
    started, plan = config.train.warm_start, config.sharding.plan
    return {
        "config": {key: str(value) for key, value in flat(to_toml_value(config)) if key not in APART},
        **once(("schema", config.schema), partial(_schema, config.schema)),
        "data": {name: once(paths, partial(_marks, paths)) for name, paths in splits.items()},
        "warm start": once(("run", started), partial(_run, started)),
        "plan": once(("plan", plan), lambda: sha256_of(Path(plan)) if plan else ""),
        "code of the models": f"{installed('mbcnet-rec')} {_code()}",  # our version, where it is installed
    }


def digest_of(depends: Mapping[str, Any]) -> str:
    """SHA-256 of dependencies, as hex digits."""
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """In what dependencies differ, in words; an empty string if in nothing."""
    found: list[str] = []
    for part in now:
        old, new = before.get(part, {}), now[part]
        if old == new:
            continue
        if part == "data":
            told = {split: mark_differences(old.get(split, []), each) for split, each in new.items()}
            found += [f"data.{split}: {words}" for split, words in told.items() if words]
        elif isinstance(new, dict):
            prefix = "" if part == "config" else f"{part} "
            pairs = {key: (old.get(key, "none"), new.get(key, "none")) for key in {**old, **new}}
            found += [
                f"{prefix}{key}" + (f" {then} -> {here}" if len(then) + len(here) < LONGEST_SHOWN else "")
                for key, (then, here) in pairs.items()
                if then != here
            ]
        else:
            found.append(part)
    return some_of(found, SHOWN)


def _schema(path: str) -> dict[str, Any]:
    """A schema line by line, without comments and blanks, and its vocabularies' hashes."""
    schema = load_schema(path)
    lines = [line for line in format_schema(schema).splitlines() if line]
    files = sorted({each.vocabulary for each in schema.features if each.encoding == "vocabulary"})
    return {
        "schema": {line.partition(" = ")[0].strip(): line.partition(" = ")[2] for line in lines},
        "vocabulary": {name: sha256_of(schema.folder / name) for name in files},
    }


def _marks(paths: tuple[str, ...]) -> list[list[Any]]:
    """The marks of a split's files, by all that they hold; folders of Hive partitions, which hold values, are part of the name."""
    files = resolve_files(paths) if paths else []
    folders = ["/".join(part for part in path_parts(file)[:-1] if "=" in part) for file in files]
    marks = zip(folders, mark_files(files, contents=True), strict=True)
    return [[f"{folder}/{mark.name}".lstrip("/"), mark.size, mark.sha256] for folder, mark in marks]


def _run(folder: str) -> str:
    if not folder:
        return ""
    config = load_run(Path(folder))
    step = best_step(storage_of(config.train, Path(folder)))
    return "" if step is None else TrainedRun(config, Path(folder), step).digest()


@cache
def _code() -> str:
    """A hash of the models' files, which people change while a study runs."""
    root = Path(mbcnet_rec.model.__file__).parent
    texts = [path.read_bytes() for path in sorted(root.rglob("*.py"))]
    return hashlib.sha256(b"".join(texts)).hexdigest()


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
    """Give a config its seed, its folder in `out`/runs, and with branches an early checkpoint; InputError if schema or data are missing."""
    early = config.train.log_every if config.model.branch_names else 0
    config = replace(config, train=replace(config.train, seed=seed, out="", keep_step=early))
    return replace(config, train=replace(config.train, out=str(out / "runs" / run_key(config, known))))


def run_key(config: RunConfig, known: Known | None = None) -> str:
    """Hash what decides a run's result; InputError if the schema or the data files are missing."""
    return digest_of(dependencies(config, {} if known is None else known))[:KEY_DIGITS]


def train_one(config: RunConfig, watch: Watch | None = None) -> str:
    """Train one run, with `watch` as run_training has it; what it prints goes to a file beside its folder. Return why it failed, or "".

    PreemptedError and CannotWriteError are raised: they are no fault of the run, and the next would not get further either.
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


def train_and_score(config: RunConfig, watch: Watch | None = None) -> str:
    """Train a run as `train_one` does, and keep what it says of each test row."""
    failure = train_one(config, watch)
    try:
        if not failure and (config.data.test or config.data.valid):
            keep_row_scores(config)
    except InputError as error:  # a score that is not a number
        return str(error)
    return failure


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


def train_all(runs: Sequence[Run], engine: Engine, train: Train = train_and_score) -> Iterator[tuple[Run, str]]:
    """Train what is not done, each run a task of the engine, once; yield each with why it failed or "", and go on. Raises as `train_one` does.

    0 workers of the local engine: one a core, or a single one where runs take a GPU. Of torchrun's ranks only the first hears of the others' runs.
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
    meet(engine, folder)
    try:
        for path in run_tasks(engine, train_task, tasks, last=True, lost=lambda path: write_whole(path, LOST)):
            if path in todo:
                yield wanted[path], path.read_text(encoding="utf-8")
        meet(engine, folder)
    finally:
        for path in tasks if engine.is_first else ():
            path.unlink(missing_ok=True)


def scores(folder: Path, splits: Sequence[str] = ("test", "valid")) -> dict[str, Any]:
    """What a finished run is judged by: test metrics, else its best validation's, NaN if not defined; InputError if there are no such rows.

    With them, of branches, the mean `disagreement` over pairs and the log, `dead` outputs at the end, and a `note` on why there is no AUC.
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


class RowScores(NamedTuple):
    """Of one run; B rows, O outputs."""

    outputs: tuple[str, ...]  # "" for the fused one, then the branches
    logits: np.ndarray  # (B, O) float32
    labels: np.ndarray  # (B,) of 0 and 1
    groups: np.ndarray | None  # (B,) int64

    def of(self, output: str) -> np.ndarray:
        """Logits of one output, (B,)."""
        return self.logits[:, self.outputs.index(output)]


def keep_row_scores(config: RunConfig) -> None:
    """Score a finished run's test rows, else its validation rows; too many leave an empty file. InputError if a score is not a number."""
    folder = config.run_folder
    with joined_process(config.train.device) as process:
        question = Question("test" if config.data.test else "valid")
        tallies, _ = score_rows(find_best(config, folder, process), process, question)
        (tally,) = tallies.of.values()
        rows = tally.kept(process)
    assert rows is not None  # of one process
    some = slice(None) if tally.exact else slice(0)
    kept = {"outputs": np.array(["", *tally.branches]), "logits": rows.logits[some], "labels": rows.labels[some]}
    if rows.group_ids is not None:
        kept["groups"] = rows.group_ids[some]
    with write_result(folder / ROW_SCORES) as draft, draft.open("wb") as file:
        np.savez(file, **kept)  # pyright: ignore[reportArgumentType]


def read_row_scores(config: RunConfig) -> RowScores | None:
    """What `keep_row_scores` has kept of a run, which is scored now if it was interrupted before; None where that cannot be, or there are too many rows."""
    path = config.run_folder / ROW_SCORES
    if not path.is_file():
        with suppress(InputError):  # its checkpoints are gone, say
            keep_row_scores(config)
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as kept:
        found = RowScores(tuple(kept["outputs"].tolist()), kept["logits"], kept["labels"], kept.get("groups"))
    return found if len(found.labels) else None
