"""EmbeddingShardingPlanner behind one door: collections, constraints and a machine -> Plan. Needs no process group and no GPU."""

import logging
from collections.abc import Mapping

from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError, Topology

from data.errors import InputError
from data.schema import Schema
from data.typed import unknown_key
from sharding.constraints import ShardingConfig, TableConstraint
from sharding.plan import AnyTypeSharder, Plan, TablePlan

GIB = 1024**3


def make_plan(
    collections: Mapping[str, nn.Module],
    schema: Schema,
    config: ShardingConfig,
    machine: tuple[int, int, str],
    batch_size_per_rank: int,
) -> Plan:
    """Choose a place for every table.

    Args:
        collections: module path -> EmbeddingBagCollection (meta device is enough).
        schema: names the tables.
        config: what is allowed.
        machine: world_size, local_world_size and device ("cpu" or "cuda").
        batch_size_per_rank: rows of one rank's batch.

    Raises:
        InputError: a constraint names no table, or nothing fits.
    """
    world_size, local_world_size, device = machine
    names = [table.name for table in schema.tables]
    for name in config.tables:
        if name not in names:
            raise InputError(unknown_key(f"sharding.tables.{name}", name, names))
    constraints = {
        name: ParameterConstraints(
            sharding_types=list(
                config.tables.get(name, TableConstraint()).sharding_types or config.sharding_types
            )
        )
        for name in names
    }
    logging.getLogger("torchrec.distributed.planner").setLevel(logging.ERROR)
    planner = EmbeddingShardingPlanner(
        topology=Topology(
            world_size=world_size,
            local_world_size=local_world_size,
            compute_device=device,
            hbm_cap=int(config.hbm_gib * GIB),
            ddr_cap=int(config.ddr_gib * GIB),
        ),
        batch_size=batch_size_per_rank,
        storage_reservation=FixedPercentageStorageReservation(0.0),
        constraints=constraints,
        timeout_seconds=60,
    )
    root = _Holder(collections)
    try:
        sharding = planner.plan(root, [AnyTypeSharder()])  # type: ignore[list-item]
    except (PlannerError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"sharding: no plan fits {world_size} ranks with {config.ddr_gib:g} GiB DDR and {config.hbm_gib:g} GiB HBM each ({reason}); "
            "allow row_wise, raise sharding.ddr_gib or hbm_gib, or use more ranks"
        ) from None
    tables: dict[str, TablePlan] = {}
    for module_plan in sharding.plan.values():
        for name, parameter in module_plan.items():  # type: ignore[attr-defined]
            ranks = () if parameter.sharding_type == "data_parallel" else tuple(parameter.ranks or ())
            tables[name] = TablePlan(parameter.sharding_type, parameter.compute_kernel, ranks)
    ordered = {name: tables[name] for name in names}
    return Plan(world_size, local_world_size, device, schema.fingerprint(), ordered)


class _Holder(nn.Module):
    """Carries the collections to the planner, which walks a module tree."""

    def __init__(self, collections: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.collections = nn.ModuleDict(
            {path.replace(".", "/"): module for path, module in collections.items()}
        )
