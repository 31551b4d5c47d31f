"""Proves a study from the command line to its page: runs are cached, every picture is drawn from them, mistakes are one line."""

import re
from dataclasses import replace

import numpy as np
import pytest
from small_data import write_small

from mbcnet_rec.cli import main
from mbcnet_rec.config import load_config
from mbcnet_rec.study import runner, runs
from mbcnet_rec.study.pictures import best_learned
from mbcnet_rec.study.probe import MISSING, Probe, neuron_outputs, probe_run
from mbcnet_rec.study.runs import scores
from mbcnet_rec.study.studies import MODELS, STUDIES
from mbcnet_rec.study.summary import summarise

SHORT = ["--set", "train.max_steps=15", "--set", "train.eval_every=5"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with data, and two models trained with two seeds each by the command."""
    folder = tmp_path_factory.mktemp("study")
    config = write_small(folder / "rows", 1_500, 400)
    args = ["table3", "--config", str(config), "--models", "mbcnet", "dnn", "--seeds", "2", "--workers", "1"]
    assert main(["study", *args, *SHORT, "--out", str(folder / "studies")]) == 0
    return folder


@pytest.fixture
def again(home, monkeypatch):
    """Run a study on what is trained already."""

    def refuse(config, watch=None):
        raise AssertionError(f"{config.run_folder} was trained again")

    def run(name, *args):
        monkeypatch.setattr(runs, "train_one", refuse)
        command = ["study", name, "--config", str(home / "rows/run.toml"), "--seeds", "2", *args, *SHORT]
        assert main([*command, "--out", str(home / "studies")]) == 0
        page = home / f"studies/{name}_small"
        return page.with_suffix(".md").read_text(), page.with_suffix(".html").read_text()

    return run


def folders_of(home, kind):
    folders = [path.parent for path in (home / "studies/runs").glob("*/DONE")]
    return [folder for folder in folders if load_config(folder / "config.toml").model.kind == kind]


def test_table3_compares_the_models_with_the_paper_beside(home, again):
    text, page = again("table3", "--models", "mbcnet", "dnn")
    assert len(list((home / "studies/runs").glob("*/DONE"))) == 4
    row = next(line for line in text.splitlines() if "MBCnet |" in line.replace("**", ""))
    assert row.count("±") == 2 and "0.7522 / 0.2866" in row and "0.7642 / 0.2800" in row
    interval = r"[+-]0\.\d{4} \[[+-]\d+\.\d{4}, [+-]\d+\.\d{4}\]"
    assert re.search(interval, row), "a difference with its interval"
    assert "MBCnet beats DNN" in text and "Of 1 claims of the paper" in text
    assert re.search(r"MBCnet is (ahead of|behind) DNN", text)
    assert "mbcnet study table3 --config" in page and "every key resolved" in page


def test_what_the_paper_does_not_claim_is_called_a_hope(again, monkeypatch):
    assert [name for name, study in STUDIES.items() if not study.claimed] == ["future"]
    monkeypatch.setitem(STUDIES, "table3", replace(STUDIES["table3"], claimed=False))
    text, _ = again("table3", "--models", "mbcnet", "dnn")
    assert "Of 1 hopes: " in text and "## What is hoped for" in text and "the paper claims" not in text


def test_the_page_needs_no_other_file(again):
    _, page = again("table3", "--models", "mbcnet", "dnn")
    assert not re.search(r'(src|href)="(?!data:)', page) and "data:image/png;base64," in page


def test_the_mean_is_that_of_the_runs(home, again):
    text, _ = again("table3", "--models", "dnn")
    aucs = [scores(folder)["auc"] for folder in folders_of(home, "dnn")]
    assert f"{np.mean(aucs):.4f} ± {np.std(aucs, ddof=1):.4f}" in text


@pytest.mark.parametrize(
    ("name", "picture", "words"),
    [
        ("fig4", "latents", "t-SNE of the latents"),
        ("fig5", "terms", "cooperation losses"),
        ("fig6", "neurons", "EFGC and CrossNet"),
        ("fig7", "categories", "counted by item"),
    ],
)
def test_figures_are_drawn_from_the_same_runs(name, picture, words, home, again):
    text, _ = again(name, "--category", "item")
    assert words in text
    assert (home / f"studies/{name}_small_pictures/{picture}.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_the_data_cannot_give_says_why(again):
    text, _ = again("fig7", "--category", "history")
    assert "No picture of categories: --category history: wanted a categorical field" in text


def test_complexity_needs_no_run(home, again):
    text, _ = again("complexity")
    assert "O(N_g L_EFGC d^2)" in text and "whole dense part" in text
    config = load_config(home / "rows/run.toml").model.mbcnet
    top = 16 * 16 + 16 + 16 * 8 + 8
    assert f"| {top:,} |" in text and config.top == (16, 8)


def test_probe_sees_what_the_run_was_tested_on(home):
    folder = folders_of(home, "mbcnet")[0]
    probe = probe_run(folder, "test", category="item")
    assert probe.names == ("efgc", "cross", "deep") and probe.latents.shape == (3, 400, 8)
    assert probe.log_loss().mean(0)[0] == pytest.approx(scores(folder)["log_loss"], abs=1e-6)
    assert np.allclose(probe.fused, probe.latents.mean(0), atol=1e-6), "fused by their mean"
    assert neuron_outputs(probe).sum(1) == pytest.approx(1.0)
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


def test_failed_runs_are_lines_of_the_report():
    rows = summarise(STUDIES["table6"], {}, {"w/o BCT": ["seed 0: the loss is not finite"]})
    assert "w/o BCT: seed 0: the loss is not finite" in [note.text for note in runner.failure_notes(rows)]
    assert runner.score_table(rows).best == -1
    assert runner.headline(STUDIES["table6"], rows, {}) == []


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


def test_list_names_every_study(capsys):
    assert main(["study", "list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(STUDIES)
