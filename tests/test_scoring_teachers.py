"""Proves EnKD's two stages in one command: teachers are runs of their own, their logits ride with the rows, the student learns from them."""

import json

import numpy as np
import pytest
import torch
from small_data import write_small

from data.errors import InputError
from data.schema import load_schema
from mbcnet_rec.cli import main
from mbcnet_rec.config import load_config
from mbcnet_rec.run_training import open_splits, run_training
from mbcnet_rec.runtime.process import joined_process
from mbcnet_rec.teachers import TaughtStream, load_teacher, teacher_config, train_model

SETTINGS = [
    "model.kind=enkd",
    "model.enkd.teachers=['wide_deep', 'dcnv2']",
    *(f"model.{kind}.hidden=[16, 8]" for kind in ("enkd", "wide_deep", "dcnv2")),
]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """An EnKD run, as `mbcnet train` makes it."""
    path = write_small(tmp_path_factory.mktemp("enkd"), 1_500, 300)
    assert train_model(load_config(path, SETTINGS)) == 0
    return load_config(path, SETTINGS)


@pytest.fixture(scope="module")
def scored(config):
    """Training batches as the student sees them, and its teachers' own streams."""
    schema = load_schema(config.schema)
    with joined_process("cpu") as process:
        stream = open_splits(config.data, 0, schema, process)["train"]
        kinds = config.model.enkd.teachers
        teachers = [load_teacher(teacher_config(config, kind), schema, process) for kind in kinds]
        taught = TaughtStream(stream, teachers)
        batches = list(taught)
        scored = [list(teacher.score((batch, None) for batch in batches)) for teacher in teachers]
        own = [np.stack([each.logits[:, 0] for each in both], axis=1) for both in zip(*scored, strict=True)]
        return schema, taught, batches, own


def lines_of(folder, split):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == split]


def test_teachers_are_whole_runs_beside_the_student_s(config):
    assert (config.run_folder / "DONE").exists()
    for kind in ("wide_deep", "dcnv2"):
        teacher = teacher_config(config, kind)
        assert teacher.run_folder == config.run_folder.with_name("run_teachers") / kind
        assert (teacher.run_folder / "DONE").exists() and lines_of(teacher.run_folder, "test")
        assert (teacher.data, teacher.train.seed) == (config.data, config.train.seed)


def test_rows_end_with_the_teachers_logits(config, scored):
    schema, taught, batches, own = scored
    width = sum(feature.dense_width for feature in schema.dense)
    assert len(batches) == taught.steps_per_epoch
    for batch, logits in zip(batches, own, strict=True):
        assert batch.dense_features.shape[1] == width + 2
        real = batch.weights > 0
        assert np.allclose(batch.dense_features[real, width:], logits, atol=1e-5)
        assert not batch.dense_features.requires_grad


def test_the_logits_are_those_of_the_best_weights(config, scored):
    """On training rows the best checkpoint of a teacher knows the clicks better than chance, and each teacher differs."""
    _, _, batches, _ = scored
    logits = torch.cat([batch.dense_features[:, -2:] for batch in batches])
    labels = torch.cat([batch.labels for batch in batches])
    for teacher in range(2):
        assert logits[labels == 1, teacher].mean() > logits[labels == 0, teacher].mean() + 0.1
    assert not torch.allclose(logits[:, 0], logits[:, 1])


def test_the_student_logs_what_the_teachers_add_and_is_tested_without_them(config):
    train, test = lines_of(config.run_folder, "train"), lines_of(config.run_folder, "test")
    assert all(line["distillation_loss"] > 0 for line in train)
    assert all(np.isclose(line["loss"], line["bce"] + line["distillation_loss"], rtol=1e-5) for line in train)
    assert 0.55 < test[0]["auc"] < 1


def test_a_resumed_run_keeps_its_teachers(config, capfd):
    teachers = config.run_folder.with_name("run_teachers")
    before = {path: path.stat().st_mtime_ns for path in teachers.glob("*/DONE")}
    assert train_model(load_config(config.run_folder / "config.toml"), resume=True) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_mistakes_are_told(config):
    with pytest.raises(InputError, match="'mbcent' is no kind of model"):
        teacher_config(config, "mbcent")
    with pytest.raises(InputError, match="start it by `mbcnet train`"):
        run_training(config)


def test_a_teacher_that_is_done_is_not_taken_for_one_of_another_model(config, capfd):
    path = config.run_folder.parent / "config.toml"
    sets = [f"--set={each}" for each in [*SETTINGS, "optim.dense_lr=0.25"]]
    name = next(each for each in config.run_folder.parent.glob("*.toml") if each.name != "schema.toml")
    assert main(["train", "--config", str(path if path.exists() else name), *sets, "--resume"]) == 2
    said = capfd.readouterr().err
    assert "this teacher is done, but optim.dense_lr = 0.25, but 0.005 in its checkpoint" in said
