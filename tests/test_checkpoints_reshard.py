"""Proves that a checkpoint moves: between world sizes and between kinds of plan every logical table and optimizer state is the same bit by
bit, training continues with the same losses, and what cannot move is refused. The short lane has worlds 1 and 2, and each kind of plan to
the next one; the long lane has worlds 1 to 4 squared and all pairs of plans."""

import json

import numpy as np
import pytest
from forked_ranks import run_script

PAIRS = {"short": 5 + 2, "long": 16 + 25 + 25 + 16 + 4}


@pytest.fixture(scope="module", params=["short", pytest.param("long", marks=pytest.mark.long)])
def lane(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reshard")
    run_script("reshard_ranks.py", str(folder), request.param)
    return request.param, json.loads((folder / "results.json").read_text())


def test_every_world_size_reads_every_other(lane):
    name, results = lane
    worlds = ["1", "2"] if name == "short" else ["1", "2", "3", "4"]
    nothing = {world: [] for world in worlds}
    found = results["every_world_size_reads_every_other"]
    assert found == dict.fromkeys(worlds, nothing), "differ in a bit, or in part"


def test_the_next_losses_are_the_same(lane):
    losses = lane[1]["train_on_at_each_world_size"]
    for world in losses:
        assert len(losses[world]) in (20, 100) and losses["1"][-1] < losses["1"][0], "it learns"
        np.testing.assert_allclose(losses[world], losses["1"], rtol=1e-5)


def test_every_kind_of_plan_reads_another(lane):
    name, results = lane
    pairs = results["between_kinds_of_plan"]
    assert len(pairs) == PAIRS[name] and {pair: names for pair, names in pairs.items() if names} == {}


def test_tables_grow_under_every_kind_of_plan(lane):
    name, results = lane
    kinds = {kind: [] for kind in ("table_wise", "row_wise", "table_row_wise", "data_parallel", "column_wise")}
    worlds = ["1", "2"] if name == "short" else ["1", "2", "4"]
    assert results["into_tables_that_have_grown"] == dict.fromkeys(worlds, kinds)


def test_rowwise_state_does_not_go_into_column_shards(lane):
    """Not even with --allow-partial: the reason and the cure are said, and nothing is loaded."""
    words = lane[1]["rowwise_state_into_column_shards"]
    assert "1 -> 2 column shards: rowwise Adagrad keeps one number a row and shard" in words
    assert "train with optim.embedding.name = 'adagrad'" in words
