"""Batch: what one rank trains on in one step.

Shapes: B rows of this rank, F single-valued sparse features, L list features, D dense columns.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from data.reading.columns import Columns, Lists
from data.schema import Schema
from data.stream.order import Cursor

START = Cursor()
Run = tuple[Columns, int, int]  # rows [start, stop) of some columns


@dataclass
class Batch(Pipelineable):
    """Rows on their way into the model.

    Attributes:
        dense_features: (B, D) float32; D may be 0.
        sparse_features: keys of `Schema.sparse`; values int64.
        weighted_features: keys of `Schema.weighted`, with weights float32; None if the schema has none.
        labels: (B,) float32 of 0 and 1; of several labels (B, T), NaN where a row has none.
        weights: (B,) float32. 1 in a full batch. A global batch that does not fill all ranks alike is padded: padding rows have
            weight 0, and real rows carry world_size * B / (real rows of all ranks), so that mean(weights * loss), averaged over
            ranks, is the exact mean over real rows. With negative_weights = "importance" real rows are weighed by label too, and with
            a weight column by its value.
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
    cursor: Cursor = START

    def to(
        self, device: torch.device, non_blocking: bool = False, data_copy_stream: torch.Stream | None = None
    ) -> "Batch":
        """Return the batch on `device`. With `data_copy_stream` that one copies it, in place, into memory of the stream that will use it.

        A batch that no CPU holds lies there already.
        """
        if data_copy_stream is None:
            return self._with(lambda part: part.to(device=device, non_blocking=non_blocking))
        streams = torch.get_device_module(device)
        # which may still use the memory for an earlier batch, or still make this one
        data_copy_stream.wait_stream(streams.current_stream(device))
        if self.labels.device.type != "cpu":
            return self
        copy = self._with(lambda part: _empty_like(part, device))
        with streams.stream(data_copy_stream):
            for name, part in self._tensors().items():
                getattr(copy, name).copy_(part, non_blocking=non_blocking)
        return copy

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory, which copies to a GPU while it computes.

        How many ids each field has is counted here: on a GPU the host would wait for it.
        """
        for part in self._tensors().values():
            if isinstance(part, KeyedJaggedTensor):
                part.sync()
        return self._with(lambda part: part.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the CUDA allocator that `stream` uses these tensors."""
        for part in self._tensors().values():
            part.record_stream(stream)

    def _with(self, move: Callable[[Any], Any]) -> "Batch":
        return replace(self, **{name: move(part) for name, part in self._tensors().items()})

    def _tensors(self) -> dict[str, Any]:
        """Each Tensor and KeyedJaggedTensor by its field's name."""
        parts = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "cursor"}
        return {name: part for name, part in parts.items() if part is not None}


def _empty_like(part: Any, device: torch.device) -> Any:
    kind: Any = KeyedJaggedTensor if isinstance(part, KeyedJaggedTensor) else torch
    return kind.empty_like(part, device=device)


