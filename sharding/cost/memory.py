"""By how much tables exceed the memory that they may fill."""

from collections.abc import Mapping
from dataclasses import dataclass

from data.errors import InputError
from sharding.cost.estimate import Room, least_costs
from sharding.plan.cluster import GIB, Cluster
from sharding.plan.placement import Plan, TablePlan

TABLES_NAMED = 3


class DoesNotFit(InputError):
    """No plan fits. `shortage` says by how much."""

    def __init__(self, shortage: "Shortage") -> None:
        super().__init__(shortage.message())
        self.shortage = shortage


@dataclass(frozen=True)
class Shortage:
    """How much memory the tables need and have, each table in its smallest placement."""

    memory: str  # HBM or DDR
    ranks: int  # of a group
    rank_room_bytes: int
    tables: dict[str, int]  # bytes over all ranks, largest first
    too_large: dict[
        str, int
    ]  # tables of which one shard alone exceeds a rank -> bytes of that shard, largest first

    @property
    def needed_bytes(self) -> int:
        """Bytes of all tables on all ranks of a group."""
        return sum(self.tables.values())

    @property
    def room_bytes(self) -> int:
        """Room of all ranks of a group."""
        return self.ranks * self.rank_room_bytes

    @property
    def is_certain(self) -> bool:
        """Whether no plan can fit, however the shards are shared out."""
        return self.needed_bytes > self.room_bytes or bool(self.too_large)

    def message(self) -> str:
        """One line: by how many bytes, which tables, and what may help."""
        memory, ranks, each = self.memory, self.ranks, gib(self.rank_room_bytes)
        needed, room = gib(self.needed_bytes), gib(self.room_bytes)
        largest = ", ".join(f"{name} {gib(size)}" for name, size in list(self.tables.items())[:TABLES_NAMED])
        if self.needed_bytes > self.room_bytes:
            missing = self.needed_bytes - self.room_bytes
            problem = (
                f"tables need {needed} of {memory} and {ranks} ranks have {room} for them ({each} each), "
                f"{missing:,} bytes short; largest: {largest}"
            )
        elif self.too_large:
            name, size = next(iter(self.too_large.items()))
            problem = (
                f"the smallest shard of table {name} takes {gib(size)} and a rank has {each} of {memory} for tables, "
                f"{size - self.rank_room_bytes:,} bytes short"
            )
        else:
            problem = (
                f"tables need {needed} of {room} of {memory}, but whole tables do not share out over {ranks} ranks of {each}; "
                f"largest: {largest}"
            )
        return (
            f"no plan fits: {problem}; use more hosts (`mbcnet plan min-gpus` finds how many), fp16 rows (data_type), splits by rows "
            "(sharding_types) or, on cuda, rows in host memory (compute_kernels = ['fused_uvm_caching'])"
        )


def find_shortage(
    options: Mapping[str, list[TablePlan]], plan: Plan, cluster: Cluster, room: Room
) -> Shortage:
    """Compare what tables need with the room of a rank. `options`: table -> candidates on any ranks."""
    memory = "HBM" if plan.device == "cuda" else "DDR"
    free = room.hbm if plan.device == "cuda" else room.ddr
    least = least_costs(options, plan, cluster, lambda cost: getattr(cost.bytes, memory.lower()))
    totals = {name: total for name, (total, _) in least.items()}
    too_large = {name: shard for name, (_, shard) in least.items() if shard > free}
    return Shortage(memory, plan.group_size, free, _largest_first(totals), _largest_first(too_large))


def _largest_first(sizes: dict[str, int]) -> dict[str, int]:
    return dict(sorted(sizes.items(), key=lambda pair: -pair[1]))


def gib(size: float) -> str:
    """Bytes for people."""
    for unit, name in ((GIB, "GiB"), (2**20, "MiB")):
        if size >= 0.1 * unit:
            return f"{size / unit:,.1f} {name}"
    return f"{size / 1024:,.1f} KiB" if size else "0"
