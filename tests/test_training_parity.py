"""Proves that 1, 2 and 4 processes train the same model: equal losses, tables and optimizer state under every kind of plan."""

import numpy as np
import pytest
from forked_ranks import run_script
from parity_worker import KINDS, STEPS
from small_data import write_small


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.long)])
def results(tmp_path_factory, request) -> dict[str, list[dict[str, np.ndarray]]]:
    """Kind of plan -> what one process and what several came to."""
    folder = tmp_path_factory.mktemp("parity")
    worlds = (1, request.param)
    run_script("parity_worker.py", str(write_small(folder, 1_430)), str(folder), *map(str, worlds))
    return {kind: [dict(np.load(folder / f"{kind}-{world}.npz")) for world in worlds] for kind in KINDS}


def assert_tables_are_equal(one, many):
    assert one.keys() == many.keys()
    tables = [name for name in one if "embedding_bags" in name]
    assert sum(name.startswith("model|") for name in tables) == 5
    for name in tables:
        np.testing.assert_allclose(many[name], one[name], atol=1e-5, rtol=0, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_several_processes_train_as_one(results, kind):
    one, many = results[kind]
    assert len(one["losses"]) == STEPS and one["losses"][-1] < one["losses"][0], "it learns"
    np.testing.assert_allclose(many["losses"], one["losses"], rtol=1e-5)
    assert many["coteaching"] > 0, "the co-teaching term is part of what is compared"
    assert_tables_are_equal(one, many)


def test_a_tables_optimizer_does_not_depend_on_the_plan(results):
    reference = results["table_wise"][0]
    for kind in ("row_wise", "table_row_wise", "data_parallel"):
        np.testing.assert_allclose(results[kind][1]["losses"], reference["losses"], rtol=1e-5)
        assert_tables_are_equal(reference, results[kind][1])
