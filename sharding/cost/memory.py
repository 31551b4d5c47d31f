"""How much memory tables may fill, and by how much they exceed it. Imports no torch."""

from dataclasses import dataclass

from data.errors import InputError
from sharding.cost.estimate import table_costs
from sharding.plan.cluster import GIB, Cluster
from sharding.plan.constraints import ShardingConfig
from sharding.plan.dense_part import DenseCost
from sharding.plan.plan_file import Plan, TablePlan

TABLES_NAMED = 3


class DoesNotFit(InputError):
    """No plan fits. `shortage` says by how much."""

    def __init__(self, message: str, shortage: "Shortage") -> None:
        super().__init__(message)
        self.shortage = shortage


@dataclass(frozen=True)
class Shortage:
    """What is missing.

    Attributes:
        memory: HBM or DDR.
        needed_bytes: of all tables on all ranks of a group in their smallest places.
        room_bytes: of all ranks of a group.
        rank_room_bytes: of one rank.
        tables: name -> bytes in its smallest place, largest first.
        too_large: tables of which one shard alone exceeds a rank -> bytes of that shard.
    """

    memory: str
    needed_bytes: int
    room_bytes: int
    rank_room_bytes: int
    tables: dict[str, int]
    too_large: dict[str, int]

    @property
    def missing_bytes(self) -> int:
        """Bytes by which the tables exceed the room: of all ranks together, else of the worst single shard."""
        whole = self.needed_bytes - self.room_bytes
        return (
            whole
            if whole > 0
            else max(self.too_large.values(), default=self.rank_room_bytes) - self.rank_room_bytes
        )

    def message(self, ranks: int) -> str:
        """One line: by how many bytes, and which tables."""
        largest = ", ".join(f"{name} {gib(size)}" for name, size in list(self.tables.items())[:TABLES_NAMED])
        if self.needed_bytes > self.room_bytes:
            return (
                f"no plan fits: tables need {gib(self.needed_bytes)} of {self.memory} and {ranks} ranks have "
                f"{gib(self.room_bytes)} for them ({gib(self.rank_room_bytes)} each), {self.missing_bytes:,} bytes short; "
                f"largest: {largest}"
            )
        if self.too_large:
            name, size = next(iter(self.too_large.items()))
            return (
                f"no plan fits: the smallest shard of table {name} takes {gib(size)} and a rank has "
                f"{gib(self.rank_room_bytes)} of {self.memory} for tables, {self.missing_bytes:,} bytes short"
            )
        return (
            f"no plan fits: tables need {gib(self.needed_bytes)} of {gib(self.room_bytes)} of {self.memory}, but whole tables do "
            f"not share out over {ranks} ranks of {gib(self.rank_room_bytes)}; largest: {largest}"
        )


def gib(size: float) -> str:
    """Bytes for people."""
    for unit, name in ((GIB, "GiB"), (2**20, "MiB")):
        if size >= 0.1 * unit:
            return f"{size / unit:,.1f} {name}"
    return f"{size / 1024:,.1f} KiB" if size else "0"


def room_for_tables(
    config: ShardingConfig, cluster: Cluster, dense: DenseCost, batch_size_per_rank: int
) -> tuple[int, int]:
    """HBM and DDR bytes of one rank that tables and their activations may fill.

    Raises:
        InputError: the dense part and the reserve leave nothing.
    """
    kept = 1 - config.storage_reserve
    hbm = int(kept * (config.hbm_gib * GIB or cluster.hbm_bytes)) if cluster.device == "cuda" else 0
    ddr = int(kept * (config.ddr_gib * GIB or cluster.ddr_bytes))
    used = dense.memory_bytes(batch_size_per_rank)
    left = (hbm - used, ddr) if cluster.device == "cuda" else (0, ddr - used)
    if min(left[0] if cluster.device == "cuda" else 1, left[1]) <= 0:
        memory = "HBM" if cluster.device == "cuda" else "DDR"
        raise InputError(
            f"{cluster}: the dense part takes {gib(used)} at {batch_size_per_rank:,} rows a rank, more than the "
            f"{gib(hbm if cluster.device == 'cuda' else ddr)} of {memory} that a rank may fill; lower --batch-size"
        )
    return left


def find_shortage(
    options: dict[str, list[TablePlan]], plan: Plan, cluster: Cluster, room: tuple[int, int]
) -> Shortage:
    """What is missing, each table in the place of its that takes least memory.

    Args:
        options: table -> candidates with ranks (any will do).
        plan: the workload.
        cluster: estimates.
        room: of a rank.
    """
    index = 4 if plan.device == "cuda" else 5  # Bytes.hbm, Bytes.ddr
    totals, too_large = {}, {}
    for name, places in options.items():
        sizes = []
        for place in places:
            shards = [cost.bytes[index] for cost in table_costs(place, plan, cluster)]
            sizes.append((sum(shards), max(shards)))
        totals[name] = min(sizes)[0]
        smallest = min(largest for _, largest in sizes)
        if smallest > room[index - 4]:
            too_large[name] = smallest
    by_size = dict(sorted(totals.items(), key=lambda pair: -pair[1]))
    return Shortage(
        "HBM" if plan.device == "cuda" else "DDR",
        sum(totals.values()),
        room[index - 4] * plan.group_size,
        room[index - 4],
        by_size,
        dict(sorted(too_large.items(), key=lambda pair: -pair[1])),
    )


def room_of(cluster: Cluster, reserve: float) -> tuple[int, int]:
    """HBM and DDR bytes of a rank less a share kept free.

    Raises:
        InputError: the share is none.
    """
    if not 0 <= reserve < 1:
        raise InputError(f"--reserve {reserve}: wanted a share in [0, 1); 0.1 is usual")
    return int(cluster.hbm_bytes * (1 - reserve)), int(cluster.ddr_bytes * (1 - reserve))
