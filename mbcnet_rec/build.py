"""Config + schema + ranks -> a sharded model with its optimizers.

The part of the composition root that training, evaluation, prediction and export share.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.model_parallel import DMPCollection
from torchrec.distributed.types import ShardingEnv, ShardingPlan

from data.errors import InputError
from data.schema import Schema
from mbcnet_rec.config import RunConfig
from mbcnet_rec.cpu.fast_path import FastPath
from mbcnet_rec.dense_cost import dense_cost
from mbcnet_rec.model.models import build_model, build_objective, model_layout, schema_with_wide
from mbcnet_rec.model.sparse_arch import Lookup, SparseArch
from mbcnet_rec.runtime.process import Process, answer_of_first, mean_over_ranks
from mbcnet_rec.training.built import Built
from mbcnet_rec.training.optim import build_optimizer, fuse_table_optimizer
from sharding.bridge.blocks import initialise_tables
from sharding.bridge.collections import meta_collections
from sharding.bridge.sharder import placed_differences, sharders_of, to_sharding_plan
from sharding.bridge.zch import collision_collection
from sharding.plan.compare import check_plan, constraint_differences
from sharding.plan.placement import Plan, plan_of_text, plan_text, read_plan
from sharding.search.candidates import Task, cluster_of
from sharding.search.planner import make_plan

SPARSE_ARCH = "model.sparse_arch."


def build_lookups(schema: Schema, plan: Plan) -> list[Lookup]:
    """Build the tables' collections on the meta device, of the plan's dtype; InputError if no field without weights has a table."""
    lookups = []
    for each, rows in meta_collections(schema, plan.data_type).items():
        collection = collision_collection(schema, rows) if each.unbounded else rows
        lookups.append(Lookup(each.name, collection, each.weighted, each.unbounded, each.sequences))
    if all(lookup.weighted for lookup in lookups):
        raise InputError(
            f"schema {schema.name!r}: no categorical, multi-valued or bucketised field; wanted at least one field "
            "with an embedding table; add one (a number can use transform = 'bucketise')"
        )
    return lookups


def plan_of(config: RunConfig, schema: Schema, process: Process) -> Plan:
    """On rank 0, the plan file of the config, checked, or a plan made now; InputError if it is faulty or of another run, or nothing fits."""
    tables_schema, optimizer = schema_with_wide(config.model, schema), config.optim.embedding.name
    source, device = config.sharding.plan, process.device.type
    if not source:
        cluster = cluster_of(config.sharding, process.world_size, process.local_world_size, device)
        batch_size_per_rank = -(-config.data.batch_size // process.world_size)
        dense = dense_cost(config.model, schema, config.sharding)
        return make_plan(Task(tables_schema, config.sharding, cluster, batch_size_per_rank, optimizer, dense))
    plan = read_plan(Path(source))
    check_plan(
        plan, tables_schema, world_size=process.world_size, local_world_size=process.local_world_size,
        device=device, optimizer=optimizer, source=source,
    )  # fmt: skip
    if differences := constraint_differences(plan, config.sharding):
        raise InputError(
            f"{source}: this run's [sharding] asks for something else: {'; '.join(differences)}; remove those keys from the "
            "run's config, or plan again with them"
        )
    return plan


def build(config: RunConfig, schema: Schema, process: Process, plan: Plan | None = None) -> Built:
    """Build, plan, shard and initialise a model; equal on every world size and plan for the same config.

    `schema` is fitted; without a plan it is the one that the config says. InputError if schema, model and plan do not fit together.
    """
    unbounded = [table.feature_names[0] for table in schema.tables if table.zch is not None]
    if config.optim.embedding.name == "adam" and unbounded:
        raise InputError(
            f"optim.embedding.name = 'adam': field {unbounded[0]!r} is of encoding 'zch', whose table is sharded by rows, and adam is for "
            "tables that every rank holds whole; use rowwise_adagrad, adagrad or sgd"
        )
    if plan is None:
        text = answer_of_first(process, lambda: plan_text(plan_of(config, schema, process)))
        plan = plan_of_text(text, config.sharding.plan or "the run's plan")
    lookups = build_lookups(schema_with_wide(config.model, schema), plan)
    collections = {f"{SPARSE_ARCH}{lookup.name}": lookup.collection for lookup in lookups}
    replicated = {name for name, table in plan.tables.items() if table.sharding_type == "data_parallel"}
    layout = model_layout(config.model, schema)
    torch.manual_seed(config.train.seed)  # dense weights: equal on all ranks
    model = build_model(config.model, SparseArch(lookups, layout), layout)
    objective = build_objective(config.model, model, mean_over_ranks)
    fused = [
        parameter
        for collection in collections.values()
        for name, parameter in collection.named_parameters()
        if name.split(".")[-2] not in replicated
    ]
    fuse_table_optimizer(fused, config.optim.embedding)
    embedding = config.optim.embedding
    sharders = sharders_of(plan, seed=config.train.seed, std=embedding.init_std)
    path = FastPath(config.train.cpu_fast_path and process.device.type == "cpu", plan)
    path.prepare(objective)
    sharded = _sharded(
        objective, plan, to_sharding_plan(plan, collections), process.device, sharders=sharders,
        data_parallel_wrapper=path.data_parallel_wrapper,
    )  # fmt: skip
    path.shorten(sharded)
    moved = placed_differences(plan, sharded)
    if moved:
        raise InputError(f"tables are not where the plan says: {'; '.join(moved)}; plan again with `mbcnet plan make`")
    tables = {
        name: name.split(".")[-2]
        for name in sharded.state_dict()
        if name.startswith(tuple(collections)) and name.endswith(".weight")
    }
    initialise_tables(sharded.state_dict(), tables, seed=config.train.seed, std=embedding.init_std)
    kept = {name for name, table in tables.items() if table in replicated}
    optimizer = build_optimizer(sharded, kept, config.optim, path.adam)
    dense = [parameter for name, parameter in sharded.named_parameters() if name not in tables]
    return Built(
        sharded, optimizer, plan, model.branch_names, tuple(model.tasks), dense, config.optim, config.sharding, config.train.seed,
        path.pipeline,
    )  # fmt: skip


def _sharded(
    objective: nn.Module, plan: Plan, sharding_plan: ShardingPlan, device: torch.device, **options: Any
) -> DistributedModelParallel:
    """Shard over all ranks, or over each of the plan's groups of ranks."""
    world: Any = torch.distributed.group.WORLD
    if plan.replicas > 1:
        return DMPCollection(
            objective, device, sharding_plan, plan.world_size, plan.group_size, world,
            node_group_size=plan.local_group_size, **options,
        )  # fmt: skip
    env = ShardingEnv.from_process_group(world)
    return DistributedModelParallel(objective, env=env, device=device, plan=sharding_plan, **options)
