"""Place: where rows come from; Columns: checked and permuted rows as a few NumPy arrays, from which runs are copied into batches.

Shapes: n rows of a window, F single-valued sparse fields, L list fields, D dense columns.
Single-valued ids stay one (F, n) matrix because its rows, laid end to end, are exactly the values of a KeyedJaggedTensor: for a schema
of hundreds of fields a batch is then one copy. The matrix is int32 where every table allows it. A window is permuted field by field as it
is decoded, when a field's ids still fit a core's cache; picking a batch's rows out of the whole window misses the cache at every id,
which costs five times as much.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..errors import InputError  # relative: an exported artifact carries this file

ABSENT = -1  # in Columns.single_ids: no id, an empty bag
NO_GROUP = int(np.iinfo(np.int64).min)  # in Columns.group_ids: the row belongs to no group


@dataclass(frozen=True)
class Place:
    """Where a record batch comes from, for messages."""

    file: str  # path of the file, or what else holds the rows
    row_group: int | None  # its index; None where there are none
    first_row: int = 0  # of the record batch, in its row group
    rows: np.ndarray | None = None  # instead of first_row: each row's number, where only some were kept

    def __str__(self) -> str:
        return self.file if self.row_group is None else f"{self.file}: row group {self.row_group}"

    def row(self, value: int, offsets: np.ndarray | None = None) -> str:
        """Name the row of one value of the record batch. `offsets`: of the lists that hold the values."""
        row = value if offsets is None else int(np.searchsorted(offsets, value, side="right")) - 1
        number = self.first_row + row if self.rows is None else int(self.rows[row])
        return f"{self}{':' if self.row_group is None else ','} row {number}"

    def fault(
        self, owner: str, values: Any, bad: np.ndarray, wanted: str, offsets: np.ndarray | None = None
    ) -> InputError:
        """The error that names the first bad value, and its owner: a field, the label."""
        first = int(bad.argmax())
        return InputError(f"{self.row(first, offsets)}, {owner} = {values[first]}: wanted {wanted}")


class Ragged(NamedTuple):
    """A list column: row i holds the next lengths[i] values."""

    values: np.ndarray  # int32 or int64
    lengths: np.ndarray  # (n,) int32 or int64
    weights: np.ndarray | None  # float32, like values


class Lists(NamedTuple):
    """List columns of the same rows: field l of row i holds values[l][offsets[l, i]:offsets[l, i + 1]]."""

    values: tuple[np.ndarray, ...]  # L times int32 or int64
    offsets: np.ndarray  # (L, n + 1) int32, or int64 where a window holds 2^31 values of one field
    weights: tuple[np.ndarray, ...]  # L times float32, like values; empty if the fields have none


@dataclass(frozen=True)
class Columns:
    """Rows that passed every check, in the field order of the schema's `sparse`, `weighted` and `dense`."""

    single_ids: np.ndarray  # (F, n) int32 or int64, ABSENT where missing
    absent: np.ndarray  # (F,) bool: fields that hold an ABSENT
    lists: Lists
    weighted_lists: Lists
    dense: np.ndarray  # (n, D) float32
    labels: np.ndarray  # (n,) float32; of several labels (n, T), NaN where null
    group_ids: np.ndarray | None  # (n,) int64, NO_GROUP where null
    repaired: Counter[str]  # by field: values that on_invalid = "null" or "modulo" changed
    weights: np.ndarray | None = None  # (n,) float32, of the schema's weight column
    nulls: Counter[str] | None = None  # by field: rows that have none, of columns of Arrow

    @property
    def num_rows(self) -> int:
        """Rows held."""
        return len(self.labels)


def join_lists(fields: Sequence[Sequence[Ragged]], rows: int) -> Lists:
    """Join each field's parts, n rows in all."""
    joined = [join(parts) for parts in fields]
    longest = max((len(ragged.values) for ragged in joined), default=0)
    offsets = np.zeros((len(fields), rows + 1), np.int32 if longest < 2**31 else np.int64)
    for field, ragged in enumerate(joined):
        np.cumsum(ragged.lengths, dtype=offsets.dtype, out=offsets[field, 1:])
    weights = tuple(ragged.weights for ragged in joined if ragged.weights is not None)
    return Lists(tuple(ragged.values for ragged in joined), offsets, weights)


def join(parts: Sequence[Ragged]) -> Ragged:
    """Join parts of a field."""
    if len(parts) == 1:
        return parts[0]
    values, lengths, weights = zip(*parts, strict=True)
    joined = None if weights[0] is None else np.concatenate(weights)
    return Ragged(np.concatenate(values), np.concatenate(lengths), joined)


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """(n,) lengths -> (n + 1,) int64 offsets."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets
