"""The days of a run: the training files of each, in RUN/lineage.jsonl, and whether a start goes on within the last day or begins another.

A day is what one `mbcnet train`, or `mbcnet train --continue`, trains. A line has its name, first_step, files (name, bytes, SHA-256 of each:
data/reading/fingerprint.py), and when it is done step, rows, label_rate and metrics. Checkpoints have the number of their day.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from data.errors import InputError
from data.reading.fingerprint import FileMark
from data.whole_folder import write_whole
from mbcnet_rec.checkpoints.run_folder import DONE
from mbcnet_rec.config import RunConfig
from mbcnet_rec.logs.metrics_log import json_line
from mbcnet_rec.training.state import TrainState

LINEAGE = "lineage.jsonl"
DATA = "data.json"  # in a run folder: the files of training and validation, see data/reading/fingerprint.py
Marks = Mapping[str, list[FileMark]]  # by split
Day = dict[str, Any]


class Days(NamedTuple):
    """Of a run, up to the one that this start trains."""

    lines: list[Day]
    begins: bool  # whether its files are read from the start, with the weights of the day before
    note: str  # which days are given up


def days_of(
    config: RunConfig, step: int | None, run: Mapping[str, Any], marks: Marks, *, continues: bool, again: bool
) -> Days:
    """The days of the run whose checkpoint of `step` has the facts `run` (no step: a fresh start), with the one of these files. For rank 0.

    InputError if a file was trained already and `again` is not set, the last day is of other files and not done, or its end is lost.
    """
    folder, files = config.run_folder, [list(mark) for mark in marks["train"]]
    lines = [] if step is None else read_days(folder)
    saved = run.get("day", 1)
    # days without a checkpoint: one has only begun, or the run goes back to an older checkpoint
    lines, lost = (lines[:saved], lines[saved:]) if type(saved) is int and saved > 0 else (lines, [])
    ended = lines[-1].get("step", step) if lost else _done_step(folder)
    is_inside = ended not in (None, step)
    if is_inside and (continues or (lost and lines[-1]["files"] != files)):
        raise InputError(
            f"{folder}: its last whole checkpoint, of step {step}, is not of the end of {lines[-1]['name']!r}; bring the later one back, or "
            "finish that day again from it: --config config.toml --resume with that day's files in data.train"
        )
    done = [each["name"] for each in lost if "step" in each]
    note = f"note: no checkpoint has {', '.join(done)}: the run goes on from step {step}, before that" if done else ""
    begins = bool(lines) and not is_inside and (bool(lost) or (continues and ended is not None))
    if begins or not lines:
        parts = config.data.train[-1].split("/")
        name = next((part for part in reversed(parts) if "=" in part), f"day {len(lines) + 1}")
        trained = {tuple(mark[1:]): each["name"] for each in lines for mark in each["files"]}
        twice = [mark for mark in files if tuple(mark[1:]) in trained]
        if twice and continues and not again:
            raise InputError(
                f"{folder}: {twice[0][0]} was trained already, in {trained[tuple(twice[0][1:])]!r} ({len(twice)} of {len(files)} files, by "
                "size and SHA-256); name the new files, or add --again to train these once more"
            )
        return Days([*lines, {"name": name, "files": files}], begins, note)
    if continues and lines[-1]["files"] != files:
        raise InputError(
            f"{folder}: {lines[-1]['name']!r} is not done, and its files are others; finish it with --config {folder}/config.toml "
            "--resume, then continue"
        )
    return Days([*lines[:-1], lines[-1] | {"files": files}], False, note)


def _done_step(folder: Path) -> int | None:
    """The step with which a run that is done has ended; None where it is not."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return int(json.loads((folder / DONE).read_text(encoding="utf-8"))["step"])
    return None


def days_done(folder: Path) -> int:
    """How many days of a run are done; 0 where there is none."""
    lines = read_days(folder)
    last_is_done = _done_step(folder) is not None or (lines and "step" not in lines[-1])
    return sum("step" in day for day in lines) - (not last_is_done and bool(lines))


def read_days(folder: Path) -> list[Day]:
    """The lines of a run; of one of an earlier version, which has none, the day that its data.json tells of."""
    try:
        if (folder / LINEAGE).is_file():
            lines = [json.loads(line) for line in (folder / LINEAGE).read_text(encoding="utf-8").splitlines()]
        else:
            old = folder / DATA
            marks = json.loads(old.read_text(encoding="utf-8"))["train"] if old.is_file() else []
            lines = [{"name": "day 1", "files": marks, "first_step": 0}]
        [(each["name"], FileMark(*mark)) for each in lines for mark in each["files"]]
    except (ValueError, TypeError, KeyError):
        raise InputError(f"{folder / LINEAGE}: is damaged; bring it back, or begin anew with --overwrite") from None
    return lines


def lineage_text(days: Sequence[Day]) -> str:
    """What RUN/lineage.jsonl says."""
    return "".join(map(json_line, days))


def close_day(folder: Path, days: Sequence[Day], rows: int, state: TrainState, metrics: Mapping[str, Any]) -> None:
    """Complete the line of the day that is done, of so many rows."""
    rate = state.clicks / state.rows if state.rows else None  # none: its checkpoint is of a version that did not count
    done = {"step": state.step, "rows": rows, "label_rate": rate, "metrics": dict(metrics)}
    write_whole(folder / LINEAGE, lineage_text([*days[:-1], days[-1] | done]))
