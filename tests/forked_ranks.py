"""Ranks forked from one process that has torchrec imported: what they left with, what they said, how long they took.

Run as a script with OMP_NUM_THREADS=1 (never fork a process whose OpenMP threads are running).
"""

import gc
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.optim  # as the modules below: once, here, and not again in each rank
from tiny_run import train

import mbcnet_rec.run_training  # noqa: F401 (for the ranks)
from mbcnet_rec.cli import main
from mbcnet_rec.plugins import our_modules
from mbcnet_rec.training.hooks import Hooks

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from side_by_side import free_port, rank_environment

CONTEXT = multiprocessing.get_context("fork")
OVERDUE = "overdue"
Action = Callable[[int], int | None]  # rank -> exit code


def mbcnet(args: list[str]) -> Action:
    """The command line."""
    return lambda rank: main(args)


def training(config: Path, settings: list[str], hooks: Callable[[int], Hooks], *, resume: bool) -> Action:
    """`mbcnet train` with --resume or --overwrite, and with the hooks of each rank."""
    return lambda rank: train(config, *settings, hooks=hooks(rank), resume=resume, overwrite=not resume)


def child(rank: int, world: int, port: int, action: Action, log: Path) -> None:
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= rank_environment(rank, world, port)
    torch.set_num_threads(1)
    code = action(rank)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


def run_ranks(
    action: Action,
    folder: Path,
    *,
    world: int = 2,
    meanwhile: Callable[[list[int]], None] = lambda pids: None,
    limit: float = 60.0,
    port: int | None = None,
) -> dict[str, Any]:
    """Fork `world` ranks, call `meanwhile` with their pids, wait for all; return exit codes, words and seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    port, start = port or free_port(), time.monotonic()
    logs = [folder / f"rank_{rank}.log" for rank in range(world)]
    our_modules()
    gc.freeze()  # a rank that collected garbage would copy every page of what is imported
    ranks = [CONTEXT.Process(target=child, args=(rank, world, port, action, logs[rank])) for rank in range(world)]
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


def run_script(name: str, *args: str, flags: Sequence[str] = (), timeout: float = 840) -> None:
    """Run a script of this folder in a process of its own; for the tests, which must not fork themselves."""
    script = Path(__file__).with_name(name)
    env = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    done = subprocess.run(
        [sys.executable, *flags, str(script), *args], env=env, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr[-3000:]
