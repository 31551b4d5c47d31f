"""Summaries of any number of rows in bounded memory: how many distinct values, and a sample."""

import numpy as np
import pyarrow as pa

HASH_SPAN = 2.0**64


class Distinct:
    """The k smallest hashes seen (k minimum values; Bar-Yossef et al., 2002).

    Below k distinct values the count is exact. Above, with U_(k) the k-th smallest hash as a share of the hash range,
    the estimate is (k - 1) / U_(k), whose standard error is about 1 / sqrt(k - 2): 1.6 % for k = 4096. The order and the
    grouping of the input change nothing. `size` is k; each hash takes 8 bytes.
    """

    def __init__(self, size: int = 4096) -> None:
        self.size = size
        self._smallest = np.zeros(0, np.uint64)  # ascending, no repeats
        self._new: list[np.ndarray] = []  # which are taken in together: each time costs as much as sorting all
        self._num_new = 0

    def add(self, hashes: np.ndarray) -> None:
        """Take in 64-bit hashes, uint64, of any number of values, with repeats."""
        if len(self._smallest) == self.size:
            hashes = hashes[hashes < self._smallest[-1]]  # most of a long column leaves here
        self._new.append(hashes)
        self._num_new += len(hashes)
        if self._num_new > self.size // 4:
            self._merge()

    def _merge(self) -> None:
        if self._new:
            # np.unique's hash table takes a hundred times longer
            hashes = np.sort(np.concatenate([self._smallest, *self._new]))
            self._smallest = hashes[np.append(hashes[1:] != hashes[:-1], True)[: len(hashes)]][: self.size]
        self._new, self._num_new = [], 0

    @property
    def smallest(self) -> np.ndarray:
        """The hashes kept, ascending, no repeats."""
        self._merge()
        return self._smallest

    @property
    def is_exact(self) -> bool:
        """Whether every distinct hash is kept."""
        return len(self.smallest) < self.size

    def estimate(self) -> int:
        """Number of distinct values."""
        if self.is_exact:
            return len(self.smallest)
        return round((self.size - 1) / ((float(self.smallest[-1]) + 1.0) / HASH_SPAN))


class EvenSample:
    """Every k-th row; k doubles when more than `limit` are held. Bounded, the same on every run."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.parts: list[pa.Table] = []
        self.stride, self.seen = 1, 0

    def add(self, rows: pa.Table) -> None:
        """Take in the next rows."""
        self.parts.append(rows.take(np.arange((-self.seen) % self.stride, len(rows), self.stride)))
        self.seen += len(rows)
        while sum(map(len, self.parts)) > self.limit:
            held = self.rows()
            self.parts = [held.take(np.arange(0, len(held), 2))]
            self.stride *= 2

    def rows(self) -> pa.Table:
        """What is held of at least one piece."""
        return pa.concat_tables(self.parts)
