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

    hashes: np.ndarray  # uint64; (n,) of a field with one value a row, undefined where a row has none
    lengths: np.ndarray  # (n,) int64: values of each row, which of lists stand one after the other in `hashes`
    is_list: bool


class Crossed(NamedTuple):
    """The combinations of each row, of which there is always one at least."""

    rows: np.ndarray  # of the table, int64
    lengths: np.ndarray  # (n,) int64
    cut: int  # rows that had more combinations than they keep


def cross(parts: Sequence[Part], num_embeddings: int, max_length: int) -> Crossed:
    """Combine every value of each part with every one of the others, the last part's values changing first; keep `max_length` of a row.

    h = splitmix64(h_1),   h <- splitmix64(h xor h_i) for i = 2, ...,   row = 1 + h mod (num_embeddings - 1)
    """
    whole = parts[0].lengths
    for part in parts[1:]:  # no product overflows: lengths are below 2^31
        whole = np.minimum(whole, max_length + 1) * part.lengths
    if not any(part.is_list for part in parts):
        rows = _rows([part.hashes for part in parts], num_embeddings)
        rows[whole == 0] = MISSING_ROW
        return Crossed(rows, np.ones(len(rows), np.int64), 0)
    kept = np.clip(whole, 1, max_length)
    owner = np.repeat(np.arange(len(whole)), kept)
    place = np.arange(len(owner)) - offsets_of(kept)[owner]
    picked = []
    for part in reversed(parts):
        if not part.is_list:
            picked.append(part.hashes[owner])
            continue
        lengths = np.maximum(part.lengths, 1)[owner]
        first = (np.cumsum(part.lengths) - part.lengths)[owner]
        picked.append(np.append(part.hashes, np.uint64(0)).take(first + place % lengths, mode="clip"))
        place //= lengths
    rows = _rows(picked[::-1], num_embeddings)
    rows[whole[owner] == 0] = MISSING_ROW
    return Crossed(rows, kept, int((whole > max_length).sum()))


def _rows(hashes: Sequence[np.ndarray], num_embeddings: int) -> np.ndarray:
    mixed = splitmix64(hashes[0])
    for other in hashes[1:]:
        mixed = splitmix64(mixed ^ other)
    rows = remainder(mixed, num_embeddings - 1)
    rows += np.uint64(1)
    return rows.view(np.int64)
