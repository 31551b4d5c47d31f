"""Planned equals real: bytes of tables and optimizer state that two and four gloo ranks hold after a step, against the plan's."""

import os
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forked_ranks import run_ranks, run_script
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.types import ShardingEnv
from torchrec.optim.keyed import KeyedOptimizerWrapper
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from data.schema import parse_schema
from data.synthetic.planted import pailitao_schema
from mbcnet_rec.training.config import EmbeddingOptimConfig
from mbcnet_rec.training.optim import TABLE_OPTIMIZERS, fuse_table_optimizer
from sharding.bridge.allocated import held_bytes, optimizer_bytes, planned_against_held
from sharding.bridge.collections import meta_collections
from sharding.bridge.sharder import sharders_of, to_sharding_plan
from sharding.cost.assess import assess
from sharding.plan.cluster import default_cluster
from sharding.plan.constraints import ShardingConfig, TableConstraint
from sharding.search.candidates import Task
from sharding.search.planner import make_plan

ROWS = 16


MIXED = """
name = "mixed"
label = "click"
[fields]
f0 = { kind = "categorical", num_embeddings = 1001, embedding_dim = 16 }
f1 = { kind = "multi_valued", num_embeddings = 50, embedding_dim = 4 }
f2 = { kind = "categorical", num_embeddings = 333, embedding_dim = 8 }
f3 = { kind = "multi_valued", num_embeddings = 2000, embedding_dim = 64, pooling = "mean" }
w = { kind = "weighted_multi_valued", num_embeddings = 77, embedding_dim = 12, weights = "w_w" }
"""


def cases():
    """(name, schema, config, optimizer); plans of every type, dtype and optimizer come up."""
    mixed = parse_schema(tomllib.loads(MIXED), "mixed", Path())
    by_type = {
        "f0": TableConstraint(sharding_types=("row_wise",)),
        "f1": TableConstraint(sharding_types=("data_parallel",)),
        "f2": TableConstraint(sharding_types=("table_row_wise",)),
        "f3": TableConstraint(sharding_types=("column_wise",), min_partition=32),
        "w": TableConstraint(sharding_types=("row_wise",)),
    }
    return [
        ("pailitao_demo", pailitao_schema("demo"), ShardingConfig(), "rowwise_adagrad"),
        ("replicated half rows", mixed, ShardingConfig(sharding_types=("data_parallel",), data_type="fp16"), "sgd"),
        ("replicated", mixed, ShardingConfig(sharding_types=("data_parallel",)), "adam"),
        ("half rows", mixed, ShardingConfig(data_type="fp16"), "rowwise_adagrad"),
        ("every type, adagrad", mixed, ShardingConfig(tables=by_type), "adagrad"),
        ("every type, sgd", mixed, ShardingConfig(tables=by_type), "sgd"),
        ("fp16 across ranks", mixed, ShardingConfig(forward_precision="fp16", backward_precision="fp16"), "rowwise_adagrad"),
        ("rows that no rank count divides", mixed, ShardingConfig(sharding_types=("row_wise",)), "adagrad"),
    ]  # fmt: skip


def random_features(schema, weighted, generator):
    """One rank's KeyedJaggedTensor with ids inside every table."""
    keys, lengths, values = [], [], []
    for feature in schema.weighted if weighted else schema.sparse:
        count = torch.randint(0, 3, (ROWS,), generator=generator)
        size = schema.table_of[feature.name].num_embeddings
        keys.append(feature.name)
        lengths.append(count)
        values.append(torch.randint(0, size, (int(count.sum()),), generator=generator))
    weights = torch.rand(sum(len(each) for each in values), generator=generator) if weighted else None
    return KeyedJaggedTensor(keys, torch.cat(values), weights, lengths=torch.cat(lengths))


def step(schema, config, optimizer, machine, rank):
    """Plan, shard, train one step; return planned and held bytes of this rank, and the line about them."""
    cluster = default_cluster(*machine)
    plan = make_plan(Task(schema, config, cluster, ROWS, optimizer))
    collections = {each.name: module for each, module in meta_collections(schema, config.data_type).items()}
    model = torch.nn.ModuleDict(collections)
    replicated = {name for name, table in plan.tables.items() if table.sharding_type == "data_parallel"}
    parameters = [value for name, value in model.named_parameters() if name.split(".")[-2] not in replicated]
    fuse_table_optimizer(parameters, EmbeddingOptimConfig(name=optimizer))
    sharded = DistributedModelParallel(
        model,
        env=ShardingEnv.from_process_group(dist.group.WORLD),
        device=torch.device("cpu"),
        plan=to_sharding_plan(plan, dict(model.items())),
        sharders=sharders_of(plan),
    )
    dense = {name: value for name, value in sharded.named_parameters() if name.split(".")[-2] in replicated}
    generator = torch.Generator().manual_seed(rank)
    losses = [
        sharded.module[name](random_features(schema, name == "weighted_ebc", generator)).wait().values().sum()
        for name in model
    ]
    sum(losses).backward()
    held = held_bytes(sharded)
    if dense:
        wrapper = KeyedOptimizerWrapper(dense, lambda params: TABLE_OPTIMIZERS[optimizer](params, lr=0.1))
        wrapper.step()
        held["state"] += optimizer_bytes(wrapper._optimizer)
    assessment = assess(plan, cluster)
    planned = assessment.ranks[rank].bytes
    line = planned_against_held(assessment, rank, [held] * machine[0], 0.01)
    types = {table.sharding_type for table in plan.tables.values()}
    return (planned.rows, planned.state), (held["rows"], held["state"]), line, types


def worker(rank, world, folder):
    """One rank of hosts with two ranks each: all cases, one after the other."""
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": str(rank % 2)}
    dist.init_process_group("gloo")
    found = [
        (name, *step(schema, config, optimizer, (world, 2, "cpu"), rank)) for name, schema, config, optimizer in cases()
    ]
    torch.save(found, folder / f"{world}_{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.long)], ids=["2 ranks", "2 hosts of 2 ranks"])
def test_planned_bytes_are_held_bytes(world, tmp_path):
    run_script("test_bridge_allocated.py", str(tmp_path), str(world))
    seen = set()
    for rank in range(world):
        for name, planned, held, line, types in torch.load(tmp_path / f"{world}_{rank}.pt", weights_only=True):
            for part, expected, real in zip(("rows", "state"), planned, held, strict=True):
                assert abs(real - expected) <= 0.01 * max(expected, 1), (name, rank, part, expected, real)
            which = f"planned against held (rank {rank} of {world}, the farthest off): rows "
            assert which in line and "cache" not in line
            seen |= types
    assert seen == {"table_wise", "row_wise", "table_row_wise", "column_wise", "data_parallel"}


if __name__ == "__main__":
    out, ranks = Path(sys.argv[1]), int(sys.argv[2])
    done = run_ranks(lambda rank: worker(rank, ranks, out), out / "logs", world=ranks)
    if any(done["codes"]):
        sys.exit("".join(done["words"]))
