"""Proves that rows of one class, which have no AUC, neither crown a checkpoint nor end a run, and that every command says so in words."""

import json

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from serving_data import printed, printed_by
from tiny_run import lines_of, make_run, train

from mbcnet_rec.checkpoints.storage import CheckpointStorage, best_step
from mbcnet_rec.report.run_report import write_run_report
from mbcnet_rec.scoring.metrics import Histogram, auc, exact_metrics, reliability
from mbcnet_rec.scoring.ranking import group_metrics

EARLY = ["train.eval_every=5", "train.patience=1", "train.schedule=plateau", "train.keep_best=2"]


def strict(text):
    """JSON as its standard has it: without NaN."""

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Rows of one class for validation and test, and the run that was trained with them."""
    folder = make_run(tmp_path_factory.mktemp("one_class"))
    rows = pq.read_table(folder / "rows/test.parquet")
    for value, name in ((0, "negative"), (1, "positive")):
        kept = rows.filter(pc.equal(rows["click"].cast("int64"), value))
        pq.write_table(kept, folder / f"rows/{name}.parquet", write_page_checksum=True)
    text = (folder / "tiny.toml").read_text().replace("rows/", f"{folder}/rows/")
    text = text.replace("[data]", f'[data]\nvalid = ["{folder}/rows/negative.parquet"]')
    (folder / "tiny.toml").write_text(text.replace("rows/test.parquet", "rows/positive.parquet"))
    return folder


@pytest.fixture(scope="module")
def run(home):
    run = home / "run"
    code, out, err = printed(lambda: train(home / "tiny.toml", *EARLY, f"train.out={run}"))
    assert code == 0, err
    (home / "said").write_text(out + err)
    return run


def sets(*settings):
    return [word for each in settings for word in ("--set", each)]


def test_training_goes_on_to_its_end_and_says_why_once(home, run):
    said = (home / "said").read_text()
    assert said.count("data.valid: the rows are all of one class, label 0, so their AUC is not defined") == 1
    assert said.count("valid AUC not defined, log-loss 0.") == 4
    assert "best so far" not in said and "nan" not in said and "stopped early" not in said
    assert "weights of the last step" in said and "not defined: the rows are all of one class, label 1" in said
    valid = lines_of(run, "valid")
    assert [line["step"] for line in valid] == [5, 10, 15, 20] and {line["auc"] for line in valid} == {None}
    assert {line["lr_scale"] for line in lines_of(run, "train")} == {1.0}
    done = strict((run / "DONE").read_text())
    assert done["step"] == 20 and done["auc"] is None and done["gauc"] is None and done["log_loss"] > 0
    for line in (run / "metrics.jsonl").read_text().splitlines():
        strict(line)
    assert lines_of(run, "test")[0]["step"] == 20 and best_step(CheckpointStorage(run / "checkpoints")) == 20
    (run / "checkpoints/best.json").write_text('{"step": 15, "auc": null}')  # of an earlier version
    assert best_step(CheckpointStorage(run / "checkpoints")) == 20
    (run / "checkpoints/best.json").unlink()
    page = write_run_report(run).read_text()
    assert "test split" in page and "AUC is not defined: the rows are all of one class, label 1." in page


def test_evaluate_says_it_of_all_rows_of_slices_and_of_groups(home, run):
    code, out, _ = printed_by("evaluate", run, "--split", "valid", "--by", "hour")
    assert code == 0 and "-: not defined, since the rows are all of one class, label 0" in out
    assert "-: not defined, since the rows of that value are all of one class" in out and "nan" not in out
    for exact in ("0", "10"):
        code, out, _ = printed_by("evaluate", run, "--json", "--by", "hour", "--exact-rows", exact)
        found = strict(out)
        assert code == 0 and found["auc"] is None and found["ne"] is None and found["gauc"] is None
        assert found["log_loss"] > 0 and found["calibration"] > 0 and found["intervals"]["auc"] == [None, None]
    rows = pq.read_table(home / "rows/test.parquet")
    first = {user: index for index, user in reversed(list(enumerate(rows["user"].to_pylist())))}
    pq.write_table(rows.take(sorted(first.values())), home / "rows/once.parquet", write_page_checksum=True)
    code, out, _ = printed_by("evaluate", run, "--data", home / "rows/once.parquet")
    assert code == 0 and "GAUC is not defined: no group has rows of both classes" in out


def test_tune_and_study_say_the_true_cause(home):
    config = ("--config", home / "tiny.toml", *sets("train.max_steps=5"))
    (home / "space.toml").write_text('[space]\n"optim.dense_lr" = { low = 1e-3, high = 1e-2 }\n')
    code, _, err = printed_by("tune", *config, "--space", home / "space.toml", "--trials", "1", "--out", home / "t")
    last = err.strip().splitlines()[-1]
    assert (
        code == 2 and "the AUC of the valid rows is not defined, since the rows are all of one class, label 0" in last
    )
    code, _, err = printed_by(
        "study", "table3", *config, "--models", "dnn", "--seeds", "1", "--workers", "1", "--out", home / "s"
    )
    page = (home / "s/table3_tiny.html").read_text()
    assert code == 0, err
    assert "the AUC of the test rows is not defined, since the rows are all of one class, label 1; name other" in page
    assert "<td>NaN</td><td>0." in page, "no AUC of the validation rows instead, and the log-loss of the test rows"


def test_training_rows_of_one_class_are_told(home):
    settings = ("data.valid=[]", "data.batch_size=12", "train.log_every=1", "train.epochs=2", f"train.out={home}/ones")
    train_rows = f"data.train=['{home}/rows/positive.parquet']"
    code, _, err = printed(lambda: train(home / "tiny.toml", train_rows, *settings))
    assert code == 0 and err.count("data.train: the rows are all of one class, label 1: nothing can be learned") == 1


def test_a_run_that_had_a_best_checkpoint_keeps_it(home):
    valid = f"data.valid=['{home}/rows/test.parquet']"
    args = (home / "tiny.toml", *EARLY[:1], f"train.out={home}/mixed")
    assert train(*args, valid, "train.max_steps=10") == 0
    best = best_step(CheckpointStorage(home / "mixed/checkpoints"))
    assert train(*args, resume=True) == 0
    assert best_step(CheckpointStorage(home / "mixed/checkpoints")) == best <= 10


@pytest.mark.parametrize("logit", [np.nan, np.inf, -np.inf, 0.0])
def test_rows_that_cannot_be_scored_have_no_metrics(logit):
    """Of a logit that is not finite, or a label other than 0 and 1, every metric is NaN, exact or binned, and there is no reliability."""
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(50, 1)).astype(np.float32), (np.arange(50) % 2).astype(np.float32)
    groups = np.arange(50) // 10
    logits[7] = logit
    for label in (labels[7],) if logit else (2.0, 0.5, -1.0, np.nan):
        labels[7] = label
        histogram = Histogram(1, 64)
        histogram.add(logits, labels)
        assert np.isnan(auc(logits[:, 0], labels))
        assert reliability(logits[:, 0], labels) == histogram.reliability() == []
        for metrics in (
            exact_metrics(logits, labels, ()), histogram.metrics(()),
            group_metrics(logits[:, 0], labels, groups, (2,)),
        ):  # fmt: skip
            assert all(np.isnan(each.value) and np.isnan(each.error) for each in metrics.values())


def test_a_score_that_is_no_number_is_refused_by_its_row(home, tmp_path):
    """Here for weights that are not finite: predict and evaluate name the first such row, and write nothing of its chunk."""
    settings = [
        f"train.out={tmp_path}/bad",
        "train.max_steps=1",
        "optim.dense_lr=3e38",
        "data.valid=[]",
        "data.test=[]",
    ]
    assert train(home / "tiny.toml", *settings) == 0
    data, out = home / "rows/test.parquet", tmp_path / "out"
    for command in (("predict", "--out", out), ("evaluate",)):
        code, _, err = printed_by(command[0], tmp_path / "bad", "--data", data, *command[1:])
        assert code == 2 and "test.parquet: row group 0, kept row 0: its score is not a number" in err
        assert not list(tmp_path.rglob("*.parquet"))
