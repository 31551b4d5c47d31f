"""The plan file: which table lives where, as JSON that a person can review. Imports no torch; sharder.py turns it into TorchRec's."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from data.errors import InputError
from data.schema import Schema
from data.schema.parse import parse_dataclass
from sharding.plan.constraints import ShardingConfig
from sharding.plan.dense_part import DenseCost

SHARDING_TYPES = ("data_parallel", "table_wise", "row_wise", "table_row_wise", "column_wise")
KERNELS = ("fused", "fused_uvm", "fused_uvm_caching", "dense")
FORMAT = 2
DIFFERENCES_SHOWN = 5
REPLAN = "write a new one with `mbcnet plan make`"


@dataclass(frozen=True)
class TablePlan:
    """Where one table lives, and what it was taken to be.

    Attributes:
        sharding_type: data_parallel, table_wise, row_wise, table_row_wise or column_wise.
        compute_kernel: fused, fused_uvm, fused_uvm_caching, or dense for data_parallel.
        ranks: table_wise: its rank; table_row_wise: the ranks of its host; column_wise: one a column shard, in order;
            row_wise and data_parallel: empty, since they use every rank.
        num_embeddings, embedding_dim: of the table; 0 in files of the first format.
        bags: fields that look it up.
        ids: mean ids that one row of data looks up, over all its fields.
        cardinality: distinct ids that occur; 0: unknown.
        cache_ratio: share of rows cached in HBM; 0 unless fused_uvm_caching.
        zch_buckets: parts of a table that gives rows to unbounded ids; 0: it does not.
    """

    sharding_type: str
    compute_kernel: str
    ranks: tuple[int, ...] = ()
    num_embeddings: int = 0
    embedding_dim: int = 0
    bags: int = 1
    ids: float = 1.0
    cardinality: int = 0
    cache_ratio: float = 0.0
    zch_buckets: int = 0


@dataclass(frozen=True)
class Plan:
    """A sharding plan keyed by table, with what it was made for.

    Attributes:
        world_size: ranks.
        local_world_size: ranks of one host.
        device: cpu or cuda.
        schema: fingerprint of the schema.
        tables: table name -> its place.
        batch_size_per_rank: rows of one rank's batch; 0 if unknown.
        optimizer: of the tables; its state is counted.
        data_type: of rows.
        forward_precision, backward_precision: of what crosses ranks.
        prefetch: of cached rows.
        replicas: groups that hold all tables each; ranks in `tables` count inside one group.
        cluster: what it was made for, HOSTSxDEVICES:KIND, and
        cluster_fingerprint: of its figures.
        versions: of the packages that made it.
        dense: the rest of the model that it was made beside; zeros if unknown.
        format: of the file.
    """

    world_size: int
    local_world_size: int
    device: str
    schema: str
    tables: dict[str, TablePlan]
    batch_size_per_rank: int = 0
    optimizer: Literal["rowwise_adagrad", "adagrad", "sgd", "adam"] = "rowwise_adagrad"
    data_type: Literal["fp32", "fp16", "bf16"] = "fp32"
    forward_precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    backward_precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    prefetch: bool = False
    replicas: int = 1
    cluster: str = ""
    cluster_fingerprint: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    dense: DenseCost = DenseCost()
    format: int = 1

    @property
    def group_size(self) -> int:
        """Ranks that share one copy of the tables."""
        return self.world_size // self.replicas

    @property
    def local_group_size(self) -> int:
        """Ranks of one host inside one group. DMPCollection deals a host's ranks to the groups in turn."""
        return self.local_world_size // self.replicas

    @property
    def hosts(self) -> int:
        """Machines."""
        return max(1, self.world_size // self.local_world_size)


def plan_text(plan: Plan) -> str:
    """The plan file: JSON, one line a table; what is as by default is left out."""
    head = {key: value for key, value in asdict(plan).items() if key not in ("tables", "format")}
    lines = [
        f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in ({"format": FORMAT} | head).items()
    ]
    tables = [
        f"    {json.dumps(name)}: {json.dumps(_table_entry(table))}" for name, table in plan.tables.items()
    ]
    return "{\n" + "\n".join(lines) + '\n  "tables": {\n' + ",\n".join(tables) + "\n  }\n}\n"


def write_plan(plan: Plan, path: Path) -> None:
    """Write a plan file.

    Raises:
        InputError: the path cannot be written.
    """
    draft = path.with_name(path.name + ".part")  # a reader never meets half a plan
    try:
        draft.write_text(plan_text(plan))
        draft.replace(path)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); choose another path with -o"
        ) from None


