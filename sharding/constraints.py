"""What the planner may do, as a config. Apart from planner.py because that imports torchrec."""

from dataclasses import dataclass, field
from typing import Literal

ShardingTypeName = Literal["data_parallel", "table_wise", "row_wise", "table_row_wise", "column_wise"]


@dataclass(frozen=True)
class TableConstraint:
    """What the planner may do with one table. sharding_types: those allowed; empty: the run's default."""

    sharding_types: tuple[ShardingTypeName, ...] = ()


@dataclass(frozen=True)
class ShardingConfig:
    """How tables are placed.

    Attributes:
        plan: a plan file to run to the letter; empty: plan now and save what was used.
        sharding_types: types the planner may choose. column_wise is not among the defaults: rowwise Adagrad keeps one state for each row
            of each column shard, so a column-wise table is trained by another optimizer than any other plan of it. Under SGD and
            Adagrad it is the same; ask for it there.
        tables: constraints by table.
        hbm_gib, ddr_gib: memory of one rank that the planner may fill, in GiB.
    """

    plan: str = ""
    sharding_types: tuple[ShardingTypeName, ...] = ("table_wise", "row_wise")
    tables: dict[str, TableConstraint] = field(default_factory=dict)
    hbm_gib: float = 64.0
    ddr_gib: float = 16.0
