"""Proves a study from the command line to its page: runs are cached, every picture is drawn from them, mistakes are one line."""

import html
import re
from dataclasses import replace

import numpy as np
import pytest
from small_data import write_small

from mbcnet_rec.cli import main
from mbcnet_rec.config import load_config
from mbcnet_rec.report.page import Picture, Table, Text, text_table
from mbcnet_rec.study import pictures, runner
from mbcnet_rec.study.pictures import best_learned
from mbcnet_rec.study.probe import MISSING, Probe, probe_run
from mbcnet_rec.study.runs import ROW_SCORES, RowScores, scores
from mbcnet_rec.study.studies import MODELS, STUDIES, with_models
from mbcnet_rec.study.summary import Results

SHORT = ["--set", "train.max_steps=15", "--set", "train.eval_every=5", "--set", "model.mbcnet.embeddings=per_branch"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with data, and two models trained with two seeds each by the command."""
    folder = tmp_path_factory.mktemp("study")
    config = write_small(folder / "rows", 1_500, 200)
    args = ["table3", "--config", str(config), "--models", "mbcnet", "dnn", "--seeds", "2", "--workers", "1"]
    assert main(["study", *args, *SHORT, "--out", str(folder / "studies")]) == 0
    return folder


@pytest.fixture
def again(home):
    """Make a study's page of runs that are trained already: table rows as `cell | cell`."""

    def run(name, *args):
        command = ["study", name, "--config", str(home / "rows/run.toml"), "--seeds", "2", *args, *SHORT]
        trained = {path: path.stat().st_mtime_ns for path in (home / "studies/runs").glob("*/DONE")}
        assert main([*command, "--out", str(home / "studies")]) == 0
        assert trained == {path: path.stat().st_mtime_ns for path in (home / "studies/runs").glob("*/DONE")}
        page = (home / f"studies/{name}_small.html").read_text()
        assert not re.search(r'(src|href)="(?!data:)', page), "the page needs no other file"
        return html.unescape(re.sub(r"</td><td[^>]*>", " | ", page))

    return run


def folders_of(home, kind):
    folders = [path.parent for path in (home / "studies/runs").glob("*/DONE")]
    return [folder for folder in folders if load_config(folder / "config.toml").model.kind == kind]


def test_table3_compares_the_models_with_the_paper_beside(home, again):
    page = again("table3", "--models", "mbcnet", "dnn")
    assert len(list((home / "studies/runs").glob("*/DONE"))) == 4
    row = next(line for line in page.splitlines() if "MBCnet | 2" in line)
    assert row.count("±") == 2 and "0.7522 / 0.2866" in row and "0.7642 / 0.2800" in row
    interval = r"[+-]0\.\d{4} \[[+-]\d+\.\d{4}, [+-]\d+\.\d{4}\]"
    assert re.search(interval, row), "a difference with its interval"
    (folders_of(home, "dnn")[0] / ROW_SCORES).unlink()  # as where a study was killed between training and scoring
    page = again("table3", "--models", "mbcnet", "dnn")
    assert "no verdict<" not in page and "Of 1 claims of the paper" in page
    aucs = [scores(folder)["auc"] for folder in folders_of(home, "dnn")]
    assert f"DNN | 2 | {np.mean(aucs):.4f} ± {np.std(aucs, ddof=1):.4f}" in page, "the mean is that of the runs"
    assert re.search(r"MBCnet is (ahead of|behind) DNN", page) and "Of 1 claims of the paper" in page
    for words in ("MBCnet beats DNN", "mbcnet study table3 --config", "every key resolved", "scores: A dot is"):
        assert words in page


def test_a_page_of_other_data_or_settings_stays(home, tmp_path, capfd):
    command = [
        "study",
        "table3",
        "--config",
        str(home / "rows/run.toml"),
        "--models",
        "dnn",
        "--seeds",
        "1",
        "--workers",
        "1",
    ]
    pages = {}
    for steps in (2, 3, 2):
        out = ["--set", f"train.max_steps={steps}", "--set", "model.dnn.hidden=[4]", "--out", str(tmp_path)]
        assert main([*command, *out]) == 0
        (page,) = re.findall(r"wrote (.*)", capfd.readouterr().out)
        assert pages.setdefault(steps, page) == page
    assert sorted(pages.values()) == sorted(map(str, tmp_path.glob("*.html"))) and len(set(pages.values())) == 2


def blocks_of(study, home, found, failures=None):
    """A study's page of made-up scores: variant -> AUC of each seed."""
    scored = {
        name: {seed: {"auc": auc, "log_loss": 0.5} for seed, auc in enumerate(aucs)} for name, aucs in found.items()
    }
    request = runner.StudyRequest(study, home / "rows/run.toml")
    return runner.report_blocks(request, load_config(request.config), [], Results(scored, {}), failures or {})


def test_what_the_paper_does_not_claim_is_called_a_hope(home):
    assert [name for name, study in STUDIES.items() if not study.claimed] == ["future"]
    hopes = replace(STUDIES["table3"], claimed=False)
    blocks = blocks_of(hopes, home, {"MBCnet": [0.7], "DNN": [0.6]})
    words = " ".join(getattr(block, "text", "") for block in blocks)
    assert "Of 1 hopes: " in words and "What is hoped for" in words and "the paper claims" not in words


def test_losses_tells_disagreement_and_dead_runs(home):
    scored = {seed: {"auc": 0.5, "log_loss": 0.7, "disagreement": 0.25, "dead": ["fused"] * seed} for seed in (0, 1)}
    study, config = STUDIES["losses"], home / "rows/run.toml"
    found = Results({study.variants[0].name: scored}, {})
    blocks = runner.report_blocks(runner.StudyRequest(study, config), load_config(config), [], found, {})
    table = next(block for block in blocks if isinstance(block, Table))
    row = dict(zip(table.header, table.rows[0], strict=True))
    assert (row[""], row["dead"], row["disagreement"]) == ("no cooperation", "1 of 2", "25.00%")
    assert "| no cooperation | 2     | 1 of 2 |" in text_table(table), "Markdown for the terminal"


def test_fig9_compares_every_cell_with_the_best_rival_and_marks_dead_ones(home):
    """Ahead of FinalMLP in one cell of two that live, both by far; a third is dead; --models takes other rivals."""
    study = with_models(STUDIES["fig9"], (), {})
    cells = [row.name for row in study.variants[:3]]
    rng = np.random.default_rng(0)
    labels = (rng.random(2000) < 0.3).astype(np.float32)
    noise = rng.normal(size=2000)
    scored = {
        cells[0]: (0.9, 2.0),
        cells[1]: (0.7, 0.1),
        cells[2]: (0.5, 0.0),
        "DCNv2": (0.75, 0.5),
        "FinalMLP": (0.8, 1.0),
    }
    metrics = {
        name: {
            s: {"auc": auc + 1e-4 * s * len(name), "log_loss": 0.5, "dead": ["fused"] * (auc == 0.5)} for s in range(3)
        }
        for name, (auc, _) in scored.items()
    }
    rows = {
        name: dict.fromkeys(range(3), RowScores(("",), (noise + gap * labels)[:, None], labels, None))
        for name, (_, gap) in scored.items()
    }
    request = runner.StudyRequest(study, home / "rows/run.toml")
    blocks = runner.report_blocks(request, load_config(request.config), [], Results(metrics, rows), {})
    assert (
        "Of 3 pairs of alpha and beta MBCnet has a higher AUC than FinalMLP, the best other model, in 1; "
        in blocks[1].text
    )
    assert "by both tests it is ahead in 1, level in 0, behind in 1, dead in 1." in blocks[1].text
    assert blocks[2].rows[2][2] == "3 of 3" and "to FinalMLP" in blocks[2].rows[0][5]
    assert [row.name for row in with_models(STUDIES["fig9"], ["mbcnet", "dnn"], {}).variants[16:]] == ["DNN"]
    assert [row.name for row in study.variants[16:]] == ["DCNv2", "FinalMLP"]


@pytest.mark.parametrize("name", ["table7", "fig9"])
def test_pictures_of_scores_have_gaps_where_runs_are_missing(name, home):
    rows = [row.name for row in STUDIES[name].variants]
    blocks = blocks_of(STUDIES[name], home, {rows[0]: [0.6, 0.7], rows[1]: [0.7], rows[-1]: [0.8]})
    assert [block.png[:4] for block in blocks if isinstance(block, Picture)] == [b"\x89PNG"]


def test_failed_runs_are_lines_of_the_report(home):
    blocks = blocks_of(STUDIES["table6"], home, {}, {"w/o BCT": ["seed 0: the loss is not finite"]})
    assert Text("w/o BCT: seed 0: the loss is not finite") in blocks
    assert Text("No picture of scores: no run has ended") in blocks
    assert next(block for block in blocks if isinstance(block, Table)).best == -1, "no row is marked"


@pytest.mark.parametrize(
    ("name", "category", "words"),
    [
        (
            "fig4",
            "item",
            ["early in training, seed 0", "late in training", "branches are more tangled early than late | "],
        ),
        ("fig5", "item", ["terms: Figure 5: the two cooperation losses"]),
        ("fig6", "item", ["EFGC and CrossNet | ", "EFGC is closer to CrossNet than to Deep | "]),
        ("fig7", "item", ["counted by item", "which branch is best depends on the category | not tested"]),
        ("fig7", "history", ["No picture of categories: --category history: wanted a categorical field"]),
    ],
)
def test_figures_are_drawn_from_the_same_runs_or_say_why_not(name, category, words, again, monkeypatch):
    monkeypatch.setattr(pictures, "LATENT_ROWS", 40)  # for t-SNE
    page = again(name, "--category", category)
    assert all(each in page for each in words) and (category == "history") == ("data:image/png;base64" not in page)


def test_complexity_needs_no_run(home, again, monkeypatch):
    monkeypatch.setattr(pictures, "MIN_SECONDS", 0.01)
    page = again("complexity")
    assert "O(N_g L_EFGC d^2)" in page and "whole dense part" in page and "Without EFGC" in page
    config = load_config(home / "rows/run.toml").model.mbcnet
    top = 16 * 16 + 16 + 16 * 8 + 8
    assert f"| {top:,} |" in page and config.top == (16, 8)


def test_probe_sees_what_the_run_was_tested_on(home):
    folder = folders_of(home, "mbcnet")[0]
    probe = probe_run(folder, "test", category="item")
    assert probe.names == ("efgc", "cross", "deep") and probe.latents.shape == (3, 200, 8)
    assert probe.log_loss().mean(0)[0] == pytest.approx(scores(folder)["log_loss"], abs=1e-6)
    assert np.allclose(probe.fused, probe.latents.mean(0), atol=1e-6), "fused by their mean"
    assert (probe.categories == MISSING).any() and probe.categories.max() < 60


def test_best_learned_rows_are_those_of_the_lowest_loss():
    labels = np.array([1, 1, 1, 1, 0, 0, 0, 0], np.float32)
    logits = np.zeros((8, 2), np.float32)
    logits[2, 1], logits[6, 1] = 9.0, -9.0  # the branch knows rows 2 and 6
    categories = np.array([5, 5, 7, 5, 5, 5, 7, MISSING])
    probe = Probe(("deep",), np.zeros((1, 8, 2)), np.zeros((8, 2)), logits, labels, categories)
    ids, counts, base, kept = best_learned(probe)
    assert kept == 2 and ids.tolist() == [5, 7] and counts.tolist() == [[0, 2]]
    assert base.tolist() == [5 * 2 / 8, 2 * 2 / 8]


def test_tuned_models_stand_in_and_overrides_hold_for_them(home, tmp_path):
    base = load_config(home / "rows/run.toml")
    text = (home / "rows/run.toml").read_text()
    (tmp_path / "dnn.toml").write_text(text.replace("dense_lr = 5e-3", "dense_lr = 7e-3"))
    dnn, ours = MODELS["dnn"], MODELS["mbcnet"]
    tuned = runner.variant_config(base, dnn, tmp_path, ("train.epochs=9",))
    assert (tuned.optim.dense_lr, tuned.model.kind, tuned.train.epochs) == (7e-3, "dnn", 9)
    assert runner.variant_config(base, ours, tmp_path).optim.dense_lr == 5e-3


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["tabel3", "--config", "{run}"], "study 'tabel3': wanted one of table3"),
        (["table3"], "--config is missing"),
        (["table3", "--config", "nowhere.toml"], "nowhere.toml"),
        (["table3", "--config", "{run}", "--seeds", "0"], "--seeds 0"),
        (["table3", "--config", "{run}", "--models", "dnm"], "--models dnm: wanted one of"),
        (["table6", "--config", "{run}", "--models", "dnn"], "study table6 has no row of these models"),
        (["table3", "--config", "{run}", "--set", "train.epoch=1"], "epoch"),
        (["table3", "--config", "{run}", "--set", "data.train=['nowhere']"], "nowhere"),
        (["table3", "--config", "{run}", "--tuned", "nowhere"], "--tuned nowhere"),
        (["fig8", "--config", "{run}", "--set", "schema=nowhere.toml"], "nowhere.toml"),
    ],
)
def test_mistakes_are_one_line(args, words, home, tmp_path, capfd):
    filled = [each.format(run=home / "rows/run.toml") for each in args]
    assert main(["study", *filled, "--out", str(tmp_path)]) == 2
    error = capfd.readouterr().err
    assert words in error and "Traceback" not in error and len(error.strip().splitlines()) == 1, error
    assert not list(tmp_path.iterdir()), "nothing is written before the mistake is told"