def _table_entry(table: TablePlan) -> dict[str, Any]:
    required = ("sharding_type", "compute_kernel")
    defaults = {each.name: each.default for each in fields(TablePlan) if each.name not in required}
    return {key: value for key, value in asdict(table).items() if key in required or value != defaults[key]}


def read_plan(path: Path) -> Plan:
    """Read a plan file.

    Raises:
        InputError: no such file, not JSON, or not a plan.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except ValueError:
        raise InputError(f"{path}: not text; {REPLAN}") from None
    return plan_of_text(text, str(path))


def plan_of_text(text: str, source: str) -> Plan:
    """Parse the text of a plan file.

    Raises:
        InputError: not JSON, or not a plan.
    """
    try:
        table: Any = json.loads(text)
    except ValueError as error:
        raise InputError(f"{source}: not JSON ({error}); {REPLAN}") from None
    if isinstance(table, dict) and isinstance(table.get("format"), int) and table["format"] > FORMAT:
        raise InputError(
            f"{source}: format = {table['format']}, this version reads up to {FORMAT}; update mbcnet, or {REPLAN}"
        )
    plan = parse_dataclass(Plan, table, source)
    check_shape(plan, source)
    return plan


def check_shape(plan: Plan, source: str) -> None:
    """Refuse a plan that contradicts itself or that the platform computes wrongly.

    Raises:
        InputError: naming the plan, the table or key, the value and the mend.
    """
    for key in ("world_size", "local_world_size", "replicas"):
        if getattr(plan, key) < 1:
            raise InputError(
                f"{source}: {key} = {getattr(plan, key)}: wanted 1 or more; write a new one with `mbcnet plan make`"
            )
    for whole, part in (("world_size", "local_world_size"), ("local_world_size", "replicas")):
        if getattr(plan, whole) % getattr(plan, part):
            raise InputError(
                f"{source}: {part} = {getattr(plan, part)}: wanted a divisor of {whole} = {getattr(plan, whole)}; change it"
            )
    if plan.device not in ("cpu", "cuda"):
        raise InputError(f"{source}: device = {plan.device!r}: wanted 'cpu' or 'cuda'; change it")
    problem = device_problem(plan)
    if problem:
        raise InputError(f"{source}: {problem}")
    for name, table in plan.tables.items():
        problem = _table_problem(table, plan)
        if problem:
            raise InputError(f"{source}: tables.{name}.{problem}")


def device_problem(plan: Plan) -> str:
    """What the plan asks for and its device cannot do, as `key = value: reason; mend`, or an empty string."""
    if plan.device == "cpu":
        if plan.data_type == "bf16":
            return "data_type = 'bf16': FBGEMM's kernels for a CPU know no bf16 rows; use 'fp16' or 'fp32'"
        if plan.prefetch:
            return "prefetch = true: on a CPU there is no cache of rows to fill ahead; set it to false, or plan for cuda"
        if plan.replicas > 1:
            return f"replicas = {plan.replicas}: TorchRec averages groups of ranks on cuda only; set it to 1, or plan for cuda"
    cached = any(table.compute_kernel == "fused_uvm_caching" for table in plan.tables.values())
    if plan.replicas > 1 and plan.optimizer not in ("rowwise_adagrad", "adagrad"):
        return f"replicas = {plan.replicas}: TorchRec averages an Adagrad's state, and {plan.optimizer} has none; set it to 1"
    if plan.replicas > 1 and cached:
        return (
            f"replicas = {plan.replicas}: TorchRec averages rows without those in the cache of fused_uvm_caching; set it to 1, or keep "
            "these tables fused"
        )
    unbounded = any(table.zch_buckets for table in plan.tables.values())
    for key, usual in (("replicas", 1), ("prefetch", False)):
        if unbounded and getattr(plan, key) != usual:
            return f"{key} = {json.dumps(getattr(plan, key))}: not with fields of encoding 'zch', whose ids are not averaged or fetched ahead; set it to {json.dumps(usual)}"
    if plan.prefetch and plan.tables and not cached:
        return "prefetch = true: no table has the kernel fused_uvm_caching, so there is no cache to fill ahead; set it to false"
    return ""


def check_plan(
    plan: Plan,
    schema: Schema,
    *,
    world_size: int,
    device: str,
    source: str,
    local_world_size: int = 0,
    optimizer: str = "",
) -> None:
    """Refuse a plan that was made for another world size, schema, optimizer or device, or that the platform computes wrongly.

    Args:
        plan: read from `source`.
        schema: of the run.
        world_size: ranks of the run.
        device: cpu or cuda, of the run.
        source: names the plan in messages.
        local_world_size: ranks of one host; 0: not compared.
        optimizer: of the run's tables; empty: not compared.

    Raises:
        InputError: naming the plan, the table or key, the value, how the two differ and the mend.
    """
    mend = "plan again with `mbcnet plan make`, or leave sharding.plan empty"
    if plan.world_size != world_size:
        raise InputError(
            f"{source}: world_size = {plan.world_size}, but this run has {world_size} ranks; use -j "
            f"{plan.hosts}x{plan.local_world_size}, or {mend}"
        )
    if local_world_size and plan.local_world_size != local_world_size:
        raise InputError(
            f"{source}: local_world_size = {plan.local_world_size}, but this run has {local_world_size} ranks a host; use -j "
            f"{plan.hosts}x{plan.local_world_size}, or {mend}"
        )
    if plan.device != device:
        raise InputError(f"{source}: device = {plan.device!r}, but this run computes on {device!r}; {mend}")
    if optimizer and plan.format > 1 and plan.optimizer != optimizer:
        raise InputError(
            f"{source}: optimizer = {plan.optimizer!r}, but this run's tables use {optimizer!r}; {mend}"
        )
    differences = schema_differences(plan, schema)
    if differences:
        more = len(differences) - DIFFERENCES_SHOWN
        shown = "; ".join(differences[:DIFFERENCES_SHOWN]) + (f"; and {more} more" if more > 0 else "")
        raise InputError(f"{source}: made for another schema: {shown}; {mend}")
    check_shape(plan, source)


def constraint_differences(plan: Plan, config: ShardingConfig) -> list[str]:
    """How a plan differs from what a run's [sharding] asks for by name; empty if it keeps to all of it.

    A key that is as by default asks for nothing: the plan says what it is.
    """
    usual = ShardingConfig()
    lines = [
        f"{key}: plan {_shown(getattr(plan, key))}, run {_shown(getattr(config, key))}"
        for key in ("data_type", "forward_precision", "backward_precision", "prefetch", "replicas")
        if getattr(config, key) not in (getattr(usual, key), getattr(plan, key))
    ]
    for name, asked in config.tables.items():
        if name not in plan.tables:
            lines.append(f"tables.{name}: not in the plan")
            continue
        table = plan.tables[name]
        pairs = [
            ("sharding_types", table.sharding_type, asked.sharding_types),
            ("compute_kernels", table.compute_kernel, asked.compute_kernels),
        ]
        lines += [
            f"tables.{name}.{key}: plan {_shown(planned)}, run {_shown(list(allowed))}"
            for key, planned, allowed in pairs
            if allowed and planned not in allowed
        ]
        if asked.ranks and not set(table.ranks) <= set(asked.ranks):
            lines.append(f"tables.{name}.ranks: plan {list(table.ranks)}, run {list(asked.ranks)}")
        if asked.cache_ratio and table.cache_ratio and table.cache_ratio != asked.cache_ratio:
            lines.append(f"tables.{name}.cache_ratio: plan {table.cache_ratio}, run {asked.cache_ratio}")
    return lines


def _shown(value: Any) -> str:
    return json.dumps(value)


def schema_differences(plan: Plan, schema: Schema) -> list[str]:
    """How the tables of a plan and of a schema differ, one phrase a table; empty if the plan is of this schema."""
    tables = {table.name: table for table in schema.tables}
    lines = [f"table {name} is not planned" for name in tables if name not in plan.tables]
    lines += [f"table {name} is not in the schema" for name in plan.tables if name not in tables]
    for name, planned in plan.tables.items():
        if name not in tables or not planned.num_embeddings:
            continue
        table = tables[name]
        pairs = (
            ("num_embeddings", planned.num_embeddings, table.num_embeddings),
            ("embedding_dim", planned.embedding_dim, table.embedding_dim),
            ("fields", planned.bags, len(table.feature_names)),
            ("zch_buckets", planned.zch_buckets, table.zch.buckets if table.zch else 0),
        )
        changed = [f"{key} {old:,} -> {new:,}" for key, old, new in pairs if old != new]
        if changed:
            lines.append(f"table {name}: {', '.join(changed)}")
    if not lines and plan.schema != schema.fingerprint():
        lines.append(
            f"fingerprint {plan.schema} -> {schema.fingerprint()} (tables are equal; fields or groups differ)"
        )
    return lines


def _table_problem(table: TablePlan, plan: Plan) -> str:
    """What is wrong with one table's place, as `key = value: wanted ...; mend`, or an empty string."""
    if table.sharding_type == "grid_shard":
        return "sharding_type = 'grid_shard': with mean pooling TorchRec computes it wrongly; use 'table_row_wise' or 'column_wise'"
    if table.sharding_type not in SHARDING_TYPES:
        return f"sharding_type = {table.sharding_type!r}: wanted one of {', '.join(SHARDING_TYPES)}"
    if table.zch_buckets:
        problem = zch_place_problem(table, plan)
        if problem:
            return problem
    replicated = table.sharding_type == "data_parallel"
    if table.compute_kernel not in KERNELS or replicated != (table.compute_kernel == "dense"):
        wanted = "'dense'" if replicated else "'fused' (or fused_uvm, fused_uvm_caching on cuda)"
        return f"compute_kernel = {table.compute_kernel!r}: {table.sharding_type} wants {wanted}; change it"
    if replicated and plan.data_type == "fp16" and plan.optimizer != "sgd":
        return (
            f"sharding_type = 'data_parallel': a replicated table's optimizer computes in the rows' fp16, in which eps is 0 and {plan.optimizer} "
            "divides by it; use fp32 rows, or another type for this table"
        )
    if plan.device == "cpu" and "uvm" in table.compute_kernel:
        return f"compute_kernel = {table.compute_kernel!r}: a CPU has no device memory to page; use 'fused'"
    if not 0 <= table.cache_ratio <= 1 or (
        table.compute_kernel == "fused_uvm_caching" and not table.cache_ratio
    ):
        return f"cache_ratio = {table.cache_ratio}: wanted a share of rows in (0, 1]; use 0.2"
    return _ranks_problem(table, plan)


