"""Proves that one command trains, writes the run folder by its names, stops early, resumes, and answers wrong input in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from forked_ranks import run_script
from small_data import write_small
from tiny_run import lines_of, train

from mbcnet_rec.cli import main
from mbcnet_rec.config import load_config

ENV = os.environ | {"OMP_NUM_THREADS": "1", "LOGLEVEL": "CRITICAL"}  # as the torchx component sets them
TRAIN_KEYS = {
    "auc", "loss", "bce", "samples_per_second", "input_wait_share", "step_seconds", "coteaching_loss", "differentiation_loss",
    "disagreement/efgc>deep", "transform_distance/efgc-deep", "latent_norm/efgc",
}  # fmt: skip
VALID_KEYS = {"auc", "log_loss", "ne", "calibration", "gauc", "auc/efgc", "log_loss/cross", "auc/deep", "rows"}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return write_small(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="module")
def run(config) -> Path:
    """A run of two processes, as launchers start them."""
    run_script("command_ranks.py", str(config.parent / "logs"), "train", "--config", str(config))
    return config.parent / "run"


def torchrun(*args: str) -> subprocess.CompletedProcess:
    launch = [sys.executable, "-m", "launch.agent", "--nproc_per_node=2", "--rdzv_backend=c10d"]
    launch += ["--rdzv_endpoint=localhost:0", "-m", "mbcnet_rec.cli", *args]
    return subprocess.run(launch, env=ENV, capture_output=True, text=True, timeout=600)


def test_run_folder_has_the_names_of_the_design(run):
    for name in ("config.toml", "metrics.jsonl", "plan.json", "report.html", "checkpoints", "tb", "DONE"):
        assert (run / name).exists(), name
    assert list((run / "tb").iterdir()), "TensorBoard has events"
    assert load_config(run / "config.toml").name == "small", "the resolved config loads"
    plan = json.loads((run / "plan.json").read_text())
    assert plan["world_size"] == 2 and set(plan["tables"]) == {"thing", "user", "tags", "likes", "hour"}


def test_metrics_have_the_names_of_the_design(run):
    lines = lines_of(run, timing=True)
    logged = [line for line in lines if line["split"] == "train"]
    assert [line["step"] for line in logged] == list(range(5, 51, 5))
    assert set(logged[0]) >= TRAIN_KEYS
    for line in logged:  # measured in the steps that end with a line, in no other
        assert line["latent_norm/efgc"] > 0 and line["transform_distance/efgc-deep"] > 0
    valid = [line for line in lines if line["split"] == "valid"]
    assert [line["step"] for line in valid] == [20, 40, 51], "the last partial batch of the epoch is a step"
    assert set(valid[0]) >= VALID_KEYS
    assert all(line["rows"] == 500 for line in valid), "each row is scored once, on however many ranks"
    test = lines[-1]
    assert test["split"] == "test" and test["ne"] < 1.0 and test["auc"] > 0.6, "it learned"
    best = max(valid, key=lambda line: line["auc"])
    assert test["step"] == best["step"], "the best weights are tested, not the last"


def test_done_holds_the_test_metrics(run):
    done = json.loads((run / "DONE").read_text())
    assert done["step"] == 51 and done["auc"] == lines_of(run)[-1]["auc"]


def test_the_same_config_trains_a_dnn(config):
    assert train(config, "model.kind=dnn", f"train.out={config.parent}/dnn") == 0
    test = lines_of(config.parent / "dnn")[-1]
    assert test["ne"] < 1.0 and not any(key.startswith("auc/") for key in test), "a DNN has no branches"


def test_early_stop_restores_the_best_step(config, capfd):
    out = config.parent / "stopped"
    # steps so long that validation gets worse soon
    settings = ["train.epochs=40", "train.patience=2", "optim.dense_lr=0.05", "train.eval_every=10"]
    assert train(config, f"train.out={out}", *settings) == 0
    valid = [line for line in lines_of(out) if line["split"] == "valid"]
    best = max(range(len(valid)), key=lambda index: valid[index]["auc"])
    assert len(valid) == best + 3, "two evaluations without a better one, then the end"
    assert "stopped early" in capfd.readouterr().out
    assert lines_of(out)[-1]["step"] == valid[best]["step"]


def test_resume_ends_like_an_uninterrupted_run(config):
    whole, parts = config.parent / "whole", config.parent / "parts"
    assert train(config, "train.eval_every=10", f"train.out={whole}") == 0
    assert train(config, "train.eval_every=10", f"train.out={parts}", "train.max_steps=20") == 0
    assert train(config, "train.eval_every=10", f"train.out={parts}", resume=True) == 0
    first, second = ([line for line in lines_of(out, "train", "valid") if line["step"] > 20] for out in (whole, parts))
    assert first == second, "the same numbers to the last digit"


def with_value(table: pa.Table, column: str, row: int, value) -> pa.Table:
    values = table[column].to_pylist()
    values[row] = value
    return table.set_column(table.column_names.index(column), column, pa.array(values, table[column].type))


DATA_FAULTS = {
    "missing column": (lambda t: t.drop_columns(["hour"]), ["bad.parquet", "'hour'", "missing"]),
    "id out of range": (
        lambda t: with_value(t, "user", 1500, 120),
        ["bad.parquet", "row group 2", "row 100", "'user'", "120", "on_invalid"],
    ),
    "negative id in a list": (lambda t: with_value(t, "tags", 3, [1, -7]), ["bad.parquet", "row 3", "'tags'", "-7"]),
    "label 2": (lambda t: with_value(t, "click", 10, 2), ["bad.parquet", "row 10", "'click'", "0 or 1"]),
}


@pytest.mark.parametrize("name", DATA_FAULTS)
def test_faulty_data_is_named(config, tmp_path, capfd, name):
    change, words = DATA_FAULTS[name]
    bad = tmp_path / "bad.parquet"
    pq.write_table(change(pq.read_table(config.parent / "train.parquet")), bad, row_group_size=700)
    assert train(config, f'data.train=["{bad}"]', f"train.out={tmp_path}/run") == 2
    message = capfd.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("mbcnet: ") and [word for word in words if word not in message] == [], message


CONFIG_FAULTS = {
    "unknown key": (["no.such=1"], ["no", "not a known key"]),
    "near miss": (["train.epoch=2"], ["train.epoch", "did you mean 'epochs'"]),
    "wrong type": (["train.epochs=many"], ["train.epochs", "'many'", "an integer"]),
    "out of range": (["train.epochs=0"], ["epochs = 0", "1 or more"]),
    "batch not divisible": (["data.batch_size=100"], ["batch_size = 100", "lanes = 12", "use 96"]),
    "no schema": (["schema=nowhere.toml"], ["nowhere.toml", "no such file"]),
    "no files": (['data.train=["nowhere/*.parquet"]'], ["nowhere", "no Parquet file"]),
    "branch without groups": (["model.mbcnet.branches=['efgc','efgc']"], ["branches", "each once"]),
    "graphs without a GPU": (
        ["train.device=cpu", "train.cuda_graph=true"],
        ["cuda_graph", "on a cpu", "--set train.cuda_graph=false"],
    ),
    "cuda without a GPU": (["train.device=cuda"], ["train.device", "cuda", "train.device=cpu"]),
}


@pytest.mark.parametrize("name", CONFIG_FAULTS)
def test_faulty_config_is_named_and_nothing_is_written(config, tmp_path, capfd, name):
    import torch

    if name.startswith("cuda") and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    overrides, words = CONFIG_FAULTS[name]
    assert train(config, f"train.out={tmp_path}/run", *overrides) == 2
    error = capfd.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and [word for word in words if word not in error] == [], error
    assert not (tmp_path / "run").exists(), "nothing half-written"


def test_a_plan_for_another_world_size_is_refused(config, run, tmp_path, capfd):
    assert train(config, f"sharding.plan={run}/plan.json", f"train.out={tmp_path}/run") == 2
    error = capfd.readouterr().err
    assert "plan.json" in error and "world_size" in error and "2" in error
    assert not (tmp_path / "run").exists()


def test_an_earlier_run_is_not_overwritten_unasked(config, run, capfd):
    before = (run / "DONE").read_text()
    assert main(["train", "--config", str(config)]) == 2
    error = capfd.readouterr().err
    assert "--resume" in error and "--overwrite" in error and (run / "DONE").read_text() == before


@pytest.mark.long
def test_two_ranks_say_a_mistake_once(config, tmp_path):
    done = torchrun("train", "--config", str(config), "--set", "train.epochs=0")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "epochs = 0" in done.stderr, done.stderr
