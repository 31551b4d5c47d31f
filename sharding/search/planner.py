"""EmbeddingShardingPlanner behind one door: collections, constraints and a machine -> Plan. Needs no process group and no GPU.

TorchRec enumerates, proposes and partitions. Three things keep that quick and honest: candidates by size class (candidates.py), times
and bytes from estimate.py, which is also what reports show, and a last pass that moves tables off the busiest rank (balance.py).
"""

import importlib.metadata
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.partitioners import GreedyPerfPartitioner, MemoryBalancedPartitioner
from torchrec.distributed.planner.perf_models import NoopPerfModel
from torchrec.distributed.planner.proposers import DynamicProgrammingProposer, GreedyProposer
from torchrec.distributed.planner.shard_estimators import EmbeddingPerfEstimator
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    HardwareConfig,
    KernelConfig,
    ParameterConstraints,
    Perf,
    PlannerError,
    ShardEstimator,
    ShardingOption,
    Stats,
    Storage,
    Topology,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.types import ParameterSharding

from data.errors import InputError
from data.schema import Schema
from sharding.bridge.collections import meta_collections
from sharding.bridge.sharder import AnyTypeSharder
from sharding.cost.estimate import table_costs
from sharding.cost.memory import DoesNotFit, find_shortage, room_for_tables
from sharding.plan.cluster import Cluster, default_cluster, read_cluster
from sharding.plan.constraints import ShardingConfig, TableConstraint
from sharding.plan.dense_part import DenseCost
from sharding.plan.plan_file import Plan, TablePlan, check_shape
from sharding.search.balance import rebalanced
from sharding.search.candidates import all_options, check_constraints, empty_plan

PATIENCE = 20  # proposals without a better plan after which a greedy search ends
DYNAMIC_BINS = 100
MILLISECONDS = 1e3
Progress = Callable[
    [int, float, float], None
]  # proposals that were dealt out, best milliseconds, seconds spent


def make_plan(
    collections: Mapping[str, nn.Module],
    schema: Schema,
    config: ShardingConfig,
    machine: tuple[int, int, str],
    batch_size_per_rank: int,
    *,
    cluster: Cluster | None = None,
    optimizer: str = "rowwise_adagrad",
    dense: DenseCost | None = None,
    progress: Progress | None = None,
    rebalance: bool = True,
) -> Plan:
    """Choose a place for every table.

    Args:
        collections: module path -> EmbeddingBagCollection (meta device is enough).
        schema: names the tables.
        config: what is allowed.
        machine: world_size, local_world_size and device ("cpu" or "cuda").
        batch_size_per_rank: rows of one rank's batch.
        cluster: figures of the machine; None: those that the config names, else the defaults for the device.
        optimizer: of the tables; its state is counted.
        dense: the rest of the model, whose memory is set aside.
        progress: called after every proposal.
        rebalance: whether tables are moved off the busiest rank at the end; without it TorchRec's plan is returned as it is.

    Raises:
        InputError: a constraint names no table, or the machine is not the config's cluster.
        DoesNotFit: nothing fits.
    """
    cluster = cluster or cluster_of(config, machine)
    dense = dense or DenseCost()
    plan = empty_plan(config, schema, cluster, batch_size_per_rank, optimizer, dense)
    check_constraints(config, schema, plan)
    room = room_for_tables(config, cluster, dense, batch_size_per_rank)
    options = all_options(schema, config, plan, room[0] if cluster.device == "cuda" else room[1])
    shortage = find_shortage(options, plan, cluster, room)
    if shortage.needed_bytes > shortage.room_bytes or shortage.too_large:
        raise DoesNotFit(shortage.message(plan.group_size), shortage)
    start = time.monotonic()
    try:
        tables = _search(collections, options, plan, config, cluster, room, progress)
    except (PlannerError, RuntimeError):
        raise DoesNotFit(shortage.message(plan.group_size), shortage) from None
    ordered = {table.name: tables[table.name] for table in schema.tables}
    plan = replace(plan, tables=ordered, versions=_versions())
    left = max(1.0, config.search_seconds - (time.monotonic() - start))
    if rebalance:
        plan = rebalanced(plan, cluster, options, config.tables, room, left)
    check_shape(plan, "sharding")
    return plan


