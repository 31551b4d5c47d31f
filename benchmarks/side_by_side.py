"""Timing on a machine that others use too: cases take turns, and only ratios within one round are compared. And what ranks find each other by."""

import argparse
import json
import os
import socket
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch

Clock = Literal["wall", "cpu"]
CLOCKS: dict[Clock, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="under 50 seconds")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "0")) or 1)
    parser.add_argument(
        "--clock",
        choices=list(CLOCKS),
        default="wall",
        help="cpu: seconds of this process's own work, for a machine that is busy with other work; meaningful with one thread",
    )
    return parser


def take_turns(
    cases: Mapping[str, Callable[[], object]], seconds: float, clock: Clock = "wall", least_rounds: int = 3
) -> dict[str, list[float]]:
    """Run every case once a round, each round from another start, until the time is up.

    One round warms up and is not counted.

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


def ratio_of_least(above: Sequence[float], below: Sequence[float]) -> float:
    """Ratio of the fastest rounds: the second opinion on `ratio`."""
    return min(above) / min(below)


def square_product(size: int = 2048) -> tuple[Callable[[], object], float]:
    """The machine's own matrix product, float32 and square: (case, FLOPs)."""
    left, right = torch.randn(size, size), torch.randn(size, size)
    out = torch.empty(size, size)
    return lambda: torch.mm(left, right, out=out), 2.0 * size**3


def one_dnn_product(size: int = 2048) -> Callable[[], object] | None:
    """The same product by oneDNN; None where torch was built without it."""
    if not torch.backends.mkldnn.is_available():
        return None
    left, right = torch.randn(size, size), torch.randn(size, size)
    return lambda: torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")


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
    """A port of this host that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun would tell one of `world` ranks on this host that meet at `port`."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def print_figures(figures: Mapping[str, Any], as_json: bool) -> None:
    """Print each figure, and all of them as one JSON object on the last line if asked to."""
    for key, value in figures.items():
        print(f"  {key:34} {value:.4g}" if isinstance(value, float) else f"  {key:34} {value}")
    if as_json:
        print(json.dumps(figures))
