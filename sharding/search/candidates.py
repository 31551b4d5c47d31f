"""What is to be planned (tables, constraints, machines, workload), and which placements are worth trying for each table, by size class."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from data.errors import InputError
from data.schema import Feature, Schema, Table
from data.schema.parse import unknown_key
from sharding.cost.estimate import DTYPE_BYTES, Room, gib, state_bytes
from sharding.plan.cluster import GIB, Cluster, default_cluster, read_cluster
from sharding.plan.constraints import CARRIED, ShardingConfig
from sharding.plan.placement import DenseCost, Plan, TablePlan, check_shape, table_problem, with_kernels

ROWS_PER_RANK = 8  # a table with fewer rows for each rank is not split by rows
TORCHREC_LEAST_COLUMNS = 128  # of a column shard where nobody says otherwise
LARGE_SHARE = 0.25  # of a rank's memory: a larger table is split by rows where that is allowed
# a smaller table of single ids is not split by rows: each shard would send as much as the whole
SMALL_BYTES = 64 * 2**20
Progress = Callable[[int, float], None]  # (proposals so far, best milliseconds)


@dataclass(frozen=True)
class Task:
    """What is to be planned."""

    schema: Schema
    config: ShardingConfig
    cluster: Cluster
    batch_size_per_rank: int
    optimizer: str = "rowwise_adagrad"  # of the tables
    dense: DenseCost = DenseCost()  # the rest of the model, whose memory is set aside

    def empty_plan(self) -> Plan:
        """The plan without its tables."""
        cluster = self.cluster
        return Plan(
            world_size=cluster.world_size,
            local_world_size=cluster.devices_per_host,
            device=cluster.device,
            schema=self.schema.fingerprint(),
            tables={},
            batch_size_per_rank=self.batch_size_per_rank,
            optimizer=self.optimizer,  # type: ignore[arg-type]
            **{key: getattr(self.config, key) for key in CARRIED},
            cluster=str(cluster),
            cluster_fingerprint=cluster.fingerprint(),
            dense=self.dense,
        )

    def room(self) -> Room:
        """Bytes of one rank that tables and their activations may fill; InputError if the dense part and the reserve leave nothing."""
        on_gpu, kept = self.cluster.device == "cuda", 1 - self.config.storage_reserve
        hbm = int(kept * (self.config.hbm_gib * GIB or self.cluster.hbm_bytes)) if on_gpu else 0
        ddr = int(kept * (self.config.ddr_gib * GIB or self.cluster.ddr_bytes))
        used = self.dense.memory_bytes(self.batch_size_per_rank)
        left = Room(hbm - used, ddr) if on_gpu else Room(0, ddr - used)
        if left.ddr <= 0 or (on_gpu and left.hbm <= 0):
            memory, size = ("HBM", hbm) if on_gpu else ("DDR", ddr)
            raise InputError(
                f"{self.cluster}: the dense part takes {gib(used)} at {self.batch_size_per_rank:,} rows a rank, more than the "
                f"{gib(size)} of {memory} that a rank may fill; lower --batch-size"
            )
        return left


def cluster_of(config: ShardingConfig, world_size: int, local_world_size: int, device: str) -> Cluster:
    """The cluster a run is on: what its config names, in the run's size, else the device's default; InputError if the devices differ."""
    if not config.cluster:
        return default_cluster(world_size, local_world_size, device)
    cluster = read_cluster(config.cluster).resized(max(1, world_size // local_world_size), local_world_size)
    if cluster.device != device:
        raise InputError(
            f"sharding.cluster = {config.cluster!r}: its device is {cluster.device!r}, but this run computes on {device!r}; "
            "name another cluster, or leave it empty"
        )
    return cluster


def described_table(table: Table, schema: Schema, config: ShardingConfig) -> TablePlan:
    """A table as the plan file carries it, without ranks: sizes, ids per row and cardinality.

    Ids per row: the constraint's, else what the schema measured, else 1 for single-valued fields and the config's assumption for lists.
    """
    constraint = config.of(table.name)
    features = {feature.name: feature for feature in schema.features}
    used = [features[name] for name in table.feature_names]
    ids = sum(constraint.pooling_factor or pooling_factor(feature, config) for feature in used)
    measured = max((feature.cardinality for feature in used), default=0)
    return TablePlan(
        "table_wise", "fused", (), table.num_embeddings, table.embedding_dim, len(used), round(ids, 4),
        cardinality=min(constraint.cardinality or measured, table.num_embeddings),
        zch_buckets=table.zch.buckets if table.zch else 0, positions=table.positions,
    )  # fmt: skip


def pooling_factor(feature: Feature, config: ShardingConfig) -> float:
    """Mean ids of a field per row."""
    return feature.pooling_factor or (1.0 if feature.is_single else config.assumed_pooling_factor)


def assumed_fields(schema: Schema, config: ShardingConfig) -> list[str]:
    """List fields whose ids per row nobody measured."""
    told = {name for name, table in config.tables.items() if table.pooling_factor}
    lists = (each for each in schema.features if each.is_sparse and not each.is_single)
    return [each.name for each in lists if not each.pooling_factor and each.table_name not in told]


def check_constraints(task: Task) -> None:
    """Refuse constraints that name what is not there or that contradict each other."""
    config, plan = task.config, task.empty_plan()
    tables = {table.name: table for table in task.schema.tables}
    check_shape(plan, "sharding.")
    for name, constraint in config.tables.items():
        where = f"sharding.tables.{name}"
        if name not in tables:
            raise InputError(unknown_key(where, name, tables))
        problem, absent = "", [rank for rank in constraint.ranks if rank >= plan.group_size]
        types, columns = constraint.sharding_types or config.sharding_types, tables[name].embedding_dim
        if absent:
            ranks = list(constraint.ranks)
            problem = f"ranks = {ranks}: wanted ranks in [0, {plan.group_size}); remove {absent}"
        elif constraint.ranks and not set(types) & {"table_wise", "column_wise", "table_row_wise"}:
            problem = f"ranks: {', '.join(types)} use every rank; remove ranks, or allow table_wise"
        elif constraint.min_partition > columns:
            problem = f"min_partition = {constraint.min_partition}: the table has {columns} columns; lower it"
        if problem:
            raise InputError(f"{where}.{problem}")


def all_options(task: Task) -> dict[str, list[TablePlan]]:
    """Every table's candidates, with ranks that serve for estimates: the partitioner chooses the real ones."""
    plan = task.empty_plan()
    return {table.name: _candidates(table, task, plan) for table in task.schema.tables}


