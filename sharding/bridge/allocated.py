"""Bytes of tables and optimizer state that a sharded model has allocated on this rank beside the planned ones, and its caches of rows in HBM."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    DenseTableBatchedEmbeddingBagsCodegen,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import nn
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection

from sharding.bridge.zch import STATE, BucketedCollisions
from sharding.cost.assess import Assessment
from sharding.cost.estimate import gib

PARTS: tuple[str, ...] = ("rows", "state", "cache")
# FBGEMM's names of the tensors of a table kernel -> the part of memory that they take
KERNEL_TENSORS = {
    **{f"weights_{where}": "rows" for where in ("dev", "host", "uvm")},
    **{f"momentum{order}_{where}": "state" for order in (1, 2) for where in ("dev", "host", "uvm")},
    **dict.fromkeys(("lxu_cache_weights", "lxu_cache_state", "lxu_state", "cache_index_table_map"), "cache"),
}


def held_bytes(model: nn.Module) -> dict[str, int]:
    """Count the bytes of this rank's tables: {"rows": ..., "state": ..., "cache": ...}. Call after the first step.

    Every storage counts once, as large as it was allocated. `state` holds what the fused kernels keep, and the ids of rows of
    encoding zch; a replicated table's state lives in the optimizer that the trainer gave it and is counted by `optimizer_bytes`.
    """
    counts = dict.fromkeys(PARTS, 0)
    seen: set[int] = set()
    for module in with_lookups(model):
        for kind, tensor in _kernel_tensors(module):
            storage = tensor.untyped_storage()
            if storage.data_ptr() and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                counts[kind] += storage.nbytes()
    return counts


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimizer's state tensors other than step counts."""
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.nbytes for value in values if torch.is_tensor(value) and value.numel() > 1)


def with_lookups(model: nn.Module) -> Iterator[nn.Module]:
    """Every module, also the lookups that TorchRec's sharded collections keep in a plain list."""
    for module in model.modules():
        yield module
        if isinstance(module, (ShardedEmbeddingBagCollection, ShardedEmbeddingCollection)):
            for lookup in module._lookups:
                # a replicated table's lookup is wrapped for gradients to be averaged
                yield from getattr(lookup, "module", lookup).modules()


def _kernel_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Tensors of one of FBGEMM's table kernels, or of rows with ids, by what they are; empty for every other module."""
    if isinstance(module, BucketedCollisions):
        return [("state", getattr(module, name)) for name in STATE]
    if isinstance(module, DenseTableBatchedEmbeddingBagsCodegen):
        return [("rows", parameter.data) for parameter in module.parameters()]
    if not isinstance(module, SplitTableBatchedEmbeddingBagsCodegen):
        return []
    tensors = [(kind, getattr(module, name, None)) for name, kind in KERNEL_TENSORS.items()]
    # one integer stands where a table has no such tensor
    return [
        (kind, tensor.data)
        for kind, tensor in tensors
        if tensor is not None and (tensor.numel() > 1 or tensor.dtype != torch.int64)
    ]


def planned_against_held(
    assessment: Assessment, rank: int, held: Sequence[Mapping[str, int]], step_seconds: float = 0.0
) -> str:
    """One line: what the plan said of a rank, what it holds, and how far the two are apart; measured seconds of 0 are left out.

    `held`: bytes of every rank, from `held_bytes`, with a replicated optimizer's state added to "state"; on cuda also "hbm".
    """
    planned, found = assessment.of_rank(rank).bytes, held[rank]
    ids = " and ids" if any(table.zch_buckets for table in assessment.plan.tables.values()) else ""
    parts = [
        _compared("rows", planned.rows, found["rows"]),
        _compared(f"optimizer state{ids}", planned.state, found["state"]),
    ]
    if planned.cache or found["cache"]:
        parts.append(_compared("cache", planned.cache, found["cache"]))
    if found.get("hbm"):
        parts.append(_compared("HBM in all", assessment.memory(assessment.of_rank(rank)).hbm, found["hbm"]))
    which = f"rank {rank}" + (f" of {len(held)}, the farthest off" if len(held) > 1 else "")
    line = f"planned against held ({which}): " + ", ".join(parts)
    if step_seconds and assessment.path.step:
        ratio = step_seconds / assessment.path.step
        line += (
            f"; step at least {1e3 * assessment.path.step:.1f} ms on {assessment.cluster}, measured {1e3 * step_seconds:.1f} ms "
            f"({ratio:.1f} times)"
        )
    return line


def _compared(what: str, planned: int, held: int) -> str:
    off = 0.0 if planned == held else 100 * (held - planned) / planned if planned else float("inf")
    return f"{what} {gib(planned)} -> {gib(held)} ({off:+.2f} %)"


def purge_caches(model: nn.Module) -> None:
    """Forget what the caches hold. Call after rows were written behind them; what is in them alone is lost, so flush before."""
    for kernel in _cached_kernels(model):
        kernel.reset_cache_states()
    release_cache_lines(model)


def release_cache_lines(model: nn.Module) -> None:
    """Unlock all rows in the caches. Call after forward passes without a backward pass, while no batch is fetched ahead.

    With prefetch a forward pass locks its rows and its backward pass unlocks them: rows of others would stay for good.
    """
    for kernel in _cached_kernels(model):
        locks = kernel.lxu_cache_locking_counter
        locks.zero_()
        if locks.is_cuda:  # before rows are fetched on another stream
            torch.cuda.current_stream(locks.device).synchronize()


def _cached_kernels(model: nn.Module) -> Iterator[Any]:
    """The kernels of tables that lie in host memory (fused_uvm_caching), with a cache in HBM; most models have none."""
    for kernel in with_lookups(model):
        if isinstance(kernel, SplitTableBatchedEmbeddingBagsCodegen):
            cached: Any = kernel.lxu_cache_weights
            if cached.numel():
                yield kernel
