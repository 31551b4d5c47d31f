"""How the cost of a training step grows: with fields, rows of tables, batch, groups, branches and ranks.

    python benchmarks/growth.py [--quick] [--json] [--clock wall] [--largest-rows 10_000_000]

Each curve changes one thing and keeps the rest: 48 fields of 8 dims, tables of 10,000 rows, 4 groups of 6 fields, three branches with
narrow layers (so that what is not matrix products shows), batches of 1,024 random rows, one process, one thread. All sizes of a curve
take turns. For each curve a * size ** b is fitted; 1 is linear.

*_exponent          b over all sizes; fields, rows, batch, groups, branches, ranks
*_last_exponent     between the last two sizes: what remains when fixed costs no longer matter
*_seconds           size -> median seconds of a step (ranks: processor seconds of all together, BATCH rows each)
cooperation_exponent    of both cooperation losses alone over 2 to 16 branches; their pairs grow with the square
"""

import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from paper_size import random_batch, run_config, training_step, uniform_schema
from side_by_side import Clock, answering_ranks, fitted_exponent, print_figures, take_turns, timing_parser_of

from data.schema import Schema
from mbcnet_rec.build import build
from mbcnet_rec.model.branches import DeepConfig, EFGCConfig
from mbcnet_rec.model.losses import branch_coteaching_loss, branch_pairs, moderate_differentiation_loss
from mbcnet_rec.model.mbcnet import MBCNetConfig
from mbcnet_rec.model.models import ModelConfig
from mbcnet_rec.plugins import model_config
from mbcnet_rec.runtime.process import Process, joined_process

FIELDS, ROWS, DIM, BATCH, GROUPS, GROUP_FIELDS = 48, 10_000, 8, 1024, 4, 6
THREE = ("efgc", "cross", "deep")
ALL_BRANCHES = ("deep", "cross", "efgc", "fm", "wide")
SIZES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {  # curve -> sizes with --quick, and without
    "fields": ((24, 96), (24, 48, 96, 192, 384, 768)),
    "rows": ((10**4, 10**5), (10**4, 10**5, 10**6, 10**7, 10**8)),
    "batch": ((256, 1024), (256, 1024, 4096, 16_384)),
    "groups": ((1, 8), (1, 2, 4, 8, 16, 32, 64)),
    "branches": ((1, 3, 5), (1, 2, 3, 4, 5)),
    "cooperation": ((2, 4, 8), (2, 4, 8, 16)),
}
ROOM = 0.85  # of free memory that the tables of all sizes may take
Case = Callable[[], object]


def model(branches: Sequence[str] = THREE) -> ModelConfig:
    """Narrow layers: the framework's own cost is not hidden behind products."""
    efgc, deep = EFGCConfig(hidden=(64, 32)), DeepConfig(hidden=(256, 128))
    mbcnet = MBCNetConfig(branches=tuple(branches), efgc=efgc, deep=deep, branch_dim=128, top=(128, 64))
    return model_config(mbcnet=mbcnet)


def schema_of(fields: int = FIELDS, rows: int = ROWS, groups: int = GROUPS, dim: int = DIM) -> Schema:
    """Groups of GROUP_FIELDS neighbouring fields, from the first field on and round again."""
    width = min(GROUP_FIELDS, fields)
    members = [[(width * group + i) % fields for i in range(width)] for group in range(groups)]
    return uniform_schema(fields, rows, dim, members)


def step_of(process: Process, schema: Schema, batch: int = BATCH, branches: Sequence[str] = THREE) -> Case:
    """A training step of a fresh model."""
    built = build(run_config(Path(), model(branches), batch), schema, process)
    return training_step(built, random_batch(schema, batch))


def step_cases(process: Process, curve: str, sizes: Sequence[int]) -> dict[int, Case]:
    """A curve of training steps: size -> step."""
    makers: dict[str, Callable[[int], Case]] = {
        "fields": lambda size: step_of(process, schema_of(fields=size)),
        # four fields only, so that the largest tables fit
        "rows": lambda size: step_of(process, schema_of(fields=4, rows=size, groups=1)),
        "batch": lambda size: step_of(process, schema_of(), batch=size),
        "groups": lambda size: step_of(process, schema_of(groups=size)),
        "branches": lambda size: step_of(process, schema_of(), branches=ALL_BRANCHES[:size]),
        "cooperation": cooperation_case,
    }
    return {size: makers[curve](size) for size in sizes}


def rows_that_fit(sizes: Sequence[int], largest: int) -> list[int]:
    """Sizes whose tables, all of them together, fit into the free memory; what is left out is told."""
    row_bytes = 4 * (DIM + 1) * 4  # of four tables, with the optimizer's number a row, in float32
    room = ROOM * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    wanted = [size for size in sizes if size <= largest]
    fits = [size for size in wanted if sum(each for each in wanted if each <= size) * row_bytes < room]
    print(f"  rows: {fits} a table; what is left out does not fit into the free memory")
    return fits


