"""The update of tables' rows by Adagrad, in loops that pass over memory once where FBGEMM's operations pass several times.

Shapes: B batch, F features. Places in arrays are unsigned where it counts: of a signed one a loop asks at each use whether it counts from the end,
and is not compiled to instructions on several numbers at once.
"""

from typing import Any

import numpy as np
from numpy import uint64 as place

from data.compiled import compiled
from mbcnet_rec.cpu.prefetch import prefetch

Array = Any  # of NumPy's: of float32, where nothing else is said
Number = Any  # NumPy's or Python's own
ZERO = np.float32(0)
LINE = place(16)  # float32 numbers in a cache line
AHEAD = place(8)  # rows to prefetch ahead: with 2 to 16 of them a batch of 26 tables takes .9 of its time


@compiled
def update_rows(
    rows: Array, squares: Array, starts: Array, columns: Array, ids: Array, offsets: Array,
    gradient: Array, stride: int, weights: Array, mean: bool, rate: float, eps: float, whole: bool, first: int, past: int,
) -> None:  # fmt: skip
    """Update the rows of tables by Adagrad: s += g^2, row -= rate g / (sqrt(s) + eps), g the sum of a row's gradients in the batch.

    Args:
        rows: of all tables, one after the other; changed.
        squares: the s, likewise; changed.
        starts: (2, F): where in `rows` and in `squares` the table of each feature begins; features of one table are neighbours.
        columns: (F + 1,): where in a row of the gradient the numbers of each feature begin, and the end of the last.
        ids: of feature f and bag b those from offsets[f B + b] to offsets[f B + b + 1].
        offsets: (F B + 1,).
        gradient: to the output; the numbers of bag b begin at b * stride.
        stride: from one bag's gradient to the next one's.
        weights: of each id; empty: all 1.
        mean: whether a bag is the mean of its rows, not their sum.
        rate: Adagrad's learning rate.
        eps: what it adds to the root.
        whole: whether each number of a row has an s of its own; else a row has one, to which the mean of its g^2 is added.
        first: the first feature whose table is updated; a table's first.
        past: the feature after the last one; a table's first, or F.
    """
    batch = (len(offsets) - 1) // (len(columns) - 1)
    number = np.empty(len(ids), np.int32)  # of each id: which of its table's distinct ones
    while first < past:
        last = first + 1
        while last < past and starts[0, last] == starts[0, first]:
            last += 1
        distinct = number_ids(ids, offsets[first * batch], offsets[last * batch], number)
        width = place(columns[last] - columns[last - 1])
        sums = np.zeros(len(distinct) * width, np.float32)
        for feature in range(first, last):
            for bag in range(batch):
                begin, end = offsets[feature * batch + bag], offsets[feature * batch + bag + 1]
                of_bag = place(bag * stride + columns[feature])
                fetch(gradient, of_bag + AHEAD * place(stride), width)
                for each in range(place(begin), place(end)):
                    weight = weights[each] if len(weights) else np.float32(1 / (end - begin) if mean else 1)
                    add_row(sums, place(number[each]) * width, gradient, of_bag, width, weight)
        if whole:
            for each in range(place(len(distinct))):
                coming = place(distinct[min(each + AHEAD, place(len(distinct) - 1))]) * width
                fetch(rows, place(starts[0, first]) + coming, width)
                fetch(squares, place(starts[1, first]) + coming, width)
                row = place(starts[0, first]) + place(distinct[each]) * width
                state = place(starts[1, first]) + place(distinct[each]) * width
                update_row(rows, row, squares, state, sums, each * width, width, np.float32(rate), np.float32(eps))
        else:
            update_by_mean(rows, squares, starts[:, first], distinct, sums, width, rate, eps)
        first = last


@compiled
def update_by_mean(
    rows: Array, squares: Array, starts: Array, distinct: Array, sums: Array, width: Number, rate: float, eps: float
) -> None:  # fmt: skip
    """Update a table's `distinct` rows by row-wise Adagrad from the sums of their gradients."""
    # one loop for what waits for memory at one place a row, one for what waits for rows: the processor waits for many at once
    rates = np.empty(len(distinct), np.float32)
    for each in range(place(len(distinct))):
        square = np.float32(0)
        for element in range(each * width, (each + place(1)) * width):
            square += sums[element] * sums[element]
        rates[each] = square / np.float32(width)
    for each in range(place(len(distinct))):
        state = place(starts[1] + distinct[each])
        squares[state] += rates[each]
        rates[each] = -rate / (np.sqrt(squares[state]) + eps) if squares[state] > 0 else 0
    for each in range(place(len(distinct))):
        coming = place(distinct[min(each + AHEAD, place(len(distinct) - 1))])
        fetch(rows, place(starts[0]) + coming * width, width)
        row = place(starts[0]) + place(distinct[each]) * width
        add_row(rows, row, sums, each * width, width, rates[each])


@compiled
def update_row(
    rows: Array, row: Number, squares: Array, state: Number, sums: Array, of: Number, width: Number, rate: Number, eps: Number
) -> None:  # fmt: skip
    """Update a row by Adagrad from the sum of its gradients: each begins at a place of its array and is `width` long."""
    for column in range(width):
        gradient = sums[of + column]
        square = squares[state + column] + gradient * gradient
        squares[state + column] = square
        # np.divide knows infinity: a division would ask for 0 each time
        rows[row + column] -= np.divide(rate * gradient, np.sqrt(square) + eps) if square > ZERO else ZERO


@compiled
def fetch(array: Array, begin: Number, width: Number) -> None:
    """Prefetch a row that begins at a place of the array and is `width` long."""
    for column in range(place(0), width, LINE):
        prefetch(array, begin + column)


@compiled
def add_row(target: Array, to: Number, source: Array, of: Number, width: Number, weight: Number) -> None:
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