def plan_schema(
    schema: Schema, config: ShardingConfig, cluster: Cluster, batch_size_per_rank: int, **options: Any
) -> Plan:
    """Plan a schema's tables for a cluster; see `make_plan`."""
    machine = (cluster.world_size, cluster.devices_per_host, cluster.device)
    return make_plan(
        {each.name: module for each, module in meta_collections(schema, config.data_type).items()},
        schema,
        config,
        machine,
        batch_size_per_rank,
        cluster=cluster,
        **options,
    )


def cluster_of(config: ShardingConfig, machine: tuple[int, int, str]) -> Cluster:
    """The cluster a run is on: what its config names, in the run's size, else defaults for the device.

    Raises:
        InputError: the config names another kind of device.
    """
    world_size, local_world_size, device = machine
    if not config.cluster:
        return default_cluster(world_size, local_world_size, device)
    cluster = read_cluster(config.cluster).resized(max(1, world_size // local_world_size), local_world_size)
    if cluster.device != device:
        raise InputError(
            f"sharding.cluster = {config.cluster!r}: its device is {cluster.device!r}, but this run computes on {device!r}; "
            "name another cluster, or leave it empty"
        )
    return cluster


def topology_of(plan: Plan, cluster: Cluster, room: tuple[int, int]) -> Topology:
    """TorchRec's view of one group's ranks, with every bandwidth given (its defaults are of old GPUs). Bytes per millisecond."""
    per_ms = 1e9 / MILLISECONDS
    on_gpu = cluster.device == "cuda"
    host_memory = cluster.ddr_gb_per_second / cluster.devices_per_host
    hardware = HardwareConfig(
        hbm_cap_bytes=room[0],
        ddr_cap_bytes=room[1],
        ssd_cap_bytes=0,
        intra_host_bw=per_ms * cluster.nvlink_gb_per_second,
        inter_host_bw=per_ms * cluster.network_gb_per_second,
        hbm_mem_bw=per_ms * (cluster.hbm_gb_per_second if on_gpu else host_memory),
        ddr_mem_bw=per_ms * host_memory,
        hbm_to_ddr_mem_bw=per_ms * (cluster.host_link_gb_per_second if on_gpu else host_memory),
        ssd_mem_bw=per_ms,  # no table lives on a disk; TorchRec wants a number above 0
    )
    return TopologyFactory.create_topology(
        trainer_config=TrainerConfig(world_size=plan.group_size, local_world_size=plan.local_group_size),
        hardware_config=hardware,
        # without this flag the factory drops the bandwidths it is given and takes its own
        kernel_config=KernelConfig(compute_device=cluster.device, use_hardware_based_bandwidth=True),
    )


def _search(
    collections: Mapping[str, nn.Module],
    options: dict[str, list[TablePlan]],
    plan: Plan,
    config: ShardingConfig,
    cluster: Cluster,
    room: tuple[int, int],
    progress: Progress | None,
) -> dict[str, TablePlan]:
    """Let TorchRec choose among the candidates: table -> its place with ranks."""
    logging.getLogger("torchrec.distributed.planner").setLevel(logging.ERROR)
    topology = topology_of(plan, cluster, room)
    constraints = {name: _torchrec_constraints(places, plan) for name, places in options.items()}
    estimators: list[Any] = [_Estimator(options, plan, cluster)]
    if config.estimator == "torchrec":  # ours still says the bytes
        estimators.append(EmbeddingPerfEstimator(topology, constraints))
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=plan.batch_size_per_rank,
        enumerator=Ordered(topology, plan.batch_size_per_rank, constraints, estimators),
        storage_reservation=FixedPercentageStorageReservation(0.0),
        proposer=[_proposer(name, plan.group_size) for name in config.proposers],
        partitioner=MemoryBalancedPartitioner()
        if config.partitioner == "memory_balanced"
        else GreedyPerfPartitioner(),
        performance_model=_Watched(topology, progress),
        stats=[_Silent()],
        constraints=constraints,
        timeout_seconds=max(1, int(config.search_seconds)),
    )
    chosen = planner.plan(_Holder(collections), [AnyTypeSharder()])  # type: ignore[list-item]
    return {
        name: _with_ranks(name, parameter, options[name], config)
        for module_plan in chosen.plan.values()
        for name, parameter in module_plan.items()  # type: ignore[attr-defined]
    }


def _proposer(name: str, size: int) -> Any:
    match name:
        case "greedy":
            return GreedyProposer(threshold=PATIENCE)
        case "greedy_total":
            return GreedyProposer(use_depth=False, threshold=PATIENCE)
        case _:
            # its bins count over all devices, and so do its proposals: about 100 of them are enough
            return DynamicProgrammingProposer(hbm_bins_per_device=max(1, DYNAMIC_BINS // size))


def _torchrec_constraints(places: list[TablePlan], plan: Plan) -> ParameterConstraints:
    first = places[0]
    columns = [
        place.embedding_dim // len(place.ranks) for place in places if place.sharding_type == "column_wise"
    ]
    return ParameterConstraints(
        sharding_types=list(dict.fromkeys(place.sharding_type for place in places)),
        compute_kernels=list(dict.fromkeys(place.compute_kernel for place in places)),
        min_partition=columns[0] if columns else None,
        pooling_factors=[first.ids / first.bags] * first.bags,
    )


def _with_ranks(
    name: str, parameter: ParameterSharding, places: list[TablePlan], config: ShardingConfig
) -> TablePlan:
    """Our form of what TorchRec chose."""
    place = _match(parameter, places)
    if place.sharding_type in ("row_wise", "data_parallel"):
        return replace(place, ranks=())
    ranks = tuple(parameter.ranks or ())
    if place.sharding_type == "column_wise":
        allowed = config.tables.get(name, TableConstraint()).ranks
        if len(set(ranks)) < len(ranks) or (allowed and not set(ranks) <= set(allowed)):
            ranks = tuple(allowed or place.ranks)[: len(ranks)]
    return replace(place, ranks=ranks)


def _match(option: ShardingOption | ParameterSharding, places: list[TablePlan]) -> TablePlan:
    wanted = (option.sharding_type, option.compute_kernel)
    return next(place for place in places if (place.sharding_type, place.compute_kernel) == wanted)


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("mbcnet-rec", "torch", "torchrec")}


class _Estimator(ShardEstimator):
    """estimate.py for TorchRec's enumerator."""

    def __init__(self, options: dict[str, list[TablePlan]], plan: Plan, cluster: Cluster) -> None:
        self.options, self.plan, self.cluster = options, plan, cluster

    def estimate(self, sharding_options: list[ShardingOption], sharder_data_map: Any = None) -> None:
        """Fill in every shard's time and bytes."""
        for option in sharding_options:
            place = _match(option, self.options[option.name])
            for shard, cost in zip(option.shards, table_costs(place, self.plan, self.cluster), strict=True):
                times = cost.times
                shard.perf = Perf(
                    fwd_compute=MILLISECONDS * times.lookup,
                    fwd_comms=MILLISECONDS * times.output_dist,
                    bwd_compute=MILLISECONDS * times.update,
                    bwd_comms=MILLISECONDS * times.gradient_dist,
                    input_dist_comms=MILLISECONDS * times.input_dist,
                )
                shard.storage = Storage(hbm=cost.bytes.hbm, ddr=cost.bytes.ddr)


class Ordered(EmbeddingEnumerator):
    """Options in the constraints' order. TorchRec's is that of a set of strings, another one in each process, and ties go to the first."""

    def _filter_sharding_types(self, name: str, *args: Any) -> list[str]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._in_order(super()._filter_sharding_types(name, *args), name, "sharding_types")

    def _filter_compute_kernels(self, name: str, *args: Any) -> list[str]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._in_order(super()._filter_compute_kernels(name, *args), name, "compute_kernels")

    def _in_order(self, found: list[str], name: str, key: str) -> list[str]:
        wanted = getattr((self._constraints or {}).get(name), key, None) or sorted(found)
        return [each for each in wanted if each in found]


class _Watched(NoopPerfModel):
    """Rates a plan by its busiest rank and tells how far the search is."""

    def __init__(self, topology: Topology, progress: Progress | None) -> None:
        super().__init__(topology)
        self.progress, self.proposals, self.best, self.start = progress, 0, float("inf"), time.monotonic()

    def rate(self, plan: list[ShardingOption]) -> float:
        """Return the milliseconds of the busiest rank."""
        rating = super().rate(plan)
        self.proposals, self.best = self.proposals + 1, min(self.best, rating)
        if self.progress:
            self.progress(self.proposals, self.best, time.monotonic() - self.start)
        return rating


class _Silent(Stats):
    """TorchRec's own statistics take longer than the search; report.py has ours."""

    def log(self, *args: Any, **kwargs: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Say nothing."""


class _Holder(nn.Module):
    """Carries the collections to the planner, which walks a module tree."""

    def __init__(self, collections: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.collections = nn.ModuleDict(
            {path.replace(".", "/"): module for path, module in collections.items()}
        )
