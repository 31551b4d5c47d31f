"""Runs cases in forked ranks, on the stubbed GPU and on a CPU, and prints what came of each as a line of JSON. Started by prove.py.

python worker.py FOLDER NUMBER_OF_A_CASE ...
"""

import itertools
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from cases import COARSE, SMALL, Case, all_cases
from emulate import STUB, Emulated, Graph, install
from forked_ranks import OVERDUE, Action, run_ranks
from safetensors.numpy import load_file
from small_data import write_small
from tiny_run import lines_of

import mbcnet_rec.serving.export  # noqa: F401 (imported once, before the ranks are forked)
from mbcnet_rec.cli import exit_code, main, plain_words
from mbcnet_rec.config import load_config
from mbcnet_rec.teachers import train_model
from mbcnet_rec.training.hooks import Hooks

LIMIT = 240.0  # seconds of one command on one device
STOPPED_AFTER = 7  # lines of the log end steps 5 and 10
STOPPED = 75  # the exit code of a run that a signal has stopped


def on_gpu(action: Action) -> Action:
    """The same on the stubbed device."""

    def emulated(rank: int) -> int | None:
        install()
        with Emulated():
            code = action(rank)
        print(f"captured {Graph.captures} graphs, on {STUB.stub_most_streams()} streams at most")
        return code

    return emulated


class FailedError(Exception):
    """A command did not end as it must."""


