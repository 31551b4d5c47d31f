"""Adagrad of FBGEMM's tables, row-wise or exact, on a processor of Intel's, by a loop of our own.

FBGEMM generates the row-wise update as machine code, with instructions of SSE among those of AVX. Intel's processors wait at each, half a
microsecond a row in all: 45 of 55 ms of a backward pass of 133 tables and 1,024 rows. Its code for a table that several features read takes a fifth
of that; with the loop, which reads the gradient where it lies, lookup and update together take .79 of what they take with that code. Of 26 exact
tables of 64 columns and 1,024 rows a backward pass takes 7 ms instead of 18. FBGEMM's for a CPU run on one thread, ours on all of torch's.
State, parameters and the rate stay FBGEMM's.
"""

from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor, nn

from mbcnet_rec.cpu.loops import update_rows
from mbcnet_rec.cpu.team import run_together
from sharding.bridge.allocated import with_lookups

MANY = 2**17  # looked-up numbers per thread, about 0.5 ms of work; with fewer, one thread does everything


def use_own_update(model: nn.Module) -> None:
    """Let the float32 tables of a sharded model be updated so; but for rounding, the numbers of a step stay."""
    kernels = [each for each in with_lookups(model) if isinstance(each, SplitTableBatchedEmbeddingBagsCodegen)]
    for kernel in kernels:
        adagrad = kernel.optimizer in (EmbOptimType.EXACT_ROWWISE_ADAGRAD, EmbOptimType.EXACT_ADAGRAD)
        if (
            adagrad
            and not kernel.is_nobag
            and kernel.weights_host.dtype == torch.float32
            and kernel.output_dtype == SparseType.FP32.as_int()
        ):
            kernel.forward = OwnUpdate(kernel)  # type: ignore[method-assign]


class OwnUpdate:
    """The forward pass of a kernel. Calls of what only FBGEMM can do go to it: a batch size for each feature, gradients of weights."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self._generated = kernel, kernel.forward
        self.starts = torch.stack([kernel.weights_offsets, kernel.momentum1_offsets]).numpy()
        self.columns = kernel.D_offsets.long().numpy()
        # features of one table are neighbours: where each table's begin, and the end of the last
        self.tables = np.flatnonzero(np.diff(self.starts[0], prepend=-1, append=-1))

    def __call__(
        self, indices: Tensor, offsets: Tensor, per_sample_weights: Tensor | None = None, **others: Any
    ) -> Tensor:
        """Look up the rows of B bags of each of F features: (F B + 1,) offsets -> (B, sum of the tables' widths)."""
        if others or (per_sample_weights is not None and per_sample_weights.requires_grad):
            return self._generated(indices, offsets, per_sample_weights, **others)
        offsets = offsets.to(indices.dtype)
        return _Rows.apply(self, self.kernel.placeholder_autograd_tensor, indices, offsets, per_sample_weights)  # type: ignore[no-any-return]

    def shares(self, offsets: np.ndarray) -> list[tuple[int, int]]:
        """Split the features into ranges (first, past the last), one for each of torch's threads: whole tables, about as many looked-up numbers in each."""
        features = len(self.columns) - 1
        numbers = np.diff(offsets[np.arange(features + 1) * ((len(offsets) - 1) // features)]) * np.diff(self.columns)
        before = np.concatenate([[0], np.cumsum(numbers)])
        threads = torch.get_num_threads()
        threads = threads if before[-1] >= MANY * threads else 1
        cuts = np.searchsorted(before[self.tables], before[-1] * np.arange(1, threads) / threads)
        edges = np.unique([0, *self.tables[cuts], self.tables[-1]]).tolist()
        return list(pairwise(edges))


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, update: OwnUpdate, _: Tensor, indices: Tensor, offsets: Tensor, weights: Tensor | None
    ) -> Tensor:
        kernel: Any = update.kernel
        ctx.update, ctx.weights = update, weights
        ctx.save_for_backward(indices, offsets)
        return torch.ops.fbgemm.split_embedding_codegen_forward_cpu(  # type: ignore[no-any-return]
            kernel.weights_host, kernel.weights_offsets, kernel.D_offsets, kernel.total_D, kernel.hash_size_cumsum, indices, offsets,
            kernel.pooling_mode.value, weights, kernel.output_dtype,
        )  # fmt: skip

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        kernel, (indices, offsets) = ctx.update.kernel, ctx.saved_tensors
        if gradient.stride(1) != 1:
            gradient = gradient.contiguous()
        flat = gradient.as_strided([(len(gradient) - 1) * gradient.stride(0) + gradient.shape[1]], [1])
        weights = flat.new_empty(0) if ctx.weights is None else ctx.weights
        update = partial(
            update_rows, kernel.weights_host.detach().numpy(), kernel.momentum1_host.detach().numpy(), ctx.update.starts, ctx.update.columns,
            indices.numpy(), offsets.numpy(), flat.numpy(), gradient.stride(0), weights.numpy(), kernel.pooling_mode == PoolingMode.MEAN,
            kernel.get_learning_rate(), kernel.optimizer_args.eps, kernel.optimizer == EmbOptimType.EXACT_ADAGRAD,
        )  # fmt: skip
        run_together([partial(update, *share) for share in ctx.update.shares(offsets.numpy())])
        return (None,) * 5
