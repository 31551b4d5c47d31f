"""Batch: what one rank trains on in one step.

Shapes: B rows of this rank, F sparse features, D dense columns.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from data.columns import Columns, Ragged
from data.order import Cursor


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
            ranks, is the exact mean over real rows. With negative_weights = "importance" real rows are weighed by label too.
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
        parts = [
            self.dense_features,
            self.sparse_features,
            self.weighted_features,
            self.labels,
            self.weights,
            self.group_ids,
        ]
        return [part for part in parts if part is not None]


class Keys(NamedTuple):
    """Names of the sparse features in the order that Columns holds them."""

    sparse: list[str]
    weighted: list[str]


def to_batch(columns: Columns, keys: Keys, *, weights: np.ndarray, cursor: Cursor) -> Batch:
    """Wrap as tensors, without copying where no single-valued field misses an id and there are no lists.

    Args:
        columns: gathered rows with padding.
        keys: names of the sparse features.
        weights: (B,) float32, see `Batch.weights`.
        cursor: the stream's position after this batch.
    """
    ids = columns.single_ids
    if ids.size == 0 or ids.min() >= 0:
        values, lengths = ids.reshape(-1), np.ones(ids.size, np.int32)
    else:
        present = ids >= 0
        values, lengths = ids[present], present.reshape(-1).astype(np.int32)
    if columns.lists:
        values = np.concatenate([values] + [ragged.values for ragged in columns.lists])
        lengths = np.concatenate([lengths] + [_lengths(ragged) for ragged in columns.lists])
    return Batch(
        dense_features=torch.from_numpy(columns.dense),
        sparse_features=KeyedJaggedTensor(
            keys.sparse, torch.from_numpy(values), lengths=torch.from_numpy(lengths)
        ),
        weighted_features=_weighted_kjt(columns.weighted_lists, keys.weighted),
        labels=torch.from_numpy(columns.labels),
        weights=torch.from_numpy(weights),
        group_ids=None if columns.group_ids is None else torch.from_numpy(columns.group_ids),
        cursor=cursor,
    )


def _weighted_kjt(lists: tuple[Ragged, ...], keys: list[str]) -> KeyedJaggedTensor | None:
    if not lists:
        return None
    values = np.concatenate([ragged.values for ragged in lists])
    weights = np.concatenate([ragged.weights for ragged in lists])  # type: ignore[misc]
    lengths = np.concatenate([_lengths(ragged) for ragged in lists])
    return KeyedJaggedTensor(
        keys, torch.from_numpy(values), torch.from_numpy(weights), torch.from_numpy(lengths)
    )


def _lengths(ragged: Ragged) -> np.ndarray:
    return np.diff(ragged.offsets).astype(np.int32)