def _candidates(table: Table, task: Task, plan: Plan) -> list[TablePlan]:
    """Placements of a table that the platform runs and that are worth trying."""
    config, name, sized = task.config, table.name, described_table(table, task.schema, task.config)
    constraint = config.of(name)
    types, kernels = config.sharding_types, config.compute_kernels
    if sized.zch_buckets:  # there is one, whatever the run allows for other tables
        types, kernels = ("row_wise",), ("fused",)
    types, kernels = constraint.sharding_types or types, constraint.compute_kernels or kernels
    ratio = constraint.cache_ratio or config.cache_ratio
    options = [each for kind in types for each in with_kernels(sized, kind, kernels, ratio)]
    options = [_placed(option, name, config, plan) for option in options]
    problems = [table_problem(option, plan) for option in options]
    sound = [option for option, problem in zip(options, problems, strict=True) if not problem]
    if not sound:
        raise InputError(
            f"sharding.tables.{name}: sharding_types {list(types)} with compute_kernels {list(kernels)} leave no choice for "
            f"{sized.num_embeddings} rows on {plan.group_size} ranks of {plan.device}: {problems[0]}"
        )
    return sound if constraint.sharding_types else _by_size(sound, task, plan)


def _by_size(options: list[TablePlan], task: Task, plan: Plan) -> list[TablePlan]:
    """Those of a table's placements that suit its size class and the number of ranks."""

    def of(*types: str) -> list[TablePlan]:
        return [each for each in options if each.sharding_type in types]

    whole_types = ("table_wise", "data_parallel", "column_wise")
    if plan.hosts == 1:
        options = of("row_wise", *whole_types) or options
    if plan.group_size == 1:
        options = of("table_wise", "data_parallel") or options
    table, split, whole = options[0], of("row_wise", "table_row_wise"), of(*whole_types)
    rows, dim = table.num_embeddings, table.embedding_dim
    size = rows * dim * DTYPE_BYTES[plan.data_type] + state_bytes(plan.optimizer, rows, dim)
    single = table.ids <= 2 * table.bags
    if whole and (rows < ROWS_PER_RANK * plan.group_size or (size < SMALL_BYTES and single)):
        return whole
    room = task.room()
    large = size > LARGE_SHARE * (room.hbm if plan.device == "cuda" else room.ddr)
    return split if split and large else options


def _placed(option: TablePlan, name: str, config: ShardingConfig, plan: Plan) -> TablePlan:
    if option.sharding_type == "table_wise":
        return replace(option, ranks=(0,))
    if option.sharding_type == "table_row_wise":
        return replace(option, ranks=tuple(range(plan.local_group_size)))
    if option.sharding_type != "column_wise" or option.zch_buckets:
        return option
    constraint, dim = config.of(name), option.embedding_dim
    least = constraint.min_partition or min(TORCHREC_LEAST_COLUMNS, dim)
    width = next(width for width in range(least, dim + 1) if not width % 4 and not dim % width)
    free = len(constraint.ranks) or plan.group_size
    if dim // width > free:
        raise InputError(
            f"sharding.tables.{name}: {dim // width} column shards of {width} columns on {free} ranks; raise min_partition to "
            f"{-(-dim // free)} or more, or allow table_wise"
        )
    return replace(option, ranks=tuple(range(dim // width)))
