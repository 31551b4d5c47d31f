"""Proves the Python API: train, predict, evaluate, metrics, a stream and a step for one's own loop, and that two runs in one process do not disturb each other."""

import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny_run
from small_data import write_small

import mbcnet_rec
from data.errors import InputError
from mbcnet_rec import Run, load_config, load_schema, stream, train, train_step
from mbcnet_rec.cli import main

SHORT = ("train.max_steps=6", "train.eval_every=3", "train.log_every=3")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("api"))


@pytest.fixture(scope="module")
def run(config):
    return train(load_config(config, [f"train.out={config.parent / 'api'}", *SHORT]))


def test_a_run_predicts_what_the_command_predicts(run, config):
    table = pq.read_table(config.parent / "test.parquet")
    assert (
        main(
            [
                "predict",
                str(run.folder),
                "--data",
                str(config.parent / "test.parquet"),
                "--out",
                str(config.parent / "p"),
            ]
        )
        == 0
    )
    wanted = pq.read_table(config.parent / "p")["probability"].to_numpy()
    for rows in (table, table.drop_columns(["click"]).to_pydict()):
        np.testing.assert_allclose(Run.load(run.folder).predict(rows), wanted, atol=2e-6)
    with pytest.raises(ValueError, match="item"):
        run.predict(table.drop_columns(["item"]))


def test_a_run_evaluates_and_has_its_metrics(run, config):
    found = run.evaluate()
    metrics = run.metrics()
    test = metrics.filter(np.array([split == "test" for split in metrics["split"].to_pylist()])).to_pylist()[0]
    assert found["auc"] == pytest.approx(test["auc"], abs=1e-6) and found["rows"] == test["rows"]
    assert {"auc/efgc", "step"} <= {*metrics.column_names} and metrics.num_rows >= 4
    by = run.evaluate(config.parent / "valid.parquet", by=["user"])
    assert by["rows"] == pq.read_metadata(config.parent / "valid.parquet").num_rows and by["slices"]["user"]
    with pytest.raises(InputError, match="no run folder"):
        Run.load(config.parent)


def test_two_runs_in_one_process_do_not_disturb_each_other(run, config):
    """The same config gives the same weights before and after another model has trained in between."""
    assert tiny_run.train(config, f"train.out={config.parent / 'dnn'}", "model.kind=dnn", "train.seed=9", *SHORT) == 0
    assert tiny_run.train(config, f"train.out={config.parent / 'again'}", *SHORT) == 0
    other, again = (Run.load(config.parent / name) for name in ("dnn", "again"))
    rows = pq.read_table(config.parent / "test.parquet")
    np.testing.assert_array_equal(run.predict(rows), again.predict(rows))
    assert np.abs(other.predict(rows) - run.predict(rows)).max() > 1e-4


def test_a_loop_of_ones_own_learns(config):
    run = load_config(config, ["model.kind=dnn", "optim.dense_lr=0.01"])
    rows = stream(load_schema(run.schema), run.data.train, batch_size=96, lanes=12, order="shuffled", seed=1)
    with train_step(run) as step:
        losses = [float(step(batch).terms["loss"]) for _ in range(4) for batch in rows]
    half = len(losses) // 2
    assert np.mean(losses[half:]) < np.mean(losses[:half]) and len(losses) == 4 * rows.steps_per_epoch


def test_the_package_is_cheap_to_import_and_typed():
    code = "import sys, mbcnet_rec; sys.exit('torch' in sys.modules or 'pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert all(hasattr(mbcnet_rec, name) for name in mbcnet_rec.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mbcnet_rec.nothing
