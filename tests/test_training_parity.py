"""Proves that 1, 2 and 4 processes train the same model: equal losses for 50 steps, equal tables and optimizer state
at the end, under every kind of plan."""

import numpy as np
import pytest
from forked_ranks import run_script
from parity_worker import KINDS, STEPS
from small_data import write_small

WORLDS = (1, 2, 4)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[tuple[str, int], dict[str, np.ndarray]]:
    folder = tmp_path_factory.mktemp("parity")
    config = write_small(folder)
    run_script("parity_worker.py", str(config), str(folder), *map(str, WORLDS))
    return {
        (kind, world): dict(np.load(folder / f"{kind}-{world}.npz")) for kind in KINDS for world in WORLDS
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", WORLDS[1:])
def test_losses_are_those_of_one_process(results, kind, world):
    one, many = results[kind, 1]["losses"], results[kind, world]["losses"]
    assert len(one) == STEPS and one[-1] < one[0], "it learns"
    np.testing.assert_allclose(many, one, rtol=1e-5)
    assert results[kind, world]["coteaching"] > 0, "the co-teaching term is part of what is compared"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", WORLDS[1:])
def test_tables_and_their_optimizer_state_are_equal(results, kind, world):
    one, many = results[kind, 1], results[kind, world]
    assert one.keys() == many.keys()
    tables = [name for name in one if "embedding_bags" in name]
    assert sum(name.startswith("model|") for name in tables) == 5
    for name in tables:
        np.testing.assert_allclose(many[name], one[name], atol=1e-5, rtol=0, err_msg=name)


def test_a_tables_optimizer_does_not_depend_on_the_plan(results):
    reference = results["table_wise", 1]
    for kind in ("row_wise", "table_row_wise", "data_parallel"):
        other = results[kind, 2]
        assert reference.keys() == other.keys()
        np.testing.assert_allclose(other["losses"], reference["losses"], rtol=1e-5)
        for name in reference:
            if "embedding_bags" in name:
                np.testing.assert_allclose(other[name], reference[name], atol=1e-5, rtol=0, err_msg=name)
