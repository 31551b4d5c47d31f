"""After TorchRec's partitioner: move, swap and re-split tables until the busiest rank can give nothing away.

TorchRec deals out largest first and never looks back. With few large and many small tables that leaves ranks 20 to 40 % above the
mean; the passes here take what can be taken off the busiest rank, one step after the other, and never make a rank overflow.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from sharding.cost.estimate import Room, ShardCost, table_costs
from sharding.plan.cluster import Cluster
from sharding.plan.placement import Plan, TablePlan

LEAST_GAIN = 1e-4  # of the busiest rank's load
MAX_STEPS_PER_TABLE = 20
MOVABLE = ("table_wise", "table_row_wise")


class _Load(NamedTuple):
    """What one option of a table puts on each rank it uses."""

    seconds: float
    hbm: int
    ddr: int


class _Option(NamedTuple):
    """An option of a table and the ranks it is on."""

    table: TablePlan
    load: _Load


class _Loads:
    """Seconds and free bytes of every rank, and the option of each movable table."""

    def __init__(self, size: int, room: Room) -> None:
        self.seconds = [0.0] * size
        self.free = [list(room) for _ in range(size)]
        self.now: dict[str, _Option] = {}

    def add(self, rank: int, load: _Load, sign: int = 1) -> None:
        self.seconds[rank] += sign * load.seconds
        self.free[rank][0] -= sign * load.hbm
        self.free[rank][1] -= sign * load.ddr

    def put(self, name: str, option: _Option) -> None:
        if old := self.now.get(name):
            for rank in old.table.ranks:
                self.add(rank, old.load, -1)
        self.now[name] = option
        for rank in option.table.ranks:
            self.add(rank, option.load)

    def change(self, rank: int, come: list[_Load], go: list[_Load], best: float) -> float | None:
        """Seconds of a rank after some loads come and others go; None if not below `best`, or if it would overflow."""
        after = self.seconds[rank] + sum(load.seconds for load in come) - sum(load.seconds for load in go)
        if after >= best:
            return None
        for index in (0, 1):
            more = sum(load[index + 1] for load in come) - sum(load[index + 1] for load in go)
            if more > 0 and more > self.free[rank][index]:
                return None
        return after


def rebalanced(
    plan: Plan,
    cluster: Cluster,
    options: Mapping[str, list[TablePlan]],
    pinned: Mapping[str, set[int]],
    room: Room,
    seconds: float = 60.0,
) -> Plan:
    """Take load off the busiest rank, and bring pinned tables to ranks they may use.

    Args:
        plan: with ranks.
        cluster: what times are estimated for.
        options: table -> placements that may be tried.
        pinned: table -> the only ranks that may hold it.
        room: bytes of a rank that tables may fill.
        seconds: budget; what was reached by then is returned.
    """
    deadline = time.monotonic() + seconds
    loads = _Loads(plan.group_size, room)
    for name, table in plan.tables.items():
        costs = table_costs(table, plan, cluster)
        if table.sharding_type in MOVABLE:
            loads.put(name, _Option(table, _load(costs)))
        else:
            for cost in costs:
                loads.add(cost.rank, _Load(cost.times.total, cost.bytes.hbm, cost.bytes.ddr))
    choices = {
        name: [
            _Option(option, _load(table_costs(option, plan, cluster)))
            for option in options[name]
            if option.sharding_type in MOVABLE
        ]
        for name in loads.now
    }
    search = _Search(plan, loads, choices, pinned)
    search.enter_allowed()
    for _ in range(MAX_STEPS_PER_TABLE * max(1, len(loads.now))):
        if time.monotonic() > deadline or not search.relieve():
            break
    return replace(plan, tables=plan.tables | {name: option.table for name, option in loads.now.items()})


def _load(costs: list[ShardCost]) -> _Load:
    """The first shard is the largest."""
    return _Load(costs[0].times.total, costs[0].bytes.hbm, costs[0].bytes.ddr)


def _moved(option: _Option, ranks: tuple[int, ...]) -> _Option:
    return option._replace(table=replace(option.table, ranks=ranks))


class _Search:
    """One pass after the other over the busiest rank."""

    def __init__(
        self, plan: Plan, loads: _Loads, choices: dict[str, list[_Option]], allowed: Mapping[str, set[int]]
    ) -> None:
        self.loads, self.choices, self.allowed = loads, choices, allowed
        local = plan.local_group_size
        self.single = [(rank,) for rank in range(plan.group_size)]
        self.hosts = [tuple(range(first, first + local)) for first in range(0, plan.group_size, local)]

    def targets(self, name: str) -> Iterator[tuple[tuple[int, ...], _Option]]:
        """Every option of a table on every set of ranks that it may use."""
        allowed = self.allowed.get(name)
        for choice in self.choices[name]:
            for ranks in self.single if choice.table.sharding_type == "table_wise" else self.hosts:
                if allowed is None or allowed.issuperset(ranks):
                    yield ranks, choice

    def enter_allowed(self) -> None:
        """Put every pinned table on the least busy ranks of those it may use."""
        for name, ranks in self.allowed.items():
            if name in self.loads.now and not ranks.issuperset(self.loads.now[name].table.ranks):
                options = list(self.targets(name))
                ranks, choice = min(options, key=self._busiest_of)
                self.loads.put(name, _moved(choice, ranks))

    def _busiest_of(self, target: tuple[tuple[int, ...], _Option]) -> float:
        ranks, choice = target
        return max(self.loads.seconds[rank] for rank in ranks) + choice.load.seconds

    def relieve(self) -> bool:
        """Make the step that leaves the least on the ranks it touches; False if none lowers the busiest."""
        seconds = self.loads.seconds
        busiest = max(range(len(seconds)), key=seconds.__getitem__)
        ours = [name for name, option in self.loads.now.items() if busiest in option.table.ranks]
        best, step = seconds[busiest] * (1 - LEAST_GAIN), {}
        for name in ours:
            for ranks, choice in self.targets(name):
                after = self._after_move(name, ranks, choice.load, best)
                if after is not None:
                    best, step = after, {name: _moved(choice, ranks)}
        for name in ours:
            mine = self.loads.now[name]
            for other, theirs in self.loads.now.items():
                after = self._after_swap(name, other, best)
                if after is not None:
                    swapped = _moved(mine, theirs.table.ranks), _moved(theirs, mine.table.ranks)
                    best, step = after, dict(zip((name, other), swapped, strict=True))
        for name, option in step.items():
            self.loads.put(name, option)
        return bool(step)

    def _after_move(self, name: str, ranks: tuple[int, ...], load: _Load, best: float) -> float | None:
        """Largest seconds of the ranks that a move touches; None if it is not below `best` or one overflows."""
        old = self.loads.now[name]
        largest = 0.0
        for rank in ranks:
            go = [old.load] if rank in old.table.ranks else []
            after = self.loads.change(rank, [load], go, best)
            if after is None:
                return None
            largest = max(largest, after)
        for rank in old.table.ranks:
            if rank not in ranks:
                largest = max(largest, self.loads.seconds[rank] - old.load.seconds)
        return largest if largest < best else None

    def _after_swap(self, name: str, other: str, best: float) -> float | None:
        """As `_after_move`, for two tables of one type that change ranks."""
        mine, theirs = self.loads.now[name], self.loads.now[other]
        gain = mine.load.seconds - theirs.load.seconds
        if gain <= 0 or self.loads.seconds[theirs.table.ranks[0]] + gain >= best:
            return None
        if mine.table.sharding_type != theirs.table.sharding_type or mine.table.ranks == theirs.table.ranks:
            return None
        for table, new in ((name, theirs), (other, mine)):
            if table in self.allowed and not self.allowed[table].issuperset(new.table.ranks):
                return None
        largest = 0.0
        for ranks, come, go in (
            (theirs.table.ranks, mine.load, theirs.load),
            (mine.table.ranks, theirs.load, mine.load),
        ):
            for rank in ranks:
                after = self.loads.change(rank, [come], [go], best)
                if after is None:
                    return None
                largest = max(largest, after)
        return largest
