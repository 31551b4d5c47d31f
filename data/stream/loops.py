"""The reader's compiled loops: what NumPy passes over several times, or out of the cache's order, in one pass.

Shapes: n rows of a window, D columns.
"""

import numpy as np

from data.compiled import compiled


@compiled
def copy_checked(values: np.ndarray, low: float, high: float, out: np.ndarray) -> bool:
    """Copy values as another type; whether all are in [low, high], as no NaN is."""
    good = True
    for i in range(len(values)):
        good &= (values[i] >= low) & (values[i] <= high)
        out[i] = values[i]
    return good


@compiled
def count_boundaries(numbers: np.ndarray, boundaries: np.ndarray, out: np.ndarray) -> None:
    """1 + the number of boundaries <= x, for each x."""
    for start in range(0, len(numbers), 512):  # so many stay in the fastest cache
        block, counts = numbers[start : start + 512], out[start : start + 512]
        for i in range(len(block)):
            counts[i] = 1
        for boundary in boundaries:
            for i in range(len(block)):
                counts[i] += np.int32(block[i] >= boundary)


@compiled
def permute(values: np.ndarray, order: np.ndarray, out: np.ndarray) -> None:
    """Value i of the result is value order[i]; with numbers of 32 bits in `order` faster than NumPy's take."""
    for i in range(len(order)):
        out[i] = values[order[i]]


@compiled
def permute_rows(values: np.ndarray, order: np.ndarray, out: np.ndarray) -> None:
    """The same of rows, (n, W)."""
    for i in range(len(order)):
        for w in range(values.shape[1]):
            out[i, w] = values[order[i], w]


@compiled
def permute_lists(
    values: np.ndarray, lengths: np.ndarray, order: np.ndarray, starts: np.ndarray, offsets: np.ndarray, out: np.ndarray
) -> None:
    """List i of the result, out[offsets[i]] and on, is list order[i] of the values; `starts`, (n + 1,), is for the loop alone.

    Four values are copied at once, of shorter lists the last ones for nothing: the next list overwrites them. `out` is longer by four.
    """
    starts[0] = offsets[0] = 0
    for i in range(len(lengths)):
        starts[i + 1] = starts[i] + lengths[i]
    at, last = 0, len(values) - 4
    for i in range(len(order)):
        start, done = starts[order[i]], 0
        length = starts[order[i] + 1] - start
        if start <= last:
            for j in range(4):
                out[at + j] = values[start + j]
            done = 4
        for j in range(done, length):
            out[at + j] = values[start + j]
        at += length
        offsets[i + 1] = at


@compiled
def turn(columns: np.ndarray, owners: np.ndarray, out: np.ndarray) -> None:
    """Write row c of `columns`, n numbers, to column owners[c] of (n, D)."""
    for start in range(0, len(out), 16):  # a cache line of each column
        for c in range(len(owners)):
            for i in range(start, min(start + 16, len(out))):
                out[i, owners[c]] = columns[c, i]
