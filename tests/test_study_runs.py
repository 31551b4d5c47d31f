"""Proves where runs live: what changes a run's folder and what does not, that each is trained once, how failures and stops are told."""

import importlib.metadata as metadata
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_data import write_small

from data.engine import HERE, Engine
from data.errors import InputError
from mbcnet_rec.config import load_config
from mbcnet_rec.runtime.exits import PreemptedError
from mbcnet_rec.study.runs import Run, dependencies, place_run, run_key, scores, train_all, train_one
from mbcnet_rec.study.tuning import with_overrides


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return load_config(write_small(tmp_path_factory.mktemp("runs"), 200, 50))


def test_what_decides_a_result_decides_the_folder(config, tmp_path):
    key = run_key(config)
    assert run_key(replace(config, name="other")) == key
    assert run_key(with_overrides(config, ["train.out=elsewhere"], "x")) == key
    for override in ("train.seed=1", "model.kind=dnn", "optim.dense_lr=0.1", "data.drop_positives=0.5"):
        assert run_key(with_overrides(config, [override], "x")) != key, override
    schema = tmp_path / "schema.toml"
    schema.write_text(Path(config.schema).read_text().replace("num_embeddings = 40", "num_embeddings = 41"))
    assert run_key(replace(config, schema=str(schema))) != run_key(replace(config, schema=str(config.schema)))


def test_a_checkout_that_is_not_installed_has_runs_too(config, monkeypatch):
    version, code = dependencies(config, {})["code of the models"].split()
    assert version == metadata.version("mbcnet-rec")
    monkeypatch.setattr(sys, "path", [])  # where packages say what they are
    assert dependencies(config, {})["code of the models"] == f" {code}"


def test_longer_data_is_another_run(tmp_path):
    config = load_config(write_small(tmp_path, 200, 50))
    key = run_key(config)
    write_small(tmp_path, 300, 50)
    assert run_key(config) != key


def test_one_changed_label_in_a_large_file_is_another_run(tmp_path):
    """Contents count: the file keeps its name, size and both ends."""
    config = load_config(write_small(tmp_path, 200, 50))
    filler = np.random.default_rng(0).integers(0, 2**62, 250_000)  # 2 MB that no encoding shortens
    pq.write_table(pa.table({"click": filler}), tmp_path / "train.parquet")
    assert (tmp_path / "train.parquet").stat().st_size > 1 << 20
    key = run_key(config)
    with (tmp_path / "train.parquet").open("r+b") as file:
        file.seek(1_000_000)
        byte = file.read(1)[0]
        file.seek(1_000_000)
        file.write(bytes([byte ^ 1]))
    assert run_key(config) != key


def test_everything_that_a_run_is_read_with_counts_and_nothing_else(tmp_path):
    config = load_config(write_small(tmp_path / "a", 200, 50))
    schema = Path(config.schema)
    items = pa.table({"value": pa.array(["x", "y"])})
    pq.write_table(items, schema.parent / "items.parquet")
    vocabulary = 'word = { kind = "categorical", encoding = "vocabulary", vocabulary = "items.parquet", num_embeddings = 4, embedding_dim = 4 }'
    schema.write_text(schema.read_text().replace("[groups]", f"{vocabulary}\n[groups]"))
    keys = [run_key(config)]

    def changes():
        yield with_overrides(config, ["train.timeout_seconds=9", "train.tracking=http://x"], "x")
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        yield load_config(
            tmp_path / "a/run.toml", [f"schema={tmp_path}/b/schema.toml", f"data.train=['{tmp_path}/b/train.parquet']"]
        )
        schema.write_text("# a comment\n" + schema.read_text())
        yield config
        pq.write_table(items.take([1, 0]), schema.parent / "items.parquet")
        yield config
        table = pq.read_table(tmp_path / "a/train.parquet")
        pq.write_table(
            table.take(list(range(len(table)))[::-1]), tmp_path / "a/train.parquet"
        )  # as many rows, other ones
        yield config

    keys += [run_key(each) for each in changes()]
    assert keys[0] == keys[1] == keys[2] == keys[3] and len(set(keys)) == 3


