"""Proves that gathering rows gives what picking them one by one gives, and that windows are permuted row by row."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data.reading.columns import ABSENT, Columns, Lists, Ragged, Run, gather, join_lists
from data.stream.batch import permuted_by_fbgemm


def make_ragged(draw, rows: int, weighted: bool) -> Ragged:
    offsets = np.concatenate([[0], np.cumsum(draw.integers(0, 4, rows))]).astype(np.int64)
    values = draw.integers(0, 99, offsets[-1], np.int32)
    return Ragged(values, offsets, draw.random(offsets[-1]).astype(np.float32) if weighted else None)


def make_columns(seed: int, rows: int, dtype=np.int32, missing=True) -> Columns:
    draw = np.random.default_rng(seed)
    ids = draw.integers(0, 99, (3, rows)).astype(dtype)
    if missing:
        ids[1] = np.where(draw.random(rows) < 0.3, ABSENT, ids[1])
    return Columns(
        single_ids=ids,
        absent=np.asarray([False, missing, False]),
        lists=join_lists([[make_ragged(draw, rows, False)] for _ in range(2)], None, rows),
        weighted_lists=join_lists([[make_ragged(draw, rows, True)]], None, rows),
        dense=draw.random((rows, 2)).astype(np.float32),
        labels=draw.integers(0, 2, rows).astype(np.float32),
        group_ids=draw.integers(0, 9, rows),
    )


def items_of(lists: Lists, row: int):
    parts = [
        slice(lists.offsets[field, row], lists.offsets[field, row + 1]) for field in range(len(lists.values))
    ]
    weights = lists.weights or [None] * len(parts)
    return [
        (values[part].tolist(), None if weight is None else weight[part].tolist())
        for values, weight, part in zip(lists.values, weights, parts, strict=True)
    ]


def row_of(columns: Columns, row: int):
    return (
        [[id] if id != ABSENT else [] for id in columns.single_ids[:, row].tolist()],
        [values for values, _ in items_of(columns.lists, row)],
        items_of(columns.weighted_lists, row),
        columns.dense[row].tolist(),
        columns.labels[row],
        columns.group_ids[row],
    )


def rows_of(got, keys: int, weighted: int):
    """A batch's rows, read as a KeyedJaggedTensor reads its values and lengths."""
    rows = len(got.labels)

    def jagged(values, lengths, count):
        ends = np.cumsum(lengths).tolist()
        pieces = [values[end - length : end].tolist() for end, length in zip(ends, lengths, strict=True)]
        assert len(pieces) == count * rows and (not ends or ends[-1] == len(values))
        return [[pieces[key * rows + row] for key in range(count)] for row in range(rows)]

    sparse = jagged(got.ids, got.lengths, keys)
    ids = jagged(got.weighted_ids, got.weighted_lengths, weighted)
    weights = jagged(got.id_weights, got.weighted_lengths, weighted)
    return [
        (
            sparse[row][:3],
            sparse[row][3:],
            list(zip(ids[row], weights[row], strict=True)),
            got.dense[row].tolist(),
            got.labels[row],
            got.group_ids[row],
        )
        for row in range(rows)
    ]


@given(data=st.data(), extra=st.integers(0, 3))
def test_gather_is_picking_row_by_row(data, extra):
    runs, wanted = [], []
    for seed in range(data.draw(st.integers(1, 3))):
        count = data.draw(st.integers(0, 9))
        columns = make_columns(
            seed, count, data.draw(st.sampled_from([np.int32, np.int64])), data.draw(st.booleans())
        )
        start = data.draw(st.integers(0, count))
        stop = data.draw(st.integers(start, count))
        runs.append(Run(columns, start, stop))
        wanted += [row_of(columns, row) for row in range(start, stop)]
    got = gather(runs, len(wanted) + extra)
    padding = ([[], [], []], [[], []], [([], [])], [0.0, 0.0], 0.0, 0)
    assert rows_of(got, 5, 1) == wanted + [padding] * extra
    assert got.ids.dtype == got.weighted_ids.dtype == np.int64
    assert got.lengths.dtype == got.weighted_lengths.dtype == np.int32


def test_gathered_rows_share_no_memory_with_their_window():
    """The window's memory is used again for the next one while the batch still trains."""
    columns = make_columns(0, 9)
    got = gather([Run(columns, 0, 9)], 9)
    held = [columns.single_ids, columns.dense, columns.labels, columns.group_ids]
    held += [*columns.lists.values, *columns.weighted_lists.values, *columns.weighted_lists.weights]
    for part in got:
        assert not any(np.shares_memory(part, source) for source in held)


@given(
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=4), weighted=st.booleans(), shuffled=st.booleans()
)
def test_joined_lists_are_the_lists_one_after_the_other_permuted(counts, weighted, shuffled):
    draw, rows = np.random.default_rng(sum(counts)), sum(counts)
    fields = [[make_ragged(draw, count, weighted) for count in counts] for _ in range(2)]
    permutation = draw.permutation(rows) if shuffled else None
    got = join_lists(fields, permutation, rows)
    fast = join_lists(fields, permutation, rows, permuted_by_fbgemm)
    for mine, other in zip(
        (*got.values, got.offsets, *got.weights), (*fast.values, fast.offsets, *fast.weights), strict=True
    ):
        assert mine.dtype == other.dtype and mine.tolist() == other.tolist()
    for field, parts in enumerate(fields):
        one_by_one = [
            (part.values[a:b].tolist(), part.weights[a:b].tolist() if weighted else None)
            for part in parts
            for a, b in zip(part.offsets, part.offsets[1:], strict=False)
        ]
        order = range(rows) if permutation is None else permutation
        assert [items_of(got, row)[field] for row in range(rows)] == [one_by_one[row] for row in order]
