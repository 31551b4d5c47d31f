"""Crosses: hashed values of two or three fields -> a table's row for each combination of them, equal on every machine.

A row of the log in which a part has no value has row MISSING_ROW. Shapes: n rows of the log.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..schema import MISSING_ROW  # relative: an exported artifact carries this file
from .columns import offsets_of
from .keys import remainder, splitmix64


class Part(NamedTuple):
    """The values of one field, as 64-bit hashes of what stands in the column, not of a table's rows: those move as a vocabulary grows."""

    hashes: np.ndarray  # uint64
    lengths: np.ndarray  # (n,) int64: values of each row, which stand one after the other in `hashes`


class Crossed(NamedTuple):
    """The combinations of each row, of which there is always one at least."""

    rows: np.ndarray  # of the table, int64
    offsets: np.ndarray  # (n + 1,) int64
    cut: int  # rows that had more combinations than they keep


def cross(parts: Sequence[Part], num_embeddings: int, max_length: int) -> Crossed:
    """Combine every value of each part with every one of the others, the last part's values changing first; keep `max_length` of a row.

    h = splitmix64(h_1),   h <- splitmix64(h xor h_i) for i = 2, ...,   row = 1 + h mod (num_embeddings - 1)
    """
    whole = np.ones(len(parts[0].lengths), np.int64)
    for part in parts:  # no product overflows: lengths are below 2^31
        whole = np.minimum(whole * part.lengths, max_length + 1)
    offsets = offsets_of(np.clip(whole, 1, max_length))
    owner = np.repeat(np.arange(len(whole)), np.diff(offsets))
    place = np.arange(len(owner)) - offsets[owner]
    picked = []
    for part in reversed(parts):
        lengths = np.maximum(part.lengths, 1)[owner]
        first = (np.cumsum(part.lengths) - part.lengths)[owner]
        picked.append(np.append(part.hashes, np.uint64(0)).take(first + place % lengths, mode="clip"))
        place //= lengths
    mixed = splitmix64(picked.pop())
    while picked:
        mixed = splitmix64(mixed ^ picked.pop())
    rows = remainder(mixed, num_embeddings - 1).view(np.int64) + 1
    rows[whole[owner] == 0] = MISSING_ROW
    return Crossed(rows, offsets, int((whole > max_length).sum()))
