"""How long planning takes and how near its bound it comes, by proposer and partitioner, with and without our last pass.

    python benchmarks/planner.py [--quick] [--json]

1,000 tables of ten to 200 million rows, a third of them lists, on 128 ranks (--quick: 300 on 32), and the paper's schema on 128.

over_bound/CASE           share by which the busiest rank's time is above the least that any dealing of the same shards could have
over_any_bound/CASE       the same against the least that any of the allowed sharding types could have
unmoved_over_bound/CASE   over_bound of TorchRec's own plan, before tables are moved off the busiest rank
memory_balance/CASE       mean over largest of the ranks' bytes
seconds/CASE              processor seconds of the whole planning
proposals/CASE            plans that TorchRec dealt out
paper_seconds             of data/schemas/pailitao.toml on 16x8:h100-80g

A case is PROPOSER+PARTITIONER; default is what runs use. Times of ranks are estimates (sharding/cost/estimate.py), so these figures compare
plans and promise no step time.
"""

import random
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from side_by_side import parser_of, print_figures

from data.schema import Schema, load_schema, parse_schema
from sharding.cost.assess import assess
from sharding.cost.estimate import least_costs
from sharding.plan.cluster import Cluster, read_cluster
from sharding.plan.constraints import ShardingConfig
from sharding.search.candidates import Task, all_options
from sharding.search.planner import make_plan

PAPER = Path(__file__).parents[1] / "data" / "schemas" / "pailitao.toml"
BATCH_SIZE = 8192  # rows of one rank
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "greedy+greedy": {"proposers": ("greedy",)},
    "greedy_total+greedy": {"proposers": ("greedy_total",)},
    "greedy+memory_balanced": {"proposers": ("greedy",), "partitioner": "memory_balanced"},
}


def main() -> int:
    arguments = parser_of(__doc__).parse_args()
    tables, cluster = (300, "4x8:h100-80g") if arguments.quick else (1000, "16x8:h100-80g")
    config = ShardingConfig(search_seconds=5.0 if arguments.quick else 60.0)
    figures = measure(random_schema(tables, seed=0), read_cluster(cluster), config)
    figures["paper_seconds"] = round(seconds_of_paper(), 2)
    figures["peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    print_figures({"tables": tables, "cluster": cluster} | figures, arguments.json)
    return 0


def random_schema(tables: int, seed: int) -> Schema:
    """Single-valued and list fields with a table each; logarithms of rows evenly spread from ten to 200 million."""
    draw = random.Random(seed)
    fields = {
        f"t{i}": {
            "kind": "multi_valued" if draw.random() < 0.33 else "categorical",
            "num_embeddings": int(10 ** draw.uniform(1, 8.3)),
            "embedding_dim": draw.choice([8, 16, 32, 64, 128]),
        }
        for i in range(tables)
    }
    return parse_schema({"name": "random", "label": "label", "fields": fields}, "random", Path())


def measure(schema: Schema, cluster: Cluster, config: ShardingConfig) -> dict[str, Any]:
    """Plan every case twice: to the end, and without the last pass."""
    figures: dict[str, Any] = {}
    for name, more in CASES.items():
        chosen, proposals = replace(config, **more), [0]

        def count(number: int, *_: float, told: list[int] = proposals) -> None:
            told[0] = number

        start = time.process_time()
        task = Task(schema, chosen, cluster, BATCH_SIZE)
        plan = make_plan(task, count)
        figures[f"seconds/{name}"] = round(time.process_time() - start, 2)
        result = assess(plan, cluster)
        # for any types: the mean of the tables' least totals, or the least largest shard of one
        least = least_costs(all_options(task), plan, cluster, lambda cost: cost.times.total).values()
        bound = max(sum(total for total, _ in least) / plan.group_size, max(shard for _, shard in least))
        memory = [rank.bytes.hbm for rank in result.ranks]
        figures |= {
            f"over_bound/{name}": round(result.over_bound, 4),
            f"over_any_bound/{name}": round(result.busiest.times.total / bound - 1, 4),
            f"memory_balance/{name}": round(sum(memory) / len(memory) / max(memory), 3),
            f"proposals/{name}": proposals[0],
        }
        unmoved = make_plan(task, rebalance=False)
        figures[f"unmoved_over_bound/{name}"] = round(assess(unmoved, cluster).over_bound, 4)
    return figures


def seconds_of_paper() -> float:
    """Processor seconds of planning the paper's schema."""
    schema, cluster = load_schema(PAPER), read_cluster("16x8:h100-80g")
    start = time.process_time()
    make_plan(Task(schema, ShardingConfig(), cluster, BATCH_SIZE))
    return time.process_time() - start


if __name__ == "__main__":
    sys.exit(main())
