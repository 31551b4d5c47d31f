"""Timing on a machine that others use too, by cases that take turns and ratios within a round; and what all scripts share."""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils import mkldnn

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # for a checkout that is not installed: what is installed comes first
Clock = Literal["wall", "cpu"]
CLOCKS: dict[Clock, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under 50 seconds")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return parser


def timing_parser_of(description: str | None) -> argparse.ArgumentParser:
    """The same with threads and the clock."""
    parser = parser_of(description)
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "0")) or 1)
    words = "cpu: seconds of this process's own work, for a busy machine; meaningful with one thread"
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help=words)
    return parser


def take_turns(
    cases: Mapping[str, Callable[[], object]], seconds: float, clock: Clock = "wall", least_rounds: int = 3
) -> dict[str, list[float]]:
    """Run every case once a round, each round from another start, until the time is up. One round warms up and is not counted.

    Returns:
        Seconds of each case, one entry a round.
    """
    names = list(cases)
    times: dict[str, list[float]] = {name: [] for name in names}
    now = CLOCKS[clock]
    for name in names:
        cases[name]()
    end, done = time.perf_counter() + seconds, 0
    while done < least_rounds or time.perf_counter() < end:
        first = done % len(names)
        for name in (*names[first:], *names[:first]):
            start = now()
            cases[name]()
            times[name].append(now() - start)
        done += 1
    return times


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median over rounds of above / below: what slows a whole round down cancels."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def square_product(size: int = 2048) -> tuple[Callable[[], object], float]:
    """The machine's own matrix product, float32 and square: (case, FLOPs)."""
    left, right = torch.randn(size, size), torch.randn(size, size)
    out = torch.empty(size, size)
    return lambda: torch.mm(left, right, out=out), 2.0 * size**3


def one_dnn_product(size: int = 2048) -> Callable[[], object] | None:
    """The same product by oneDNN; None where torch was built without it."""
    if not torch.backends.mkldnn.is_available():
        return None
    layer = mkldnn.to_mkldnn(torch.nn.Linear(size, size, bias=False).eval())
    return partial(layer, torch.randn(size, size).to_mkldnn())


def large_copy(megabytes: int = 128) -> tuple[Callable[[], object], float]:
    """Copying more than the caches hold: (case, bytes read and written)."""
    source = torch.ones(megabytes * 2**20 // 4)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2.0 * megabytes * 2**20


def fitted_exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Exponent b of seconds = a * size ** b, by least squares of the logarithms."""
    x = torch.tensor(sizes, dtype=torch.float64).log()
    y = torch.tensor(seconds, dtype=torch.float64).log()
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())


def free_port() -> int:
    """A port of this host on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun would set for one of `world` ranks on this host that meet at `port`."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {key: str(value) for key, value in (own | meeting).items()}


def environment(threads: int = 1, tree: Path = ROOT) -> dict[str, str]:
    """This process's own, in which a tree and its benchmarks can be imported."""
    paths = [str(tree), str(tree / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(filter(None, paths))
    return os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": str(threads)}


def mbcnet(*words: str, folder: Path = ROOT, tree: Path = ROOT, ranks: int = 1) -> str:
    """Run the command line of a tree in a folder; return what it printed.

    Raises:
        SystemExit: it failed; with the end of what it said.
    """
    agent = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    command = [sys.executable, "-m", *(agent if ranks > 1 else []), "mbcnet_rec.cli", *words]
    ran = subprocess.run(command, cwd=folder, env=environment(tree=tree), capture_output=True, text=True)
    if ran.returncode:
        said = f"mbcnet {' '.join(words)} ended with {ran.returncode}:\n{ran.stderr[-2000:]}"
        raise SystemExit(f"{tree}: {said}")
    return ran.stdout


def settings(*pairs: str) -> list[str]:
    """KEY=VALUE as arguments of `mbcnet train`."""
    return [word for pair in pairs for word in ("--set", pair)]


class Answering:
    """A process that answers each line on its standard input with a line; its standard error may go to a file."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], log: Path | None = None) -> None:
        self._log = log
        words = log.open("w") if log else None
        self._process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=words, text=True
        )
        if words:
            words.close()

    def ask(self, line: str) -> None:
        """Send a line."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer will be missing

    def answer(self) -> str:
        """Wait for a line.

        Raises:
            SystemExit: the process has ended; with its last words.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            words = self._log.read_text()[-3000:] if self._log else "its words are above"
            raise SystemExit(f"{' '.join(self._process.args)} has ended:\n{words}")  # type: ignore[arg-type]
        return line

    def end(self) -> None:
        """Close its input and let it leave; one that stays is terminated."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            self._process.wait(60)


def answering_ranks(script: str, words: Sequence[str], world: int, threads: int = 1) -> list[Answering]:
    """Start a script as `world` ranks that find each other."""
    port, command = free_port(), [sys.executable, script, *words]
    places = (environment(threads) | rank_environment(rank, world, port) for rank in range(world))
    return [Answering(command, place) for place in places]


def print_figures(figures: Mapping[str, Any], as_json: bool) -> None:
    """Print each figure, and all of them as one JSON object on the last line if asked to."""
    for key, value in figures.items():
        print(f"  {key:34} {value:.4g}" if isinstance(value, float) else f"  {key:34} {value}")
    if as_json:
        print(json.dumps(figures))
