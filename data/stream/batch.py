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

from data.reading.columns import Gathered, Ragged, offsets_of
from data.reading.order import Cursor


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


def to_batch(rows: Gathered, keys: Keys, *, weights: np.ndarray, cursor: Cursor) -> Batch:
    """Wrap a batch's arrays as tensors, without copying.

    Args:
        rows: gathered rows with padding.
        keys: names of the sparse features.
        weights: (B,) float32, see `Batch.weights`.
        cursor: the stream's position after this batch.
    """
    weighted = None
    if keys.weighted:
        weighted = KeyedJaggedTensor(
            keys.weighted,
            torch.from_numpy(rows.weighted_ids),
            torch.from_numpy(rows.id_weights),
            torch.from_numpy(rows.weighted_lengths),
        )
    return Batch(
        dense_features=torch.from_numpy(rows.dense),
        sparse_features=KeyedJaggedTensor(
            keys.sparse, torch.from_numpy(rows.ids), lengths=torch.from_numpy(rows.lengths)
        ),
        weighted_features=weighted,
        labels=torch.from_numpy(rows.labels),
        weights=torch.from_numpy(weights),
        group_ids=None if rows.group_ids is None else torch.from_numpy(rows.group_ids),
        cursor=cursor,
    )


def permuted_by_fbgemm(ragged: Ragged, permutation: np.ndarray) -> Ragged:
    """Do what `columns.permuted` does a list at a time, not an id at a time: 1.5 times as fast on lists of one id, 5 times on thirty."""
    lengths, values, weights = torch.ops.fbgemm.permute_1D_sparse_data(
        torch.from_numpy(permutation.astype(np.int32)),
        torch.from_numpy(np.diff(ragged.offsets)),
        _writable(ragged.values),
        None if ragged.weights is None else _writable(ragged.weights),
        None,
    )
    return Ragged(values.numpy(), offsets_of(lengths.numpy()), None if weights is None else weights.numpy())


def _writable(array: np.ndarray) -> Tensor:
    """As a tensor; torch warns of memory that is not to be written, such as Arrow's."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())
