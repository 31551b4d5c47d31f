"""Kill a two-process run again and again; it must end with the weights of a run that nobody touched.

    python benchmarks/crash_storm.py --kills 100 --seed 1

Real torchelastic starts the ranks and starts them again; they are forked from one process that has torchrec imported, so that a
restart costs no import. The kills, by turns drawn from the seed:
    step    SIGKILL of one rank as it begins a step
    moment  SIGKILL of one rank at a random time, wherever it stands
    save    SIGKILL of all ranks at one write, sync or rename inside a save
seconds_per_kill is what one costs: detection, restart, loading and the steps since the last checkpoint.
Then every tensor of the last checkpoint (tables, dense weights, optimizer state) and every metric is compared bit by bit.
"""

import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from same_as import differences, logged, tensors
from side_by_side import parser_of, print_figures
from small_log import LONG_RUN, at_each_step, write_log
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from mbcnet_rec.checkpoints.storage import CheckpointStorage
from mbcnet_rec.config import load_config
from mbcnet_rec.run_training import run_training
from mbcnet_rec.runtime.exits import RunStoppedError

STEPS_BETWEEN_KILLS = 4
CHECKPOINT_EVERY = 2


def make_schedule(kills: int, seed: int, ranks: int) -> list[dict[str, Any]]:
    """Draw the kills: entry i strikes in attempt i."""
    rng, kinds = random.Random(seed), ("step", "save", "moment")
    return [
        {
            "kind": kinds[index % 3] if kills < 6 else rng.choice(kinds),
            "rank": rng.randrange(ranks),
            "steps": rng.randrange(1, STEPS_BETWEEN_KILLS + 1),
            "seconds": rng.uniform(0.0, 1.0),
            "tick": rng.randrange(0, 90),
        }
        for index in range(kills)
    ]


class Executioner:
    """Carries out one kill of the schedule in this attempt. Every rank has one; `strike` says who dies."""

    def __init__(self, kill: dict[str, Any], folder: Path, attempt: int) -> None:
        self.kill, self.folder, self.attempt = kill, folder, attempt
        self.rank = int(os.environ["RANK"])
        self.steps = self.ticks = 0
        (folder / f"pid_{attempt}_{self.rank}").write_text(str(os.getpid()))
        if kill["kind"] == "save":
            self._count_writes()

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

    def note_step(self, step: int) -> None:
        """A step begins on this rank."""
        self.steps += self.rank == self.kill["rank"]
        if self.kill["kind"] == "step" and self.steps > self.kill["steps"]:
            self.strike(f"at the start of step {step}")
        if self.kill["kind"] == "moment" and self.steps == 1:
            where = f"{self.kill['seconds']:.2f} s after the start of step {step}"
            timer = threading.Timer(self.kill["seconds"], self.strike, [where])
            timer.daemon = True
            timer.start()

    def _tick(self, name: str) -> None:
        if threading.current_thread().name == "checkpoint-writer":
            self.ticks += 1
            if self.ticks > self.kill["tick"]:
                self.strike(f"rank {self.rank} before {name}, write {self.ticks} of its saves")

    def _count_writes(self) -> None:
        write, replace = CheckpointStorage.write, os.replace

        @contextmanager
        def counted(storage: CheckpointStorage, name: str) -> Iterator[Any]:
            with write(storage, name) as file:
                yield SimpleNamespace(write=lambda data: (self._tick("a write"), file.write(data))[1])
                self._tick("fsync")

        def renamed(*paths: Any) -> None:
            self._tick("rename")
            replace(*paths)

        CheckpointStorage.write, os.replace = counted, renamed  # type: ignore[assignment]


def rank_main(config_file: str, overrides: list[str], schedule: list[dict[str, Any]], notes: str) -> None:
    """One rank, from fork to end; it notes when it began, as step 0, and when each step began."""
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    began = time.time()
    torch.set_num_threads(1)
    killer = Executioner(schedule[attempt], Path(notes), attempt) if attempt < len(schedule) else None
    times = Path(notes) / f"times_{attempt}_{os.environ['RANK']}"

    def note_step(step: int) -> None:
        print(step, time.time(), file=file)
        if killer:
            killer.note_step(step)

    try:
        with times.open("a", buffering=1) as file:
            print(0, began, file=file)
            run_training(load_config(config_file, overrides), overwrite=attempt == 0, hooks=at_each_step(note_step))
    except RunStoppedError as error:
        print(f"mbcnet: {error}", file=sys.stderr, flush=True)
        os._exit(error.exit_code)


def run_elastic(config: Path, overrides: list[str], schedule: list[Any], notes: Path) -> float:
    """Run two ranks to the end under torchelastic; return seconds."""
    start = time.perf_counter()
    notes.mkdir(parents=True, exist_ok=True)
    launch = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, run_id="storm", rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        max_restarts=len(schedule), monitor_interval=0.05, start_method="fork",
        logs_specs=DefaultLogsSpecs(log_dir=str(notes / "logs"), redirects=Std.ALL),
    )  # fmt: skip
    elastic_launch(launch, rank_main)(str(config), [*LONG_RUN, *overrides], schedule, str(notes))
    return time.perf_counter() - start


def evaluated(run: Path) -> dict[str, Any]:
    """What metrics.jsonl tells of evaluations; a training line tells of the steps since a resume."""
    return {key: value for key, value in logged(run).items() if not key.startswith("train")}


def storm(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Run once untouched and once through the storm; print the table."""
    config = write_log(folder)
    steps = (STEPS_BETWEEN_KILLS + CHECKPOINT_EVERY) * kills + 10
    common = [f"train.max_steps={steps}", f"train.checkpoint_every={CHECKPOINT_EVERY}"]
    common += ["train.log_every=5", "train.eval_every=25"]
    calm, struck, notes = folder / "calm", folder / "struck", folder / "notes"
    calm_seconds = run_elastic(config, [*common, f"train.out={calm}"], [], folder / "calm-notes")
    schedule = make_schedule(kills, seed, 2)
    struck_seconds = run_elastic(config, [*common, f"train.out={struck}"], schedule, notes)
    print(f"{'kill':>4}  {'kind':<7} {'rank':<5} where")
    counts: dict[str, int] = {}
    for index, kill in enumerate(schedule):
        note, kind = notes / f"kill_{index}", kill["kind"]
        where = note.read_text() if note.is_file() else "not reached: the run was over"
        counts[kind] = counts.get(kind, 0) + note.is_file()
        print(f"{index + 1:>4}  {kind:<7} {'all' if kind == 'save' else kill['rank']:<5} {where}")
    found = differences("tensors", tensors(struck, steps), tensors(calm, steps))
    found += differences("metrics.jsonl", evaluated(struck), evaluated(calm))
    left = [str(path) for path in struck.rglob("*.partial*")]
    equal, carried = not found and not left, sum(counts.values())
    each = (struck_seconds - calm_seconds) / max(1, carried)
    different = f"DIFFERENT: {found[:10]} left behind: {left}"
    print("every tensor and metric is bitwise equal" if equal else different)
    figures = {"kills": carried, "bitwise_equal": equal, "steps": steps, "seconds_per_kill": round(each, 3)}
    return figures | {"calm_seconds": round(calm_seconds, 1), "kinds": counts, "seed": seed}


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--kills", type=int, default=100, help="at most 3, one of each kind, with --quick")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave runs and logs there")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(prefix="crash-storm-") as name:
        folder = args.keep or Path(name)
        result = storm(folder, min(args.kills, 3) if args.quick else args.kills, args.seed)
    print_figures(result, args.json)
    return 0 if result["bitwise_equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