class Runs:
    """What the cases share: data, and the CPU's runs, by their settings."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.configs = {
            "small": write_small(folder / "rows", 960, 192),
            "unbounded": write_unbounded(folder / "unbounded"),
        }
        self.by_settings: dict[Any, Path] = {}
        self.numbers = itertools.count()

    def of(self, case: Case, device: str) -> Path:
        """The run of a case on a device."""
        settings = case.settings if device == "cuda" else case.on_cpu
        key = (device, case.data, case.ranks, "resume" in case.then, settings)
        if key not in self.by_settings:
            self.by_settings[key] = self._trained(case, device, settings)
        return self.by_settings[key]

    def _trained(self, case: Case, device: str, settings: tuple[str, ...]) -> Path:
        out = self.folder / f"{device}_{next(self.numbers)}"
        config = load_config(self.configs[case.data], [*SMALL, f"train.device={device}", f"train.out={out}", *settings])

        def training(**options: Any) -> Action:
            return lambda rank: exit_code(lambda: in_plain_words(lambda: train_model(config, **options)))

        def stop(place: str) -> None:
            if place == f"step {STOPPED_AFTER}" and os.environ["RANK"] == "0":
                os.kill(os.getpid(), signal.SIGTERM)

        if "resume" in case.then:
            self._run(case, device, training(hooks=Hooks(on_place=stop)), out, STOPPED)
            self._run(case, device, training(resume=True), out)
        else:
            self._run(case, device, training(), out, 2 if case.refused else 0)
        return out

    def command(self, case: Case, device: str, words: list[str], out: Path) -> None:
        """Run a command on a trained run."""
        self._run(case, device, lambda rank: main(words), out)

    def _run(self, case: Case, device: str, action: Action, out: Path, code: int = 0) -> None:
        logs = out.with_name(f"{out.name}_said")
        found = run_ranks(on_gpu(action) if device == "cuda" else action, logs, world=case.ranks, limit=LIMIT)
        words = "\n".join(found["words"])
        if OVERDUE in found["codes"]:
            raise FailedError(f"{device}: not done after {LIMIT:.0f} s")
        if {*found["codes"]} != {code} or (case.refused and code and case.refused not in words):
            raise FailedError(f"{device}: exit codes {found['codes']}, wanted {code}: {last_words(words)}")


def in_plain_words(command: Any) -> int:
    with plain_words():
        return command()


def last_words(words: str) -> str:
    """The line of an error among what ranks have said."""
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    faults = [line for line in lines if "Error" in line or line.startswith(("mbcnet:", "stub of"))]
    return (faults or lines or ["it said nothing"])[-1][:400]


def write_unbounded(folder: Path) -> Path:
    """The small data with two fields whose ids are unbounded."""
    config = write_small(folder, 960, 192)
    schema = folder / "schema.toml"
    text = schema.read_text()
    for field in ("user", "tags"):
        begin = text.index(f"{field} ")
        kind = text.index('kind = "', begin)
        text = text[:kind] + 'encoding = "zch", eviction_interval = 3, ' + text[kind:]
    schema.write_text(text)
    return config


def numbers(line: dict[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in line.items() if isinstance(value, int | float) and key != "step"}


def difference(mine: dict[str, float], theirs: dict[str, float]) -> tuple[float, str]:
    """The largest relative difference of numbers by the same names, AUCs by a hundredth, and its name.

    Raises:
        FailedError: one has a number that the other lacks.
    """
    if mine.keys() != theirs.keys():
        raise FailedError(f"only one of both has {', '.join(sorted(mine.keys() ^ theirs.keys())[:4])}")
    worst = (0.0, "")
    for key, value in mine.items():
        other = theirs[key]
        if math.isnan(value) and math.isnan(other):
            continue
        # an AUC counts pairs, of which rounding turns those that are nearly equal
        apart = abs(value - other) / max(1e-3, abs(other)) / (100 if "auc" in key else 1)
        worst = max(worst, (math.inf if math.isnan(apart) else apart, key))
    return worst


def compared(case: Case, runs: Runs) -> Iterator[tuple[float, str]]:
    """Run a case on both, and give the differences."""
    gpu = runs.of(case, "cuda")
    if case.refused:
        return
    cpu = runs.of(case, "cpu")
    mine, theirs = lines_of(gpu), lines_of(cpu)
    if [line["split"] for line in mine] != [line["split"] for line in theirs]:
        raise FailedError(f"the logs have other lines: {len(mine)} and {len(theirs)}")
    for one, other in zip(mine, theirs, strict=True):
        if one["step"] != other["step"]:  # the test of the best step, which coarse numbers may make another one
            if one["split"] == "test" and case.within >= COARSE:
                continue
            raise FailedError(f"{one['split']} of step {one['step']} and of step {other['step']}")
        apart, key = difference(numbers(one), numbers(other))
        # rounding grows with the steps, by ReLUs at 0 and parameters whose gradient is rounding: what comes later counts a hundredth
        yield apart / (1 if one["step"] <= 5 else 100), f"{key} of step {one['step']}, {one['split']}"
    for step in case.then:
        if step in AFTERWARDS:
            yield AFTERWARDS[step](case, runs, gpu, cpu)
    if "profile" in case.then and not any((gpu / "profile").glob("rank_*.json")):
        raise FailedError("no trace was written")
    if "graphs" in case.then:
        said = (gpu.with_name(f"{gpu.name}_said") / "rank_0.log").read_text()
        if not re.search(
            r"^captured 3 graphs, on [46] streams", said, re.MULTILINE
        ):  # training both ways, evaluation: a stream for each branch
            raise FailedError("not all was captured")


def evaluated(case: Case, runs: Runs, gpu: Path, cpu: Path) -> tuple[float, str]:
    found = []
    for device, run in (("cuda", gpu), ("cpu", cpu)):
        runs.command(case, device, ["evaluate", str(run), "--json"], run)
        said = (run.with_name(f"{run.name}_said") / "rank_0.log").read_text()
        found.append(json.loads(next(line for line in reversed(said.splitlines()) if line.startswith("{"))))
    apart, key = difference(*(numbers(flat(each)) for each in found))
    return apart, f"{key} of evaluate"


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {prefix + key: value}
    return found


def predicted(case: Case, runs: Runs, gpu: Path, cpu: Path) -> tuple[float, str]:
    import pyarrow.dataset as dataset

    found = []
    for device, run in (("cuda", gpu), ("cpu", cpu)):
        out = run.with_name(f"{run.name}_scores")
        rows = runs.configs[case.data].parent / "test.parquet"
        runs.command(case, device, ["predict", str(run), "--data", str(rows), "--out", str(out)], run)
        files = sorted(each for each in out.rglob("*.parquet"))
        table = dataset.dataset(files).to_table()
        found.append(
            {name: table[name].to_numpy() for name in table.column_names if table[name].type in ("float", "double")}
        )
    apart = max(float(abs(found[0][name] - found[1][name]).max()) for name in found[1])
    return apart, "a probability of predict"


def exported(case: Case, runs: Runs, gpu: Path, cpu: Path) -> tuple[float, str]:
    found = []
    for device, run in (("cuda", gpu), ("cpu", cpu)):
        out = run.with_name(f"{run.name}_artifact")
        # it computes on the host, in one process
        runs.command(Case(case.name, (), 1), device, ["export", str(run), "--out", str(out), "--no-aot"], run)
        found.append(load_file(out / "dense.safetensors"))
    if found[0].keys() != found[1].keys():
        raise FailedError("artifacts of other tensors")
    apart = max(float(abs(each - found[1][name]).max(initial=0.0)) for name, each in found[0].items())
    return apart, "a weight of the artifact"


AFTERWARDS = {"evaluate": evaluated, "predict": predicted, "export": exported}


def result(case: Case, runs: Runs) -> dict[str, Any]:
    """What came of a case."""
    begin = time.monotonic()
    found: dict[str, Any] = {"case": case.name, "within": case.within}
    try:
        apart, where = max(compared(case, runs), default=(0.0, ""))
        found |= {"outcome": "ok" if apart <= case.within else "differs", "difference": apart, "where": where}
        if case.refused:
            found |= {"where": f"refused: {case.refused}"}
    except Exception as error:  # each is told, and the next case runs
        words = str(error) if isinstance(error, FailedError) else f"{type(error).__name__}: {error}"
        found |= {"outcome": "failed", "where": words}
    return found | {"seconds": time.monotonic() - begin}


if __name__ == "__main__":
    torch.set_num_threads(1)
    shared = Runs(Path(sys.argv[1]))
    known = all_cases()
    for number in sys.argv[2:]:
        print(json.dumps(result(known[int(number)], shared)), flush=True)
