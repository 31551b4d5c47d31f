"""TorchRec's planner behind one function: what is to be planned -> Plan; and the smallest cluster for it. Needs no process group and no GPU.

TorchRec enumerates, proposes and partitions. Three things keep that quick and honest: candidates by size class (candidates.py), times
and bytes from estimate.py, which is also what reports show, and a last pass that moves tables off the busiest rank (balance.py).
"""

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.partitioners import GreedyPerfPartitioner, MemoryBalancedPartitioner
from torchrec.distributed.planner.perf_models import NoopPerfModel
from torchrec.distributed.planner.proposers import GreedyProposer
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import Perf, PlannerError, ShardEstimator, ShardingOption, Storage
from torchrec.distributed.types import ParameterSharding

from data.errors import InputError
from sharding.bridge.collections import meta_collections
from sharding.bridge.sharder import AnyTypeSharder, SequenceSharder
from sharding.cost.assess import Assessment, assess
from sharding.cost.estimate import find_shortage, table_costs
from sharding.plan.cluster import MAX_RANKS, Cluster
from sharding.plan.placement import UNIFORM, Options, Plan, TablePlan, check_shape, device_problem
from sharding.search.balance import Balance
from sharding.search.candidates import Progress, Task, all_options, assumed_fields, check_constraints

MOST_HOSTS = 4096  # of a search for the smallest cluster
PROPOSALS_WITHOUT_GAIN = 20  # after which a greedy search ends
MILLISECONDS = 1e3
Constraints = dict[str, ParameterConstraints]


def make_plan(task: Task, progress: Progress | None = None, rebalance: bool = True) -> Plan:
    """Place every table, as TorchRec does without `rebalance`; InputError if a constraint names none, DoesNotFit if nothing fits."""
    check_constraints(task)
    plan, room, options = task.empty_plan(), task.room(), all_options(task)
    shortage = find_shortage(options, plan, task.cluster, room)
    if shortage.is_certain:
        raise shortage
    start = time.monotonic()
    try:
        tables = _search(task, plan, options, progress)
    except (PlannerError, RuntimeError):
        raise shortage from None
    versions = {}
    for name in ("mbcnet-rec", "torch", "torchrec"):
        with suppress(PackageNotFoundError):  # a checkout need not be installed
            versions[name] = version(name)
    plan = replace(plan, tables={name: tables[name] for name in options}, versions=versions)
    if rebalance:
        left = max(1.0, task.config.search_seconds - (time.monotonic() - start))
        pinned = {name: set(each.ranks) for name, each in task.config.tables.items() if each.ranks}
        plan = Balance(plan, task.cluster, options, pinned, room).improved(left)
    check_shape(plan, "sharding.")
    return plan


def solve(task: Task, progress: Progress | None = None) -> Assessment:
    """Plan and assess; DoesNotFit if nothing fits."""
    return replace(assess(make_plan(task, progress), task.cluster), assumed=assumed_fields(task.schema, task.config))


def smallest_cluster(task: Task, headroom: float, say: Callable[[str], None] = lambda line: None) -> Assessment:
    """The fewest devices that fit: parts of one host, then whole hosts. The task's cluster says the kind of host, not how many.

    `headroom`: share of each device's memory to leave free, in place of the config's reserve. `say` is told each size that is tried.
    """
    if problem := device_problem(task.empty_plan()):  # on every size
        raise InputError(f"sharding.{problem}")
    devices, config = task.cluster.devices_per_host, replace(task.config, storage_reserve=headroom)

    def attempt(hosts: int, devices: int) -> Assessment | InputError:
        cluster = task.cluster.resized(hosts, devices)
        say(f"trying: {cluster}")
        try:
            return solve(replace(task, config=config, cluster=cluster))
        except InputError as error:
            return error

    powers = [1 << power for power in range(MOST_HOSTS.bit_length())]
    sizes = [(1, count) for count in powers if count < devices]
    sizes += [(hosts, devices) for hosts in powers if hosts * devices <= MAX_RANKS]
    for high, count in sizes:
        if isinstance(found := attempt(high, count), Assessment):
            break
    else:
        raise InputError(f"no cluster of {task.cluster.name} up to {high} hosts fits: {found}")
    low = high // 2  # so many hosts do not fit
    while high - low > 1:
        middle = (low + high) // 2
        smaller = attempt(middle, devices)
        if isinstance(smaller, InputError):
            low = middle
        else:
            found, high = smaller, middle
    return found