def test_missing_data_is_told(config):
    with pytest.raises(InputError, match="no such file"):
        run_key(replace(config, schema="nowhere.toml"))
    with pytest.raises(InputError, match="nowhere"):
        run_key(replace(config, data=replace(config.data, train=("nowhere",))))


def run_of(config, tmp_path, variant="a", seed=0):
    return Run(variant, seed, place_run(config, seed, tmp_path))


def test_each_run_is_trained_once_and_done_ones_are_not(config, tmp_path):
    trained = []
    first, same = run_of(config, tmp_path), run_of(config, tmp_path, "b")
    other = run_of(config, tmp_path, seed=1)
    assert first.folder == same.folder != other.folder
    other.folder.mkdir(parents=True)
    (other.folder / "DONE").touch()
    noted = train_all([first, same, other], HERE, lambda config, watch: trained.append(config.train.seed) or "")
    assert [failure for _, failure in noted] == [""] and trained == [0]


@pytest.mark.parametrize(
    ("override", "told"),
    [("data.train_where=['nonsense <']", "nonsense"), ("optim.dense_lr=1e38", "loss is not finite")],
)
def test_a_failure_is_one_line_and_what_the_run_printed_is_kept(override, told, config, tmp_path):
    run = run_of(with_overrides(config, [override, "model.kind=dnn"], "x"), tmp_path)
    failure = train_one(run.config)
    assert told in failure and "\n" not in failure and not run.done
    assert run.folder.with_suffix(".log").is_file()


def test_a_stop_request_ends_the_study(config, tmp_path):
    def stop(config, watch):
        raise PreemptedError("stopped at step 3")

    with pytest.raises(PreemptedError):
        list(train_all([run_of(config, tmp_path, seed=seed) for seed in range(3)], HERE, stop))


@pytest.mark.long
def test_several_processes_train_for_real_and_each_knows_its_threads(config, tmp_path):
    short = ["model.kind=dnn", "train.max_steps=2", "train.eval_every=0", "train.epochs=1"]
    quick = with_overrides(config, short, "x")
    before = os.environ.get("OMP_NUM_THREADS")
    pending = [run_of(quick, tmp_path, seed=seed) for seed in range(2)]
    broken = run_of(with_overrides(quick, ["data.train_where=['nonsense <']"], "x"), tmp_path, "c")
    outcome = {
        (run.variant, run.seed): failure
        for run, failure in train_all([*pending, broken], Engine("local", 2), train_one)
    }
    assert outcome[("a", 0)] == outcome[("a", 1)] == "" and len(outcome[("c", 0)].splitlines()) == 1
    assert all(run.done for run in pending) and not broken.done
    assert os.environ.get("OMP_NUM_THREADS") == before
    assert 0 < scores(pending[0].folder)["auc"] < 1


def test_scores_are_the_test_rows_else_the_best_validation(tmp_path):
    lines = [
        {"split": "train", "step": 1, "auc": 0.99},
        {"split": "valid", "step": 1, "auc": 0.8, "log_loss": 0.4},
        {"split": "valid", "step": 2, "auc": 0.7, "log_loss": 0.3},
        {"split": "valid", "step": 3, "auc": None, "log_loss": 0.3},
    ]
    file = tmp_path / "metrics.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    assert scores(tmp_path)["log_loss"] == 0.4 and scores(tmp_path, ("valid",))["auc"] == 0.8
    file.write_text("\n".join(map(json.dumps, [*lines, {"split": "test", "step": 1, "auc": 0.6}])))
    assert scores(tmp_path)["auc"] == 0.6 and scores(tmp_path, ("valid",))["auc"] == 0.8
    file.write_text(json.dumps(lines[0]))
    with pytest.raises(InputError, match=r"no test or valid rows were scored; name data.test or data.valid"):
        scores(tmp_path)
