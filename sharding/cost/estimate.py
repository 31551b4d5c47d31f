"""Bytes and seconds of one shard, by part, from first principles; and by how much tables exceed the memory that they may fill.

G rows of a batch over one group's ranks, B of one rank, P ids a row (all fields of the table), F fields, D columns of the shard,
r rows of the shard, s its share of the lookups (1, or 1/n where n ranks share the rows), w bytes of a weight. Of a table
that sequences read F is the rows that one row of data may get: the lengths that its fields keep, and 1 of a field of one id.

Memory. rows r D w, state 4 r (rowwise_adagrad), 4 r D (adagrad), 8 r D (adam, of replicated tables), 0 (sgd),
and 32 r where ids are given rows (encoding zch). Activations: ids 2 * 8 G P s (two batches in flight),
pooled rows and their gradient 2 * 4 G F D. With fused_uvm* rows are in host memory; state is where FBGEMM puts it: rowwise in HBM,
full in host memory. A cache of c r rows takes c r (D w + 16) + 4 r bytes of HBM (slots with two 64-bit marks; one 32-bit map entry a row).

Time. Rows are read at random, so a row costs at least one burst of 64 bytes. Bandwidths are used at 0.93 for memory (what FBGEMM's
lookup reaches on an H100) and 0.8 for links. A repeated id is read once from memory and then from the GPU's cache, and updated once.
This is a floor, not a forecast: no launches, no stragglers, no skew of hot rows.
"""

import functools
import math
from collections.abc import Callable
from operator import add
from typing import NamedTuple, TypeVar

from data.errors import InputError
from data.schema.show import bytes_in_words as gib
from sharding.plan.cluster import LINK_EFFICIENCY, MEMORY_EFFICIENCY, Cluster
from sharding.plan.placement import Options, Plan, TablePlan, shards_of

ID_BYTES, LENGTH_BYTES, FLOAT_BYTES, BURST_BYTES = 8, 4, 4, 64
ZCH_BYTES_PER_ROW = 32  # id, row, count and last step, 8 bytes each
DTYPE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
TABLES_NAMED = 3
SORT_BYTES_PER_ID = 96  # backward sorts (id, position): 12 bytes, read and written in 4 radix passes


class Times(NamedTuple):
    """Seconds of one step on one rank."""

    input_dist: float = 0.0
    lookup: float = 0.0
    output_dist: float = 0.0
    gradient_dist: float = 0.0
    update: float = 0.0

    @property
    def total(self) -> float:
        """What loads a rank; input_dist is left out, since the pipeline overlaps it with the step before."""
        return self.lookup + self.output_dist + self.gradient_dist + self.update


class Bytes(NamedTuple):
    """Bytes on one rank."""

    rows: int = 0
    state: int = 0
    cache: int = 0
    activations: int = 0
    hbm: int = 0
    ddr: int = 0


class Room(NamedTuple):
    """Bytes of one rank that tables and their activations may fill."""

    hbm: int
    ddr: int


Costs = TypeVar("Costs", Bytes, Times)
Measure = TypeVar("Measure", int, float)


def plus(left: Costs, right: Costs) -> Costs:
    """Sum part by part."""
    return type(left)(*map(add, left, right))  # type: ignore[arg-type]


class ShardCost(NamedTuple):
    """One shard: its rank, bytes and seconds."""

    rank: int
    bytes: Bytes
    times: Times


def table_costs(table: TablePlan, plan: Plan, cluster: Cluster) -> list[ShardCost]:
    """Cost of every shard of a table, in shard order."""

    @functools.cache  # most shards are of one size
    def cost(rows: int, columns: int) -> tuple[Bytes, Times]:
        return shard_bytes(table, plan, rows, columns), shard_times(table, plan, cluster, rows, columns)

    return [ShardCost(rank, *cost(rows, columns)) for rank, rows, columns in shards_of(table, plan)]


def least_costs(
    options: Options, plan: Plan, cluster: Cluster, measure: Callable[[ShardCost], Measure]
) -> dict[str, tuple[Measure, Measure]]:
    """Each table's least sum over shards, and its least largest shard, among its candidate placements."""
    least = {}
    for name, candidates in options.items():
        costs = [[measure(cost) for cost in table_costs(each, plan, cluster)] for each in candidates]
        least[name] = min(sum(shards) for shards in costs), min(max(shards) for shards in costs)
    return least