def _search(task: Task, plan: Plan, options: Options, progress: Progress | None) -> dict[str, TablePlan]:
    """Let TorchRec choose among the candidates: table -> its placement with ranks."""
    logging.getLogger("torchrec.distributed.planner").setLevel(logging.ERROR)
    config, room = task.config, task.room()
    local = plan.local_group_size
    topology = Topology(plan.group_size, plan.device, room.hbm, room.ddr, ssd_cap=0, local_world_size=local)
    constraints = {name: _torchrec_constraints(each) for name, each in options.items()}
    estimators = [_Estimator(options, plan, task.cluster)]
    greedy = partial(GreedyProposer, threshold=PROPOSALS_WITHOUT_GAIN)
    balanced = config.partitioner == "memory_balanced"
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=plan.batch_size_per_rank,
        enumerator=Ordered(topology, plan.batch_size_per_rank, constraints, estimators),
        storage_reservation=FixedPercentageStorageReservation(0.0),
        proposer=[greedy(use_depth=name == "greedy") for name in config.proposers],
        partitioner=MemoryBalancedPartitioner() if balanced else GreedyPerfPartitioner(),
        performance_model=_Watched(topology, progress),
        stats=[],  # TorchRec's own statistics take longer than the search
        constraints=constraints,
        timeout_seconds=max(1, int(config.search_seconds)),
    )
    collections = meta_collections(task.schema, config.data_type)
    tables = nn.ModuleDict({each.name: module for each, module in collections.items()})
    chosen = planner.plan(tables, [AnyTypeSharder(), SequenceSharder()])  # type: ignore[list-item]
    return {
        name: _with_ranks(parameter, options[name], config.of(name).ranks)
        for module_plan in chosen.plan.values()
        for name, parameter in module_plan.items()  # type: ignore[attr-defined]
    }


def _torchrec_constraints(options: list[TablePlan]) -> ParameterConstraints:
    first = options[0]
    by_column = (each for each in options if each.sharding_type == "column_wise")
    columns = (each.embedding_dim // len(each.ranks) for each in by_column)
    return ParameterConstraints(
        sharding_types=list(dict.fromkeys(each.sharding_type for each in options)),
        compute_kernels=list(dict.fromkeys(each.compute_kernel for each in options)),
        min_partition=next(columns, None),
        pooling_factors=[first.ids / first.bags] * first.bags,
    )


def _with_ranks(parameter: ParameterSharding, options: list[TablePlan], allowed: tuple[int, ...]) -> TablePlan:
    """Our form of what TorchRec chose."""
    option, ranks = _match(parameter, options), tuple(parameter.ranks or ())
    misplaced = len(set(ranks)) < len(ranks) or (allowed and not set(ranks) <= set(allowed))
    if option.sharding_type in UNIFORM:
        ranks = ()
    elif option.sharding_type == "column_wise" and misplaced:
        ranks = tuple(allowed or option.ranks)[: len(ranks)]
    return replace(option, ranks=ranks)


def _match(chosen: ShardingOption | ParameterSharding, options: list[TablePlan]) -> TablePlan:
    wanted = (chosen.sharding_type, chosen.compute_kernel)
    return next(each for each in options if (each.sharding_type, each.compute_kernel) == wanted)


class _Estimator(ShardEstimator):
    """estimate.py for TorchRec's enumerator."""

    def __init__(self, options: Options, plan: Plan, cluster: Cluster) -> None:
        self.options, self.plan, self.cluster = options, plan, cluster

    def estimate(self, sharding_options: list[ShardingOption], sharder_data_map: Any = None) -> None:
        """Fill in every shard's time and bytes."""
        for option in sharding_options:
            placed = _match(option, self.options[option.name])
            for shard, cost in zip(option.shards, table_costs(placed, self.plan, self.cluster), strict=True):
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

    def __init__(self, topology: Topology, batch_size: int, wanted: Constraints, estimators: Any) -> None:
        super().__init__(topology, batch_size, wanted, estimators)
        self.wanted = wanted

    def enumerate(self, module: nn.Module, sharders: list[Any]) -> list[ShardingOption]:
        """List the options of every table."""
        options = super().enumerate(module, sharders)
        tables = {name: index for index, name in enumerate(dict.fromkeys(each.name for each in options))}

        def order(option: ShardingOption) -> tuple[int, int, int]:
            types, kernels = self.wanted[option.name].sharding_types, self.wanted[option.name].compute_kernels
            kind, kernel = option.sharding_type, option.compute_kernel
            return tables[option.name], (types or []).index(kind), (kernels or []).index(kernel)

        return sorted(options, key=order)


class _Watched(NoopPerfModel):
    """Rates a plan by its busiest rank and reports progress."""

    def __init__(self, topology: Topology, progress: Progress | None) -> None:
        super().__init__(topology)
        self.progress, self.proposals, self.best = progress, 0, float("inf")

    def rate(self, plan: list[ShardingOption]) -> float:
        """Return the milliseconds of the busiest rank."""
        rating = super().rate(plan)
        self.proposals, self.best = self.proposals + 1, min(self.best, rating)
        if self.progress:
            self.progress(self.proposals, self.best)
        return rating
