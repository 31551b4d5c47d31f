"""Ranks forked from one process that has torchrec imported, each running `mbcnet` itself: exit codes and what they said.

Run as a script with OMP_NUM_THREADS=1 (never fork a process whose OpenMP threads are running).
"""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mbcnet_rec.cli import main

CONTEXT = multiprocessing.get_context("fork")
OVERDUE = "overdue"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def child(rank: int, world: int, port: int, args: list[str], hook: Callable[[int], None], log: Path) -> None:
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    hook(rank)
    code = main(args)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


def run_ranks(
    args: list[str],
    folder: Path,
    *,
    world: int = 2,
    hook: Callable[[int], None] = lambda rank: None,
    meanwhile: Callable[[list[int]], None] = lambda pids: None,
    limit: float = 90.0,
    port: int | None = None,
) -> dict[str, Any]:
    """Fork `world` ranks, call `meanwhile` with their pids, wait for all; return exit codes, words and seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    port, start = port or free_port(), time.monotonic()
    logs = [folder / f"rank_{rank}.log" for rank in range(world)]
    ranks = [
        CONTEXT.Process(target=child, args=(rank, world, port, args, hook, logs[rank]))
        for rank in range(world)
    ]
    for each in ranks:
        each.start()
    meanwhile([each.pid or 0 for each in ranks])
    codes: list[Any] = []
    for each in ranks:
        each.join(max(0.0, start + limit - time.monotonic()))
        overdue = each.is_alive()
        if overdue:
            os.kill(each.pid or 0, signal.SIGKILL)
            each.join()
        codes.append(OVERDUE if overdue else each.exitcode)
    words = [log.read_text(errors="replace") for log in logs]
    return {"codes": codes, "words": words, "seconds": time.monotonic() - start}


def report(scenarios: dict[str, Callable[[], dict[str, Any]]], out: Path) -> None:
    """Run scenarios in turn and write what came of each."""
    results = {}
    for name, scenario in scenarios.items():
        results[name] = scenario()
        out.write_text(json.dumps(results))
