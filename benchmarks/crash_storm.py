"""Kill a two-process run again and again; it must end with the weights of a run that nobody touched.

    python benchmarks/crash_storm.py --kills 100 --seed 1

Real torchelastic starts the ranks and starts them again; they are forked from one process that has torchrec imported, so that a
restart costs no import. The kills, by turns drawn from the seed:
    step    SIGKILL of one rank as it begins a step
    moment  SIGKILL of one rank at a random time, wherever it stands
    save    SIGKILL of all ranks at one write, sync or rename inside a save
Then every tensor of the last checkpoint (tables, dense weights, optimizer state) and every metric is compared bit by bit.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from mbcnet_rec.checkpoints import storage as places
from mbcnet_rec.checkpoints import tensor_file
from mbcnet_rec.checkpoints.shards import Saved, step_folder
from mbcnet_rec.config import load_config
from mbcnet_rec.logs.metrics_log import TIMING_KEYS
from mbcnet_rec.runtime.exits import RunStoppedError
from mbcnet_rec.runtime.watchdog import Watchdog
from mbcnet_rec.train import run_training

STEPS_BETWEEN_KILLS = 4
CHECKPOINT_EVERY = 2

SCHEMA = """
name = "storm"
label = "click"
[fields]
user = { kind = "categorical", num_embeddings = 500, embedding_dim = 8 }
item = { kind = "categorical", num_embeddings = 300, embedding_dim = 8 }
tags = { kind = "multi_valued", num_embeddings = 50, embedding_dim = 8, pooling = "sum" }
price = { kind = "numeric", transform = "log1p" }
[groups]
taste = ["user", "item"]
content = ["item", "tags", "price"]
"""

CONFIG = """
name = "storm"
schema = "{folder}/schema.toml"
[data]
train = ["{folder}/train.parquet"]
valid = ["{folder}/valid.parquet"]
batch_size = 64
lanes = 4
window_rows = 512
[model.mbcnet]
branch_dim = 8
top = [8]
[model.mbcnet.efgc]
hidden = [8]
[model.mbcnet.deep]
hidden = [16, 8]
[train]
out = "{folder}/unset"
device = "cpu"
epochs = 1000
log_every = 5
eval_every = 25
timeout_seconds = 20.0
stall_seconds = 10.0
"""


def write_data(folder: Path) -> Path:
    """Write a small log whose clicks can be learned, its schema and a config; return the config."""
    rng = np.random.default_rng(0)
    for split, rows in (("train", 4_000), ("valid", 200)):
        user, item = rng.integers(0, 500, rows), rng.integers(0, 300, rows)
        table = pa.table(
            {
                "user": user,
                "item": item,
                "tags": [rng.integers(0, 50, n).tolist() for n in rng.integers(0, 4, rows)],
                "price": rng.gamma(2.0, 10.0, rows),
                "click": ((user % 7 + item % 5 + rng.normal(size=rows)) > 5).astype(np.int8),
            }
        )
        pq.write_table(table, folder / f"{split}.parquet", row_group_size=500)
    (folder / "schema.toml").write_text(SCHEMA)
    config = folder / "storm.toml"
    config.write_text(CONFIG.format(folder=folder))
    return config


def make_schedule(kills: int, seed: int, ranks: int) -> list[dict[str, Any]]:
    """Draw the kills: entry i strikes in attempt i."""
    rng = random.Random(seed)
    schedule = []
    for index in range(kills):
        kind = ("step", "save", "moment")[index % 3] if kills < 6 else rng.choice(("step", "save", "moment"))
        schedule.append(
            {
                "kind": kind,
                "rank": rng.randrange(ranks),
                "steps": rng.randrange(1, STEPS_BETWEEN_KILLS + 1),
                "seconds": rng.uniform(0.0, 1.0),
                "tick": rng.randrange(0, 90),
            }
        )
    return schedule


class Executioner:
    """Carries out one kill of the schedule in this attempt. Every rank has one; `strike` says who dies."""

    def __init__(self, kill: dict[str, Any], folder: Path, attempt: int) -> None:
        self.kill, self.folder, self.attempt = kill, folder, attempt
        self.rank = int(os.environ["RANK"])
        self.steps = self.ticks = 0
        (folder / f"pid_{attempt}_{self.rank}").write_text(str(os.getpid()))

    def strike(self, place: str) -> None:
        """Write down where, then kill."""
        note = self.folder / f"kill_{self.attempt}"
        with suppress(FileExistsError), open(note, "x") as file:
            file.write(place)
        if self.kill["kind"] == "save":
            for path in self.folder.glob(f"pid_{self.attempt}_*"):
                if int(path.name.rsplit("_", 1)[1]) != self.rank:
                    with suppress(ProcessLookupError):
                        os.kill(int(path.read_text()), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    def arm(self) -> None:
        """Hook into what this kill is bound to."""
        if self.kill["kind"] == "save":
            self._hook_save()
        elif self.rank == self.kill["rank"]:
            self._hook_beat()

    def _hook_beat(self) -> None:
        beat = Watchdog.beat

        def counted(watchdog: Watchdog, place: str) -> None:
            if place.startswith("step"):
                self.steps += 1
                if self.kill["kind"] == "step" and self.steps > self.kill["steps"]:
                    self.strike(f"at the start of {place}")
                if self.kill["kind"] == "moment" and self.steps == 1:
                    timer = threading.Timer(
                        self.kill["seconds"], lambda: self.strike(f"during {watchdog._place}")
                    )
                    timer.daemon = True
                    timer.start()
            beat(watchdog, place)

        Watchdog.beat = counted  # type: ignore[method-assign]

    def _hook_save(self) -> None:
        def ticking(name: str, action: Callable[..., Any]) -> Callable[..., Any]:
            def ticked(*args: Any, **kwargs: Any) -> Any:
                if threading.current_thread().name == "checkpoint-writer":
                    self.ticks += 1
                    if self.ticks > self.kill["tick"]:
                        self.strike(f"rank {self.rank} before {name}, write {self.ticks} of its saves")
                return action(*args, **kwargs)

            return ticked

        places.os = _Ticking(
            os, {"fsync": ticking("fsync", os.fsync), "replace": ticking("rename", os.replace)}
        )  # type: ignore[assignment]
        digest = tensor_file.hashlib.sha256

        def sha256() -> Any:
            made = digest()
            return _Ticking(made, {"update": ticking("a write", made.update)})

        tensor_file.hashlib = _Ticking(tensor_file.hashlib, {"sha256": sha256})  # type: ignore[assignment]


class _Ticking:
    """An object with some of its attributes replaced."""

    def __init__(self, real: Any, replaced: dict[str, Any]) -> None:
        self._real, self._replaced = real, replaced

    def __getattr__(self, name: str) -> Any:
        return self._replaced.get(name) or getattr(self._real, name)


def rank_main(config_file: str, overrides: list[str], schedule: list[dict[str, Any]], notes: str) -> None:
    """One rank, from fork to end."""
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    torch.set_num_threads(1)
    if attempt < len(schedule):
        Executioner(schedule[attempt], Path(notes), attempt).arm()
    try:
        run_training(load_config(config_file, overrides), overwrite=attempt == 0)
    except RunStoppedError as error:
        print(f"mbcnet: {error}", file=sys.stderr, flush=True)
        os._exit(error.exit_code)


def run_elastic(
    config: Path,
    overrides: list[str],
    schedule: list[dict[str, Any]],
    notes: Path,
    *,
    main: Callable[..., None] = rank_main,
) -> float:
    """Run two ranks to the end under torchelastic; return seconds."""
    start = time.perf_counter()
    notes.mkdir(parents=True, exist_ok=True)
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        run_id="storm",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=len(schedule),
        monitor_interval=0.05,
        start_method="fork",
        logs_specs=DefaultLogsSpecs(log_dir=str(notes / "logs"), redirects=Std.ALL),
    )
    elastic_launch(launch, main)(str(config), overrides, schedule, str(notes))
    return time.perf_counter() - start


def final_tensors(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a run's last checkpoint."""
    step = json.loads((run / "DONE").read_text())["step"]
    saved = Saved(step_folder(run / "checkpoints", step))
    return {f"{entry.name}{list(entry.offsets)}": tensor for entry, tensor in saved.tensors()}


