"""The blocks of a sharded tensor that this rank holds, in either of TorchRec's two forms; and initial rows, equal under every plan and world size."""

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn, optim
from torch.distributed.tensor import DTensor
from torchrec.distributed.model_parallel import DMPCollection
from torchrec.optim.keyed import KeyedOptimizer, KeyedOptimizerWrapper

CHUNK_ROWS = 4_096  # initial rows that one generator draws


class LocalBlock(NamedTuple):
    """A block: live storage, and where it begins in the whole tensor."""

    tensor: Tensor
    offsets: tuple[int, ...]


def local_blocks(value: Any) -> Iterator[LocalBlock] | None:
    """List the blocks of a ShardedTensor, or of a DTensor as replicated groups have them; None for a tensor that is whole."""
    if isinstance(value, DTensor):
        local: Any = value.to_local()
        # a rank without a block has one offset all the same
        pairs = zip(local.local_shards(), local.local_offsets(), strict=False)
        return (LocalBlock(tensor, tuple(offsets)) for tensor, offsets in pairs)
    shards = getattr(value, "local_shards", None)
    if shards is None:
        return None
    return (LocalBlock(shard.tensor, tuple(shard.metadata.shard_offsets)) for shard in shards())


def is_copy(model: nn.Module) -> bool:
    """Whether another group of ranks, before this rank's, holds the same tables: of replicated groups the first one counts."""
    return isinstance(model, DMPCollection) and dist.get_rank(model._default_ctx.replica_pg) > 0


def wrapped_optimizer(keyed: KeyedOptimizer) -> optim.Optimizer:
    """The torch optimizer that TorchRec's wrapper drives; the optimizer itself if there is no wrapper."""
    return keyed._optimizer if isinstance(keyed, KeyedOptimizerWrapper) else keyed


def table_rows(seed: int, table: str, start: int, stop: int, dim: int, std: float) -> Iterator[tuple[int, Tensor]]:
    """Yield (first row, (rows, dim) float32 normal values) that cover rows [start, stop) of a table.

    Each chunk of 4,096 rows has a generator of its own, so a shard draws only the chunks it holds. A chunk is
    always drawn whole: how torch fills a tensor with normal values depends on its size, so a part of a chunk
    would have other values than the same rows of the whole.
    """
    for chunk in range(start // CHUNK_ROWS, -(-stop // CHUNK_ROWS)):
        digest = hashlib.sha256(f"{seed}/{table}/{chunk}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        first = chunk * CHUNK_ROWS
        low, high = max(start, first), min(stop, first + CHUNK_ROWS)
        values = torch.empty(CHUNK_ROWS, dim).normal_(0.0, std, generator=generator)
        yield low, values[low - first : high - first]


def initial_rows(
    state: dict[str, Any], tables: dict[str, str], *, seed: int, std: float, most: int | None = None
) -> Iterator[tuple[str, int, Tensor, Tensor]]:
    """Yield (table, first row, held, initial), both of (rows, columns): a piece that this rank holds, live, and its float32 initial values.

    `state` is the sharded model's; `tables`: name in it -> table name; `most`: of each table only so many rows, the first ones.
    """
    for name, table in tables.items():
        value = state[name]
        for tensor, (row, column) in local_blocks(value) or [LocalBlock(value, (0, 0))]:
            height, width = tensor.shape
            stop = row + height if most is None else min(row + height, most)
            for first, rows in table_rows(seed, table, row, stop, value.size(1), std) if row < stop else ():
                yield table, first, tensor[first - row : first - row + len(rows)], rows[:, column : column + width]


def initialise_tables(state: dict[str, Any], tables: dict[str, str], *, seed: int, std: float) -> None:
    """Fill the local shards of every table in place; see `initial_rows`."""
    with torch.no_grad():
        for _, _, held, initial in initial_rows(state, tables, seed=seed, std=std):
            held.copy_(initial)
