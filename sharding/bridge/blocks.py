"""The blocks of a sharded tensor that this rank holds, whichever of its two forms TorchRec gives it."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor
from torch.distributed.tensor import DTensor


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
