"""Proves that a checkpoint moves: saved at W ranks and loaded at W' for {1, 2, 3, 4} squared, between all kinds of plan, every logical table
and optimizer state is the same bit by bit, training goes on with the same losses, and what cannot move is refused."""

import json

import numpy as np
import pytest
from forked_ranks import run_script

WORLDS = ("1", "2", "3", "4")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reshard")
    run_script("reshard_ranks.py", str(folder))
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("after", WORLDS)
@pytest.mark.parametrize("before", WORLDS)
def test_every_world_size_reads_every_other(results, before, after):
    assert results["save_at_each_world_size"][before] == [0] * int(before)
    assert results["load_at_each_world_size"][after][before] == [], "tensors that differ in a bit, or in part"


@pytest.mark.parametrize("world", WORLDS)
def test_the_next_hundred_losses_are_the_same(results, world):
    losses = results["train_on_at_each_world_size"]
    assert len(losses["1"]) == 100 and losses["1"][-1] < losses["1"][0], "it learns"
    np.testing.assert_allclose(losses[world], losses["1"], rtol=1e-5)


def test_every_kind_of_plan_reads_every_other(results):
    pairs = results["between_kinds_of_plan"]
    assert len(pairs) == 16 + 25 + 25 + 16 + 4
    assert {pair: names for pair, names in pairs.items() if names} == {}


def test_rowwise_state_does_not_go_into_column_shards(results):
    """Not even with --allow-partial: the reason and the cure are said, and nothing is loaded."""
    refused = results["refused"]
    assert refused["codes"] == [0, 0], refused
    for words in refused["words"]:
        assert "1 -> 2 column shards: rowwise Adagrad keeps one number a row and shard" in words
        assert "train with optim.embedding.name = 'adagrad'" in words