def metric_lines(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what tells of the machine; of train lines step and split: one tells of the steps since a resume."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {
            key: value
            for key, value in line.items()
            if key not in TIMING_KEYS and (line["split"] != "train" or key in ("step", "split"))
        }
        for line in lines
    ]


def differences(one: Path, other: Path) -> list[str]:
    """What differs between two finished runs."""
    found = []
    before, after = final_tensors(one), final_tensors(other)
    if before.keys() != after.keys():
        found.append(f"tensors: {sorted(before.keys() ^ after.keys())[:5]}")
    for name in before.keys() & after.keys():
        left, right = before[name].contiguous(), after[name].contiguous()
        if left.shape != right.shape or left.numpy().tobytes() != right.numpy().tobytes():
            found.append(name)
    lines, others = metric_lines(one), metric_lines(other)
    if lines != others:
        found.append(f"metrics.jsonl: {len(lines)} and {len(others)} lines")
    return found


def leftovers(run: Path) -> list[str]:
    """Half-written things in a run folder."""
    return [str(path.relative_to(run)) for path in run.rglob("*.partial*")]


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--quick", action="store_true", help="3 kills, one of each kind, unless --kills says fewer"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--keep", metavar="FOLDER", help="leave runs and logs there")
    args = parser.parse_args()
    kills = min(args.kills, 3) if args.quick else args.kills
    folder = Path(args.keep) if args.keep else Path(tempfile.mkdtemp(prefix="crash-storm-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        result = storm(folder, kills, args.seed)
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
    if args.json:
        print(json.dumps(result))
    sys.exit(0 if result["bitwise_equal"] else 1)


def storm(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Run once untouched and once through the storm; print the table."""
    os.environ["OMP_NUM_THREADS"] = "1"
    config = write_data(folder)
    steps = (STEPS_BETWEEN_KILLS + CHECKPOINT_EVERY) * kills + 10
    common = [f"train.max_steps={steps}", f"train.checkpoint_every={CHECKPOINT_EVERY}"]
    calm, struck = folder / "calm", folder / "struck"
    calm_seconds = run_elastic(config, [*common, f"train.out={calm}"], [], folder / "calm-notes")
    schedule = make_schedule(kills, seed, 2)
    notes = folder / "notes"
    struck_seconds = run_elastic(config, [*common, f"train.out={struck}"], schedule, notes)
    print(f"{'kill':>4}  {'kind':<7} {'rank':<5} where")
    carried = 0
    counts: dict[str, int] = {}
    for index, kill in enumerate(schedule):
        note = notes / f"kill_{index}"
        where = note.read_text() if note.is_file() else "not reached: the run was over"
        carried += note.is_file()
        counts[kill["kind"]] = counts.get(kill["kind"], 0) + note.is_file()
        print(
            f"{index + 1:>4}  {kill['kind']:<7} {'all' if kill['kind'] == 'save' else kill['rank']:<5} {where}"
        )
    found = differences(calm, struck)
    left = leftovers(struck)
    equal = not found and not left
    print(
        f"{steps} steps: {calm_seconds:.1f} s untouched, {struck_seconds:.1f} s with {carried} kills {counts}"
    )
    each = (struck_seconds - calm_seconds) / max(1, carried)
    print(f"a kill cost {each:.2f} s: detection, restart, loading and the steps since the last checkpoint")
    print(
        "every tensor and metric is bitwise equal"
        if equal
        else f"DIFFERENT: {found[:10]} left behind: {left}"
    )
    return {
        "kills": carried,
        "bitwise_equal": equal,
        "steps": steps,
        "seconds_per_kill": round(each, 3),
        "kinds": counts,
        "seed": seed,
    }


if __name__ == "__main__":
    main()
