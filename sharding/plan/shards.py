"""Which rows and columns of a table each rank holds. Follows TorchRec's splits: blocks of ceil(rows / ranks). Imports no torch."""

from typing import NamedTuple

from sharding.plan.plan_file import Plan, TablePlan


class Shard(NamedTuple):
    """A block of a table on a rank; rows and columns may be 0 and the whole respectively."""

    rank: int
    rows: int
    columns: int


def shards_of(table: TablePlan, plan: Plan) -> list[Shard]:
    """List a table's shards in shard order, for the ranks of one group."""
    rows, dim = table.num_embeddings, table.embedding_dim
    if table.sharding_type == "data_parallel":
        return [Shard(rank, rows, dim) for rank in range(plan.group_size)]
    if table.sharding_type == "table_wise":
        return [Shard(table.ranks[0], rows, dim)]
    if table.sharding_type == "column_wise":
        return [Shard(rank, rows, dim // len(table.ranks)) for rank in table.ranks]
    ranks = range(plan.group_size) if table.sharding_type == "row_wise" else table.ranks
    block = -(-rows // len(ranks))
    return [Shard(rank, max(0, min(block, rows - index * block)), dim) for index, rank in enumerate(ranks)]
