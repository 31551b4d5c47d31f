"""Batch: what one rank trains on in one step.

Shapes: B rows of this rank, F sparse features, D dense columns.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable


@dataclass(frozen=True)
class Cursor:
    """A position in a stream: batches of this epoch that come before it. The next batch to read, or to train."""

    epoch: int = 0
    step: int = 0


@dataclass
class Batch(Pipelineable):
    """Rows on their way into the model.

    Attributes:
        dense_features: (B, D) float32; D may be 0.
        sparse_features: keys of `Schema.sparse`; values int64.
        weighted_features: keys of `Schema.weighted`, with weights float32; None if the schema has none.
        labels: (B,) float32 of 0 and 1.
        weights: (B,) float32. 1 in a full batch. A global batch that does not fill all ranks alike is padded: padding rows have
            weight 0, and real rows carry world_size * B / (real rows of all ranks), so that mean(weights * loss), averaged over
            ranks, is the exact mean over real rows.
        group_ids: (B,) int64, equal for rows of one GAUC group; None if the schema names no group column.
        cursor: the stream's position after this batch. It rides here because a pipeline reads two batches ahead of the one it trains:
            what a checkpoint must keep is the position of the trained batch, not the reader's.
    """

    dense_features: Tensor
    sparse_features: KeyedJaggedTensor
    weighted_features: KeyedJaggedTensor | None
    labels: Tensor
    weights: Tensor
    group_ids: Tensor | None = None
    cursor: Cursor = Cursor()

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        """Return the batch on `device`."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device=device, non_blocking=non_blocking)

        return replace(
            self,
            dense_features=move(self.dense_features),
            sparse_features=self.sparse_features.to(device=device, non_blocking=non_blocking),
            weighted_features=self.weighted_features
            and self.weighted_features.to(device=device, non_blocking=non_blocking),
            labels=move(self.labels),
            weights=move(self.weights),
            group_ids=None if self.group_ids is None else move(self.group_ids),
        )

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the CUDA allocator that `stream` uses these tensors."""
        for part in self._parts():
            part.record_stream(stream)  # type: ignore[arg-type]

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory, which copies to a GPU while it computes."""
        return replace(
            self,
            dense_features=self.dense_features.pin_memory(),
            sparse_features=self.sparse_features.pin_memory(),
            weighted_features=self.weighted_features and self.weighted_features.pin_memory(),
            labels=self.labels.pin_memory(),
            weights=self.weights.pin_memory(),
            group_ids=None if self.group_ids is None else self.group_ids.pin_memory(),
        )

    def _parts(self) -> list[Tensor | KeyedJaggedTensor]:
        parts = [self.dense_features, self.sparse_features, self.weighted_features, self.labels, self.weights, self.group_ids]
        return [part for part in parts if part is not None]
