"""The plan file: which table lives where, as JSON that a person can review; and its way into a TorchRec ShardingPlan."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    data_parallel,
    row_wise,
    table_row_wise,
    table_wise,
)
from torchrec.distributed.types import ShardingPlan, ShardingType

from data.errors import InputError
from data.schema import Schema
from data.typed import parse_dataclass

SHARDING_TYPES = ("data_parallel", "table_wise", "row_wise", "table_row_wise", "column_wise")


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
        if compute_device_type != "cpu":
            return super().compute_kernels(sharding_type, compute_device_type)
        return ["dense"] if sharding_type == ShardingType.DATA_PARALLEL.value else ["fused"]


@dataclass(frozen=True)
class TablePlan:
    """Where one table lives.

    Attributes:
        sharding_type: data_parallel, table_wise, row_wise, table_row_wise or column_wise.
        compute_kernel: fused, fused_uvm, fused_uvm_caching, or dense for data_parallel.
        ranks: the rank of each shard, in shard order; empty for data_parallel.
    """

    sharding_type: str
    compute_kernel: str
    ranks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A sharding plan keyed by table, with what it was made for.

    Attributes:
        world_size: ranks.
        local_world_size: ranks of one host.
        device: cpu or cuda.
        schema: fingerprint of the schema.
        tables: table name -> its place.
    """

    world_size: int
    local_world_size: int
    device: str
    schema: str
    tables: dict[str, TablePlan]


def write_plan(plan: Plan, path: Path) -> None:
    """Write a plan as JSON, one line a table."""
    head = {key: value for key, value in asdict(plan).items() if key != "tables"}
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    tables = [f"    {json.dumps(name)}: {json.dumps(asdict(table))}" for name, table in plan.tables.items()]
    path.write_text("{\n" + "\n".join(lines) + '\n  "tables": {\n' + ",\n".join(tables) + "\n  }\n}\n")


def read_plan(path: Path) -> Plan:
    """Read a plan file.

    Raises:
        InputError: no such file, not JSON, or not a plan.
    """
    try:
        table: Any = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except ValueError as error:
        raise InputError(
            f"{path}: not JSON ({error}); let `mbcnet train` write a new plan by leaving sharding.plan empty"
        ) from None
    return parse_dataclass(Plan, table, str(path))


def check_plan(plan: Plan, schema: Schema, *, world_size: int, device: str, source: str) -> None:
    """Refuse a plan that was made for another world size, schema or device, or that the platform computes wrongly.

    Raises:
        InputError: naming the plan, the table or key, the value and the mend.
    """
    mend = "plan again by leaving sharding.plan empty"
    if plan.world_size != world_size:
        raise InputError(
            f"{source}: world_size = {plan.world_size}, but this run has {world_size} ranks; use -j 1x{plan.world_size}, or {mend}"
        )
    if plan.device != device:
        raise InputError(f"{source}: device = {plan.device!r}, but this run computes on {device!r}; {mend}")
    names = {table.name for table in schema.tables}
    missing, extra = sorted(names - set(plan.tables)), sorted(set(plan.tables) - names)
    if missing or extra:
        raise InputError(
            f"{source}: tables not planned: {missing or 'none'}; tables not in the schema: {extra or 'none'}; {mend}"
        )
    if plan.schema != schema.fingerprint():
        raise InputError(
            f"{source}: made for schema {plan.schema}, this one is {schema.fingerprint()} (sizes or fields differ); {mend}"
        )
    for name, table in plan.tables.items():
        _check_table(table, name, plan, source)


def _check_table(table: TablePlan, name: str, plan: Plan, source: str) -> None:
    where = f"{source}: tables.{name}"
    if table.sharding_type == ShardingType.GRID_SHARD.value:
        raise InputError(
            f"{where}: grid_shard with mean pooling is computed wrongly by TorchRec; use table_row_wise or column_wise"
        )
    if table.sharding_type not in SHARDING_TYPES:
        raise InputError(
            f"{where}.sharding_type = {table.sharding_type!r}: wanted one of {', '.join(SHARDING_TYPES)}"
        )
    replicated = table.sharding_type == ShardingType.DATA_PARALLEL.value
    if replicated != (table.compute_kernel == "dense"):
        wanted = "dense" if replicated else "fused"
        raise InputError(
            f"{where}.compute_kernel = {table.compute_kernel!r}: {table.sharding_type} wants {wanted!r}; change it"
        )
    bad = [rank for rank in table.ranks if not 0 <= rank < plan.world_size]
    if bad or (not replicated and not table.ranks):
        raise InputError(
            f"{where}.ranks = {list(table.ranks)}: wanted ranks in [0, {plan.world_size}); change them"
        )


def to_sharding_plan(plan: Plan, collections: Mapping[str, nn.Module]) -> ShardingPlan:
    """Build TorchRec's plan for the EmbeddingBagCollections at the given module paths.

    Args:
        plan: where each table lives.
        collections: module path inside the model -> EmbeddingBagCollection.
    """
    result = {}
    for path, collection in collections.items():
        generators = {
            config.name: _generator(plan.tables[config.name], plan)
            for config in collection.embedding_bag_configs()  # type: ignore[operator]
        }
        sharder: Any = AnyTypeSharder()
        result[path] = construct_module_sharding_plan(
            collection,
            generators,
            sharder=sharder,
            local_size=plan.local_world_size,
            world_size=plan.world_size,
            device_type=plan.device,
        )
    return ShardingPlan(result)


def _generator(table: TablePlan, plan: Plan) -> Any:
    kernel = table.compute_kernel
    if table.sharding_type == "data_parallel":
        return data_parallel()
    if table.sharding_type == "table_wise":
        return table_wise(rank=table.ranks[0], compute_kernel=kernel)
    if table.sharding_type == "row_wise":
        return row_wise(compute_kernel=kernel)
    if table.sharding_type == "table_row_wise":
        return table_row_wise(host_index=table.ranks[0] // plan.local_world_size)
    return column_wise(ranks=list(table.ranks), compute_kernel=kernel)
