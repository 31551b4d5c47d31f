"""Config + schema + ranks -> a sharded model with its optimizers.

The part of the composition root that training, evaluation, prediction and export share.
"""

import logging
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.types import ShardingEnv
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.keyed import CombinedOptimizer

from data.errors import InputError
from data.schema import Schema
from data.tables import embedding_bag_configs
from mbcnet_rec.config import RunConfig
from mbcnet_rec.model.distillation import DistillationObjective
from mbcnet_rec.model.layers import InputLayout, wide_tables
from mbcnet_rec.model.losses import CoteachingConfig, DifferentiationConfig
from mbcnet_rec.model.models import ModelConfig, build_model, needs_wide
from mbcnet_rec.model.objective import Objective
from mbcnet_rec.model.sparse_arch import SparseArch
from mbcnet_rec.training.optim import build_optimizer, fuse_table_optimizer
from mbcnet_rec.training.process import Process, mean_over_ranks
from sharding.initialise import initialise_tables
from sharding.plan import Plan, check_plan, read_plan
from sharding.planner import make_plan
from sharding.sharder import AnyTypeSharder, to_sharding_plan

EBC_PATH = "model.sparse_arch.ebc"
WEIGHTED_EBC_PATH = "model.sparse_arch.weighted_ebc"


@dataclass
class Built:
    """A model ready to train or to be loaded.

    Attributes:
        model: the sharded objective.
        optimizer: fused, dense and replicated parts.
        plan: where the tables live.
        branch_names: of the model's outputs after the fused one.
        dense: parameters that are in no table.
    """

    model: DistributedModelParallel
    optimizer: CombinedOptimizer
    plan: Plan
    branch_names: tuple[str, ...]
    dense: list[nn.Parameter]