def state_bytes(optimizer: str, rows: int, columns: int) -> int:
    """Bytes of the fused optimizer's state for a block of a table; it is fp32 for every row dtype."""
    whole = FLOAT_BYTES * rows * columns
    return {"rowwise_adagrad": FLOAT_BYTES * rows, "adagrad": whole, "adam": 2 * whole, "sgd": 0}[optimizer]


def shard_bytes(table: TablePlan, plan: Plan, rows: int, columns: int) -> Bytes:
    """Bytes of one shard; see the top of the file."""
    width, replicated = DTYPE_BYTES[plan.data_type], table.sharding_type == "data_parallel"
    weights, state = rows * columns * width, state_bytes(plan.optimizer, rows, columns)
    if table.zch_buckets:
        state += ZCH_BYTES_PER_ROW * rows
    global_rows = plan.batch_size_per_rank * (1 if replicated else plan.group_size)
    ids = 2 * ID_BYTES * global_rows * table.ids * _lookup_share(table, plan)
    pooled = 2 * FLOAT_BYTES * global_rows * table.outputs * columns
    if replicated:
        state = state * width // FLOAT_BYTES  # a dense optimizer keeps its state in the rows' dtype
        pooled += 2 * weights  # a dense gradient, and its all-reduce bucket
    activations = int(ids + pooled)
    if plan.device == "cpu":
        return Bytes(weights, state, 0, activations, 0, weights + state + activations)
    if "uvm" not in table.compute_kernel:
        return Bytes(weights, state, 0, activations, weights + state + activations, 0)
    cache = 0
    if table.compute_kernel == "fused_uvm_caching":
        cache = int(table.cache_ratio * rows) * (columns * width + 16) + 4 * rows
    on_host = 0 if plan.optimizer == "rowwise_adagrad" else state
    hbm = cache + activations + state - on_host
    return Bytes(weights, state, cache, activations, hbm, weights + on_host)


def shard_times(table: TablePlan, plan: Plan, cluster: Cluster, rows: int, columns: int) -> Times:
    """Seconds of one shard; see the top of the file."""
    width, kind = DTYPE_BYTES[plan.data_type], table.sharding_type
    size, replicated = plan.group_size, kind == "data_parallel"
    global_rows = plan.batch_size_per_rank * (1 if replicated else size)
    lookups = global_rows * table.ids * _lookup_share(table, plan) if rows else 0.0
    distinct = min(lookups, table.cardinality * _lookup_share(table, plan) or rows, rows)
    row_bytes = max(BURST_BYTES, columns * width)
    speed, slow = MEMORY_EFFICIENCY * cluster.memory_bytes_per_second, _slow_share(table)
    host = LINK_EFFICIENCY * 1e9 * cluster.host_link_gb_per_second if slow else math.inf
    pooled = global_rows * table.outputs * columns
    hidden = plan.prefetch and table.compute_kernel == "fused_uvm_caching"
    paging = distinct * row_bytes * slow / host * (0.0 if hidden else 1.0)
    lookup = (lookups * ID_BYTES + distinct * row_bytes + pooled * FLOAT_BYTES) / speed + paging
    row_state = {"rowwise_adagrad": BURST_BYTES, "adagrad": row_bytes, "adam": 2 * row_bytes, "sgd": 0}
    state = 2 * row_state[plan.optimizer]  # read and written
    update = (lookups * SORT_BYTES_PER_ID + pooled * FLOAT_BYTES + distinct * (2 * row_bytes + state)) / speed
    update += distinct * row_bytes * slow / host  # rows that leave the cache, or are written in place
    if replicated:
        gradient = 2 * rows * columns * width * (size - 1) / size
        # the dense optimizer reads and writes every row, its gradient and state
        dense = 6 * rows * columns * FLOAT_BYTES / speed
        inside, outside = (0.0, gradient) if plan.hosts > 1 else (gradient, 0.0)
        return Times(0.0, lookup, 0.0, _link_seconds(cluster, inside, outside), update + dense)
    ids = lookups * ID_BYTES + global_rows * table.bags * LENGTH_BYTES
    exchange = _by_host if kind == "table_row_wise" else _all_to_all
    output = exchange(pooled * DTYPE_BYTES[plan.forward_precision], plan, cluster)
    gradient = exchange(pooled * DTYPE_BYTES[plan.backward_precision], plan, cluster)
    return Times(_all_to_all(ids, plan, cluster), lookup, output, gradient, update)


