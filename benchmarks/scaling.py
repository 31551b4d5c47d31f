"""From 1 to 1,024 GPUs at the paper's sizes, on paper: which wall stands where. Nothing is measured; no GPU is needed.

    python benchmarks/scaling.py [--quick] [--json] [--kind h100-80g] [--batch 8192]

Each size is planned by the project's own planner for the paper's tables (480 M users, 974 M items) and added up by its cost model
(sharding/cost/estimate.py, sharding/cost/assess.py). What is assumed of overlap: the exchange of ids and the decoding of Parquet happen beside
the step before; the dense all-reduce hides behind two thirds of the dense part; lookup, pooled rows, dense part, gradients and update
follow one another. Rows are fp32 where they fit, else fp16, else the largest tables live in host memory with a cache. Seconds are a
floor: no launches, no stragglers, no skew, no contention of links.

compute, memory, network, input walls: samples a second that this resource alone would allow all GPUs together
not_tried                what a user could try at these sizes and this script does not
wall_at                  GPUs -> the resource that takes most of the step (or input, where it is longer than all of it)
samples_per_second       GPUs -> all together
efficiency               GPUs -> a GPU's rate against that at the smallest size
"""

import json
import sys
import time
from dataclasses import replace
from typing import Any

from side_by_side import parser_of

from data.schema import Schema
from data.synthetic.planted import pailitao_schema
from mbcnet_rec.dense_cost import dense_cost
from mbcnet_rec.plugins import model_config
from sharding.cost.assess import Assessment
from sharding.cost.estimate import DoesNotFit
from sharding.plan.cluster import read_cluster
from sharding.plan.constraints import ShardingConfig, TableConstraint
from sharding.search.candidates import Task
from sharding.search.planner import solve

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
QUICK_SIZES = (1, 8, 128, 1024)
HOST_DEVICES = 8
WALLS = ("compute", "memory", "network", "input")
PAGED_TABLES = 2  # the largest, where nothing else fits
NOT_TRIED = (
    f"more than the {PAGED_TABLES} largest tables in host memory, without which 1 and 2 GPUs do not fit",
    "replicas of the plan in groups (sharding.replicas), which shorten the exchange on many hosts",
)
CACHED = TableConstraint(compute_kernels=("fused_uvm_caching",))


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--kind", default="h100-80g", help="of GPU: a preset or a TOML file")
    parser.add_argument("--batch", type=int, default=8192, help="rows of one GPU")
    parser.add_argument("--sizes", help="comma-separated numbers of GPUs; default 1 to 1,024 by doubling")
    parser.add_argument("--search-seconds", type=float, default=None, help="of the planner at each size")
    args = parser.parse_args()
    sizes = QUICK_SIZES if args.quick else SIZES
    if args.sizes:
        sizes = [int(text) for text in args.sizes.split(",")]
    seconds = args.search_seconds or (3.0 if args.quick else 20.0)
    print(
        "prediction: a single GPU waits for its host's memory (the tables are larger than its own); where they fit, compute and HBM share\n"
        "the step; from the second host on the network takes most of it and does not let go; input never: 14 cores a GPU decode faster"
    )
    schema = pailitao_schema("paper")
    cells = {}
    heads = "".join(f"{name:>10}" for name in WALLS)
    print(f"  {'GPUs':>5} {'rows':>5} {'M samples/s':>12} {'ms/step':>8} {heads}  wall")
    for size in sizes:
        start = time.perf_counter()
        found = assessed(schema, args.kind, size, args.batch, seconds)
        if found is None:
            print(f"  {size:5} does not fit")
            continue
        assessment, rows = found
        cells[size] = cell_of(assessment, rows, time.perf_counter() - start)
        cell = cells[size]
        spent = "".join(f"{1e3 * cell['spent_seconds'][name]:10.2f}" for name in WALLS)
        rate, step = cell["samples_per_second"] / 1e6, 1e3 * cell["step_seconds"]
        print(f"  {size:5} {rows:>5} {rate:12.2f} {step:8.2f} {spent}  {cell['wall']}")
    for each in NOT_TRIED:
        print(f"  not tried: {each}")
    if args.json:
        print(json.dumps(figures_of(cells, args.kind, args.batch)))
    return 0


def assessed(schema: Schema, kind: str, size: int, batch: int, seconds: float) -> tuple[Assessment, str] | None:
    """Plan for so many GPUs; the kindest rows that fit. None where nothing does."""
    hosts, devices = max(1, size // HOST_DEVICES), min(size, HOST_DEVICES)
    cluster = read_cluster(kind).resized(hosts, devices)
    plain = ShardingConfig(search_seconds=seconds)
    dense = dense_cost(model_config(), schema, plain)
    by_size = sorted(schema.tables, key=lambda table: -table.num_embeddings * table.embedding_dim)
    paged = {table.name: CACHED for table in by_size[:PAGED_TABLES]}
    half, host = replace(plain, data_type="fp16"), replace(plain, data_type="fp16", tables=paged)
    for config, rows in ((plain, "fp32"), (half, "fp16"), (host, "host")):
        try:
            return solve(Task(schema, config, cluster, batch, dense=dense)), rows
        except DoesNotFit:
            continue
    return None


def cell_of(assessment: Assessment, rows: str, seconds: float) -> dict[str, Any]:
    """Figures of one size."""
    path, cluster = assessment.path, assessment.cluster
    rows_together = assessment.plan.batch_size_per_rank * cluster.world_size
    spent = {
        "compute": path.dense,
        "memory": path.lookup + path.update,
        "network": path.output_dist + path.gradient_dist + path.all_reduce,
        "input": path.decode,
    }
    return {
        "samples_per_second": assessment.samples_per_second,
        "step_seconds": path.step,
        "spent_seconds": spent,
        "walls": {name: rows_together / each if each else None for name, each in spent.items()},
        "wall": path.bound_by,
        "rows": rows,
        "balance": assessment.balance,
        "largest_rank_bytes": max(sum(assessment.memory(rank)) for rank in assessment.ranks),
        "planning_seconds": seconds,
    }


def figures_of(cells: dict[int, dict[str, Any]], kind: str, batch: int) -> dict[str, Any]:
    """What the JSON line holds."""
    rates = {size: cell["samples_per_second"] / size for size, cell in cells.items()}
    first = rates[min(rates)] if rates else 1.0
    return {
        "wall_at": {str(size): cell["wall"] for size, cell in cells.items()},
        "samples_per_second": {str(size): round(cell["samples_per_second"]) for size, cell in cells.items()},
        "efficiency": {str(size): round(rate / first, 4) for size, rate in rates.items()},
        "rows": {str(size): cell["rows"] for size, cell in cells.items()},
        "not_tried": list(NOT_TRIED),
        "kind": kind,
        "batch_per_gpu": batch,
        "cells": {str(size): cell for size, cell in cells.items()},
    }


if __name__ == "__main__":
    sys.exit(main())
