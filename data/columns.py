"""Columns: decoded, checked rows as a few NumPy arrays that can be permuted, joined and turned into a Batch.

Shapes: n rows, F single-valued sparse fields, D dense columns.
Single-valued ids stay one (F, n) matrix because its rows, laid end to end, are exactly the values of a KeyedJaggedTensor: for a schema
of hundreds of fields a batch is then one gather and no concatenation.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

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
        weighted_lists=tuple(
            _join([part.weighted_lists[i] for part in parts]) for i in range(len(first.weighted_lists))
        ),
        dense=np.concatenate([part.dense for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        group_ids=None if first.group_ids is None else np.concatenate([part.group_ids for part in parts]),  # type: ignore[misc]
    )


def _join(parts: list[Ragged]) -> Ragged:
    starts = np.cumsum([0] + [part.offsets[-1] for part in parts])
    offsets = [part.offsets[1:] + start for part, start in zip(parts, starts[:-1], strict=True)]
    weights = None if parts[0].weights is None else np.concatenate([part.weights for part in parts])  # type: ignore[misc]
    return Ragged(
        np.concatenate([part.values for part in parts]),
        np.concatenate([np.zeros(1, np.int64), *offsets]),
        weights,
    )


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
