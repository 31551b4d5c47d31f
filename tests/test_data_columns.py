"""Proves that gathering rows gives what picking them one by one gives."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data.columns import ABSENT, Columns, Ragged, gather, join_ragged


def make_columns(seed: int, rows: int, dtype=np.int32) -> Columns:
    draw = np.random.default_rng(seed)

    def ragged(weighted):
        offsets = np.concatenate([[0], np.cumsum(draw.integers(0, 4, rows))]).astype(np.int64)
        values = draw.integers(0, 99, offsets[-1])
        return Ragged(values, offsets, draw.random(offsets[-1]).astype(np.float32) if weighted else None)

    return Columns(
        single_ids=draw.integers(-1, 99, (3, rows)).astype(dtype),
        lists=(ragged(False), ragged(False)),
        weighted_lists=(ragged(True),),
        dense=draw.random((rows, 2)).astype(np.float32),
        labels=draw.integers(0, 2, rows).astype(np.float32),
        group_ids=draw.integers(0, 9, rows),
    )


def row_of(columns: Columns, row: int):
    def items(ragged):
        part = slice(ragged.offsets[row], ragged.offsets[row + 1])
        return ragged.values[part].tolist(), None if ragged.weights is None else ragged.weights[part].tolist()

    return (
        columns.single_ids[:, row].tolist(),
        [items(ragged) for ragged in columns.lists],
        [items(ragged) for ragged in columns.weighted_lists],
        columns.dense[row].tolist(),
        columns.labels[row],
        columns.group_ids[row],
    )


@given(data=st.data(), extra=st.integers(0, 3))
def test_gather_is_picking_row_by_row(data, extra):
    parts, wanted = [], []
    for seed in range(data.draw(st.integers(1, 3))):
        count = data.draw(st.integers(0, 9))
        columns = make_columns(seed, count, data.draw(st.sampled_from([np.int32, np.int64])))
        if data.draw(st.booleans()):
            start = data.draw(st.integers(0, count))
            rows = slice(start, data.draw(st.integers(start, count)))
            numbers = range(rows.start, rows.stop)
        else:
            numbers = data.draw(st.lists(st.integers(0, count - 1), max_size=9)) if count else []
            rows = np.asarray(numbers, np.int64)
        parts.append((columns, rows))
        wanted += [row_of(columns, row) for row in numbers]
    got = gather(parts, len(wanted) + extra)
    assert got.num_rows == len(wanted) + extra and got.single_ids.dtype == np.int64
    assert [row_of(got, row) for row in range(len(wanted))] == wanted
    padding = ([ABSENT] * 3, [([], None), ([], None)], [([], [])], [0.0, 0.0], 0.0, 0)
    assert [row_of(got, row) for row in range(len(wanted), got.num_rows)] == [padding] * extra


def test_gathered_rows_share_no_memory_with_their_window():
    """A batch is changed in place by nobody, but its window may go while the batch lives on a GPU's copy queue."""
    columns = make_columns(0, 9)
    got = gather([(columns, slice(0, 9))], 9)
    for part in ("single_ids", "dense", "labels", "group_ids"):
        assert not np.shares_memory(getattr(got, part), getattr(columns, part))


@given(st.lists(st.integers(0, 5), max_size=4), st.booleans())
def test_joined_lists_are_the_lists_one_after_the_other(counts, weighted):
    parts = [
        (make_columns(seed, count).weighted_lists if weighted else make_columns(seed, count).lists)[0]
        for seed, count in enumerate(counts)
    ]
    got = join_ragged(parts, weighted)
    lists = [
        part.values[a:b].tolist()
        for part in parts
        for a, b in zip(part.offsets, part.offsets[1:], strict=False)
    ]
    assert [got.values[a:b].tolist() for a, b in zip(got.offsets, got.offsets[1:], strict=False)] == lists
    assert (got.weights is not None) == weighted
