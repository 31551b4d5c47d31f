"""Proves that pages say what they were given, with everything in one file, and that every figure draws what data may hold."""

import re

import numpy as np
import pytest

from mbcnet_rec.report import figures
from mbcnet_rec.report.page import Code, Heading, Picture, Table, Text, to_html

PNG = b"\x89PNG\r\n\x1a\n"
NAN = float("nan")


def test_a_page_escapes_and_holds_everything():
    blocks = [
        Heading("Result <b>"),
        Text("a & b"),
        Table(("", "AUC"), (("MBCnet | x", "0.7"), ("DNN", "")), 0),
        Picture("curves", PNG, 'what "it" shows'),
        Code("mbcnet study x"),
        Code("key = 1\n", "the config"),
    ]
    page = to_html("T <i>", "lead", blocks)
    assert page.startswith("<!doctype html>") and not re.search(r'(src|href)="http', page)
    assert "Result &lt;b&gt;" in page and "a &amp; b" in page and "<i>" not in page
    assert 'class="best"' in page and page.count("<tr") == 3
    assert "data:image/png;base64,iVBORw0KGgo=" in page and "&#34;it&#34;" in page
    assert "<details><summary>the config</summary>" in page and "<pre>mbcnet study x</pre>" in page


def seeds(*aucs):
    return [{"auc": auc, "log_loss": 0.5} for auc in aucs]


def grid(*rows):
    auc, weights = np.array(rows), [0.0, 0.1][: len(rows)]
    return figures.grid_figure(weights, weights, auc, np.zeros(auc.shape, bool), ("", np.nan))


CASES = {
    "scores": lambda: figures.scores_figure({"MBCnet": seeds(0.69, 0.71), "dead": []}),
    "a row that diverged": lambda: figures.scores_figure(
        {"dead": seeds(0.1)} | {str(number): seeds(0.7 + number / 1e3) for number in range(5)}
    ),
    "curves of two seeds": lambda: figures.curves_figure(
        [("AUC", {"fused": [[(1, 0.5), (2, 0.6)], [(1, 0.4), (2, 0.7)]], "efgc": [[(1, 0.5)], []]})]
    ),
    "panels of other lines": lambda: figures.curves_figure(
        [("a", {"x": [[(1, 1.0)]], "y": [[(1, 2.0)]]}), ("b", {}), ("c", {}), ("d", {}), ("e", {})]
    ),
    "latents": lambda: figures.latents_figure("t", np.zeros((4, 2)), ["efgc", "fused"], np.array([0, 0, 1, 1])),
    "categories": lambda: figures.categories_figure(
        ["shoes", "bags"], {"efgc": np.array([1, 2]), "deep": np.array([2, 1])}, np.array([1.5, 1.5])
    ),
    "grid with gaps": lambda: grid([0.7, NAN], [0.8, 0.7]),
    "grid of nothing": lambda: grid([NAN]),
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


def test_means_of_seeds_and_of_neighbouring_points():
    curves = [[(1, 0.4), (2, 0.6), (3, 0.9)], [(1, 0.6), (2, 0.8)]]
    assert figures.mean_curve(curves) == [(1, pytest.approx(0.5)), (2, pytest.approx(0.7))], "steps of all"
    found = figures.smooth([(step, float(step)) for step in range(1, 121)])
    assert len(found) == 60 and found[0] == (2, 1.5) and found[-1][0] == 120
    assert figures.mean_curve([]) == figures.smooth([]) == []
