"""Loops of a training step that pass over memory once, where torch's and FBGEMM's operations pass several times.

Shapes: B batch, F features. Places in arrays are unsigned where it counts: of a signed one a loop asks at each use whether it counts from the end,
and is not compiled to instructions on several numbers at once.
"""

from typing import Any

import numpy as np
from numpy import uint64 as place

from data.compiled import compiled

Array = Any  # of NumPy's; of which types is said beside each function


@compiled
def update_rows(
    rows: Array, squares: Array, starts: Array, columns: Array, ids: Array, offsets: Array,
    gradient: Array, stride: int, weights: Array, mean: bool, rate: float, eps: float,
) -> None:  # fmt: skip
    """Update the rows of tables by row-wise Adagrad: s += mean(g^2), row -= rate g / (sqrt(s) + eps), g the sum of a row's gradients in the batch.

    Args:
        rows, squares: of all tables, float32; changed.
        starts: (2, F): where in them the table of each feature begins; features of one table are neighbours.
        columns: (F + 1,): of the gradient, where each feature's begin.
        ids, offsets: those of feature f and bag b are ids[offsets[f B + b] : offsets[f B + b + 1]].
        gradient: float32; the first column of bag b stands at b * stride.
        weights: of each id, float32; empty: all 1.
        mean: whether a bag is the mean of its rows, not their sum.
    """
    features = len(columns) - 1
    batch = (len(offsets) - 1) // features
    number = np.empty(len(ids), np.int32)  # of each id: which of its table's distinct ones
    first = 0
    while first < features:
        last = first + 1
        while last < features and starts[0, last] == starts[0, first]:
            last += 1
        distinct = number_ids(ids, offsets[first * batch], offsets[last * batch], number)
        width = place(columns[last] - columns[last - 1])
        sums = np.zeros(len(distinct) * width, np.float32)
        for feature in range(first, last):
            for bag in range(batch):
                begin, end = offsets[feature * batch + bag], offsets[feature * batch + bag + 1]
                of_bag = place(bag * stride + columns[feature])
                for each in range(place(begin), place(end)):
                    weight = weights[each] if len(weights) else np.float32(1 / (end - begin) if mean else 1)
                    add_row(sums, place(number[each]) * width, gradient, of_bag, width, weight)
        # one loop for what waits for memory at one place a row, one for what waits for rows: the processor waits for many at once
        rates = np.empty(len(distinct), np.float32)
        for each in range(place(len(distinct))):
            square = np.float32(0)
            for element in range(each * width, (each + place(1)) * width):
                square += sums[element] * sums[element]
            rates[each] = square / np.float32(width)
        for each in range(place(len(distinct))):
            state = place(starts[1, first] + distinct[each])
            squares[state] += rates[each]
            rates[each] = -rate / (np.sqrt(squares[state]) + eps) if squares[state] > 0 else 0
        for each in range(place(len(distinct))):
            row = place(starts[0, first]) + place(distinct[each]) * width
            add_row(rows, row, sums, each * width, width, rates[each])
        first = last


@compiled
def add_row(target: Array, to: int, source: Array, of: int, width: int, weight: float) -> None:
    """Add a row times a weight to another: each begins at a place of its array and is `width` long."""
    for column in range(width):
        target[to + column] += weight * source[of + column]


@compiled
def number_ids(ids: Array, begin: int, end: int, number: Array) -> Array:
    """Number the distinct ids of ids[begin:end] in the order of their first appearance, in number[begin:end]; return them."""
    size = 16
    while size < 2 * (end - begin):
        size *= 2
    slots = np.full(size, -1, np.int32)  # of a hash table: the number of the id that is there
    distinct = np.empty(end - begin, np.int64)
    known = 0
    for each in range(begin, end):
        slot = ((ids[each] * 0x9E3779B1) >> 7) & (size - 1)
        while slots[slot] >= 0 and distinct[slots[slot]] != ids[each]:
            slot = (slot + 1) & (size - 1)
        if slots[slot] < 0:
            slots[slot] = known
            distinct[known] = ids[each]
            known += 1
        number[each] = slots[slot]
    return distinct[:known]