def gather(runs: Sequence[Run], num_rows: int, schema: Schema, cursor: Cursor = START) -> Batch:
    """Copy runs of rows (at least one run, which may be empty) into a batch of B = `num_rows`, padded by no ids, zeros, label 0, weight 0."""
    first = runs[0][0]
    pieces, _, list_lengths = _list_pieces([columns.lists for columns, _, _ in runs], runs, num_rows)
    padding = num_rows - sum(stop - start for _, start, stop in runs)

    def joined(name: str) -> np.ndarray:
        parts = [getattr(columns, name)[start:stop] for columns, start, stop in runs]
        zeros = [np.zeros((padding, *parts[0].shape[1:]), parts[0].dtype)] if padding else []
        return np.concatenate([*parts, *zeros])

    dense, labels = joined("dense"), joined("labels")
    group_ids = None if first.group_ids is None else joined("group_ids")
    if first.weights is None:
        weights = np.ones(num_rows, np.float32)
        weights[num_rows - padding :] = 0
    else:
        weights = joined("weights")
    size = len(first.single_ids) * num_rows
    lengths = np.empty(size + list_lengths.size, np.int32)
    lengths[:size], lengths[size:] = 1, list_lengths.reshape(-1)
    ids = np.empty(size + sum(map(len, pieces)), np.int64)
    used = _copy_single(runs, ids, lengths[:size].reshape(len(first.single_ids), num_rows))
    ids = ids[: used + sum(map(len, pieces))]
    if pieces:
        np.concatenate(pieces, out=ids[used:])
    return Batch(
        dense_features=torch.from_numpy(dense),
        sparse_features=KeyedJaggedTensor(
            [feature.name for feature in schema.sparse], torch.from_numpy(ids), lengths=torch.from_numpy(lengths)
        ),
        weighted_features=_weighted(runs, num_rows, schema) if schema.weighted else None,
        labels=torch.from_numpy(labels),
        weights=torch.from_numpy(weights),
        group_ids=None if group_ids is None else torch.from_numpy(group_ids),
        cursor=cursor,
    )


def _weighted(runs: Sequence[Run], num_rows: int, schema: Schema) -> KeyedJaggedTensor:
    ids, weights, lengths = _list_pieces([columns.weighted_lists for columns, _, _ in runs], runs, num_rows)
    return KeyedJaggedTensor(
        [feature.name for feature in schema.weighted],
        torch.from_numpy(np.concatenate(ids, dtype=np.int64)),
        torch.from_numpy(np.concatenate(weights)),
        torch.from_numpy(lengths.reshape(-1)),
    )


def _copy_single(runs: Sequence[Run], ids: np.ndarray, lengths: np.ndarray) -> int:
    """Copy single-valued ids, field by field, to the front of `ids`, and set (F, B) lengths to 0 where there is none; how many were copied.

    Most fields have an id in every row: neighbouring ones are copied in one go.
    """
    num_fields, num_rows = lengths.shape
    real = sum(stop - start for _, start, stop in runs)
    absent = np.logical_or.reduce([columns.absent for columns, _, _ in runs]) | (real < num_rows)
    fields = np.flatnonzero(absent)
    found = np.concatenate([columns.single_ids[fields, start:stop] for columns, start, stop in runs], axis=1)
    present, no_ids = found >= 0, np.zeros(0, bool)
    lengths[fields, :real], lengths[fields, real:] = present, 0
    used = copied = 0
    for field, own, kept in zip([*fields.tolist(), num_fields], [*found, no_ids], [*present, no_ids], strict=True):
        if field > copied:  # so there is no padding
            full = ids[used : used + (field - copied) * num_rows].reshape(field - copied, num_rows)
            np.concatenate([columns.single_ids[copied:field, start:stop] for columns, start, stop in runs], 1, full)
            used += full.size
        some = own[kept]
        ids[used : used + len(some)] = some
        used, copied = used + some.size, field + 1
    return used


def _list_pieces(
    lists: Sequence[Lists], runs: Sequence[Run], num_rows: int
) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """The values and the weights of every field and run, field by field, and the (L, B) int32 lengths."""
    fields = range(len(lists[0].values))
    lengths = np.zeros((len(fields), num_rows), np.int32)
    if not fields:
        return [], [], lengths
    parts, begin = [], 0
    for part, (_, start, stop) in zip(lists, runs, strict=True):
        end = begin + stop - start
        lengths[:, begin:end] = part.offsets[:, start + 1 : stop + 1] - part.offsets[:, start:stop]
        parts.append((part, part.offsets[:, start].tolist(), part.offsets[:, stop].tolist()))
        begin = end
    values = [part.values[field][low[field] : high[field]] for field in fields for part, low, high in parts]
    if not lists[0].weights:
        return values, [], lengths
    weights = [part.weights[field][low[field] : high[field]] for field in fields for part, low, high in parts]
    return values, weights, lengths
