"""After some steps, one line: what the plan said of memory and time, and what the ranks hold and measure."""

from contextlib import suppress
from dataclasses import replace
from statistics import median

import numpy as np
import torch

from data.errors import InputError
from mbcnet_rec.runtime.process import Process, gather_rows
from mbcnet_rec.training.built import Built
from sharding.bridge.allocated import PARTS, held_bytes, optimizer_bytes, planned_against_held
from sharding.cost.assess import assess
from sharding.plan.cluster import Cluster, read_cluster
from sharding.search.candidates import cluster_of

STEPS = 20  # after which the line is due; a shorter run has it after its last step
WARM_UP = 2  # steps whose time is not counted


class PlanWatch:
    """Times the first of at most `steps` steps of `batch_size` rows over all ranks, and then says once how plan and run compare."""

    def __init__(self, built: Built, batch_size: int, process: Process, steps: int) -> None:
        self.built, self.batch_size, self.process = built, batch_size, process
        self.due = min(STEPS, steps)
        self.seconds: list[float] = []

    def after_step(self, seconds: float) -> str:
        """Take the seconds of a step; every rank calls it. Returns the line on rank 0 after the step at which it is due, else ""."""
        if len(self.seconds) >= self.due:
            return ""
        self.seconds.append(seconds)
        return self._line() if len(self.seconds) == self.due else ""

    def _line(self) -> str:
        plan = self.built.plan
        held = held_by_rank(self.built, self.process)
        if held is None or not all(table.num_embeddings for table in plan.tables.values()):
            return ""  # a plan without sizes of tables, as files of the first format, has no bytes either
        rows = -(-self.batch_size // self.process.world_size)
        assessment = assess(replace(plan, batch_size_per_rank=rows), self._cluster())

        def distance(rank: int) -> tuple[int, int]:
            planned, found = assessment.of_rank(rank).bytes, held[rank]
            apart = sum(abs(getattr(planned, part) - found[part]) for part in PARTS)
            return apart, sum(found[part] for part in PARTS)

        farthest = max(range(len(held)), key=distance)  # of equal ones the rank that holds most
        step = median(self.seconds[WARM_UP:] or self.seconds)
        line = f"after {self.due} steps, {planned_against_held(assessment, farthest, held, step)}"
        if plan.batch_size_per_rank not in (0, rows):
            line += f"; the plan was made for {plan.batch_size_per_rank:,} rows a rank, this run has {rows:,}"
        return line

    def _cluster(self) -> Cluster:
        """The machines whose figures times are estimated with: the config's, else the plan's, else the defaults for the device."""
        config, planned, process = self.built.sharding, self.built.plan.cluster, self.process
        if not config.cluster and planned:
            with suppress(InputError):  # made for defaults, or for a file that is not here
                return read_cluster(planned)
        return cluster_of(config, process.world_size, process.local_world_size, process.device.type)


def held_by_rank(built: Built, process: Process) -> list[dict[str, int]] | None:
    """What every rank holds, by part, and on cuda what it has allocated at most: on rank 0; None elsewhere."""
    on_gpu = process.device.type == "cuda"
    held = held_bytes(built.model) | {"hbm": torch.cuda.max_memory_allocated(process.device) if on_gpu else 0}
    for name, keyed in built.optimizer.optimizers:
        if name == "replicated":
            held["state"] += optimizer_bytes(keyed)
    parts = (*PARTS, "hbm")
    table = gather_rows(np.array([[held[part] for part in parts]], np.int64), process)
    return None if table is None else [dict(zip(parts, row, strict=True)) for row in table.tolist()]
