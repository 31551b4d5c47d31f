"""Columns: decoded, checked rows as a few NumPy arrays that can be permuted, joined and turned into a Batch.

Shapes: n rows, F single-valued sparse fields, D dense columns.
Single-valued ids stay one (F, n) matrix because its rows, laid end to end, are exactly the values of a KeyedJaggedTensor: for a schema
of hundreds of fields a batch is then one gather and no concatenation.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from data.batch import Batch, Cursor

ABSENT = -1  # in Columns.single_ids: no id, an empty bag


class Ragged(NamedTuple):
    """A list column: row i holds values[offsets[i]:offsets[i + 1]]."""

    values: np.ndarray  # int64
    offsets: np.ndarray  # (n + 1,) int64
    weights: np.ndarray | None  # float32, like values


@dataclass(frozen=True)
class Columns:
    """Rows that passed every check, in the field order of the schema's `sparse`, `weighted` and `dense`."""

    single_ids: np.ndarray  # (F, n) int64, ABSENT where missing
    lists: tuple[Ragged, ...]
    weighted_lists: tuple[Ragged, ...]
    dense: np.ndarray  # (n, D) float32
    labels: np.ndarray  # (n,) float32
    group_ids: np.ndarray | None  # (n,) int64

    @property
    def num_rows(self) -> int:
        """Rows held."""
        return len(self.labels)


def take(columns: Columns, rows: np.ndarray) -> Columns:
    """Return the rows at the given positions, in that order."""
    return Columns(
        single_ids=columns.single_ids.take(rows, axis=1),
        lists=tuple(_take_ragged(ragged, rows) for ragged in columns.lists),
        weighted_lists=tuple(_take_ragged(ragged, rows) for ragged in columns.weighted_lists),
        dense=columns.dense.take(rows, axis=0),
        labels=columns.labels.take(rows),
        group_ids=None if columns.group_ids is None else columns.group_ids.take(rows),
    )


def _take_ragged(ragged: Ragged, rows: np.ndarray) -> Ragged:
    starts = ragged.offsets[rows]
    lengths = ragged.offsets[rows + 1] - starts
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    # position in the output minus the row's start there, plus the row's start in the source
    source = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
    return Ragged(ragged.values[source], offsets, None if ragged.weights is None else ragged.weights[source])


def concatenate(parts: list[Columns]) -> Columns:
    """Join rows of several Columns in order."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    return Columns(
        single_ids=np.concatenate([part.single_ids for part in parts], axis=1),
        lists=tuple(_join([part.lists[i] for part in parts]) for i in range(len(first.lists))),
        weighted_lists=tuple(_join([part.weighted_lists[i] for part in parts]) for i in range(len(first.weighted_lists))),
        dense=np.concatenate([part.dense for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        group_ids=None if first.group_ids is None else np.concatenate([part.group_ids for part in parts]),  # type: ignore[misc]
    )


def _join(parts: list[Ragged]) -> Ragged:
    starts = np.cumsum([0] + [part.offsets[-1] for part in parts])
    offsets = [part.offsets[1:] + start for part, start in zip(parts, starts[:-1], strict=True)]
    weights = None if parts[0].weights is None else np.concatenate([part.weights for part in parts])  # type: ignore[misc]
    return Ragged(np.concatenate([part.values for part in parts]), np.concatenate([np.zeros(1, np.int64), *offsets]), weights)


def pad(columns: Columns, num_rows: int) -> Columns:
    """Append rows without ids, of zeros and label 0, up to `num_rows`."""
    extra = num_rows - columns.num_rows
    if extra == 0:
        return columns

    def pad_ragged(ragged: Ragged) -> Ragged:
        return ragged._replace(offsets=np.concatenate([ragged.offsets, np.full(extra, ragged.offsets[-1])]))

    return Columns(
        single_ids=np.pad(columns.single_ids, ((0, 0), (0, extra)), constant_values=ABSENT),
        lists=tuple(pad_ragged(ragged) for ragged in columns.lists),
        weighted_lists=tuple(pad_ragged(ragged) for ragged in columns.weighted_lists),
        dense=np.pad(columns.dense, ((0, extra), (0, 0))),
        labels=np.pad(columns.labels, (0, extra)),
        group_ids=None if columns.group_ids is None else np.pad(columns.group_ids, (0, extra)),
    )


class Keys(NamedTuple):
    """Names of the sparse features in the order that Columns holds them."""

    sparse: list[str]
    weighted: list[str]


def to_batch(columns: Columns, keys: Keys, *, num_rows: int, weight: float, cursor: Cursor) -> Batch:
    """Pad to `num_rows` and wrap as tensors, without copying where nothing was padded.

    Args:
        keys: names of the sparse features.
        num_rows: B, rows of this rank's batch with padding.
        weight: of each real row, see `Batch.weights`.
        cursor: the stream's position after this batch.
    """
    real_rows = columns.num_rows
    columns = pad(columns, num_rows)
    weights = np.zeros(num_rows, np.float32)
    weights[:real_rows] = weight
    ids = columns.single_ids
    present = ids >= 0
    if present.all():
        values, lengths = ids.reshape(-1), np.ones(ids.size, np.int32)
    else:
        values, lengths = ids[present], present.reshape(-1).astype(np.int32)
    values = np.concatenate([values] + [ragged.values for ragged in columns.lists]) if columns.lists else values
    lengths = np.concatenate([lengths] + [_lengths(ragged) for ragged in columns.lists]) if columns.lists else lengths
    return Batch(
        dense_features=torch.from_numpy(columns.dense),
        sparse_features=KeyedJaggedTensor(keys.sparse, torch.from_numpy(values), lengths=torch.from_numpy(lengths)),
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
    return KeyedJaggedTensor(keys, torch.from_numpy(values), torch.from_numpy(weights), torch.from_numpy(lengths))


def _lengths(ragged: Ragged) -> np.ndarray:
    return np.diff(ragged.offsets).astype(np.int32)
