"""Which places are worth trying for each table, by size class: what makes the search end. Imports no torch."""

from dataclasses import replace

from data.errors import InputError
from data.schema import Feature, Schema, Table
from data.schema.parse import unknown_key
from sharding.cost.estimate import DTYPE_BYTES, state_bytes
from sharding.plan.cluster import Cluster
from sharding.plan.constraints import ShardingConfig, TableConstraint
from sharding.plan.dense_part import DenseCost
from sharding.plan.plan_file import FORMAT, Plan, TablePlan, device_problem, leaves_empty, zch_place_problem

ROWS_PER_RANK = 8  # a table with fewer rows for each rank is not split by rows
TORCHREC_LEAST_COLUMNS = 128  # of a column shard where nobody says otherwise
LARGE_SHARE = 0.25  # of a rank's memory: a larger table is split by rows where that is allowed
SMALL_BYTES = (
    64 * 2**20
)  # a smaller table of single ids is not split by rows: each shard would send as much as the whole


def described_table(table: Table, schema: Schema, config: ShardingConfig) -> TablePlan:
    """A table as the plan file carries it, without a place: sizes, ids a row and cardinality.

    Ids a row: the constraint's, else what the schema measured, else 1 for single-valued fields and the config's assumption for lists.
    """
    constraint = config.tables.get(table.name, TableConstraint())
    features = {feature.name: feature for feature in schema.features}
    used = [features[name] for name in table.feature_names]
    ids = sum(constraint.pooling_factor or pooling_factor(feature, config) for feature in used)
    measured = max((int(getattr(feature, "cardinality", 0) or 0) for feature in used), default=0)
    cardinality = min(constraint.cardinality or measured, table.num_embeddings)
    return TablePlan(
        "table_wise",
        "fused",
        (),
        table.num_embeddings,
        table.embedding_dim,
        len(used),
        round(ids, 4),
        cardinality,
        zch_buckets=table.zch.buckets if table.zch else 0,
    )


def pooling_factor(feature: Feature, config: ShardingConfig) -> float:
    """Mean ids of a field in one row."""
    measured = float(getattr(feature, "pooling_factor", 0.0) or 0.0)
    return measured or (1.0 if feature.is_single else config.assumed_pooling_factor)


def assumed_fields(schema: Schema, config: ShardingConfig) -> list[str]:
    """List fields whose ids a row nobody measured."""
    told = {name for name, table in config.tables.items() if table.pooling_factor}
    return [
        feature.name
        for feature in schema.features
        if feature.is_sparse
        and not feature.is_single
        and feature.table_name not in told
        and not getattr(feature, "pooling_factor", 0.0)
    ]


def empty_plan(
    config: ShardingConfig,
    schema: Schema,
    cluster: Cluster,
    batch_size_per_rank: int,
    optimizer: str,
    dense: DenseCost,
) -> Plan:
    """A plan without tables for this schema, cluster and workload."""
    return Plan(
        cluster.world_size,
        cluster.devices_per_host,
        cluster.device,
        schema.fingerprint(),
        {},
        batch_size_per_rank,
        optimizer,  # type: ignore[arg-type]
        config.data_type,
        config.forward_precision,
        config.backward_precision,
        config.prefetch,
        config.replicas,
        str(cluster),
        cluster.fingerprint(),
        {},
        dense,
        FORMAT,
    )


def check_constraints(config: ShardingConfig, schema: Schema, plan: Plan) -> None:
    """Refuse constraints that name what is not there or that contradict each other.

    Raises:
        InputError: naming key, value and mend.
    """
    tables = {table.name: table for table in schema.tables}
    problem = device_problem(plan)
    if problem:
        raise InputError(f"sharding.{problem}")
    if plan.local_world_size % config.replicas:
        raise InputError(
            f"sharding.replicas = {config.replicas}: wanted a divisor of the {plan.local_world_size} ranks of a host; use 1"
        )
    for name, constraint in config.tables.items():
        where = f"sharding.tables.{name}"
        if name not in tables:
            raise InputError(unknown_key(where, name, tables))
        absent = [rank for rank in constraint.ranks if rank >= plan.group_size]
        if absent:
            raise InputError(
                f"{where}.ranks = {list(constraint.ranks)}: wanted ranks in [0, {plan.group_size}); remove {absent}"
            )
        types = constraint.sharding_types or config.sharding_types
        if constraint.ranks and not set(types) & {"table_wise", "column_wise", "table_row_wise"}:
            raise InputError(
                f"{where}.ranks: {', '.join(types)} use every rank; remove ranks, or allow table_wise"
            )
        if constraint.min_partition > tables[name].embedding_dim:
            raise InputError(
                f"{where}.min_partition = {constraint.min_partition}: the table has {tables[name].embedding_dim} columns; lower it"
            )


