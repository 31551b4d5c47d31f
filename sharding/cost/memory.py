"""By how much tables exceed the memory that they may fill."""

from data.errors import InputError
from sharding.cost.estimate import Room, least_costs
from sharding.plan.cluster import GIB, Cluster
from sharding.plan.placement import Options, Plan

TABLES_NAMED = 3


class DoesNotFit(InputError):
    """No plan fits, which is certain if it holds however the shards are shared out."""

    def __init__(self, problem: str, is_certain: bool) -> None:
        self.is_certain = is_certain
        super().__init__(
            f"no plan fits: {problem}; use more hosts (`mbcnet plan min-gpus` finds how many), fp16 rows (data_type), splits by rows "
            "(sharding_types) or, on cuda, rows in host memory (compute_kernels = ['fused_uvm_caching'])"
        )


def find_shortage(options: Options, plan: Plan, cluster: Cluster, room: Room) -> DoesNotFit:
    """What there is to say of these tables if no plan is found: by how many bytes which tables exceed the room of a rank.

    Of the candidates for a table the smallest one counts.
    """
    memory, free = ("HBM", room.hbm) if plan.device == "cuda" else ("DDR", room.ddr)
    least = least_costs(options, plan, cluster, lambda cost: getattr(cost.bytes, memory.lower()))
    totals = {name: total for name, (total, _) in least.items()}
    too_large = {name: shard for name, (_, shard) in least.items() if shard > free}
    needed, have, ranks = sum(totals.values()), plan.group_size * free, plan.group_size
    names = sorted(totals, key=lambda name: -totals[name])[:TABLES_NAMED]
    largest = f"largest: {', '.join(f'{name} {gib(totals[name])}' for name in names)}"
    if needed > have:
        return DoesNotFit(
            f"tables need {gib(needed)} of {memory} and {ranks} ranks have {gib(have)} for them ({gib(free)} each), "
            f"{needed - have:,} bytes short; {largest}",
            is_certain=True,
        )
    if too_large:
        name = max(too_large, key=too_large.__getitem__)
        return DoesNotFit(
            f"the smallest shard of table {name} takes {gib(too_large[name])} and a rank has {gib(free)} of {memory} for tables, "
            f"{too_large[name] - free:,} bytes short",
            is_certain=True,
        )
    return DoesNotFit(
        f"tables need {gib(needed)} of {gib(have)} of {memory}, but whole tables do not share out over {ranks} ranks of {gib(free)}; "
        f"{largest}",
        is_certain=False,
    )


def gib(size: float) -> str:
    """Bytes for people."""
    for unit, name in ((GIB, "GiB"), (2**20, "MiB")):
        if size >= 0.1 * unit:
            return f"{size / unit:,.1f} {name}"
    return f"{size / 1024:,.1f} KiB" if size else "0"
