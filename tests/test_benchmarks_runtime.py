"""Proves in a small form what the benchmarks of the runtime prove in a large one: a storm of kills ends bit for bit like a calm run, save and
restart cycles leave no thread or handle behind, and no value of a config ends in a traceback."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from data.errors import InputError
from mbcnet_rec.config import RunConfig, load_config

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def scripts():
    """The benchmarks as modules: they are scripts beside one another."""
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def result_of(script, *args):
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), "--json", *args],
        env=os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stdout


def test_a_storm_of_one_kill_of_each_kind():
    result, table = result_of("crash_storm.py", "--quick", "--seed", "3")
    assert result["bitwise_equal"] and result["kills"] == 3
    assert result["kinds"] == {"step": 1, "save": 1, "moment": 1}
    assert "every tensor and metric is bitwise equal" in table


def test_cycles_of_save_and_restart_leave_nothing_behind():
    result, _ = result_of("soak.py", "--quick", "--cycles", "6")
    assert result["cycles"] == 6
    assert (
        result["threads_added"] <= 0 and result["handles_added"] <= 0 and result["native_threads_added"] <= 0
    )


def test_five_hundred_wrong_configs_are_refused_in_one_line_or_read(scripts, tmp_path):
    import config_fuzz
    from crash_storm import CONFIG

    rng, keys = random.Random(0), config_fuzz.keys_of(RunConfig)
    assert len(keys) > 100
    file = tmp_path / "run.toml"
    file.write_text(CONFIG.format(folder=tmp_path))
    outcomes = {"read": 0, "refused": 0}
    for _ in range(500):
        overrides = config_fuzz.mutation(rng, keys)
        try:
            load_config(file, overrides)
            outcomes["read"] += 1
        except InputError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
    assert outcomes["refused"] > 200 and outcomes["read"] > 50, outcomes


def test_some_of_them_through_training():
    result, _ = result_of("config_fuzz.py", "--mutations", "12", "--seed", "4")
    assert result["failures"] == 0 and result["trained"] + result["refused"] == 12
