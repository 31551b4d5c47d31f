"""Proves that `mbcnet compare` gives the differences of what `evaluate` says, by slice, with clicks counted by hand; and refuses what cannot be compared."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from serving_data import artifact_of, evaluated, printed_by
from test_scoring_one_class import strict
from tiny_run import lines_of, train

from data.errors import InputError
from data.schema import load_schema
from mbcnet_rec.scoring.compare import Comparison, Found, groups_in_words, report_blocks, to_json
from mbcnet_rec.scoring.evaluate import Question
from mbcnet_rec.scoring.paired import Difference

NAN = float("nan")


@pytest.fixture(scope="module")
def other(runs, tmp_path_factory):
    """A DNN after one step, whose schema names no group column and which was trained on the test rows too."""
    folder = tmp_path_factory.mktemp("other")
    text = (runs / "schema.toml").read_text().replace('group_column = "user"\n', "")
    (folder / "schema.toml").write_text(
        text.replace('group_type = "integer"\n', "").replace("vocabulary/", f"{runs}/vocabulary/")
    )
    data = f"data.train=['{runs}/train.parquet','{runs}/test.parquet']"
    settings = (
        "model.kind=dnn",
        f"schema={folder}/schema.toml",
        f"train.out={folder}/dnn",
        "train.max_steps=1",
        data,
        "train.ranking_k=[]",
    )
    assert train(runs / "run_row_wise.toml", *settings, "data.valid=[]") == 0
    return folder / "dnn"


def by_hand(runs, other, tmp_path, top):
    """Mean over users of the clicks on their `top` most probable rows, under either run."""
    rows, found = pq.read_table(runs / "test.parquet").select(["user", "click"]).to_pylist(), []
    code, _, err = printed_by("predict", other, "--data", runs / "test.parquet", "--out", tmp_path / "scores")
    assert code == 0, err
    for folder in (runs / "row_wise_predicted_1", tmp_path / "scores"):
        users: dict[int, list] = {}
        for row, probability in zip(
            rows, pq.read_table(folder / "test.parquet")["probability"].to_pylist(), strict=True
        ):
            users.setdefault(row["user"], []).append((-probability, row["click"]))
        found.append(np.mean([sum(click for _, click in sorted(each)[:top]) for each in users.values()]))
    return found


def test_differences_are_those_of_evaluate_on_all_rows_and_slices(runs, other, tmp_path):
    page = tmp_path / "page.html"
    argv = ("compare", runs / "row_wise", other, "--by", "hour", "--by", "city", "--expected-clicks", "3")
    code, out, err = printed_by(*argv, "--json", "-o", page)
    assert code == 0, err
    found = strict(out)
    first, second = evaluated(runs, "row_wise_evaluate_1"), lines_of(other, "test")[0]
    for metric in ("auc", "log_loss", "calibration"):
        entry = found[metric]
        assert entry["ours"] == pytest.approx(first[metric], abs=1e-6), metric
        assert entry["theirs"] == pytest.approx(second[metric], abs=1e-6), metric
        assert entry["difference"] == pytest.approx(entry["ours"] - entry["theirs"], abs=1e-12)
        low, high = entry["interval"]
        assert low < entry["difference"] < high and entry["p_corrected"] == entry["p"]
    assert found["gauc"]["ours"] == pytest.approx(first["gauc"], abs=1e-6), "the groups of the run that names some"
    assert found["auc"]["difference"] > 0.1 and found["auc"]["p"] < 1e-6 and found["auc"]["significant"]
    clicks = [found["expected_clicks"][name] for name in ("ours", "theirs")]
    assert clicks == pytest.approx(by_hand(runs, other, tmp_path, 3))
    assert found["notes"] == [
        f"note: {other} was trained on rows of 1 of these files",
        "note: the two were not trained on the same rows: data.train or data.train_where differs",
    ]
    slices = found["slices"]
    assert {column: sum(each["rows"] for each in values.values()) for column, values in slices.items()} == {
        "hour": 2_000,
        "city": 2_000,
    }
    hour = next(iter(slices["hour"]))
    assert slices["hour"][hour]["log_loss"]["ours"] == pytest.approx(
        first["slices"]["hour"][hour]["log_loss"], abs=1e-6
    )
    entries = [each["auc"] for values in slices.values() for each in values.values()]
    assert len(entries) > 30 and max(each["p"] for each in entries) <= max(each["p_corrected"] for each in entries)
    smallest = min(entries, key=lambda each: each["p"])
    assert smallest["p_corrected"] == pytest.approx(min(1, smallest["p"] * len(entries))), "Holm, over both columns"
    assert all(each["significant"] == (each["p_corrected"] < 0.05) for each in entries)
    text = page.read_text()
    assert text.count("<img") == 4 and "By hour" in text and "--by hour --by city --expected-clicks 3" in text
    code, out, _ = printed_by(*argv)
    assert code == 0 and "rows of one user are taken together" in out and "nan" not in out
    assert re.search(r"\| AUC +\| 0\.\d{5} +\| 0\.\d{5} +\| \+0\.\d{5} ", out) and re.search(
        r"\| by city +\| rows +\| AUC ", out
    )


def test_a_run_is_no_better_than_itself(runs):
    code, out, _ = printed_by(
        "compare", runs / "row_wise", runs / "row_wise", "--json", "--by", "hour", "--expected-clicks", "2"
    )
    found = strict(out)
    everything = [found, *found["slices"]["hour"].values()]
    entries = [
        each[metric] for each in everything for metric in ("auc", "gauc", "log_loss", "calibration", "expected_clicks")
    ]
    assert code == 0 and len(entries) > 100 and not found["notes"]
    assert {(each["difference"], *each["interval"], each["p"], each["significant"]) for each in entries} == {
        (0, 0, 0, 1, False)
    }


def test_what_is_not_defined_is_a_dash_and_null():
    everything, slice_ = (
        Found(3, {"auc": Difference(*[NAN] * 4)}),
        Found(3, {"auc": Difference(0.25, NAN, NAN, NAN, 0.5, 0.25)}),
    )
    comparison, slices = Comparison(Path("runs/a"), Path("runs/b"), Question()), {"x": {"a|b": slice_}}
    _, table, _, cut, *texts = report_blocks(comparison, everything, slices, pictures=True)
    assert table.rows == (("AUC", *"-----"),) and table.header[1:3] == ("a", "b")
    assert cut.rows == (("a|b", "3", "+0.2500"),) and "too few rows of a class" in texts[-1].text
    entry = {"ours": None, "theirs": None, "difference": None, "interval": [None, None], "p": None, "p_corrected": None}
    assert strict(json.dumps(to_json(everything, slices)))["auc"] == entry | {"significant": False}


def test_what_cannot_be_compared_is_refused(runs, other, tmp_path):
    """In one line, before any row is scored, and with nothing written."""
    run = runs / "row_wise"
    cases = (
        ((run, tmp_path), f"{tmp_path}: no run folder (it has no config.toml)"),
        ((run, artifact_of(runs)), "no run folder (it is an exported artifact)"),
        ((run, runs / "row_wise_predicted_1"), "no run folder (it is scores of `mbcnet predict`)"),
        ((other, other, "--expected-clicks", 3), "neither run's schema names a group_column"),
        ((run, other, "--expected-clicks", 0), "--expected-clicks 0: wanted 1 or more"),
        ((run, other, "--exact-rows", 100), "more rows than 100"),
        ((run, other, "--by", "tags"), "wanted one value a row"),
        ((run, other, "-o", tmp_path / "no/page.html"), "wanted a file in a folder that is there"),
    )
    for argv, words in cases:
        code, out, err = printed_by("compare", *argv)
        assert code == 2 and words in err and err.count("\n") == 1 and not out, err
    assert not list(tmp_path.iterdir())
    schema = load_schema(runs / "schema.toml")
    comparison = Comparison(run, other, Question())
    renamed = type(schema)(**{**vars(schema), "label": "bought"})
    with pytest.raises(InputError, match=r"was trained on label 'click', .* on 'bought'"):
        groups_in_words(comparison, [schema, renamed])
