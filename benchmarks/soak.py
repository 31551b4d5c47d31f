"""Save and restart again and again in processes that live on: memory, threads and file handles must not grow.

    python benchmarks/soak.py --cycles 200 [--minutes 30] [--quick] [--json]

Two ranks. A cycle joins the other rank, builds the model, loads the newest checkpoint, trains some steps, is asked to stop by SIGTERM,
writes a checkpoint and leaves. A scheduler would start a new process each time; here the process stays, so that what it does not
give back adds up. Compared are the first tenth of the cycles after a warm-up of a tenth (for counts: all until then), and the last tenth.
"""

import gc
import json
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from side_by_side import parser_of, print_figures, rank_environment
from small_log import LONG_RUN, at_each_step, write_log

from mbcnet_rec.config import load_config
from mbcnet_rec.run_training import run_training
from mbcnet_rec.runtime.exits import PreemptedError
from mbcnet_rec.training.hooks import Hooks

RANKS = 2
STEPS = 5  # of a cycle
LARGEST_GROWTH = 0.02
MOMENT_SECONDS, PATIENCE_SECONDS = 0.3, 5.0
Measure = dict[str, int]


def counts() -> Measure:
    """Threads of Python and of the process, and its file handles, now."""
    native, handles = len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))
    return {"threads": threading.active_count(), "native_threads": native, "handles": handles}


def measure(before: list[Measure]) -> Measure:
    """What must not grow. Threads and handles are the fewest of a moment: what was told to end may take that long, what leaks stays.

    The moment is longer while there are more of them than `before`: on a busy machine what is to end takes its time.
    """
    gc.collect()
    start, fewest = time.monotonic(), counts()
    while (waited := time.monotonic() - start) < PATIENCE_SECONDS:
        grown = before and any(fewest[key] > max(each[key] for each in before) for key in fewest)
        if waited >= MOMENT_SECONDS and not grown:
            break
        time.sleep(0.01)
        now = counts()
        fewest = {key: min(fewest[key], now[key]) for key in fewest}
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {"resident_bytes": pages * os.sysconf("SC_PAGE_SIZE")} | fewest


def stop_after(steps: int) -> Hooks:
    """Ask this process to stop after that many steps of a cycle."""
    seen: list[int] = []

    def count(step: int) -> None:
        seen.append(step)
        if len(seen) == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    return at_each_step(count)


def rank_main(rank: int, port: int, config: Path, folder: Path, cycles: int, seconds: float) -> None:
    """Cycles until there are enough of them, or until the time is over; the measures go to a file."""
    os.environ |= rank_environment(rank, RANKS, port) | {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    log = (folder / f"log_{rank}").open("wb")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    settings = [*LONG_RUN, f"train.out={folder / 'run'}", "train.log_every=2", "train.eval_every=1000000"]
    measures: list[Measure] = []
    wanted, start = load_config(config, settings), time.monotonic()
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    for cycle in range(cycles):
        if rank == 0:  # both end with the same cycle
            store.set(f"go/{cycle}", "yes" if time.monotonic() - start < seconds else "no")
        if store.get(f"go/{cycle}") == b"no":
            break
        try:
            run_training(wanted, resume=cycle > 0, hooks=stop_after(STEPS) if rank == 0 else Hooks())
        except PreemptedError:
            measures.append(measure(measures))
            (folder / f"measures_{rank}.json").write_text(json.dumps(measures))


def growth(measures: list[Measure]) -> dict[str, float]:
    """What grew after a warm-up of a tenth of the cycles.

    Memory: median of the last tenth over that of the first tenth, less 1. Counts: the most of the last tenth less the most before it,
    since threads that were told to end are still there in some cycles and not in others.
    """
    tenth = max(1, len(measures) // 10)
    last = measures[-tenth:]
    parts = (measures[tenth : 2 * tenth], last)
    early, late = (statistics.median(each["resident_bytes"] for each in part) for part in parts)
    result = {"memory_growth": round(late / early - 1, 5)}
    for key in measures[0].keys() - {"resident_bytes"}:
        most = max(each[key] for each in measures[tenth:-tenth])
        result[f"{key}_added"] = max(each[key] for each in last) - most
    return result


def soak(folder: Path, cycles: int, seconds: float) -> dict[str, Any]:
    """Run the ranks; print and return what grew on the rank where most did."""
    config = write_log(folder)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("fork")
    start = time.monotonic()
    places = [(rank, store.port, config, folder, cycles, seconds) for rank in range(RANKS)]
    ranks = [context.Process(target=rank_main, args=place) for place in places]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join()
    result: dict[str, Any] = {"cycles": cycles, "seconds": round(time.monotonic() - start, 1)}
    failed = any(each.exitcode for each in ranks)
    if failed:
        print(*((folder / f"log_{rank}").read_text()[-2000:] for rank in range(RANKS)), sep="\n")
    for rank in range(RANKS):
        measures = json.loads((folder / f"measures_{rank}.json").read_text())
        print(f"rank {rank}, {len(measures)} cycles: {measures[len(measures) // 10]} -> {measures[-1]}")
        result["cycles"] = min(result["cycles"], len(measures))
        for key, value in growth(measures).items():
            result[key] = max(result.get(key, value), value)
    added = max(value for key, value in result.items() if key.endswith("_added"))
    result["ok"] = not failed and result["memory_growth"] < LARGEST_GROWTH and added <= 0
    return result


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--cycles", type=int, default=200, help="at most 12 with --quick")
    parser.add_argument("--minutes", type=float, default=30.0, help="end earlier, after that long")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        minutes = min(args.minutes, 0.5) if args.quick else args.minutes
        result = soak(Path(name), min(args.cycles, 12) if args.quick else args.cycles, 60 * minutes)
    print_figures(result, args.json)
    return 0 if result["ok"] or args.quick else 1


if __name__ == "__main__":
    sys.exit(main())
