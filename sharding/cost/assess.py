"""A plan on a cluster: bytes and seconds of every table and rank, balance, the critical path and what bounds it. Imports no torch."""

from dataclasses import dataclass, field

from sharding.cost.estimate import Bytes, ShardCost, Times, add_bytes, add_times, table_costs
from sharding.plan.cluster import Cluster
from sharding.plan.dense_part import DenseCost
from sharding.plan.plan_file import Plan, TablePlan

PARTS = Times._fields


@dataclass
class Rank:
    """One rank of a group."""

    rank: int
    bytes: Bytes = Bytes()
    times: Times = Times()
    tables: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class CriticalPath:
    """Seconds of one step. Collectives end each phase, so a phase lasts as long as its slowest rank.

    step = max(lookup + output_dist + dense + gradient_dist + update + exposed all-reduce, input_dist, decode): the last two run
    beside the step before.
    """

    input_dist: float
    lookup: float
    output_dist: float
    dense: float
    gradient_dist: float
    update: float
    all_reduce: float
    decode: float

    @property
    def main(self) -> float:
        """What follows one after the other."""
        return (
            self.lookup + self.output_dist + self.dense + self.gradient_dist + self.update + self.all_reduce
        )

    @property
    def step(self) -> float:
        """Seconds from one step to the next."""
        return max(self.main, self.input_dist, self.decode)

    @property
    def bound_by(self) -> str:
        """The resource that takes most of the step: compute, memory, network or input."""
        if self.step > self.main:
            return "input" if self.decode >= self.input_dist else "network"
        shares = {
            "compute": self.dense,
            "memory": self.lookup + self.update,
            "network": self.output_dist + self.gradient_dist + self.all_reduce,
        }
        return max(shares, key=lambda name: shares[name])


@dataclass(frozen=True)
class Assessment:
    """What a plan costs.

    Attributes:
        plan, cluster, dense: what was assessed.
        costs: table -> its shards.
        ranks: of one group; replicas repeat them.
        path: the critical path.
        bound: least possible load in seconds of the busiest rank, for these sharding types (see `lower_bound`).
    """

    plan: Plan
    cluster: Cluster
    dense: DenseCost
    costs: dict[str, list[ShardCost]]
    ranks: list[Rank]
    path: CriticalPath
    bound: float

    @property
    def busiest(self) -> Rank:
        """The rank with most table time."""
        return max(self.ranks, key=lambda rank: rank.times.total)

    @property
    def balance(self) -> float:
        """Mean over largest table time of a rank: 1 is perfect."""
        largest = self.busiest.times.total
        return sum(rank.times.total for rank in self.ranks) / len(self.ranks) / largest if largest else 1.0

    @property
    def over_bound(self) -> float:
        """By which share the busiest rank is above the lower bound."""
        return self.busiest.times.total / self.bound - 1 if self.bound else 0.0

    @property
    def samples_per_second(self) -> float:
        """Of all ranks together."""
        return (
            self.plan.batch_size_per_rank * self.plan.world_size / self.path.step if self.path.step else 0.0
        )

    def of_rank(self, rank: int) -> Rank:
        """Costs of a rank of the whole cluster: the ranks of a host are dealt to the replicas in turn."""
        return self.ranks[rank // self.plan.replicas]

    def memory(self, rank: Rank) -> tuple[int, int]:
        """HBM and DDR bytes of a rank with the dense part."""
        dense = self.dense.memory_bytes(self.plan.batch_size_per_rank)
        if self.cluster.device == "cuda":
            return rank.bytes.hbm + dense, rank.bytes.ddr
        return 0, rank.bytes.ddr + dense


def lower_bound(plan: Plan, costs: dict[str, list[ShardCost]]) -> float:
    """Least seconds of the busiest rank over all ways to deal these shards to ranks.

    bound = max(mean load, U + max of a movable shard), U: the load that row_wise and data_parallel tables put on every rank.
    """
    spread = {
        name for name, table in plan.tables.items() if table.sharding_type in ("row_wise", "data_parallel")
    }
    uniform = sum(min(shard.times.total for shard in costs[name]) for name in spread)
    everything = sum(shard.times.total for shards in costs.values() for shard in shards)
    movable = [shard.times.total for name, shards in costs.items() if name not in spread for shard in shards]
    return max(everything / plan.group_size, uniform + max(movable, default=0.0))


def search_bound(options: dict[str, list[TablePlan]], plan: Plan, cluster: Cluster) -> float:
    """Least seconds of the busiest rank over all plans made of these candidates, however they are dealt out.

    bound = max(sum over tables of the least total / ranks, max over tables of the least largest shard)
    """
    everything, largest = 0.0, 0.0
    for places in options.values():
        costs = [[shard.times.total for shard in table_costs(place, plan, cluster)] for place in places]
        everything += min(sum(shards) for shards in costs)
        largest = max(largest, min(max(shards) for shards in costs))
    return max(everything / plan.group_size, largest)


def assess(plan: Plan, cluster: Cluster, dense: DenseCost | None = None) -> Assessment:
    """Add up what a plan costs on a cluster, with the dense part: the given one, else the plan's."""
    dense = dense or plan.dense
    costs = {name: table_costs(table, plan, cluster) for name, table in plan.tables.items()}
    ranks = [Rank(number) for number in range(plan.group_size)]
    for name, shards in costs.items():
        for shard in shards:
            rank = ranks[shard.rank]
            rank.bytes = add_bytes(rank.bytes, shard.bytes)
            rank.times = add_times(rank.times, shard.times)
            rank.tables.append(name)
    return Assessment(
        plan, cluster, dense, costs, ranks, _path(plan, cluster, dense, ranks), lower_bound(plan, costs)
    )


def _path(plan: Plan, cluster: Cluster, dense: DenseCost, ranks: list[Rank]) -> CriticalPath:
    batch = plan.batch_size_per_rank
    slowest = Times(*(max(rank.times[index] for rank in ranks) for index in range(len(PARTS))))
    seconds = dense.step_seconds(batch, cluster)
    hidden = (
        seconds * 2 / 3
    )  # the all-reduce starts with the first gradients of the backward pass, two thirds of the work
    return CriticalPath(
        slowest.input_dist,
        slowest.lookup,
        slowest.output_dist,
        seconds,
        slowest.gradient_dist,
        slowest.update,
        max(0.0, dense.all_reduce_seconds(cluster) - hidden),
        dense.decode_seconds(batch, cluster),
    )


def shortage(assessment: Assessment, room: tuple[int, int]) -> tuple[int, int]:
    """Largest excess in bytes of a rank over the room for (HBM, DDR); 0 where all fit."""
    over = [0, 0]
    for rank in assessment.ranks:
        for index, used in enumerate(assessment.memory(rank)):
            over[index] = max(over[index], used - room[index])
    return over[0], over[1]