def zch_place_problem(table: TablePlan, plan: Plan) -> str:
    """What is wrong with the place of a table of encoding zch, as `key = value: wanted ...; mend`, or an empty string."""
    if table.sharding_type != "row_wise":
        return f"sharding_type = {table.sharding_type!r}: a table of encoding 'zch' is sharded by rows, each rank giving rows to its ids; use 'row_wise'"
    if table.compute_kernel != "fused":
        return f"compute_kernel = {table.compute_kernel!r}: rows of a table of encoding 'zch' change their ids in place; use 'fused'"
    if table.zch_buckets % plan.group_size:
        mend = -(-table.zch_buckets // plan.group_size) * plan.group_size
        return (
            f"zch_buckets = {table.zch_buckets}: wanted a multiple of the {plan.group_size} ranks, which hold whole buckets; set "
            f"zch_buckets = {mend} in the schema, or take a number of ranks that divides {table.zch_buckets}"
        )
    return ""


def _ranks_problem(table: TablePlan, plan: Plan) -> str:
    ranks, size, local = table.ranks, plan.group_size, plan.local_group_size
    where = f"ranks = {list(ranks)}: "
    if any(not 0 <= rank < size for rank in ranks):
        return f"{where}wanted ranks in [0, {size}); change them"
    kind = table.sharding_type
    over = {"row_wise": size, "table_row_wise": local}.get(kind, 1)
    if table.num_embeddings and leaves_empty(table.num_embeddings, over):
        return f"sharding_type = {kind!r}: {table.num_embeddings} rows over {over} ranks leave a rank without rows; use 'table_wise'"
    if kind in ("row_wise", "data_parallel"):
        if ranks and sorted(ranks) != list(range(size)):
            return f"{where}{kind} uses every rank; remove them"
    elif kind == "table_wise" and len(ranks) != 1:
        return f"{where}table_wise wants one rank; name one in [0, {size})"
    elif kind == "table_row_wise":
        first = ranks[0] - ranks[0] % local if ranks else 0
        if ranks != tuple(range(first, first + local)):
            return f"{where}table_row_wise wants the ranks of one host; write {list(range(first, first + local))}"
    elif kind == "column_wise":
        if not ranks or len(set(ranks)) < len(ranks):
            return f"{where}column_wise wants one rank a column shard, each once; change them"
        if table.embedding_dim % (4 * len(ranks)):
            return f"{where}{table.embedding_dim} columns do not divide into {len(ranks)} shards of a multiple of 4; name fewer ranks"
    return ""


def leaves_empty(rows: int, ranks: int) -> bool:
    """Whether a split of rows in blocks of ceil(rows / ranks) gives some rank none: FBGEMM was seen to fail there on a CPU."""
    return ranks > 1 and -(-rows // ranks) * (ranks - 1) >= rows


def plan_dict(plan: Plan) -> Mapping[str, Any]:
    """The plan file as a value, for --json."""
    return json.loads(plan_text(plan))
