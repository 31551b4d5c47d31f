"""How many machines: the smallest cluster that fits, batch sizes against hosts, and what to change where nothing fits.

Every answer is a plan that was made, never a formula alone.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from data.errors import InputError
from data.schema import Schema
from sharding.cost.assess import Assessment, assess
from sharding.cost.estimate import DTYPE_BYTES
from sharding.cost.memory import DoesNotFit, Shortage
from sharding.plan.cluster import MAX_RANKS, Cluster
from sharding.plan.constraints import ShardingConfig, TableConstraint
from sharding.plan.dense_part import DenseCost
from sharding.search.planner import Progress, plan_schema

CURES_SHOWN = 3
LEAST_CACHE = 0.05  # share of rows that a cure still caches
MARGIN = 1.1  # a cure aims at so many times the bytes that are missing
HALF_ROWS = 'fp16 rows: data_type = "fp16"'
MOST_STEPS = 12  # cluster sizes tried by one search


@dataclass(frozen=True)
class Task:
    """What is to be planned.

    Attributes:
        schema: names the tables.
        config: what is allowed.
        cluster: where.
        batch_size_per_rank: rows.
        optimizer: of the tables.
        dense: the rest of the model.
    """

    schema: Schema
    config: ShardingConfig
    cluster: Cluster
    batch_size_per_rank: int
    optimizer: str = "rowwise_adagrad"
    dense: DenseCost = DenseCost()

    def solve(self, progress: Progress | None = None) -> Assessment:
        """Plan and assess.

        Raises:
            DoesNotFit: nothing fits.
        """
        plan = plan_schema(
            self.schema,
            self.config,
            self.cluster,
            self.batch_size_per_rank,
            optimizer=self.optimizer,
            dense=self.dense,
            progress=progress,
        )
        return assess(plan, self.cluster, self.dense)


@dataclass(frozen=True)
class Cure:
    """A change after which a plan was found.

    Attributes:
        change: in words, with the keys to set.
        task: the changed task.
        assessment: of the plan that it gave.
        changes_model: whether it trains another model.
    """

    change: str
    task: Task
    assessment: Assessment
    changes_model: bool = False

    @property
    def cost(self) -> float:
        """Device-seconds for a million samples."""
        rate = self.assessment.samples_per_second
        return 1e6 * self.task.cluster.world_size / rate if rate else math.inf


def find_cures(task: Task, shortage: Shortage, say: Callable[[str], None] = lambda line: None) -> list[Cure]:
    """The cheapest changes that make a plan fit, each verified by planning again.

    Cheapest: fewest device-seconds a sample; changes that make another model come last.
    """
    cures: list[Cure] = []
    solved: set[str] = set()
    for kind, change, changed, other_model in _changes(task, shortage):
        if kind in solved:
            continue  # a milder form of it was enough
        say(f"trying: {change}")
        try:
            cures.append(Cure(change, changed, changed.solve(), other_model))
            solved.add(kind)
        except InputError:
            continue
    half_rows = None if "fp16" in solved else _half_rows(task)  # together only where neither is enough alone
    for base, words in ((task, ""), (half_rows, f"{HALF_ROWS}, and ")):
        larger = _more_hosts(base, shortage, say) if base else None
        if larger:
            cures.append(replace(larger, change=words + larger.change))
    cures.sort(key=lambda cure: (cure.changes_model, cure.cost))
    return cures[:CURES_SHOWN]


def _half_rows(task: Task) -> Task | None:
    if task.config.data_type != "fp32":
        return None
    return replace(task, config=replace(task.config, data_type="fp16"))


def _changes(task: Task, shortage: Shortage) -> list[tuple[str, str, Task, bool]]:
    """Changes on the same machines, each sized to what is missing, milder forms first: (kind, words, task, another model?)."""
    config, missing = task.config, shortage.missing_bytes
    less = missing - shortage.needed_bytes // 2  # missing beside fp16 rows
    half_rows = _half_rows(task)
    found: list[tuple[str, str, Task, bool]] = []
    if half_rows:
        found.append(("fp16", HALF_ROWS, half_rows, False))
    split = tuple(dict.fromkeys((*config.sharding_types, "row_wise", "table_row_wise")))
    if split != config.sharding_types:
        freed = replace(task, config=replace(config, sharding_types=split))  # type: ignore[arg-type]
        found.append(("split", f"split by rows: sharding_types = {list(split)}", freed, False))
    if task.cluster.device == "cuda":
        found += [
            ("uvm", *_paged(task, shortage, missing, ratio)) for ratio in (config.cache_ratio, LEAST_CACHE)
        ]
        if half_rows:
            words, changed, _ = _paged(half_rows, shortage, less, config.cache_ratio)
            found.append(("uvm", f"{HALF_ROWS}, and {words}", changed, False))
    if task.optimizer == "adagrad":
        lighter = replace(task, optimizer="rowwise_adagrad")
        found.append(("state", "one state a row: --optimizer rowwise_adagrad", lighter, True))
    half = task.batch_size_per_rank // 2
    if half:
        smaller = replace(task, batch_size_per_rank=half)
        found.append(("batch", f"a smaller batch: --batch-size {half}", smaller, False))
    for base, words, short in ((task, "", missing), (half_rows, f"{HALF_ROWS}, and ", less)):
        for divisor, share in ((2, "half"), (4, "a quarter of")):
            names = _enough(task, shortage, short, 1 - 1 / divisor)
            narrower = _narrower(task.schema, names, divisor)
            if base and narrower:
                change = f"{words}{share} the columns of {_named(names)}"
                found.append(("dim", change, replace(base, schema=narrower), True))
    return found


def _enough(task: Task, shortage: Shortage, missing: int, saved_share: float) -> list[str]:
    """The largest tables, until a share of their rows' bytes makes up for what is missing."""
    rows = {table.name: table.num_embeddings * table.embedding_dim for table in task.schema.tables}
    names, saved = [], 0.0
    for name in shortage.tables:
        names.append(name)
        saved += saved_share * rows[name] * DTYPE_BYTES[task.config.data_type]
        if saved > MARGIN * missing:
            break
    return names


