"""After some steps, one line: what the plan said of memory and time, and what the ranks hold and measure."""

from dataclasses import replace
from statistics import median

import numpy as np
import torch

from data.errors import InputError
from mbcnet_rec.runtime.process import Process, gather_rows
from mbcnet_rec.training.built import Built
from sharding.bridge.allocated import (
    PARTS,
    held_bytes,
    optimizer_bytes,
    planned_against_held,
)
from sharding.cost.assess import Assessment, assess
from sharding.plan.cluster import Cluster, read_cluster
from sharding.plan.constraints import ShardingConfig
from sharding.plan.placement import Plan
from sharding.search.task import cluster_of

STEPS = 20  # after which the line is due; a shorter run has it after its last step
WARM_UP = 2  # steps whose time is not counted


class PlanWatch:
    """Counts steps and their seconds, and says once how the plan and the run compare.

    Args:
        built: the model with its plan.
        batch_size: rows of a step, over all ranks.
        process: this rank.
        steps: that this start of the run will take.
    """

    def __init__(self, built: Built, batch_size: int, process: Process, steps: int) -> None:
        self.built, self.batch_size, self.process = built, batch_size, process
        self.due = min(STEPS, steps)
        self.seconds: list[float] = []

    def after_step(self, seconds: float) -> str:
        """Take the seconds of a step. Every rank calls it; on rank 0 the line after the step at which it is due, else nothing."""
        if len(self.seconds) >= self.due:
            return ""
        self.seconds.append(seconds)
        return self._line() if len(self.seconds) == self.due else ""

    def _line(self) -> str:
        held = held_by_rank(self.built, self.process)
        plan = self.built.plan
        if not all(table.num_embeddings for table in plan.tables.values()):
            return ""  # a plan that says no sizes, as files of the first format, says no bytes either
        if held is None:
            return ""
        rows = -(-self.batch_size // self.process.world_size)
        cluster = assessed_cluster(plan, self.built.sharding, self.process)
        assessment = assess(replace(plan, batch_size_per_rank=rows), cluster)
        step = median(self.seconds[WARM_UP:] or self.seconds)
        line = planned_against_held(assessment, farthest_off(assessment, held), held, step)
        other = f"; the plan was made for {plan.batch_size_per_rank:,} rows a rank, this run has {rows:,}"
        return f"after {self.due} steps, {line}" + (
            other if plan.batch_size_per_rank not in (0, rows) else ""
        )


def held_by_rank(built: Built, process: Process) -> list[dict[str, int]] | None:
    """What every rank holds, by part, and on cuda what it has allocated at most: on rank 0; None elsewhere."""
    held = held_bytes(built.model)
    for name, keyed in built.optimizer.optimizers:
        if name == "replicated":
            held["state"] += optimizer_bytes(keyed)
    on_gpu = process.device.type == "cuda"
    allocated = torch.cuda.max_memory_allocated(process.device) if on_gpu else 0
    table = gather_rows(np.array([[*(held[part] for part in PARTS), allocated]], np.int64), process)
    if table is None:
        return None
    return [dict(zip((*PARTS, "hbm"), map(int, row), strict=True)) for row in table]


def farthest_off(assessment: Assessment, held: list[dict[str, int]]) -> int:
    """The rank whose tables differ most from the plan in bytes; of equal ones the one that holds most."""

    def distance(rank: int) -> tuple[int, int]:
        planned = assessment.of_rank(rank).bytes
        apart = sum(abs(getattr(planned, part) - held[rank][part]) for part in PARTS)
        return apart, sum(held[rank][part] for part in PARTS)

    return max(range(len(held)), key=distance)


def assessed_cluster(plan: Plan, config: ShardingConfig, process: Process) -> Cluster:
    """The machines whose figures times are estimated with: the config's, else the plan's, else the defaults for the device."""
    if not config.cluster and plan.cluster:
        try:
            return read_cluster(plan.cluster)
        except InputError:
            pass  # made for defaults, or for a file that is not here
    return cluster_of(config, process.world_size, process.local_world_size, process.device.type)
