"""After TorchRec's partitioner: move, swap and re-split tables until the busiest rank can give nothing away.

TorchRec assigns the largest tables first and never looks back. With few large and many small tables that leaves ranks 20 to 40 % above the
mean; the passes here take what can be taken off the busiest rank, one step after the other, and never make a rank overflow.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from data.errors import InputError
from sharding.cost.estimate import Room, table_costs
from sharding.plan.cluster import Cluster
from sharding.plan.placement import Options, Plan, TablePlan

LEAST_GAIN = 1e-4  # of the busiest rank's load
MAX_STEPS_PER_TABLE = 20
MOVABLE = ("table_wise", "table_row_wise")


class _Load(NamedTuple):
    """What a table puts on each rank that it uses."""

    seconds: float
    hbm: int
    ddr: int


class _Option(NamedTuple):
    """A type and kernel for a table, on some ranks."""

    table: TablePlan
    ranks: tuple[int, ...]
    load: _Load


class Balance:
    """Seconds and free bytes of every rank, the option of each movable table, and the steps from one to the next.

    `options` are the placements that may be tried for each table, `pinned` the only ranks that may hold a table.
    """

    def __init__(
        self, plan: Plan, cluster: Cluster, options: Options, pinned: Mapping[str, set[int]], room: Room
    ) -> None:
        def loads(table: TablePlan) -> list[tuple[int, _Load]]:
            costs = table_costs(table, plan, cluster)
            return [(cost.rank, _Load(cost.times.total, cost.bytes.hbm, cost.bytes.ddr)) for cost in costs]

        self.plan, self.pinned, local = plan, pinned, plan.local_group_size
        self.seconds = [0.0] * plan.group_size
        self.free = [list(room) for _ in self.seconds]
        self.now: dict[str, _Option] = {}
        self.choices: dict[str, list[_Option]] = {}
        single = [(rank,) for rank in range(plan.group_size)]
        hosts = [tuple(range(first, first + local)) for first in range(0, plan.group_size, local)]
        for name, table in plan.tables.items():
            if table.sharding_type not in MOVABLE:
                for rank, load in loads(table):
                    self._add(rank, load)
                continue
            self._put(name, _Option(table, table.ranks, loads(table)[0][1]))  # the first shard is the largest
            tried = [(option, loads(option)[0][1]) for option in options[name] if option.sharding_type in MOVABLE]
            self.choices[name] = [
                _Option(option, ranks, load)
                for option, load in tried
                for ranks in (single if option.sharding_type == "table_wise" else hosts)
                if name not in pinned or pinned[name].issuperset(ranks)
            ]

    def improved(self, seconds: float) -> Plan:
        """Bring pinned tables to ranks they may use, and take load off the busiest rank for so many seconds at most."""
        deadline = time.monotonic() + seconds
        for name, ranks in self.pinned.items():
            if name in self.now and not ranks.issuperset(self.now[name].ranks):
                if not self.choices[name]:
                    raise InputError(
                        f"sharding.tables.{name}.ranks = {sorted(ranks)}: no placement of it lies on these ranks; allow table_wise, or name "
                        "all ranks of a host"
                    )
                self._put(name, min(self.choices[name], key=self._busiest_with))
        for _ in range(MAX_STEPS_PER_TABLE * max(1, len(self.now))):
            if time.monotonic() > deadline or not self._relieve():
                break
        moved = {name: replace(option.table, ranks=option.ranks) for name, option in self.now.items()}
        return replace(self.plan, tables=self.plan.tables | moved)

    def _add(self, rank: int, load: _Load, sign: int = 1) -> None:
        self.seconds[rank] += sign * load.seconds
        self.free[rank][0] -= sign * load.hbm
        self.free[rank][1] -= sign * load.ddr

    def _put(self, name: str, option: _Option) -> None:
        if old := self.now.get(name):
            for rank in old.ranks:
                self._add(rank, old.load, -1)
        self.now[name] = option
        for rank in option.ranks:
            self._add(rank, option.load)

    def _busiest_with(self, option: _Option) -> float:
        return max(self.seconds[rank] for rank in option.ranks) + option.load.seconds

    def _relieve(self) -> bool:
        """Make the step that leaves the least on the ranks it touches; False if none lowers the busiest."""
        busiest = max(range(len(self.seconds)), key=self.seconds.__getitem__)
        ours = [name for name, option in self.now.items() if busiest in option.ranks]
        best, step = self.seconds[busiest] * (1 - LEAST_GAIN), {}
        for trial in self._steps(ours):
            after = self._after(trial, best)
            if after is not None:
                best, step = after, trial
        for name, option in step.items():
            self._put(name, option)
        return bool(step)

    def _steps(self, names: list[str]) -> Iterator[dict[str, _Option]]:
        """Every move of these tables, then every swap with a table of the same type that loads a rank less."""
        for name in names:
            for option in self.choices[name]:
                yield {name: option}
        for name in names:
            mine = self.now[name]
            for other, theirs in self.now.items():
                if theirs.load.seconds >= mine.load.seconds or theirs.ranks == mine.ranks:
                    continue
                if theirs.table.sharding_type == mine.table.sharding_type and all(
                    self.pinned[table].issuperset(new)
                    for table, new in ((name, theirs.ranks), (other, mine.ranks))
                    if table in self.pinned
                ):
                    yield {name: mine._replace(ranks=theirs.ranks), other: theirs._replace(ranks=mine.ranks)}

    def _after(self, step: dict[str, _Option], best: float) -> float | None:
        """Largest seconds of the ranks that a step touches; None if that is not below `best`, or if one overflows."""
        after: dict[int, list[float]] = {}  # rank -> its seconds, and how much more of either memory it needs
        for sign, options in ((1, step), (-1, {name: self.now[name] for name in step})):
            for option in options.values():
                for rank in option.ranks:
                    sums = after.setdefault(rank, [self.seconds[rank], 0, 0])
                    after[rank] = [total + sign * part for total, part in zip(sums, option.load, strict=True)]
        for rank, (seconds, *more) in after.items():
            if seconds >= best or any(need > max(0, free) for need, free in zip(more, self.free[rank], strict=True)):
                return None
        return max(seconds for seconds, *_ in after.values())
