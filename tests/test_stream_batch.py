"""Proves that a batch holds the rows that picking them one by one gives, by key and padded, and moves as a pipeline needs."""

from collections import Counter
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.reading.columns import ABSENT, Columns, Lists, Ragged, join_lists
from data.schema import parse_schema
from data.stream.batch import Batch, gather
from data.stream.order import Cursor

BAGS = {"num_embeddings": 99, "embedding_dim": 4}
FIELDS = {
    **{name: {"kind": "categorical"} | BAGS for name in ("a", "b", "c")},
    **{name: {"kind": "multi_valued"} | BAGS for name in ("d", "e")},
    "w": {"kind": "weighted_multi_valued", "weights": "w_weights"} | BAGS,
    "x": {"kind": "numeric"},
    "y": {"kind": "numeric"},
}


SCHEMA = parse_schema({"name": "t", "label": "click", "fields": FIELDS}, "schema.toml", Path())


def make_ragged(draw, rows: int, weighted: bool) -> Ragged:
    lengths = draw.integers(0, 4, rows)
    values = draw.integers(0, 99, lengths.sum(), np.int32)
    return Ragged(values, lengths, draw.random(len(values)).astype(np.float32) if weighted else None)


def make_columns(seed: int, rows: int, dtype=np.int32, missing=True) -> Columns:
    draw = np.random.default_rng(seed)
    ids = draw.integers(0, 99, (3, rows)).astype(dtype)
    if missing:
        ids[1] = np.where(draw.random(rows) < 0.3, ABSENT, ids[1])
    return Columns(
        single_ids=ids,
        absent=np.asarray([False, missing, False]),
        lists=join_lists([[make_ragged(draw, rows, False)] for _ in range(2)], rows),
        weighted_lists=join_lists([[make_ragged(draw, rows, True)]], rows),
        dense=draw.random((rows, 2)).astype(np.float32),
        labels=draw.integers(0, 2, rows).astype(np.float32),
        group_ids=draw.integers(0, 9, rows),
        repaired=Counter(),
    )


def items_of(lists: Lists, row: int):
    parts = [slice(offsets[row], offsets[row + 1]) for offsets in lists.offsets]
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


def rows_of(batch: Batch):
    sparse = [batch.sparse_features[key].to_dense() for key in FIELDS if key < "w"]
    weighted = batch.weighted_features["w"]
    bags = zip(weighted.to_dense(), weighted.to_dense_weights(), strict=True)
    return [
        (
            [bags[row].tolist() for bags in sparse[:3]],
            [bags[row].tolist() for bags in sparse[3:]],
            [(ids.tolist(), weights.tolist())],
            batch.dense_features[row].tolist(),
            batch.labels[row],
            batch.group_ids[row],
        )
        for row, (ids, weights) in enumerate(bags)
    ]


@given(data=st.data(), extra=st.integers(0, 3))
def test_gather_is_picking_row_by_row(data, extra):
    runs, wanted = [], []
    for seed in range(data.draw(st.integers(1, 3))):
        count = data.draw(st.integers(0, 9))
        dtype = data.draw(st.sampled_from([np.int32, np.int64]))
        columns = make_columns(seed, count, dtype, data.draw(st.booleans()))
        start = data.draw(st.integers(0, count))
        stop = data.draw(st.integers(start, count))
        runs.append((columns, start, stop))
        wanted += [row_of(columns, row) for row in range(start, stop)]
    batch = gather(runs, len(wanted) + extra, SCHEMA, Cursor(2, 5))
    padding = ([[], [], []], [[], []], [([], [])], [0.0, 0.0], 0.0, 0)
    assert rows_of(batch) == wanted + [padding] * extra and batch.cursor == Cursor(2, 5)
    assert batch.weights.tolist() == [1.0] * len(wanted) + [0.0] * extra
    assert batch.sparse_features.keys() == ["a", "b", "c", "d", "e"]
    for bags in (batch.sparse_features, batch.weighted_features):
        assert bags.values().dtype == torch.int64 and bags.lengths().dtype == torch.int32


def test_moving_keeps_every_part():
    """A field added to Batch and forgotten in `to` would stay on the host, or lose the cursor."""
    batch = gather([(make_columns(0, 3), 0, 3)], 4, SCHEMA, Cursor(2, 5))
    moved = batch.to(torch.device("meta"))
    for field in fields(Batch):
        part, before = getattr(moved, field.name), getattr(batch, field.name)
        if field.name == "cursor":
            assert part == before
        elif isinstance(part, torch.Tensor):
            assert part.device.type == "meta" and part.shape == before.shape
        else:
            assert part.device().type == "meta" and part.keys() == before.keys()
