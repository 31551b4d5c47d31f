"""Columns: decoded, checked rows as a few NumPy arrays, from which rows are gathered into a batch.

Shapes: n rows, F single-valued sparse fields, D dense columns, B rows of a batch.
Single-valued ids stay one (F, n) matrix because its rows, laid end to end, are exactly the values of a KeyedJaggedTensor: for a schema
of hundreds of fields a batch is then one gather and no concatenation. The matrix is int32 where every table allows it: half the memory
to write and to gather from, and a row of 65,536 ids still fits a core's cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

ABSENT = -1  # in Columns.single_ids: no id, an empty bag

Rows = np.ndarray | slice  # positions of rows, or a run of rows


class Ragged(NamedTuple):
    """A list column: row i holds values[offsets[i]:offsets[i + 1]]."""

    values: np.ndarray  # int64
    offsets: np.ndarray  # (n + 1,) int64
    weights: np.ndarray | None  # float32, like values


@dataclass(frozen=True)
class Columns:
    """Rows that passed every check, in the field order of the schema's `sparse`, `weighted` and `dense`."""

    single_ids: np.ndarray  # (F, n) int32 or int64, ABSENT where missing
    lists: tuple[Ragged, ...]
    weighted_lists: tuple[Ragged, ...]
    dense: np.ndarray  # (n, D) float32
    labels: np.ndarray  # (n,) float32
    group_ids: np.ndarray | None  # (n,) int64

    @property
    def num_rows(self) -> int:
        """Rows held."""
        return len(self.labels)


def gather(parts: Sequence[tuple[Columns, Rows]], num_rows: int) -> Columns:
    """Join the chosen rows of each part in order, and append rows without ids, of zeros and label 0, up to `num_rows`.

    Args:
        parts: at least one; its rows may be none.
        num_rows: B, rows of the result.

    Returns:
        Columns with int64 ids, in memory of their own.
    """
    first = parts[0][0]
    single_ids = np.empty((len(first.single_ids), num_rows), np.int64)
    dense = np.zeros((num_rows, first.dense.shape[1]), np.float32)
    labels = np.zeros(num_rows, np.float32)
    group_ids = None if first.group_ids is None else np.zeros(num_rows, np.int64)
    start = 0
    for columns, rows in parts:
        stop = start + _count(rows)
        if isinstance(rows, slice):
            single_ids[:, start:stop] = columns.single_ids[:, rows]
        else:
            single_ids[:, start:stop] = columns.single_ids.take(rows, axis=1, mode="clip")
        dense[start:stop] = columns.dense[rows]
        labels[start:stop] = columns.labels[rows]
        if group_ids is not None and columns.group_ids is not None:
            group_ids[start:stop] = columns.group_ids[rows]
        start = stop
    single_ids[:, start:] = ABSENT
    return Columns(
        single_ids=single_ids,
        lists=tuple(
            _gather_ragged([(columns.lists[i], rows) for columns, rows in parts], num_rows)
            for i in range(len(first.lists))
        ),
        weighted_lists=tuple(
            _gather_ragged([(columns.weighted_lists[i], rows) for columns, rows in parts], num_rows)
            for i in range(len(first.weighted_lists))
        ),
        dense=dense,
        labels=labels,
        group_ids=group_ids,
    )


def _count(rows: Rows) -> int:
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows)


def _gather_ragged(parts: list[tuple[Ragged, Rows]], num_rows: int) -> Ragged:
    taken = [_take_ragged(ragged, rows) for ragged, rows in parts]
    lengths = np.zeros(num_rows, np.int64)
    start = 0
    for ragged, (_, rows) in zip(taken, parts, strict=True):
        stop = start + _count(rows)
        lengths[start:stop] = np.diff(ragged.offsets)
        start = stop
    offsets = np.zeros(num_rows + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    if len(taken) == 1:
        return Ragged(taken[0].values, offsets, taken[0].weights)
    weights = [ragged.weights for ragged in taken if ragged.weights is not None]
    return Ragged(
        np.concatenate([ragged.values for ragged in taken]),
        offsets,
        np.concatenate(weights) if weights else None,
    )


def _take_ragged(ragged: Ragged, rows: Rows) -> Ragged:
    if isinstance(rows, slice):
        offsets = ragged.offsets[rows.start : rows.stop + 1]
        values = slice(int(offsets[0]), int(offsets[-1]))
        weights = None if ragged.weights is None else ragged.weights[values]
        return Ragged(ragged.values[values], offsets - offsets[0], weights)
    starts = ragged.offsets[rows]
    lengths = ragged.offsets[rows + 1] - starts
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    # position in the output minus the row's start there, plus the row's start in the source
    source = np.repeat(starts - offsets[:-1], lengths)
    source += np.arange(offsets[-1])
    return Ragged(
        ragged.values.take(source), offsets, None if ragged.weights is None else ragged.weights.take(source)
    )


def join_ragged(parts: Sequence[Ragged], weighted: bool) -> Ragged:
    """Join the rows of several list columns in order; none gives no rows."""
    if len(parts) == 1:
        return parts[0]
    lengths = [np.diff(part.offsets) for part in parts]
    weights = [part.weights for part in parts if part.weights is not None]
    offsets = np.zeros(sum(map(len, lengths)) + 1, np.int64)
    np.cumsum(np.concatenate([np.zeros(0, np.int64), *lengths]), out=offsets[1:])
    return Ragged(
        np.concatenate([np.zeros(0, np.int64), *(part.values for part in parts)]),
        offsets,
        np.concatenate([np.zeros(0, np.float32), *weights]) if weighted else None,
    )
