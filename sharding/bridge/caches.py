"""The caches in HBM of tables that lie in host memory (kernel fused_uvm_caching). Models without one are left as they are."""

from collections.abc import Iterator
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import nn

from sharding.bridge.allocated import with_lookups


def purge_caches(model: nn.Module) -> None:
    """Forget what the caches hold. Call after rows were written behind them; what is in them alone is lost, so flush before."""
    for kernel in _kernels(model):
        kernel.reset_cache_states()
    release_cache_lines(model)


def release_cache_lines(model: nn.Module) -> None:
    """Unlock all rows in the caches. Call after forward passes without a backward pass, while no batch is fetched ahead.

    With prefetch a forward pass locks its rows and its backward pass unlocks them: rows of others would stay for good.
    """
    for kernel in _kernels(model):
        locks = kernel.lxu_cache_locking_counter
        locks.zero_()
        if locks.is_cuda:  # before rows are fetched on another stream
            torch.cuda.current_stream(locks.device).synchronize()


def _kernels(model: nn.Module) -> Iterator[Any]:
    kernels: list[Any] = [
        each for each in with_lookups(model) if isinstance(each, SplitTableBatchedEmbeddingBagsCodegen)
    ]
    return (kernel for kernel in kernels if kernel.lxu_cache_weights.numel())