def quieten_libraries() -> None:
    """Silence, by name, what the libraries say on every run and no user can mend."""
    logging.getLogger("torch.fx._symbolic_trace").setLevel(
        logging.ERROR
    )  # is_fx_tracing will return true ...
    logging.getLogger("torchrec.distributed.planner").setLevel(logging.ERROR)
    logging.getLogger("torchrec.distributed.utils").setLevel(
        logging.ERROR
    )  # data_parallel: caching params will be ignored
    for name in ("torchrec.distributed.planner.stats", "torchrec.distributed.logger"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger().addFilter(
        lambda record: not record.getMessage().startswith("Sharding spec not found for ")
    )
    for module in ("torchrec", "fbgemm_gpu", "torch.distributed", "torch.autograd"):
        warnings.filterwarnings("ignore", module=module.replace(".", r"\.") + r"(\..*)?$")
    warnings.filterwarnings("ignore", message="Please use DTensor instead", category=FutureWarning)


def input_layout(schema: Schema) -> InputLayout:
    """Describe a schema's fields and groups to the model."""
    dims = {
        feature.name: schema.table_of[feature.name].embedding_dim
        for feature in (*schema.sparse, *schema.weighted)
    }
    slices, start = {}, 0
    for feature in schema.dense:
        slices[feature.name] = (start, feature.dense_width)
        start += feature.dense_width
    projections = {feature.name: feature.projection for feature in schema.dense if feature.projection}
    return InputLayout(dims, slices, schema.groups, projections=projections)


def build_collections(schema: Schema) -> dict[str, EmbeddingBagCollection]:
    """Build the tables' collections on the meta device: module path -> collection.

    Raises:
        InputError: no field without weights looks up a table.
    """
    meta = torch.device("meta")
    plain = embedding_bag_configs(schema, weighted=False)
    if not plain:
        raise InputError(
            f"schema {schema.name!r}: no categorical, multi-valued or bucketised field; wanted at least one field "
            "with an embedding table; add one (a number can use transform = 'bucketise')"
        )
    collections = {EBC_PATH: EmbeddingBagCollection(plain, device=meta)}
    weighted = embedding_bag_configs(schema, weighted=True)
    if weighted:
        collections[WEIGHTED_EBC_PATH] = EmbeddingBagCollection(weighted, is_weighted=True, device=meta)
    return collections


def choose_plan(
    config: RunConfig, schema: Schema, process: Process, collections: dict[str, EmbeddingBagCollection]
) -> Plan:
    """Read the plan file that the config names, or plan now.

    Raises:
        InputError: the file is faulty or for another run, or nothing fits.
    """
    device = process.device.type
    if config.sharding.plan:
        plan = read_plan(Path(config.sharding.plan))
        check_plan(
            plan, schema, world_size=process.world_size, device=device, source=str(config.sharding.plan)
        )
        return plan
    machine = (process.world_size, process.local_world_size, device)
    batch_size_per_rank = -(-config.data.batch_size // process.world_size)
    return make_plan(collections, schema, config.sharding, machine, batch_size_per_rank)


def schema_with_wide(config: ModelConfig, schema: Schema) -> Schema:
    """Add a table of one weight per id for each field, where the model has a wide part; else return the schema."""
    if not needs_wide(config):
        return schema
    return replace(schema, tables=(*schema.tables, *wide_tables(schema.tables)))


def cooperation(config: ModelConfig) -> tuple[CoteachingConfig, DifferentiationConfig]:
    """The cooperation losses of a model; models without branches ignore them."""
    return config.mbcnet.coteaching, config.mbcnet.differentiation


def build(config: RunConfig, schema: Schema, process: Process, plan: Plan | None = None) -> Built:
    """Build, plan, shard and initialise a model; equal on every world size and plan for the same config.

    Args:
        config: of the run.
        schema: fitted.
        process: this rank.
        plan: where tables live; None: as the config says.

    Raises:
        InputError: the schema, the model and the plan do not fit together.
    """
    tables_schema = schema_with_wide(config.model, schema)
    collections = build_collections(tables_schema)
    if plan is None:
        plan = choose_plan(config, tables_schema, process, collections)
    replicated = {name for name, table in plan.tables.items() if table.sharding_type == "data_parallel"}
    # from the schema without wide tables: a field's own table gives its width
    layout = replace(input_layout(schema), wide=needs_wide(config.model))
    torch.manual_seed(config.train.seed)  # dense weights: equal on all ranks
    arch = SparseArch(collections[EBC_PATH], collections.get(WEIGHTED_EBC_PATH), layout)
    model = build_model(config.model, arch, layout)
    objective = (
        DistillationObjective(model, config.model.enkd)  # type: ignore[arg-type]
        if config.model.kind == "enkd"
        else Objective(model, *cooperation(config.model), mean_over_ranks)  # type: ignore[arg-type]
    )
    sharding_plan = to_sharding_plan(plan, collections)
    fused = [
        parameter
        for collection in collections.values()
        for name, parameter in collection.named_parameters()
        if name.split(".")[-2] not in replicated
    ]
    fuse_table_optimizer(fused, config.optim.embedding)
    sharded = DistributedModelParallel(
        objective,
        env=ShardingEnv.from_process_group(torch.distributed.group.WORLD),  # type: ignore[arg-type]
        device=process.device,
        plan=sharding_plan,
        sharders=[AnyTypeSharder()],  # type: ignore[list-item]
    )
    tables = {
        name: name.split(".")[-2]
        for name in sharded.state_dict()
        if name.startswith((EBC_PATH, WEIGHTED_EBC_PATH)) and name.endswith(".weight")
    }
    initialise_tables(
        sharded.state_dict(), tables, seed=config.train.seed, std=config.optim.embedding.init_std
    )
    kept = {name for name, table in tables.items() if table in replicated}
    optimizer = build_optimizer(sharded, kept, config.optim)
    dense = [parameter for name, parameter in sharded.named_parameters() if name not in tables]
    return Built(sharded, optimizer, plan, model.branch_names, dense)  # type: ignore[arg-type]
