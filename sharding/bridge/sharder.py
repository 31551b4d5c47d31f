"""Plan -> TorchRec: the sharder that offers what was seen to work, and the ShardingPlan for a model's collections."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    data_parallel,
    row_wise,
    table_row_wise,
    table_wise,
)
from torchrec.distributed.types import CacheParams, ShardingPlan
from torchrec.modules.embedding_modules import EmbeddingCollection

from sharding.bridge.zch import EMBEDDING_MODULE, CollisionSharder
from sharding.plan.placement import SEQUENCE_TYPES, SHARDING_TYPES, Plan, TablePlan


class AnyTypeSharder(EmbeddingBagCollectionSharder):
    """TorchRec's sharder, offering on a CPU every type that was seen to run there with right results.

    The stock one hides row-wise types on a CPU although they work (compared with unsharded tables in tests), and offers kernels for
    data-parallel tables that fail. Grid shards are left out: with mean pooling TorchRec divides wrongly and says nothing.
    """

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Return the types a plan may use."""
        return list(SHARDING_TYPES)

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        """Return the kernels of a type: dense where tables are replicated, else fused (optimizer in backward)."""
        if sharding_type == "data_parallel":
            return ["dense"]
        return ["fused"] if compute_device_type == "cpu" else ["fused", "fused_uvm", "fused_uvm_caching"]


class SequenceSharder(EmbeddingCollectionSharder):
    """The same for tables that sequences read. Grid and host-wise shards raise on a CPU, and replicated tables are not offered."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Return the types a plan may use."""
        return list(SEQUENCE_TYPES)

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        """Return the one kernel."""
        return ["fused"]


def sharders_of(plan: Plan, *, seed: int = 0, std: float = 0.0) -> list[Any]:
    """The sharders that send pooled rows and gradients in the plan's precisions. gloo has no bf16: TorchRec takes fp16 there instead.

    `seed` is the run's, `std` the standard deviation of the values of rows that are given to another id (encoding zch).
    """
    registry = None
    if not plan.forward_precision == plan.backward_precision == "fp32":
        forward, backward = (CommType[each.upper()] for each in (plan.forward_precision, plan.backward_precision))
        precisions = QCommsConfig(forward, backward)
        registry = get_qcomm_codecs_registry(precisions, device=torch.device(plan.device))
    sharders: list[Any] = [AnyTypeSharder(qcomm_codecs_registry=registry)]
    if any(table.positions for table in plan.tables.values()):
        sharders.append(SequenceSharder(qcomm_codecs_registry=registry))
    if any(table.zch_buckets for table in plan.tables.values()):
        sharders.append(CollisionSharder(AnyTypeSharder(qcomm_codecs_registry=registry), seed, std))
    return sharders


def to_sharding_plan(plan: Plan, collections: Mapping[str, nn.Module]) -> ShardingPlan:
    """Build TorchRec's plan for collections, also with managed collision before them, at these module paths."""
    result = {}
    for path, collection in collections.items():
        rows: Any = getattr(collection, EMBEDDING_MODULE, collection)
        unpooled = isinstance(rows, EmbeddingCollection)
        configs = rows.embedding_configs() if unpooled else rows.embedding_bag_configs()
        generators = {config.name: _generator(plan.tables[config.name], plan) for config in configs}
        sharder: Any = SequenceSharder() if unpooled else AnyTypeSharder()
        if rows is not collection:
            sharder = CollisionSharder(sharder)
        result[path] = construct_module_sharding_plan(
            collection, generators, sharder, plan.local_group_size, plan.group_size, plan.device
        )
    return ShardingPlan(result)


def _generator(table: TablePlan, plan: Plan) -> Any:
    """TorchRec's way to say the same: a function that makes a ParameterSharding of a parameter."""
    kernel = table.compute_kernel
    match table.sharding_type:
        case "data_parallel":
            return data_parallel()
        case "table_wise":
            generate = table_wise(rank=table.ranks[0], compute_kernel=kernel)
        case "row_wise":
            generate = row_wise(compute_kernel=kernel)
        case "table_row_wise":
            generate = table_row_wise(host_index=table.ranks[0] // plan.local_group_size)
        case _:
            generate = column_wise(ranks=list(table.ranks), compute_kernel=kernel)

    def finished(*args: Any) -> Any:
        sharding = generate(*args)
        sharding.compute_kernel = kernel  # table_row_wise takes none
        if kernel == "fused_uvm_caching":
            sharding.cache_params = CacheParams(load_factor=table.cache_ratio, prefetch_pipeline=plan.prefetch)
        return sharding

    return finished


def placed_differences(plan: Plan, model: nn.Module) -> list[str]:
    """How a sharded model differs from the plan it was made by, one phrase a table; empty if it keeps to it to the letter."""
    held: dict[str, Any] = {}
    for module in model.modules():
        held.update(getattr(module, "module_sharding_plan", None) or {})
    lines = []
    for name, table in plan.tables.items():
        if name not in held:
            lines.append(f"{name}: planned, but in no sharded collection")
            continue
        found = held[name]
        pairs = [(key, getattr(table, key), getattr(found, key)) for key in ("sharding_type", "compute_kernel")]
        if table.ranks and plan.replicas == 1:  # a group's ranks are numbered anew
            pairs.append(("ranks", list(table.ranks), list(found.ranks or ())))
        changed = [f"{key} {planned} -> {real}" for key, planned, real in pairs if planned != real]
        if changed:
            lines.append(f"{name}: {', '.join(changed)}")
    return lines + [f"{name}: sharded, but not planned" for name in held if name not in plan.tables]
