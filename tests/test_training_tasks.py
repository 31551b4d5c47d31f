"""Proves that two labels, one of them null in some rows, train, resume, are scored, exported and served task by task, at one and two ranks alike."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from forked_ranks import run_script
from tasks_data import write_tasks
from tiny_run import lines_of, train

from mbcnet_rec.scoring.metrics import auc
from mbcnet_rec.serving import loader as serving

pytestmark = pytest.mark.long
BRANCHES = ("efgc", "cross", "deep")
OUTPUTS = [f"{task}{branch}" for task in ("click", "buy") for branch in ("", *(f"/{name}" for name in BRANCHES))]
REFUSED = {
    "compare": "compare: takes one label, and schema 'small' has click, buy",
    "importance": "importance: takes one label",
    "calibrate": "--calibrate platt: takes one label",
    "sampled": "data.keep_negatives and data.drop_positives: takes one label",
    "wrong": "train.early_stop = 'auc/cart': wanted one of auc, log_loss, ne, gauc, auc/click, ",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    found = tmp_path_factory.mktemp("tasks")
    run_script("task_ranks.py", str(found))
    return found


@pytest.fixture(scope="module")
def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_commands_end_well_and_what_takes_one_label_says_so(results):
    for name, result in results.items():
        wanted = 0 if name not in REFUSED else 2
        assert set(result["codes"]) == {wanted}, (name, result["words"])
        if name in REFUSED:
            lines = result["words"][0].strip().splitlines()
            assert REFUSED[name] in lines[-1] and "Traceback" not in result["words"][0], (name, lines)


def test_every_metric_is_by_task_and_the_plain_ones_are_the_first(results):
    valid = next(line for line in results["one"]["lines"] if line["split"] == "valid")
    for metric in ("auc", "log_loss", "ne", "calibration"):
        assert valid[metric] == valid[f"{metric}/click"]
        assert all(f"{metric}/{output}" in valid for output in OUTPUTS)
    assert valid["gauc"] == valid["gauc/click"] != valid["gauc/buy"]
    assert valid["rows/click"] == valid["rows"] == 500 and 350 < valid["rows/buy"] < 450
    train = next(line for line in reversed(results["one"]["lines"]) if line["split"] == "train")
    for task in ("click", "buy"):
        assert train[f"coteaching_loss/{task}"] > 0 and train[f"disagreement/{task}/cross>deep"] > 0
    bce = train["bce/click"] + 0.5 * train["bce/buy"]
    assert train["bce"] == pytest.approx(bce, rel=1e-6)
    assert not {"auc/efgc", "disagreement/cross>deep"} & train.keys()


def test_two_ranks_train_as_one(results):
    one, two = (results[name]["lines"] for name in ("one", "two"))
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for ours, theirs in zip(one, two, strict=True):
        # the log of training tells of the first rank's rows
        keys = [
            key
            for key in ours
            if ours["split"] != "train" or key.partition("/")[0] in ("loss", "bce", "coteaching_loss")
        ]
        for key in keys:
            if isinstance(ours[key], float):
                assert theirs[key] == pytest.approx(ours[key], rel=2e-4, abs=2e-5), (key, ours["step"])
    trained = [line["loss"] for line in one if line["split"] == "train"]
    assert trained[-1] < trained[0]


def sums(folder):
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.safetensors"))]  # by rank


def test_a_resumed_run_is_the_same_bit_for_bit(results, folder):
    before, after = (results[name]["lines"] for name in ("two", "again"))
    last = [[line for line in lines if line["step"] > 10] for lines in (before, after)]
    assert last[0] == last[1] and len(last[0]) >= 3
    tensors = [sums(folder / name / "checkpoints" / "step_20") for name in ("two", "again")]
    assert tensors[0] == tensors[1] and tensors[0]


def test_evaluate_says_what_training_logged(results, folder):
    (logged,) = lines_of(folder / "two", "test")
    found = json.loads(results["evaluate"]["words"][0].splitlines()[-1])
    floats = [key for key, value in logged.items() if isinstance(value, float)]
    assert len(floats) > 35
    for key in floats:
        assert found[key] == pytest.approx(logged[key], abs=1e-6), key
        assert found["intervals"][key][0] <= found[key] <= found["intervals"][key][1]
    by_hour = found["slices"]["hour"].values()
    for task in ("click", "buy"):
        assert sum(each[f"rows/{task}"] for each in by_hour) == found[f"rows/{task}"]
    assert all(f"auc/{output}" in each for each in by_hour for output in OUTPUTS)
    binned = json.loads(results["binned"]["words"][0].splitlines()[-1])
    for output in OUTPUTS:
        assert binned[f"auc/{output}"] == pytest.approx(found[f"auc/{output}"], abs=1e-4)
        assert binned[f"log_loss/{output}"] == pytest.approx(found[f"log_loss/{output}"], abs=1e-6)


def test_predict_writes_a_column_for_every_output(folder):
    scores, rows = pq.read_table(folder / "s2" / "test.parquet"), pq.read_table(folder / "test.parquet")
    names = [f"probability_{each.replace('/', '_')}" for each in OUTPUTS]
    assert scores.column_names == ["user", *names]
    (logged,) = lines_of(folder / "two", "test")
    for output, name in zip(OUTPUTS, names, strict=True):
        labels = rows[output.partition("/")[0]].to_numpy()
        known = ~np.isnan(labels.astype(float))
        found = auc(scores[name].to_numpy()[known], labels[known])
        assert found == pytest.approx(logged[f"auc/{output}"], abs=2e-4)


def test_esmm_scores_click_conversion_and_their_product(folder, results):
    scores, rows = pq.read_table(folder / "s_esmm" / "test.parquet"), pq.read_table(folder / "test.parquet")
    click, buy, both = (scores[f"probability_{name}"].to_numpy() for name in ("click", "buy", "click_and_buy"))
    assert np.abs(click.astype(float) * buy - both).max() < 1e-6
    (logged,) = lines_of(folder / "esmm", "test")
    clicked, bought = (rows[name].to_numpy().astype(float) for name in ("click", "buy"))
    known = (clicked == 0) | ~np.isnan(bought)
    assert logged["rows/click_and_buy"] == known.sum() and logged["rows/buy"] == (clicked * ~np.isnan(bought)).sum()
    assert auc(both[known], np.nan_to_num(clicked * bought)[known]) == pytest.approx(
        logged["auc/click_and_buy"], abs=2e-4
    )
    train = next(line for line in results["esmm"]["lines"] if line["split"] == "train")
    assert train["bce"] == pytest.approx(train["bce/click"] + train["bce/click_and_buy"], rel=1e-6)
    assert "bce/buy" not in train, "conversion is learned through the product alone"


def test_early_stop_goes_by_a_tasks_metric(folder, results):
    """The best checkpoint is the one of that metric, and patience counts by it."""
    valid = [line for line in results["esmm"]["lines"] if line["split"] == "valid"]
    best = min(valid, key=lambda line: line["log_loss/click_and_buy"])["step"]
    assert json.loads((folder / "esmm" / "checkpoints" / "best.json").read_text())["step"] == best
    values = [line["auc/buy/deep"] for line in results["stopped"]["lines"] if line["split"] == "valid"]
    assert len(values) < 20 and max(values[:-2]) == max(values) and values[-3] == max(values)
    assert "2 evaluations without a better validation auc/buy/deep" in results["stopped"]["words"][0]


@pytest.mark.parametrize(("name", "scores"), [("two", "s2"), ("esmm", "s_esmm")])
def test_an_artifact_gives_the_probabilities_of_predict_by_task(folder, name, scores):
    model = serving.load(folder / f"artifact_{name}")
    rows, wanted = pq.read_table(folder / "test.parquet"), pq.read_table(folder / scores / "test.parquet")
    tasks = ["click", "buy"] if name == "two" else ["click", "buy", "click_and_buy"]
    assert model.tasks == tasks
    found = model.predict(rows)
    assert found.shape == (500, len(tasks)) and found.dtype == np.float32
    for place, task in enumerate(tasks):
        assert np.abs(found[:, place] - wanted[f"probability_{task}"].to_numpy()).max() < 1e-5
    by_parts = np.concatenate(list(model.predict_parquet(folder / "test.parquet", 77)))
    np.testing.assert_allclose(by_parts, found, atol=1e-6)
    check = json.loads((folder / f"artifact_{name}" / "check.json").read_text())
    (logged,) = lines_of(folder / name, "test")
    for task in tasks:
        assert check[f"auc/{task}"] == pytest.approx(logged[f"auc/{task}"], abs=1e-4)
        assert check[f"log_loss/{task}"] == pytest.approx(logged[f"log_loss/{task}"], abs=1e-5)


@pytest.mark.parametrize("branches", [0, 1])
def test_the_scorer_answers_by_task(folder, tmp_path, branches):
    from asgi_calls import serving as server  # skips where the extra is not installed

    rows = pq.read_table(folder / "test.parquet").slice(0, 20)
    wanted = pq.read_table(folder / "s2" / "test.parquet").slice(0, 20)
    with server(folder / "artifact_two", tmp_path / "state", max_rows=50) as ask:
        answer = ask("POST", f"/score?branches={branches}", {"rows": rows.to_pylist()})
        assert answer.status == 200, answer
        fused = ["probability_click", "probability_buy"]
        names = wanted.column_names[1:] if branches else fused
        assert set(answer.json) == {"model", *names}
        for name in names:
            assert np.abs(np.array(answer.json[name]) - wanted[name].to_numpy()).max() < 1e-5


def test_a_label_that_no_row_has_is_told(tmp_path, capfd):
    config = write_tasks(tmp_path, 200, 100)
    table = pq.read_table(tmp_path / "train.parquet")
    nothing = table.set_column(table.column_names.index("buy"), "buy", pa.nulls(len(table)))
    pq.write_table(nothing, tmp_path / "train.parquet")
    assert train(config, "train.epochs=1", "train.log_every=1") == 0
    said = "".join(capfd.readouterr())
    assert "data.train: the rows have no label of buy: nothing can be learned from them" in said
