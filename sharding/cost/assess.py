"""What a plan costs on a cluster: bytes and seconds of every table and rank, balance, the critical path and what bounds it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from sharding.cost.estimate import Bytes, Room, ShardCost, Times, plus, table_costs
from sharding.plan.cluster import Cluster
from sharding.plan.placement import UNIFORM, Plan

PARTS = Times._fields
MAIN_PHASES = ("lookup", "output_dist", "dense", "gradient_dist", "update", "all_reduce")


@dataclass
class Rank:
    """What the tables cost one rank of a group."""

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
        """Seconds of the phases that follow one another."""
        return sum(getattr(self, phase) for phase in MAIN_PHASES)

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
    """What a plan costs."""

    plan: Plan
    cluster: Cluster
    costs: dict[str, list[ShardCost]]  # table -> costs of its shards
    ranks: list[Rank]  # of one group; replicas repeat them
    path: CriticalPath
    assumed: Sequence[str] = ()  # of a plan that was made just now: fields whose ids per row nobody measured

    @property
    def busiest(self) -> Rank:
        """The rank with most table time."""
        return max(self.ranks, key=lambda rank: rank.times.total)

    @property
    def bound(self) -> float:
        """Least seconds of the busiest rank however shards are assigned: max(mean load, U + max movable shard), U: of row_wise and data_parallel."""
        totals = {name: [shard.times.total for shard in shards] for name, shards in self.costs.items()}
        spread = [name for name, table in self.plan.tables.items() if table.sharding_type in UNIFORM]
        uniform = sum(min(totals[name]) for name in spread)
        everything = sum(seconds for shards in totals.values() for seconds in shards)
        movable = [max(shards) for name, shards in totals.items() if name not in spread]
        return max(everything / self.plan.group_size, uniform + max(movable, default=0.0))

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
        """Rows a second of all ranks together, at most."""
        rows = self.plan.batch_size_per_rank * self.plan.world_size
        return rows / self.path.step if self.path.step else 0.0

    def of_rank(self, rank: int) -> Rank:
        """Costs of a rank of the whole cluster: the ranks of a host belong to the replicas in turn."""
        return self.ranks[rank // self.plan.replicas]

    def memory(self, rank: Rank) -> Room:
        """HBM and DDR bytes of a rank with the dense part."""
        dense = self.plan.dense.memory_bytes(self.plan.batch_size_per_rank)
        if self.cluster.device == "cuda":
            return Room(rank.bytes.hbm + dense, rank.bytes.ddr)
        return Room(0, rank.bytes.ddr + dense)


def assess(plan: Plan, cluster: Cluster) -> Assessment:
    """Add up what a plan costs on a cluster, with the dense part that it was made for."""
    costs = {name: table_costs(table, plan, cluster) for name, table in plan.tables.items()}
    ranks = [Rank(number) for number in range(plan.group_size)]
    for name, shards in costs.items():
        for shard in shards:
            rank = ranks[shard.rank]
            rank.bytes, rank.times = plus(rank.bytes, shard.bytes), plus(rank.times, shard.times)
            rank.tables.append(name)
    dense, batch = plan.dense, plan.batch_size_per_rank
    slowest = {part: max(getattr(rank.times, part) for rank in ranks) for part in PARTS}
    seconds = dense.step_seconds(batch, cluster)
    # of the all-reduce, which starts with backward's first gradients: backward is two thirds of the work
    hidden = seconds * 2 / 3
    all_reduce = max(0.0, dense.all_reduce_seconds(cluster) - hidden)
    path = CriticalPath(**slowest, dense=seconds, all_reduce=all_reduce, decode=dense.decode_seconds(batch, cluster))
    return Assessment(plan, cluster, costs, ranks, path)
