"""The ranks of tests/test_training_parity.py: each trains some steps under each kind of plan, and rank 0 writes what came out."""

import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch.distributed as dist
from forked_ranks import run_ranks

from data.schema import load_schema
from data.stream import ParquetStream
from mbcnet_rec.build import build
from mbcnet_rec.checkpoints.shards import shards_of
from mbcnet_rec.config import load_config
from mbcnet_rec.runtime.process import joined_process
from mbcnet_rec.training.pipeline import CheckedStep
from mbcnet_rec.training.trainer import average_terms, seed_step
from sharding.plan.placement import Plan, TablePlan

STEPS = 10
KINDS = ("table_wise", "row_wise", "table_row_wise", "data_parallel", "column_wise", "shared")
# of all but the last one, which has table-row-wise shards
OPTIONS = (
    "embeddings=per_branch", "coteaching.threshold=base_rate", "differentiation.latents=unit", "differentiation.weight=0.3",
)  # fmt: skip


def plan_of(kind, schema, process):
    """Every table under one kind of plan; table-wise ones dealt out in turn."""
    world = process.world_size
    kernel = "dense" if kind == "data_parallel" else "fused"
    tables = {}
    for index, table in enumerate(schema.tables):
        ranks = {"table_wise": (index % world,), "data_parallel": ()}.get(kind, tuple(range(world)))
        tables[table.name] = TablePlan(kind, kernel, ranks)
    return Plan(world, process.local_world_size, "cpu", schema.fingerprint(), tables)


def logical_tensors(built, process):
    """Every tensor of model and optimizers, put together from all ranks, on rank 0."""
    own = [
        (p.name, p.offsets, p.global_shape, p.tensor.detach().numpy().copy())
        for p in shards_of(built.model, built.optimizer)
        if process.rank == 0 or not p.replicated
    ]
    parts = [None] * process.world_size
    dist.all_gather_object(parts, own)
    whole = {}
    for name, offsets, shape, values in (piece for part in parts for piece in part):
        target = whole.setdefault(name, np.full(shape, np.nan, np.float64))
        target[tuple(slice(o, o + n) for o, n in zip(offsets, values.shape, strict=True))] = values
    return whole


def train_all(config_file, out):
    with joined_process("cpu") as process:
        for kind in KINDS:
            # column shards make rowwise Adagrad another optimizer
            optimizer = "sgd" if kind == "column_wise" else "rowwise_adagrad"
            options = [f"optim.embedding.name={optimizer}"]
            if kind != "shared":
                options += [f"model.mbcnet.{option}" for option in OPTIONS]
            config = load_config(config_file, options)
            schema = load_schema(config.schema)
            plan = plan_of("table_row_wise" if kind == "shared" else kind, schema, process)
            built = build(config, schema, process, plan)
            files = [Path(path) for path in config.data.train]
            stream = ParquetStream(files, schema, config.data.train_options(0), process.rank, process.world_size)
            pipeline = built.pipeline(CheckedStep(built.model, built.optimizer, nullcontext))
            built.model.train()
            batches, losses, disagreements = iter(stream), [], 0.0
            for step in range(STEPS):
                seed_step(0, step, process.rank)
                terms = average_terms([pipeline.progress(batches)])
                losses.append(terms["loss"])
                disagreements += terms["coteaching_loss"]
            tensors = logical_tensors(built, process)
            if process.is_first:
                np.savez(
                    Path(out) / f"{kind}-{process.world_size}.npz",
                    losses=losses,
                    coteaching=disagreements,
                    **{name.replace("/", "|"): value for name, value in tensors.items()},
                )


if __name__ == "__main__":
    config, folder = Path(sys.argv[1]), Path(sys.argv[2])
    for world in map(int, sys.argv[3:]):
        result = run_ranks(lambda rank: train_all(config, folder), folder / f"logs-{world}", world=world, limit=500)
        assert result["codes"] == [0] * world, result
