"""Where each table lives: the plan as a value and as a file that a person can review.

With it: the shards it gives every rank, what the dense part costs, and what no platform runs.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from data.errors import InputError
from data.schema.bounds import Bounded, bounded
from data.schema.parse import parse_dataclass
from sharding.plan.cluster import LINK_EFFICIENCY, MEMORY_EFFICIENCY, Cluster
from sharding.plan.constraints import DtypeName, KernelName, ShardingTypeName

SHARDING_TYPES = get_args(ShardingTypeName)
KERNELS = get_args(KernelName)
SEQUENCE_TYPES = ("table_wise", "row_wise", "column_wise")  # of tables that sequences read
FORMAT = 2  # of the plan file
REPLAN = "plan again with `mbcnet plan make`"
UNIFORM = ("row_wise", "data_parallel")  # types that use every rank
FLOAT_BYTES = 4
TRAINING_FLOPS = 3  # a backward pass costs two forward ones
COPIES = 5  # weight, gradient, all-reduce bucket, and Adam's two moments


@dataclass(frozen=True)
class TablePlan:
    """Where one table lives, and what the planner took it to be.

    `ranks` of table_wise is its rank, of table_row_wise the ranks of its host, of column_wise one a column shard, in order;
    row_wise and data_parallel have none, since they use every rank.
    """

    sharding_type: str
    compute_kernel: str  # dense for data_parallel, else fused, fused_uvm or fused_uvm_caching
    ranks: tuple[int, ...] = ()
    num_embeddings: int = 0
    embedding_dim: int = 0
    bags: int = 1  # fields that look it up
    ids: float = 1.0  # mean ids that one row of data looks up, over all its fields
    cardinality: int = 0  # distinct ids that occur; 0: unknown
    cache_ratio: float = 0.0  # share of rows cached in HBM; 0 unless fused_uvm_caching
    zch_buckets: int = 0  # parts of a table that gives rows to unbounded ids; 0: it does not
    # of a table that sequences read: the rows that one row of data may get of it, none of them pooled
    positions: int = 0

    @property
    def outputs(self) -> int:
        """Rows that leave the table for one row of data."""
        return self.positions or self.bags


@dataclass(frozen=True)
class DenseCost(Bounded):
    """The part of a model that is in no table."""

    parameters: int = bounded(0, at_least=0)  # fp32
    forward_flops: float = bounded(0.0, at_least=0)  # of one row's forward pass, 2 a multiply-add
    activation_bytes: float = bounded(0.0, at_least=0)  # of one row, kept from forward to backward
    input_columns: float = bounded(0.0, at_least=0)  # Parquet values decoded per row

    def weight_bytes(self) -> int:
        """Weights with everything an optimizer step keeps beside them."""
        return self.parameters * FLOAT_BYTES * COPIES

    def memory_bytes(self, batch_size: int) -> int:
        """Bytes on one rank."""
        return self.weight_bytes() + int(self.activation_bytes * batch_size)

    def step_seconds(self, batch_size: int, cluster: Cluster) -> float:
        """Forward, backward and optimizer: the larger of arithmetic and of moving weights and activations."""
        flops = TRAINING_FLOPS * self.forward_flops * batch_size
        arithmetic = flops / (1e12 * cluster.dense_tflops * cluster.dense_efficiency)
        moved = self.weight_bytes() + 2 * self.activation_bytes * batch_size
        return max(arithmetic, moved / (MEMORY_EFFICIENCY * cluster.memory_bytes_per_second))

    def all_reduce_seconds(self, cluster: Cluster) -> float:
        """Gradients over all ranks, ring, without overlap."""
        size = cluster.world_size
        sent = 2 * self.parameters * FLOAT_BYTES * (size - 1) / size
        link = cluster.network_gb_per_second if cluster.hosts > 1 else cluster.nvlink_gb_per_second
        return sent / (LINK_EFFICIENCY * 1e9 * link)

    def decode_seconds(self, batch_size: int, cluster: Cluster) -> float:
        """Parquet values of one rank's batch, over its share of the host's cores."""
        cores = max(1.0, cluster.cores / cluster.devices_per_host)
        return self.input_columns * batch_size / (cores * cluster.decode_values_per_second)


@dataclass(frozen=True)
class Plan(Bounded):
    """A sharding plan keyed by table, with what it was made for."""

    world_size: int
    local_world_size: int  # ranks of one host
    device: Literal["cpu", "cuda"]
    schema: str  # its fingerprint
    tables: dict[str, TablePlan]
    batch_size_per_rank: int = 0  # rows; 0: unknown
    optimizer: Literal["rowwise_adagrad", "adagrad", "sgd", "adam"] = "rowwise_adagrad"  # of the tables
    data_type: DtypeName = "fp32"  # of the rows
    forward_precision: DtypeName = "fp32"  # of pooled rows between ranks
    backward_precision: DtypeName = "fp32"  # of their gradients
    prefetch: bool = False  # whether rows of the next batch are cached during this one
    replicas: int = bounded(1, at_least=1)  # groups that hold all tables each; `ranks` count inside one group
    cluster: str = ""  # HOSTSxDEVICES:KIND
    cluster_fingerprint: str = ""  # of that cluster's figures
    versions: dict[str, str] = field(default_factory=dict)  # of the packages that made it
    dense: DenseCost = DenseCost()  # the dense part of the model; zeros: unknown
    format: int = FORMAT

    @property
    def group_size(self) -> int:
        """Ranks that share one copy of the tables."""
        return self.world_size // self.replicas

    @property
    def local_group_size(self) -> int:
        """Ranks of one host inside one group. DMPCollection assigns a host's ranks to the groups in turn."""
        return self.local_world_size // self.replicas

    @property
    def hosts(self) -> int:
        """Machines."""
        return max(1, self.world_size // self.local_world_size)


Options = Mapping[str, list[TablePlan]]  # table -> placements that it may have


class Shard(NamedTuple):
    """A block of a table on a rank; rows may be 0."""

    rank: int
    rows: int
    columns: int


def shards_of(table: TablePlan, plan: Plan) -> list[Shard]:
    """List a table's shards in order, for the ranks of one group. Rows split as in TorchRec: blocks of ceil(rows / ranks)."""
    rows, dim = table.num_embeddings, table.embedding_dim
    if table.sharding_type == "data_parallel":
        return [Shard(rank, rows, dim) for rank in range(plan.group_size)]
    if table.sharding_type in ("table_wise", "column_wise"):
        return [Shard(rank, rows, dim // len(table.ranks)) for rank in table.ranks]
    ranks = range(plan.group_size) if table.sharding_type == "row_wise" else table.ranks
    block = -(-rows // len(ranks))
    return [Shard(rank, max(0, min(block, rows - index * block)), dim) for index, rank in enumerate(ranks)]


def with_kernels(table: TablePlan, kind: str, kernels: Sequence[str], cache_ratio: float) -> list[TablePlan]:
    """A table under a sharding type with each of the kernels, of which data_parallel has its own one; without ranks."""
    return [
        replace(
            table, sharding_type=kind, compute_kernel=kernel, ranks=(),
            cache_ratio=cache_ratio if kernel == "fused_uvm_caching" else 0.0,
        )
        for kernel in (["dense"] if kind == "data_parallel" else kernels)
    ]  # fmt: skip


def check_shape(plan: Plan, source: str) -> None:
    """Refuse, naming the fix, a plan that contradicts itself or that the platform computes wrongly; `source` stands before the key."""
    if plan.world_size < 1 or plan.local_world_size < 1:
        sizes = f"world_size = {plan.world_size}, local_world_size = {plan.local_world_size}"
        raise InputError(f"{source}{sizes}: wanted 1 or more of each; {REPLAN}")
    problem = device_problem(plan)
    for whole, part in (("world_size", "local_world_size"), ("local_world_size", "replicas")):
        if getattr(plan, whole) % getattr(plan, part):
            problem = f"{part} = {getattr(plan, part)}: wanted a divisor of {whole} = {getattr(plan, whole)}; change it"
    wrong = ((name, table_problem(table, plan)) for name, table in plan.tables.items())
    tables = (f"tables.{name}.{found}" for name, found in wrong if found)
    if problem := problem or next(tables, ""):
        raise InputError(source + problem)


def device_problem(plan: Plan) -> str:
    """What the plan asks for and its device cannot do, as `key = value: reason; fix`, or an empty string."""
    on_cpu, replicas = plan.device == "cpu", f"replicas = {plan.replicas}:"
    cached = any(table.compute_kernel == "fused_uvm_caching" for table in plan.tables.values())
    unbounded = any(table.zch_buckets for table in plan.tables.values())
    sequences = any(table.positions for table in plan.tables.values())
    averaged = plan.optimizer in ("rowwise_adagrad", "adagrad")
    zch = "not with fields of encoding 'zch', whose ids are not averaged or fetched ahead; set it to"
    refusals = [
        (plan.data_type == "bf16", "data_type = 'bf16': FBGEMM has no kernels for bf16 rows; use 'fp16' or 'fp32'"),
        (on_cpu and plan.prefetch, "prefetch = true: on a CPU there is no cache of rows to fill ahead; set it to false, or plan for cuda"),
    ]  # fmt: skip
    if plan.replicas > 1:
        refusals += [
            (on_cpu, f"{replicas} TorchRec averages groups of ranks on cuda only; set it to 1, or plan for cuda"),
            (not averaged, f"{replicas} TorchRec averages an Adagrad's state, and {plan.optimizer} has none; set it to 1"),
            (cached, f"{replicas} TorchRec averages rows without those in the cache of fused_uvm_caching; set it to 1, or keep these tables fused"),
            (unbounded, f"{replicas} {zch} 1"),
            (sequences, f"{replicas} not with sequences, whose tables were not seen to be averaged; set it to 1"),
        ]  # fmt: skip
    if plan.prefetch:
        nothing = "no table has the kernel fused_uvm_caching, so there is no cache to fill ahead"
        refusals += [
            (unbounded, f"prefetch = true: {zch} false"),
            (sequences, "prefetch = true: not with sequences, whose rows are not fetched ahead; set it to false"),
            (plan.tables and not cached, f"prefetch = true: {nothing}; set it to false"),
        ]
    return next((words for refused, words in refusals if refused), "")


def table_problem(table: TablePlan, plan: Plan) -> str:
    """What is wrong with one table's placement, as `key = value: wanted ...; fix`, or an empty string."""
    if table.sharding_type == "grid_shard":
        return "sharding_type = 'grid_shard': with mean pooling TorchRec computes it wrongly; use 'table_row_wise' or 'column_wise'"
    if table.sharding_type not in SHARDING_TYPES:
        return f"sharding_type = {table.sharding_type!r}: wanted one of {', '.join(SHARDING_TYPES)}"
    if table.zch_buckets and (problem := _zch_problem(table, plan)):
        return problem
    if table.positions and table.sharding_type not in SEQUENCE_TYPES:
        return f"sharding_type = {table.sharding_type!r}: a sequence reads this table; use one of {', '.join(SEQUENCE_TYPES)}"
    if table.positions and table.compute_kernel != "fused":
        return f"compute_kernel = {table.compute_kernel!r}: a sequence reads this table; use 'fused'"
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
    cached = table.compute_kernel == "fused_uvm_caching"
    if not 0 <= table.cache_ratio <= 1 or (cached and not table.cache_ratio):
        return f"cache_ratio = {table.cache_ratio}: wanted a share of rows in (0, 1]; use 0.2"
    return _ranks_problem(table, plan)


def _zch_problem(table: TablePlan, plan: Plan) -> str:
    """The same for a table of encoding zch."""
    if table.sharding_type != "row_wise":
        return f"sharding_type = {table.sharding_type!r}: a table of encoding 'zch' is sharded by rows, each rank giving rows to its ids; use 'row_wise'"
    if table.compute_kernel != "fused":
        return f"compute_kernel = {table.compute_kernel!r}: rows of a table of encoding 'zch' change their ids in place; use 'fused'"
    if table.zch_buckets % plan.group_size:
        whole = -(-table.zch_buckets // plan.group_size) * plan.group_size
        return (
            f"zch_buckets = {table.zch_buckets}: wanted a multiple of the {plan.group_size} ranks, which hold whole buckets; set "
            f"zch_buckets = {whole} in the schema, or take a number of ranks that divides {table.zch_buckets}"
        )
    return ""


def _ranks_problem(table: TablePlan, plan: Plan) -> str:
    ranks, size, local = table.ranks, plan.group_size, plan.local_group_size
    where = f"ranks = {list(ranks)}: "
    if any(not 0 <= rank < size for rank in ranks):
        return f"{where}wanted ranks in [0, {size}); change them"
    kind = table.sharding_type
    over = {"row_wise": size, "table_row_wise": local}.get(kind, 1)
    if table.num_embeddings and _leaves_empty(table.num_embeddings, over):
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


def _leaves_empty(rows: int, ranks: int) -> bool:
    """Whether a split of rows in blocks of ceil(rows / ranks) gives some rank none: FBGEMM was seen to fail there on a CPU."""
    return ranks > 1 and -(-rows // ranks) * (ranks - 1) >= rows


def plan_text(plan: Plan) -> str:
    """The plan file: JSON, one line a table; what is as by default is left out."""
    head = {"format": FORMAT} | asdict(plan)  # the first key
    tables: Any = head.pop("tables")
    usual = {each.name: each.default for each in fields(TablePlan)}
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    entries = []
    for name, table in tables.items():
        entry = {key: value for key, value in table.items() if value != usual[key]}
        entries.append(f"    {json.dumps(name)}: {json.dumps(entry)}")
    return "{\n" + "\n".join(lines) + '\n  "tables": {\n' + ",\n".join(entries) + "\n  }\n}\n"


def read_plan(path: Path) -> Plan:
    """Read a plan file; InputError if it is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); check the path, or {REPLAN}") from None
    return plan_of_text(text, str(path))


def plan_of_text(text: str, source: str) -> Plan:
    """Parse the text of a plan file; InputError if it is none."""
    try:
        table: Any = json.loads(text)
    except ValueError as error:
        raise InputError(f"{source}: not JSON ({error}); {REPLAN}") from None
    if isinstance(table, dict) and table.get("format", 1) != FORMAT:
        raise InputError(f"{source}: format = {table.get('format', 1)}, this version reads {FORMAT}; {REPLAN}")
    plan = parse_dataclass(Plan, table, source)
    check_shape(plan, f"{source}: ")
    return plan
