"""Proves that the planner benchmark compares what it says: every case plans the same tables, and the last pass only helps."""

import importlib.util
import sys
from pathlib import Path

import pytest

from sharding.plan.cluster import read_cluster
from sharding.plan.constraints import ShardingConfig

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "planner.py"


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("benchmarks_planner", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    sys.path.remove(str(SCRIPT.parent))
    return module


def test_the_tables_are_the_same_in_every_run(bench):
    schema = bench.random_schema(50, seed=0)
    assert (
        schema.fingerprint()
        == bench.random_schema(50, seed=0).fingerprint()
        != bench.random_schema(50, seed=1).fingerprint()
    )
    assert len(schema.tables) == 50 and 5 < sum(not each.is_single for each in schema.features) < 30


def test_every_case_has_its_figures(bench):
    figures = bench.measure(
        bench.random_schema(40, seed=0), read_cluster("2x2:h100-80g"), ShardingConfig(search_seconds=2.0)
    )
    assert len(bench.CASES) >= 3
    for name in bench.CASES:
        assert 0 <= figures[f"over_bound/{name}"] <= figures[f"unmoved_over_bound/{name}"] + 1e-4
        assert figures[f"over_any_bound/{name}"] >= 0 and figures[f"proposals/{name}"] >= 1
        assert 0 < figures[f"memory_balance/{name}"] <= 1