def cooperation_case(branches: int) -> Case:
    """Both losses forward and backward for K branches, whose pairs are K (K - 1) / 2."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(branches, BATCH, generator=draw).requires_grad_()
    latents = torch.randn(branches, BATCH, 64, generator=draw).requires_grad_()
    transforms = torch.randn(len(branch_pairs(branches)), 64, 64, generator=draw).requires_grad_()
    labels = (torch.rand(BATCH, generator=draw) < 0.09).float()

    def run() -> None:
        loss = branch_coteaching_loss(logits, labels) + moderate_differentiation_loss(latents, transforms)
        loss.backward()

    return run


def ranks_curve(quick: bool, seconds: float) -> dict[int, float]:
    """Ranks -> processor seconds of all ranks together for a step of BATCH rows each."""
    found = {}
    for world in (1, 2) if quick else (1, 2, 4):
        ranks = answering_ranks(__file__, ["--rank-for", str(seconds / world)], world)
        found[world] = sum(float(rank.answer()) for rank in ranks)
        for rank in ranks:
            rank.end()
    return found


def train_as_rank(seconds: float) -> int:
    """Train for a while; answer with processor seconds a step. Ranks step together, so they count alike."""
    torch.set_num_threads(1)
    with joined_process("cpu") as process:
        step = step_of(process, schema_of())
        start = time.process_time()
        for _ in range(5):
            step()
        count = torch.tensor([max(5.0, seconds / ((time.process_time() - start) / 5))])
        torch.distributed.broadcast(count, 0)  # the same number of steps on every rank
        times = take_turns({"step": step}, 0.0, "cpu", least_rounds=int(count))
    print(statistics.median(times["step"]), flush=True)
    return 0


def fitted(name: str, seconds: dict[int, float]) -> dict[str, Any]:
    """Exponents of a curve, printed beside it."""
    sizes, values = list(seconds), list(seconds.values())
    figures = {
        f"{name}_exponent": fitted_exponent(sizes, values) if len(sizes) > 1 else None,
        f"{name}_last_exponent": fitted_exponent(sizes[-2:], values[-2:]) if len(sizes) > 1 else None,
    }
    shown = ", ".join(f"{size:,}: {1e3 * value:.1f} ms" for size, value in seconds.items())
    print(f"  {name}: {shown}", flush=True)
    return figures | {f"{name}_seconds": {str(size): value for size, value in seconds.items()}}


def main() -> int:
    if sys.argv[1:2] == ["--rank-for"]:
        return train_as_rank(float(sys.argv[2]))
    parser = timing_parser_of(__doc__)
    parser.set_defaults(clock="cpu")
    parser.add_argument("--seconds", type=float, help="of measuring for each curve; default 15, quick 0.5")
    parser.add_argument("--curves", default="fields,rows,batch,groups,branches,cooperation,ranks")
    parser.add_argument("--largest-rows", type=int, default=10**7, help="of a table; 100,000,000 takes 14 GB")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    seconds = args.seconds or (0.5 if args.quick else 15.0)
    print(
        "prediction: batch 0.9 to 1 (fixed costs at the small end); fields 0.7, nearing 1: layers on all fields grow with them, the rest does not;\n"
        "rows below 0.1: cache misses only; groups 0.5, nearing 1; branches below 1; cooperation nearing 2, since its pairs do (its share of a\n"
        "step is small); ranks 1: each does its own rows, and the exchange is little"
    )
    figures: dict[str, Any] = {}
    wanted = args.curves.split(",")
    with joined_process("cpu") as process:
        for name, (quick_sizes, all_sizes) in SIZES.items():
            if name in wanted:
                sizes = quick_sizes if args.quick else all_sizes
                sizes = rows_that_fit(sizes, args.largest_rows) if name == "rows" else sizes
                cases = step_cases(process, name, sizes)
                figures |= fitted(name, measured(cases, seconds, args.clock))
                del cases
                gc.collect()
    if "ranks" in wanted:
        figures |= fitted("ranks", ranks_curve(args.quick, seconds))
    print_figures({**figures, "threads": args.threads, "clock": args.clock}, args.json)
    return 0


def measured(cases: dict[int, Case], seconds: float, clock: Clock) -> dict[int, float]:
    """Median seconds of each size, all sizes taking turns."""
    times = take_turns({str(size): case for size, case in cases.items()}, seconds, clock)
    return {size: statistics.median(times[str(size)]) for size in cases}


if __name__ == "__main__":
    sys.exit(main())
