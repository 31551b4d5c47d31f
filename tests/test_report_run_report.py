"""Proves the page of a single run: scores, curves, calibration, branches, speed and plan from what it logged; less where less was logged."""

import json
import re

import pytest

from data.errors import InputError
from mbcnet_rec.cli import main
from mbcnet_rec.report.run_report import day_plots, plots_of, write_run_report


def line(split, step, **more):
    values = {"auc": 0.7 + step / 1000, "log_loss": 0.5, "ne": 0.9, "calibration": 1.0}
    branches = {f"{key}/{branch}": value for key, value in values.items() for branch in ("deep", "efgc")}
    return {"split": split, "step": step, **values, **branches} | more


TRAIN = {
    "samples_per_second": 1000.0,
    "input_wait_share": 0.25,
    "grad_norm": 1.0,
    "coteaching_loss": 0.7,
    "differentiation_loss": 0.2,
    "disagreement/efgc>deep": 0.1,
    "disagreement/deep>efgc": 0.2,
    "transform_distance/efgc-deep": 4.0,
    "latent_norm/efgc": 1.0,
    "latent_norm/deep": 2.0,
    "gradient_share/efgc": 0.4,
    "gradient_share/deep": 0.6,
}
LINES = [
    *(line("train", step, **TRAIN) for step in range(5, 45, 5)),
    line("valid", 20),
    line("valid", 40),
    line("test", 20, rows=321, gauc=0.61, reliability=[[0.1, 0.12, 100], [0.4, 0.38, 100]]),
]
TABLE = {"num_embeddings": 100, "embedding_dim": 8, "sharding_type": "row_wise", "compute_kernel": "fused"}
TABLES = {"item": TABLE, "user": TABLE | {"sharding_type": "table_wise", "ranks": [1]}}
PLAN = {"world_size": 2, "device": "cpu", "tables": TABLES}


def write_run(folder, lines, plan=PLAN):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    (folder / "config.toml").write_text('name = "r"\n')
    if plan:
        (folder / "plan.json").write_text(json.dumps(plan))
    return folder


def test_the_page_has_everything(tmp_path, capsys):
    run = write_run(tmp_path / "run", LINES)
    assert main(["report", str(run)]) == 0
    assert str(run / "report.html") in capsys.readouterr().out
    page = (run / "report.html").read_text()
    for heading in ("Result", "Curves", "Calibration", "Branches", "Speed", "Plan", "Again"):
        assert f"<h2>{heading}</h2>" in page
    for words in (
        "every key resolved",
        "321 rows, weights of step 20",
        "GAUC of the fused output 0.6100",
        "1,000 samples a second, 25.0% of the time",
        "2 tables on 2 ranks",
        "row_wise, fused",
    ):
        assert words in page
    outputs = re.findall(r"<td>(fused|EFGC|Deep)</td><td>0.7200", page)
    assert outputs == ["fused", "EFGC", "Deep"], "fused first, then as the paper names them"
    assert page.count("data:image/png") == 4


NO_BRANCHES = [
    {key: value for key, value in each.items() if "/" not in key}
    | {"coteaching_loss": 0.0, "differentiation_loss": 0.0}
    for each in LINES
]


NULLS = [each | {"auc": None, "grad_norm": None} for each in LINES]
LESS = {
    "a young run": (LINES[:1], {}, "No validation or test rows were scored", "Plan</h2>"),
    "a model without branches": (NO_BRANCHES, PLAN, "fused", "Branches"),
    "values that are null": (NULLS, PLAN, "AUC is not defined", ">nan<"),
}


@pytest.mark.parametrize(("lines", "plan", "there", "not_there"), LESS.values(), ids=LESS)
def test_less_is_shown_where_less_was_logged(lines, plan, there, not_there, tmp_path):
    page = write_run_report(write_run(tmp_path / "run", lines, plan)).read_text()
    assert there in page and not_there not in page


def test_the_best_validation_is_that_of_the_metric_that_training_stops_by(tmp_path):
    lines = [*NO_BRANCHES[:8], *({**each, "log_loss": each["step"] / 100} for each in NO_BRANCHES[8:10])]
    for key, step in (("auc", 40), ("log_loss", 20)):
        run = write_run(tmp_path / key, lines)
        (run / "config.toml").write_text(f'[train]\nearly_stop = "{key}"\n')
        assert f"weights of step {step}" in write_run_report(run).read_text()


def test_days_of_several_labels_have_a_curve_for_each():
    metrics = {"auc": 0.6, "auc/click": 0.6, "auc/buy": 0.7, "rows/click": 9, "rows/buy": 4}
    (plot,) = day_plots([(1, metrics), (2, metrics)])
    assert plot[1] == {"buy": [[(1.0, 0.7), (2.0, 0.7)]], "click": [[(1.0, 0.6), (2.0, 0.6)]]}
    (plot,) = day_plots([(1, {"auc": 0.6})])
    assert plot[1] == {"fused": [[(1.0, 0.6)]]}


def test_curves_are_of_what_was_logged_and_not_0_throughout():
    run = {"train": LINES[:8], "valid": LINES[8:10]}
    wanted = (("a", "valid", "auc"), ("b", "train", "disagreement"), ("c", "train", "dis"), ("d", "valid", "loss"))
    plots = dict(plots_of([run, run], wanted))
    points = [(20, pytest.approx(0.72)), (40, pytest.approx(0.74))]
    assert list(plots) == ["a", "b"] and plots["a"]["fused"] == [points, points]
    assert list(plots["a"]) == ["fused", "efgc", "deep"] and list(plots["b"]) == ["deep>efgc", "efgc>deep"]
    assert plots_of([{"train": [{"step": 1, "x": 0.0}]}], (("a", "train", "x"),)) == []


def test_mistakes_are_told(tmp_path, capfd):
    with pytest.raises(InputError, match="no run folder"):
        write_run_report(tmp_path)
    empty = write_run(tmp_path / "empty", [])
    with pytest.raises(InputError, match="it is empty"):
        write_run_report(empty)
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "Traceback" not in capfd.readouterr().err
