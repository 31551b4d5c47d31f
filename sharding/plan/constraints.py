"""What the planner may do, as a config. Apart from planner.py because that imports torchrec."""

from dataclasses import dataclass, field
from typing import Literal

from data.errors import InputError

ShardingTypeName = Literal["data_parallel", "table_wise", "row_wise", "table_row_wise", "column_wise"]
KernelName = Literal["fused", "fused_uvm", "fused_uvm_caching", "dense"]
DataTypeName = Literal["fp32", "fp16", "bf16"]
PrecisionName = Literal["fp32", "fp16", "bf16"]
ProposerName = Literal["greedy", "greedy_total", "dynamic_programming"]


@dataclass(frozen=True)
class TableConstraint:
    """What the planner may do with one table.

    Attributes:
        sharding_types: those allowed; empty: the run's.
        compute_kernels: those allowed; empty: the run's.
        ranks: ranks that may hold it; empty: any. row_wise and data_parallel use all.
        min_partition: least columns of a column shard, a multiple of 4.
        pooling_factor: mean ids a row, over one field; 0: as the schema says.
        cardinality: distinct ids that occur; 0: as the schema says, else every row.
        cache_ratio: share of rows cached in HBM by fused_uvm_caching; 0: the run's.
    """

    sharding_types: tuple[ShardingTypeName, ...] = ()
    compute_kernels: tuple[KernelName, ...] = ()
    ranks: tuple[int, ...] = ()
    min_partition: int = 0
    pooling_factor: float = 0.0
    cardinality: int = 0
    cache_ratio: float = 0.0

    def __post_init__(self) -> None:
        """Refuse absurd figures."""
        if self.min_partition < 0 or self.min_partition % 4:
            raise InputError(
                f"min_partition = {self.min_partition}: wanted a multiple of 4, or 0; FBGEMM's rows are; use 4 or more"
            )
        for key in ("pooling_factor", "cardinality"):
            if getattr(self, key) < 0:
                raise InputError(
                    f"{key} = {getattr(self, key)}: wanted 0 (as the schema says) or more; remove the minus"
                )
        _check_share("cache_ratio", self.cache_ratio)
        if any(rank < 0 for rank in self.ranks) or len(set(self.ranks)) < len(self.ranks):
            raise InputError(
                f"ranks = {list(self.ranks)}: wanted ranks of 0 or more, each once; mend the list"
            )


@dataclass(frozen=True)
class ShardingConfig:
    """How tables are placed.

    Attributes:
        plan: a plan file to run to the letter; empty: plan now and save what was used.
        cluster: HOSTSxDEVICES:KIND, a preset or a TOML file, as `mbcnet plan --cluster`; empty: what the run finds.
        sharding_types: types the planner may choose. column_wise is not among the defaults: rowwise Adagrad keeps one state for each row
            of each column shard, so a column-wise table is trained by another optimizer than any other plan of it. Under SGD and
            Adagrad it is the same; ask for it there. table_row_wise matters on two hosts or more.
        compute_kernels: kernels the planner may choose. The uvm ones keep rows in host memory: only where HBM is short.
        tables: constraints by table.
        data_type: of the rows. Optimizer state stays fp32.
        hbm_gib, ddr_gib: memory of one rank that the planner may fill, in GiB; 0: the cluster's.
        storage_reserve: share of that memory kept free, for CUDA's and NCCL's own buffers and fragments.
        cache_ratio: share of rows cached in HBM by fused_uvm_caching.
        assumed_pooling_factor: mean ids a row of multi-valued fields that nobody measured.
        forward_precision, backward_precision: dtype in which pooled rows and their gradients cross ranks.
        prefetch: fetch the cached rows of the next batch during this one (fused_uvm_caching, cuda).
        replicas: groups of ranks that hold all tables each and average them (2-D parallelism); 1: none.
        proposers: TorchRec's searches, in order; greedy_total sorts by the sum over shards instead of the largest.
        partitioner: TorchRec's way of dealing shards to ranks.
        estimator: whose times steer the search: ours (sharding/cost/estimate.py, which is also what reports show) or TorchRec's.
        search_seconds: budget of the search.
    """

    plan: str = ""
    cluster: str = ""
    sharding_types: tuple[ShardingTypeName, ...] = ("table_wise", "row_wise", "table_row_wise")
    compute_kernels: tuple[KernelName, ...] = ("fused",)
    tables: dict[str, TableConstraint] = field(default_factory=dict)
    data_type: DataTypeName = "fp32"
    hbm_gib: float = 0.0
    ddr_gib: float = 0.0
    storage_reserve: float = 0.1
    cache_ratio: float = 0.2
    assumed_pooling_factor: float = 10.0
    forward_precision: PrecisionName = "fp32"
    backward_precision: PrecisionName = "fp32"
    prefetch: bool = False
    replicas: int = 1
    proposers: tuple[ProposerName, ...] = ("greedy", "greedy_total")
    partitioner: Literal["greedy", "memory_balanced"] = "greedy"
    estimator: Literal["mbcnet", "torchrec"] = "mbcnet"
    search_seconds: float = 60.0

    def __post_init__(self) -> None:
        """Refuse absurd figures."""
        for key in ("sharding_types", "compute_kernels", "proposers"):
            if not getattr(self, key):
                raise InputError(f"{key} = []: wanted at least one; remove the key to have the default")
        for key in ("hbm_gib", "ddr_gib"):
            if getattr(self, key) < 0:
                raise InputError(
                    f"{key} = {getattr(self, key)}: wanted 0 (the cluster's) or more; remove the minus"
                )
        _check_share("cache_ratio", self.cache_ratio)
        if not 0 <= self.storage_reserve < 1:
            raise InputError(
                f"storage_reserve = {self.storage_reserve}: wanted a share in [0, 1); 0.1 is usual"
            )
        if self.replicas < 1:
            raise InputError(f"replicas = {self.replicas}: wanted 1 (no replicated groups) or more; set 1")
        if self.search_seconds <= 0 or self.assumed_pooling_factor <= 0:
            raise InputError(
                f"search_seconds = {self.search_seconds}, assumed_pooling_factor = {self.assumed_pooling_factor}: "
                "wanted numbers above 0; raise them"
            )


def _check_share(key: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise InputError(f"{key} = {value}: wanted a share of rows in [0, 1]; 0.2 is usual")
