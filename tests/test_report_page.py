"""Proves that reports say what they were given, on one page and in Markdown, and that every figure draws what data may hold."""

import re

import numpy as np
import pytest

from mbcnet_rec.report import figures
from mbcnet_rec.report.page import Code, Heading, Picture, Table, Text, to_html, to_markdown, write_report
from mbcnet_rec.study.projection import tsne_plane
from mbcnet_rec.study.summary import Row

PNG = b"\x89PNG\r\n\x1a\n"
BLOCKS = [
    Heading("Result <b>"),
    Text("a & b"),
    Table(("", "AUC"), (("MBCnet | x", "0.7"), ("DNN", "")), 0),
    Picture("curves", PNG, 'what "it" shows'),
    Code("mbcnet study x"),
    Code("key = 1\n", "the config"),
]
NAN = float("nan")


def test_html_escapes_and_holds_everything():
    page = to_html("T <i>", "lead", BLOCKS)
    assert "Result &lt;b&gt;" in page and "a &amp; b" in page and "<i>" not in page
    assert 'class="best"' in page and page.count("<tr") == 3
    assert "data:image/png;base64,iVBORw0KGgo=" in page and "&#34;it&#34;" in page
    assert "<details><summary>the config</summary>" in page
    assert not re.search(r'(src|href)="http', page)


def test_markdown_keeps_tables_whole():
    text = to_markdown("T", "lead", BLOCKS, "pictures")
    assert "| **MBCnet \\| x** | **0.7** |" in text and "| DNN |  |" in text
    assert '![what "it" shows](pictures/curves.png)' in text
    assert "```\nkey = 1\n```" in text


def test_files_of_a_report(tmp_path):
    page, text = write_report(tmp_path / "out", "t", "T", "lead", BLOCKS)
    assert page.read_text().startswith("<!doctype html>") and text.read_text().startswith("# T")
    assert (tmp_path / "out/t_pictures/curves.png").read_bytes() == PNG


def row(name, seeds=2, auc=(0.7, 0.01), loss=(0.5, 0.01)):
    return Row(name, seeds, auc, loss, "", None, None, ())


CASES = {
    "scores": lambda: figures.scores_figure(
        [row("MBCnet"), row("dead", 0, (NAN, NAN), (NAN, NAN))],
        {"auc": {"MBCnet": [0.69, 0.71]}, "log_loss": {"MBCnet": [0.5, 0.5]}},
    ),
    "nothing ended": lambda: figures.scores_figure(
        [row("dead", 0, (NAN, NAN), (NAN, NAN))], {"auc": {}, "log_loss": {}}
    ),
    "curves of two seeds": lambda: figures.curves_figure(
        [("AUC", {"fused": [[(1, 0.5), (2, 0.6)], [(1, 0.4), (2, 0.7)]], "efgc": [[(1, 0.5)], []]})]
    ),
    "panels of other lines": lambda: figures.curves_figure(
        [("a", {"x": [[(1, 1.0)]], "y": [[(1, 2.0)]]}), ("b", {})], columns=2
    ),
    "latents": lambda: figures.latents_figure(
        [("t", np.zeros((4, 2)), ["efgc", "fused"], np.array([0, 0, 1, 1]))]
    ),
    "neurons": lambda: figures.neurons_figure([0, 5], {"efgc": np.array([0.1, 0.9])}),
    "categories": lambda: figures.categories_figure(
        ["shoes", "bags"], {"efgc": np.array([1, 2]), "deep": np.array([2, 1])}, np.array([1.5, 1.5])
    ),
    "density with gaps": lambda: figures.density_figure(
        [20, 100], {"DNN": [[0.5, 0.6], []]}, {"DNN": [0.51, 0.74]}
    ),
    "grid with gaps": lambda: figures.grid_figure([0.0, 0.1], [0.0, 0.1], np.array([[0.7, NAN], [0.8, 0.7]])),
    "grid of nothing": lambda: figures.grid_figure([0.0], [0.0], np.array([[NAN]])),
    "complexity": lambda: figures.complexity_figure(
        [{"name": "efgc", "parameters": 10, "flops": 20.0, "milliseconds": 0.1}]
    ),
    "calibration": lambda: figures.calibration_figure([(0.1, 0.0, 10), (0.5, 1.0, 10)], "test"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_figures_draw(case):
    assert case().startswith(PNG)


def test_a_row_that_diverged_does_not_press_the_others_into_a_line():
    low, high = figures.readable_range([0.7374, 0.7358, 0.7363, 0.5097, 0.7370, 0.7335])
    assert 0.5097 < low < 0.7335 and high > 0.7374
    assert figures.readable_range([0.7, 0.5, 0.6]) == (-np.inf, np.inf), "too few to tell"
    assert figures.readable_range([0.7, 0.7, 0.7, 0.7, 0.1]) == (-np.inf, np.inf), "equal rows have no range"


def test_mean_curve_is_over_steps_that_all_seeds_have():
    curves = [[(1, 0.4), (2, 0.6), (3, 0.9)], [(1, 0.6), (2, 0.8)]]
    assert figures.mean_curve(curves) == [(1, pytest.approx(0.5)), (2, pytest.approx(0.7))]
    assert figures.mean_curve([]) == []


def test_smoothing_keeps_the_mean_and_the_last_step():
    curve = [(step, float(step)) for step in range(1, 121)]
    found = figures.smooth(curve)
    assert len(found) == 60 and found[0] == (2, 1.5) and found[-1][0] == 120
    assert figures.smooth([]) == []


def test_a_branch_has_one_colour_and_the_paper_s_name():
    assert len(set(figures.COLOURS.values())) == len(figures.COLOURS)
    assert figures.label("efgc") == "EFGC" and figures.label("cross") == "CrossNet"


def test_planes_are_equal_for_equal_seeds_and_keep_clusters_apart():
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.normal(size=(30, 8)), rng.normal(size=(30, 8)) + 20]).astype(np.float32)
    plane = tsne_plane(points)
    assert plane.shape == (60, 2) and np.array_equal(plane, tsne_plane(points))
    left, right = plane[:30].mean(0), plane[30:].mean(0)
    spread = max(plane[:30].std(), plane[30:].std())
    assert np.linalg.norm(left - right) > spread
    assert np.array_equal(tsne_plane(np.ones((9, 4))), np.zeros((9, 2))), "all points are one"