def _lookup_share(table: TablePlan, plan: Plan) -> float:
    """s, the share of a table's lookups that one shard serves."""
    if table.sharding_type == "row_wise":
        return 1 / plan.group_size
    return 1 / len(table.ranks) if table.sharding_type == "table_row_wise" else 1.0


def _slow_share(table: TablePlan) -> float:
    """Share of reads from host memory: ids follow a power law near 1 / rank, so a cache of c of C rows misses 1 - ln(1 + c) / ln(1 + C)."""
    if table.compute_kernel == "fused_uvm":
        return 1.0
    if table.compute_kernel != "fused_uvm_caching":
        return 0.0
    occurring = table.cardinality or table.num_embeddings
    cached = min(table.cache_ratio * table.num_embeddings, occurring)
    return 1 - math.log1p(cached) / math.log1p(occurring)


def _all_to_all(sent_bytes: float, plan: Plan, cluster: Cluster) -> float:
    """Seconds in which a rank sends (or gets) an equal part to each other rank; a row_wise reduce-scatter has the same volume."""
    size, local = plan.group_size, plan.local_group_size
    return _link_seconds(cluster, sent_bytes * (local - 1) / size, sent_bytes * (size - local) / size)


def _by_host(sent_bytes: float, plan: Plan, cluster: Cluster) -> float:
    """The same for table_row_wise: reduce-scatter inside the host, then all-to-all of 1 / local of it between hosts."""
    size, local = plan.group_size, plan.local_group_size
    outside = sent_bytes / local * (size - local) / size
    return _link_seconds(cluster, sent_bytes * (local - 1) / local, outside)


def _link_seconds(cluster: Cluster, inside_bytes: float, outside_bytes: float) -> float:
    """Seconds of a rank's traffic to the other ranks of its host and to other hosts, both at once."""
    inside = inside_bytes / (LINK_EFFICIENCY * 1e9 * cluster.nvlink_gb_per_second)
    outside = outside_bytes / (LINK_EFFICIENCY * 1e9 * cluster.network_gb_per_second)
    return max(inside, outside)


class DoesNotFit(InputError):
    """No plan fits, which is certain if it holds however the shards are shared out."""

    def __init__(self, problem: str, is_certain: bool) -> None:
        self.is_certain = is_certain
        super().__init__(
            f"no plan fits: {problem}; use more hosts (`mbcnet plan min-gpus` finds how many), fp16 rows (data_type), splits by rows "
            "(sharding_types) or, on cuda, rows in host memory (compute_kernels = ['fused_uvm_caching'])"
        )


def find_shortage(options: Options, plan: Plan, cluster: Cluster, room: Room) -> DoesNotFit:
    """By how many bytes which tables exceed a rank's room where no plan is found; of a table's candidates the smallest counts."""
    memory, free = ("HBM", room.hbm) if plan.device == "cuda" else ("DDR", room.ddr)
    least = least_costs(options, plan, cluster, lambda cost: getattr(cost.bytes, memory.lower()))
    names = sorted(least, key=lambda name: -least[name][0])
    needed, have = sum(total for total, _ in least.values()), plan.group_size * free
    name, (_, shard) = max(least.items(), key=lambda item: item[1][1])
    problem = f"tables need {gib(needed)} of {memory} and {plan.group_size} ranks have {gib(have)} for them ({gib(free)} each), "
    if needed > have:
        problem += f"{needed - have:,} bytes short"
    elif shard > free:
        problem += f"and the smallest shard of table {name} takes {gib(shard)}, {shard - free:,} bytes short"
    else:
        problem += "but whole tables do not share out over them"
    largest = ", ".join(f"{name} {gib(least[name][0])}" for name in names[:TABLES_NAMED])
    return DoesNotFit(f"{problem}; largest: {largest}", is_certain=needed > have or shard > free)
