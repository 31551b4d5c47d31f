"""The blocks of a sharded tensor that this rank holds, whichever of its two forms TorchRec gives it."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor, nn, optim
from torch.distributed.distributed_c10d import _abort_process_group
from torch.distributed.tensor import DTensor
from torchrec.distributed.model_parallel import DMPCollection
from torchrec.optim.keyed import KeyedOptimizer, KeyedOptimizerWrapper


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


def leave_groups(*, abort: bool = False) -> None:
    """Leave all process groups; with `abort` at once, where NCCL would wait for a collective that another rank never joins."""
    (_abort_process_group if abort else dist.destroy_process_group)()