def _paged(task: Task, shortage: Shortage, missing: int, ratio: float) -> tuple[str, Task, bool]:
    """Keep the rows of enough tables in host memory."""
    names = _enough(task, shortage, missing, 1 - ratio)
    tables = dict(task.config.tables)
    for name in names:
        paged = replace(
            tables.get(name, TableConstraint()), compute_kernels=("fused_uvm_caching",), cache_ratio=ratio
        )
        tables[name] = paged
    words = f'rows of {_named(names)} in host memory, {ratio:.0%} of them cached in HBM (compute_kernels = ["fused_uvm_caching"])'
    return words, replace(task, config=replace(task.config, tables=tables)), False


def _named(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more tables" if len(names) > 3 else "")


def _narrower(schema: Schema, names: list[str], divisor: int) -> Schema | None:
    """The schema with fewer columns in some tables, where that leaves a multiple of 4; None where it leaves none of them so."""
    possible = {
        table.name
        for table in schema.tables
        if table.name in names and not table.embedding_dim % (4 * divisor)
    }
    tables = tuple(
        replace(table, embedding_dim=table.embedding_dim // divisor) if table.name in possible else table
        for table in schema.tables
    )
    return replace(schema, tables=tables) if possible else None


def _more_hosts(task: Task, shortage: Shortage, say: Callable[[str], None]) -> Cure | None:
    hosts = task.cluster.hosts + 1
    for _ in range(MOST_STEPS):
        if hosts * task.cluster.devices_per_host > MAX_RANKS:
            return None
        larger = replace(task, cluster=task.cluster.resized(hosts))
        say(f"trying: {hosts} hosts")
        try:
            return Cure(f"more hosts: --cluster {larger.cluster}", larger, larger.solve())
        except DoesNotFit as error:
            hosts = max(hosts + 1, _hosts_needed(error.shortage, hosts))
        except InputError:
            return None
    return None


def _hosts_needed(shortage: Shortage, hosts: int) -> int:
    """A first guess: as if need stayed and room grew with hosts. Activations grow too, so it may be short by some."""
    if shortage.room_bytes <= 0 or shortage.too_large:
        return hosts + 1
    return min(2 * hosts, math.ceil(hosts * shortage.needed_bytes / shortage.room_bytes))


def smallest_cluster(
    task: Task, headroom: float, say: Callable[[str], None] = lambda line: None
) -> Assessment:
    """The fewest devices that fit, leaving a share of each device's memory free: parts of one host, then whole hosts.

    Args:
        task: its cluster says the kind of host, not how many.
        headroom: share of memory to leave free, beside nothing else.
        say: told each size that is tried.

    Raises:
        InputError: none of the sizes tried fits.
    """
    if not 0 <= headroom < 1:
        raise InputError(
            f"--headroom {headroom}: wanted a share in [0, 1); 0.2 leaves a fifth of every device free"
        )
    base = replace(task, config=replace(task.config, storage_reserve=headroom))
    devices = task.cluster.devices_per_host
    parts = [count for count in (1, 2, 4, 8, 16) if count < devices] + [devices]
    last: InputError | None = None
    for count in parts:
        try:
            return _sized(base, 1, count, say)
        except InputError as error:
            last = error
    low, high = 1, 1  # `low` hosts do not fit
    for _ in range(MOST_STEPS):
        shortage = last.shortage if isinstance(last, DoesNotFit) else None
        high = max(low + 1, _hosts_needed(shortage, low) if shortage else low + 1)
        if high * devices > MAX_RANKS:
            break
        try:
            found = _sized(base, high, devices, say)
        except InputError as error:
            low, last = high, error
            continue
        while high - low > 1:
            middle = (low + high) // 2
            try:
                found, high = _sized(base, middle, devices, say), middle
            except InputError:
                low = middle
        return found
    raise InputError(f"no cluster of {task.cluster.name} up to {high} hosts fits: {last}")


def _sized(task: Task, hosts: int, devices: int, say: Callable[[str], None]) -> Assessment:
    cluster = task.cluster.resized(hosts, devices)
    say(f"trying: {cluster}")
    return replace(task, cluster=cluster).solve()


def sweep(
    task: Task,
    batch_sizes: Sequence[int],
    hosts: Sequence[int],
    say: Callable[[str], None] = lambda line: None,
) -> dict[tuple[int, int], Assessment | str]:
    """Plan every batch size on every number of hosts: (rows a rank, hosts) -> assessment, or why it does not fit."""
    table: dict[tuple[int, int], Assessment | str] = {}
    for rows in batch_sizes:
        for count in hosts:
            changed = replace(task, batch_size_per_rank=rows, cluster=task.cluster.resized(count))
            say(f"planning: {rows:,} rows a rank on {changed.cluster}")
            try:
                table[rows, count] = changed.solve()
            except InputError as error:
                table[rows, count] = str(error)
    return table
