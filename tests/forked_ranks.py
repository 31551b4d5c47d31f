"""Ranks forked from one process that has torchrec imported: what they left with, what they said, how long they took.

Run as a script with OMP_NUM_THREADS=1 (never fork a process whose OpenMP threads are running).
"""

import atexit
import gc
import json
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.optim  # as the modules below: once, here, and not again in each rank
from tiny_run import train

import mbcnet_rec.run_training  # noqa: F401 (for the ranks)
from data.stream.loops import count_boundaries
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


def before_fork() -> None:
    """Import what a rank would import; a rank that collected garbage would copy every page of what is imported."""
    our_modules()
    count_boundaries(np.zeros(1), np.zeros(1), np.zeros(1, np.int32))
    gc.freeze()


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
    before_fork()
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


class Server:
    """The process of script_server.py, as this one sees it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._words = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (as long as the process)
        atexit.register(self.end)

    def run(self, script: Path, args: Sequence[str], variables: dict[str, str], timeout: float) -> tuple[int, str]:
        """The exit code of a script and what it said. A script that takes too long is killed with all that it started."""
        if self._process is None:
            command = [sys.executable, str(Path(__file__).with_name("script_server.py"))]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "encoding": "utf-8"}
            self._process = subprocess.Popen(command, env=variables, start_new_session=True, **pipes)
        assert self._process.stdin and self._process.stdout
        self._words.seek(0)
        self._words.truncate()
        words = f"/proc/{os.getpid()}/fd/{self._words.fileno()}"
        request = {"script": str(script), "args": args, "variables": variables, "folder": os.getcwd(), "words": words}
        self._process.stdin.write(f"{json.dumps(request)}\n")
        self._process.stdin.flush()
        code = ""
        try:
            if select.select([self._process.stdout], [], [], timeout)[0]:
                code = self._process.stdout.readline()
        finally:
            if not code:
                os.killpg(self._process.pid, signal.SIGKILL)
                self.end()
        self._words.seek(0)
        return int(code or -signal.SIGKILL), self._words.read()

    def end(self) -> None:
        if self._process is not None:
            assert self._process.stdin and self._process.stdout
            self._process.stdin.close()
            self._process.wait()
            self._process.stdout.close()
            self._process = None


SERVER = Server()


def run_script(name: str, *args: str, flags: Sequence[str] = (), timeout: float = 840) -> str:
    """Run a script of this folder, which may fork ranks; for the tests, which must not fork themselves. With flags of Python it is started anew.

    Returns what the script said.
    """
    script = Path(__file__).with_name(name)
    if flags:
        command = [sys.executable, *flags, str(script), *args]
        done = subprocess.run(command, env=script_variables(), capture_output=True, text=True, timeout=timeout)
        code, words = done.returncode, done.stdout + done.stderr
    else:
        code, words = SERVER.run(script, args, script_variables(), timeout)
    assert code == 0, words[-3000:]
    return words


def script_variables() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}


def run_code(code: str, *args: str, timeout: float = 120) -> tuple[int, str]:
    """What `python -c CODE ARGS` would end with and say, in a process that has torch, torchrec and our modules imported but none of this one's state."""
    with tempfile.NamedTemporaryFile("w", suffix=".py", encoding="utf-8") as script:
        script.write(code)
        script.flush()
        return SERVER.run(Path(script.name), args, script_variables(), timeout)
