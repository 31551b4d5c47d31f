"""Appends what a run measures to metrics.jsonl, and hands the same numbers to TensorBoard and MLflow."""

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from data.errors import InputError
from data.whole_folder import write_whole
from mbcnet_rec.logs.mlflow import MlflowSink, curve_name
from mbcnet_rec.logs.progress import tell
from mbcnet_rec.runtime.exits import CannotWriteError

METRICS = "metrics.jsonl"
PROGRESSIVE = "progressive"  # the split of a day's rows before they are trained
# these keys depend on the machine and on when a run was started: two equal runs differ in them
TIMINGS = ("samples_per_second", "step_seconds", "input_wait_share", "checkpoint_stall_seconds", "checkpoint_seconds")


class Records:
    """The log of a run, on rank 0. Lines of steps after the first one are dropped: a resumed run repeats them.

    `day`: the step with which the day begins that is trained. When opened and by every method CannotWriteError if it cannot be written.
    """

    def __init__(self, folder: Path, first_step: int, sink: MlflowSink | None = None, *, day: int = 0) -> None:
        self._path = path = folder / METRICS
        self._curves: SummaryWriter | None = None
        self._sink = sink
        with written(path):
            text = path.read_text(errors="replace", encoding="utf-8") if path.exists() else ""
            kept = "".join(line + "\n" for line in keep_until(text.splitlines(), first_step, day))
            if kept != text:
                write_whole(path, kept)
            self._file = path.open("ab", buffering=0)
        with self._curves_if_possible():
            self._curves = SummaryWriter(folder / "tb", purge_step=first_step or None, max_queue=1000, flush_secs=10)

    def add(self, step: int, split: str, values: dict[str, Any]) -> None:
        """Write one line: step, split, and every value; NaN becomes null, which JSON has. A line is written whole or not at all."""
        clean = {key: finite_or_none(value) for key, value in values.items()}
        line = json_line({"step": step, "split": split, **clean}).encode()
        end = os.fstat(self._file.fileno()).st_size
        with written(self._path):
            try:
                while line:  # a full disk takes a part of it first
                    line = line[self._file.write(line) :]
            except OSError:
                os.truncate(self._path, end)
                raise
        if self._sink is not None:
            self._sink.add(step, split, clean)
        with self._curves_if_possible():
            for key, value in clean.items():
                if self._curves is not None and isinstance(value, (int, float)):
                    self._curves.add_scalar(curve_name(split, key), value, step)

    def sync(self) -> None:
        """Make the lines so far durable, before a checkpoint of their step is written."""
        with written(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close everything; an exception in flight becomes the status on the MLflow server."""
        self._file.close()
        with suppress(OSError):
            if self._curves is not None:
                self._curves.close()
        if self._sink is not None:
            self._sink.close(sys.exc_info()[1])

    @contextmanager
    def _curves_if_possible(self) -> Iterator[None]:
        """Continue without curves where they cannot be written."""
        try:
            yield
        except OSError as error:
            folder = self._path.parent / "tb"
            tell(f"mbcnet: warning: {folder}: no more TensorBoard curves ({error.strerror})", sys.stderr)
            self._curves = None


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Around writing what a run cannot do without; a CannotWriteError names the file, or `path` where the system names none."""
    try:
        yield
    except OSError as error:
        raise CannotWriteError(
            f"rank 0: {error.filename or path}: cannot be written ({error.strerror}); what was written before is intact: free space, "
            "or choose another folder, then continue with --resume"
        ) from None


def read_metrics(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Read a run's metrics.jsonl; InputError if it is not there."""
    if not (folder / METRICS).is_file():
        raise InputError(f"{folder}: no run folder (it has no {METRICS}); pass what `mbcnet train` wrote")
    found: dict[str, list[dict[str, Any]]] = {}
    for text in (folder / METRICS).read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        found.setdefault(line["split"], []).append(line)
    return found


def keep_until(lines: list[str], step: int, day: int = 0) -> list[str]:
    """The lines of steps up to `step`, the last one of each split, without one cut off by a crash and those of this day's test, with which it ends."""
    kept: dict[tuple[int, str], str] = {}
    for line in lines:
        try:
            entry = json.loads(line)
            if entry["step"] <= (day if entry["split"] == "test" else step):
                kept[entry["step"], entry["split"]] = line
        except (ValueError, KeyError, TypeError):
            continue
    return list(kept.values())


def json_line(values: dict[str, Any]) -> str:
    """A JSON object on one line; NaN and infinity, which JSON does not have, become null."""
    return json.dumps(finite_or_none(dict(values)), allow_nan=False) + "\n"


def finite_or_none(value: Any) -> Any:
    """None for NaN and infinity, which JSON does not have; lists and dictionaries are searched."""
    if isinstance(value, dict):
        return {key: finite_or_none(each) for key, each in value.items()}
    if isinstance(value, list):
        return [finite_or_none(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
