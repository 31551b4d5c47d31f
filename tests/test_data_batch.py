"""Proves that a batch's tensors hold the gathered rows by key, and that the batch moves as a pipeline needs."""

from dataclasses import fields

import numpy as np
import pytest
import torch

from data.reading.columns import ABSENT, Columns, Ragged, Run, gather, join_lists
from data.reading.order import Cursor
from data.stream.batch import Batch, Keys, to_batch


def make_batch(missing: bool, lists: bool = True, weighted: bool = True) -> Batch:
    bag = Ragged(np.asarray([7, 8, 9]), np.asarray([0, 2, 2, 3]), None)
    weights = bag._replace(weights=np.asarray([0.5, 1.5, 2.5], np.float32))
    columns = Columns(
        single_ids=np.asarray([[1, 2, 3], [4, ABSENT if missing else 5, 6]], np.int32),
        absent=np.asarray([False, missing]),
        lists=join_lists([[bag]] if lists else [], None, 3),
        weighted_lists=join_lists([[weights]] if weighted else [], None, 3),
        dense=np.arange(6, dtype=np.float32).reshape(3, 2),
        labels=np.asarray([1, 0, 0], np.float32),
        group_ids=np.asarray([11, 12, 13]) if weighted else None,
    )
    keys = Keys(["a", "b", *(["c"] if lists else [])], ["w"] if weighted else [])
    rows = gather([Run(columns, 0, 3)], 3)
    return to_batch(rows, keys, weights=np.asarray([1, 1, 0], np.float32), cursor=Cursor(2, 5))


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("lists", [False, True])
def test_values_and_lengths_by_key(missing, lists):
    batch = make_batch(missing, lists)
    sparse = batch.sparse_features
    assert sparse["a"].values().tolist() == [1, 2, 3] and sparse["a"].lengths().tolist() == [1, 1, 1]
    assert sparse["b"].values().tolist() == ([4, 6] if missing else [4, 5, 6])
    assert sparse["b"].lengths().tolist() == ([1, 0, 1] if missing else [1, 1, 1])
    if lists:
        assert sparse["c"].values().tolist() == [7, 8, 9] and sparse["c"].lengths().tolist() == [2, 0, 1]
    assert sparse.values().dtype == torch.int64 and sparse.lengths().dtype == torch.int32
    weighted = batch.weighted_features
    assert weighted is not None and weighted["w"].weights().tolist() == [0.5, 1.5, 2.5]
    assert batch.dense_features.tolist() == [[0, 1], [2, 3], [4, 5]] and batch.weights.tolist() == [1, 1, 0]
    assert batch.cursor == Cursor(2, 5)


def test_absent_parts_are_none():
    batch = make_batch(False, weighted=False)
    assert batch.weighted_features is None and batch.group_ids is None


def test_moving_keeps_every_part():
    """A field added to Batch and forgotten in `to` would stay on the host, or lose the cursor."""
    batch = make_batch(True)
    moved = batch.to(torch.device("meta"))
    for field in fields(Batch):
        part = getattr(moved, field.name)
        if field.name == "cursor":
            assert part == batch.cursor
        elif isinstance(part, torch.Tensor):
            assert part.device.type == "meta" and part.shape == getattr(batch, field.name).shape
        else:
            assert part.device().type == "meta" and part.keys() == getattr(batch, field.name).keys()
    assert {id(part) for part in batch._parts()} == {
        id(getattr(batch, field.name)) for field in fields(Batch) if field.name != "cursor"
    }
