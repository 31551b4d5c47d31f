"""Save and restart again and again in processes that live on: memory, threads and file handles must not grow.

    python benchmarks/soak.py --cycles 200 [--minutes 30] [--quick] [--json]

Two ranks. A cycle joins the other rank, builds the model, loads the newest checkpoint, trains some steps, is asked to stop by SIGTERM,
writes a checkpoint and leaves. A scheduler would start a new process each time; here the process stays, so that what it does not
give back adds up. Compared are the first tenth of the cycles after a warm-up of a tenth (for counts: all until then), and the last tenth.
"""

import argparse
import gc
import json
import multiprocessing
import os
import shutil
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
from crash_storm import write_data
from side_by_side import rank_environment

from mbcnet_rec.config import load_config
from mbcnet_rec.runtime.exits import PreemptedError
from mbcnet_rec.runtime.watchdog import Watchdog
from mbcnet_rec.train import run_training

RANKS = 2
STEPS = 5  # of a cycle
LARGEST_GROWTH = 0.02
MOMENT_SECONDS, PATIENCE_SECONDS = 0.3, 5.0


def resident_bytes() -> int:
    """Memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def counts() -> dict[str, int]:
    """Threads of Python and of the process, and its file handles, now."""
    return {
        "threads": threading.active_count(),
        "native_threads": len(os.listdir("/proc/self/task")),
        "handles": len(os.listdir("/proc/self/fd")),
    }


def measure(before: list[dict[str, int]]) -> dict[str, int]:
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
    return {"resident_bytes": resident_bytes()} | fewest


def stop_after(steps: int) -> None:
    """Ask this process to stop after that many steps of each cycle."""
    beat, done = Watchdog.beat, {"place": "", "steps": 0}

    def counted(watchdog: Watchdog, place: str) -> None:
        if watchdog is not done["place"]:
            done.update(place=watchdog, steps=0)
        if place.startswith("step"):
            done["steps"] += 1
            if done["steps"] == steps:
                os.kill(os.getpid(), signal.SIGTERM)
        beat(watchdog, place)

    Watchdog.beat = counted  # type: ignore[method-assign]


def rank_main(rank: int, port: int, config: Path, folder: Path, cycles: int, seconds: float) -> None:
    """Cycles until there are enough of them, or until the time is over; the measures go to a file."""
    os.environ |= rank_environment(rank, RANKS, port) | {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    log = (folder / f"log_{rank}").open("wb")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    if rank == 0:
        stop_after(STEPS)
    settings = [f"train.out={folder / 'run'}", "train.log_every=2", "train.eval_every=1000000"]
    measures: list[dict[str, int]] = []
    wanted, start = load_config(config, settings), time.monotonic()
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    for cycle in range(cycles):
        if rank == 0:  # both end with the same cycle
            store.set(f"go/{cycle}", "yes" if time.monotonic() - start < seconds else "no")
        if store.get(f"go/{cycle}") == b"no":
            break
        try:
            run_training(wanted, resume=cycle > 0)
        except PreemptedError:
            measures.append(measure(measures))
            (folder / f"measures_{rank}.json").write_text(json.dumps(measures))


def growth(measures: list[dict[str, int]]) -> dict[str, float]:
    """What grew after a warm-up of a tenth of the cycles.

    Memory: median of the last tenth over that of the first tenth, less 1. Counts: the most of the last tenth less the most before it,
    since threads that were told to end are still there in some cycles and not in others.
    """
    tenth = max(1, len(measures) // 10)
    early, late = measures[tenth : 2 * tenth], measures[-tenth:]
    result = {"memory_growth": round(_median(late) / _median(early) - 1, 5)}
    for key in measures[0].keys() - {"resident_bytes"}:
        most = max(each[key] for each in measures[tenth:-tenth])
        result[f"{key}_added"] = max(each[key] for each in late) - most
    return result


def _median(measures: list[dict[str, int]]) -> float:
    return statistics.median(each["resident_bytes"] for each in measures)


def soak(folder: Path, cycles: int, seconds: float) -> dict[str, Any]:
    """Run the ranks; print and return what grew on the rank where most did."""
    config = write_data(folder)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("fork")
    start = time.monotonic()
    ranks = [
        context.Process(target=rank_main, args=(rank, store.port, config, folder, cycles, seconds))
        for rank in range(RANKS)
    ]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join()
    spent = time.monotonic() - start
    if any(each.exitcode for each in ranks):
        print((folder / "log_0").read_text()[-2000:], (folder / "log_1").read_text()[-2000:], sep="\n")
    print(f"{'rank':>4}{'cycles':>8}{'first MB':>10}{'last MB':>10}{'threads':>9}{'native':>8}{'handles':>9}")
    result: dict[str, Any] = {"cycles": cycles, "seconds": round(spent, 1)}
    for rank in range(RANKS):
        measures = json.loads((folder / f"measures_{rank}.json").read_text())
        found = growth(measures)
        first, last = measures[len(measures) // 10], measures[-1]
        print(
            f"{rank:>4}{len(measures):>8}{first['resident_bytes'] / 1e6:>10.1f}{last['resident_bytes'] / 1e6:>10.1f}"
            f"{first['threads']:>4} ->{last['threads']:>2}{first['native_threads']:>4} ->{last['native_threads']:>2}"
            f"{first['handles']:>4} ->{last['handles']:>3}"
        )
        result["cycles"] = min(result["cycles"], len(measures))
        for key, value in found.items():
            result[key] = max(result.get(key, value), value)
    result["ok"] = (
        not any(each.exitcode for each in ranks)
        and result["memory_growth"] < LARGEST_GROWTH
        and all(value <= 0 for key, value in result.items() if key.endswith("_added"))
    )
    print(
        f"{result['cycles']} cycles in {spent:.0f} s: memory {result['memory_growth']:+.2%}, threads {result['threads_added']:+g}, "
        f"native threads {result['native_threads_added']:+g}, handles {result['handles_added']:+g}"
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cycles", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=30.0, help="end earlier, after that long")
    parser.add_argument("--quick", action="store_true", help="20 cycles")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    try:
        result = soak(folder, min(args.cycles, 20) if args.quick else args.cycles, 60 * args.minutes)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if args.json:
        print(json.dumps(result))
    sys.exit(0 if result["ok"] or args.quick else 1)


if __name__ == "__main__":
    main()