def candidates(
    table: TablePlan, name: str, plan: Plan, config: ShardingConfig, room_bytes: int
) -> list[TablePlan]:
    """Places worth trying for a table, without ranks where the partitioner chooses them.

    Args:
        table: from `described_table`.
        name: of the table.
        plan: from `empty_plan`.
        config: what is allowed.
        room_bytes: memory of a rank that tables may fill.

    Raises:
        InputError: nothing is left.
    """
    constraint = config.tables.get(name, TableConstraint())
    if table.zch_buckets:
        return [_unbounded(table, name, plan, constraint)]
    types = _by_size(table, plan, constraint.sharding_types, config.sharding_types, room_bytes)
    kernels = constraint.compute_kernels or config.compute_kernels
    options = []
    for kind in types:
        allowed = (
            ("dense",)
            if kind == "data_parallel"
            else tuple(kernel for kernel in kernels if kernel != "dense")
        )
        for kernel in allowed:
            if plan.device == "cpu" and "uvm" in kernel:
                continue
            ratio = (constraint.cache_ratio or config.cache_ratio) if kernel == "fused_uvm_caching" else 0.0
            options.append(replace(table, sharding_type=kind, compute_kernel=kernel, cache_ratio=ratio))
    if not types:
        asked = constraint.sharding_types or config.sharding_types
        raise InputError(
            f"sharding.tables.{name}: {', '.join(asked)} of {table.num_embeddings} rows leave one of {plan.group_size} ranks without "
            "rows; allow table_wise"
        )
    if not options:
        raise InputError(
            f"sharding.tables.{name}: sharding_types {list(types)} with compute_kernels {list(kernels)} leave no choice on "
            f"{plan.device}; allow table_wise or row_wise with fused, or data_parallel"
        )
    return options


def _unbounded(table: TablePlan, name: str, plan: Plan, constraint: TableConstraint) -> TablePlan:
    """The one place of a table of encoding zch, whatever the run allows for other tables."""
    where = f"sharding.tables.{name}"
    for key, only in (("sharding_types", "row_wise"), ("compute_kernels", "fused")):
        allowed = getattr(constraint, key)
        if allowed and only not in allowed:
            raise InputError(
                f"{where}.{key} = {list(allowed)}: its fields are of encoding 'zch', which runs {only} only; allow {only}, or remove it"
            )
    place = replace(table, sharding_type="row_wise", compute_kernel="fused", ranks=())
    problem = zch_place_problem(place, plan)
    if problem:
        raise InputError(f"table {name}: {problem}")
    return place


def _by_size(
    table: TablePlan, plan: Plan, asked: tuple[str, ...], usual: tuple[str, ...], room_bytes: int
) -> list[str]:
    """Types for a table: those asked for it by name as they are, else the run's, thinned out by size class."""
    types = [kind for kind in (asked or usual) if kind != "table_row_wise" or plan.hosts > 1 or asked]
    if plan.group_size == 1 and not asked:
        types = [kind for kind in types if kind in ("table_wise", "data_parallel")] or types
    rows, dim = table.num_embeddings, table.embedding_dim
    over = {"row_wise": plan.group_size, "table_row_wise": plan.local_group_size}
    types = [kind for kind in types if not leaves_empty(rows, over.get(kind, 1))]
    if asked or len(types) <= 1:
        return types
    size = rows * dim * DTYPE_BYTES[plan.data_type] + state_bytes(plan.optimizer, rows, dim)
    split = [kind for kind in types if kind in ("row_wise", "table_row_wise")]
    whole = [kind for kind in types if kind not in split]
    single = table.ids <= 2 * table.bags
    if whole and (rows < ROWS_PER_RANK * plan.group_size or (size < SMALL_BYTES and single)):
        return whole
    return split if split and size > LARGE_SHARE * room_bytes else types


def all_options(
    schema: Schema, config: ShardingConfig, plan: Plan, room_bytes: int
) -> dict[str, list[TablePlan]]:
    """Every table's candidates, with ranks that serve for estimates: the partitioner chooses the real ones."""
    result = {}
    for table in schema.tables:
        described = described_table(table, schema, config)
        places = candidates(described, table.name, plan, config, room_bytes)
        result[table.name] = [_placed(place, plan, config, table.name) for place in places]
    return result


def _placed(option: TablePlan, plan: Plan, config: ShardingConfig, name: str) -> TablePlan:
    if option.sharding_type == "table_wise":
        return replace(option, ranks=(0,))
    if option.sharding_type == "table_row_wise":
        return replace(option, ranks=tuple(range(plan.local_group_size)))
    if option.sharding_type != "column_wise":
        return option
    constraint, dim = config.tables.get(name, TableConstraint()), option.embedding_dim
    least = constraint.min_partition or min(TORCHREC_LEAST_COLUMNS, dim)
    width = next(width for width in range(least, dim + 1) if not width % 4 and not dim % width)
    free = len(constraint.ranks) or plan.group_size
    if dim // width > free:
        raise InputError(
            f"sharding.tables.{name}: {dim // width} column shards of {width} columns on {free} ranks; raise min_partition to "
            f"{-(-dim // free)} or more, or allow table_wise"
        )
    return replace(option, ranks=tuple(range(dim // width)))
