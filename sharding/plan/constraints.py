"""What the planner may do: the [sharding] part of a run's config."""

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from data.errors import InputError
from data.schema.bounds import Bounded, bounded

ShardingTypeName = Literal["data_parallel", "table_wise", "row_wise", "table_row_wise", "column_wise"]
KernelName = Literal["fused", "fused_uvm", "fused_uvm_caching", "dense"]
DtypeName = Literal["fp32", "fp16", "bf16"]
ProposerName = Literal["greedy", "greedy_total"]
# keys of [sharding] that a plan carries
CARRIED = ("data_type", "forward_precision", "backward_precision", "prefetch", "replicas")
some = partial(bounded, min_length=1, wanted="at least one", fix="remove the key to have the default")


@dataclass(frozen=True)
class TableConstraint(Bounded):
    """What the planner may do with one table. What is empty or 0 is as the run's config or the schema says."""

    sharding_types: tuple[ShardingTypeName, ...] = ()
    compute_kernels: tuple[KernelName, ...] = ()
    ranks: tuple[int, ...] = bounded((), at_least=0)  # that may hold it; row_wise and data_parallel use all
    min_partition: int = bounded(0, at_least=0)  # fewest columns of a column shard, a multiple of 4
    pooling_factor: float = bounded(0.0, at_least=0)  # mean ids per row and field
    cardinality: int = bounded(0, at_least=0)  # distinct ids that occur; if nobody says, every row
    cache_ratio: float = bounded(0.0, at_least=0, at_most=1, fix="0.2 is usual")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_partition % 4:
            raise InputError(
                f"min_partition = {self.min_partition}: wanted a multiple of 4, or 0; FBGEMM's rows are; use 4 or more"
            )
        if len(set(self.ranks)) < len(self.ranks):
            raise InputError(f"ranks = {list(self.ranks)}: wanted each rank once; change the list")


@dataclass(frozen=True)
class ShardingConfig(Bounded):
    """How tables are placed."""

    plan: str = ""  # a plan file to run to the letter; empty: plan now and save what was used
    cluster: str = ""  # as of `mbcnet plan --cluster`; empty: what the run finds
    # column_wise is not among the defaults: rowwise Adagrad keeps one state for each row of each column shard, so a column-wise
    # table is trained by another optimizer than any other plan of it. Under SGD and Adagrad it is the same; ask for it there.
    # table_row_wise matters on two hosts or more.
    sharding_types: tuple[ShardingTypeName, ...] = some(("table_wise", "row_wise", "table_row_wise"))
    # those of uvm keep rows in host memory: only where HBM is short
    compute_kernels: tuple[KernelName, ...] = some(("fused",))
    tables: dict[str, TableConstraint] = field(default_factory=dict)
    data_type: DtypeName = "fp32"  # of the rows; optimizer state stays fp32
    hbm_gib: float = bounded(0.0, at_least=0)  # memory of one rank that the planner may fill; 0: the cluster's
    ddr_gib: float = bounded(0.0, at_least=0)  # the same of host memory
    # share of that memory kept free, for CUDA's and NCCL's own buffers and fragments
    storage_reserve: float = bounded(0.1, at_least=0, below=1, fix="0.1 is usual")
    # share of rows cached in HBM by fused_uvm_caching
    cache_ratio: float = bounded(0.2, at_least=0, at_most=1, fix="0.2 is usual")
    assumed_pooling_factor: float = bounded(10.0, above=0)  # mean ids a row of multi-valued fields that nobody measured
    forward_precision: DtypeName = "fp32"  # of pooled rows between ranks
    backward_precision: DtypeName = "fp32"  # of their gradients
    prefetch: bool = False  # fetch the next batch's cached rows during this one (fused_uvm_caching, cuda)
    replicas: int = bounded(1, at_least=1)  # groups of ranks that hold all tables each and average them
    # TorchRec's searches, in order; greedy_total sorts by the sum over shards instead of the largest
    proposers: tuple[ProposerName, ...] = some(("greedy", "greedy_total"))
    partitioner: Literal["greedy", "memory_balanced"] = "greedy"  # TorchRec's way of dealing shards to ranks
    estimator: Literal["mbcnet"] = "mbcnet"  # was a choice; configs of earlier runs have it
    search_seconds: float = bounded(60.0, above=0)  # budget of the search

    def of(self, table: str) -> TableConstraint:
        """What is asked of one table."""
        return self.tables.get(table, TableConstraint())
