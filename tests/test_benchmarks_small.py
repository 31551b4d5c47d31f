"""Proves that the benchmarks of speed run at a tiny size, give every figure that their text promises, and say what they could not measure."""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mbcnet_rec.cpu.layers import Dropout

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def figures_of(monkeypatch, capsys):
    """Run a benchmark in this process, as its own script would; return its JSON line and its words."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    threads = torch.get_num_threads()

    def run(name, *args):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--json", *args])
        assert importlib.import_module(name).main() == 0
        words = capsys.readouterr().out
        return json.loads(words.splitlines()[-1]), words

    yield run
    torch.set_num_threads(threads)


def figures_of_script(name, *args):
    """The same for one that starts processes and must not have torch imported first."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / f"{name}.py"), "--json", *args],
        env=os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "prediction" in done.stdout
    return json.loads(done.stdout.splitlines()[-1])


def test_growth_fits_an_exponent_to_each_curve_and_draws_it(figures_of, tmp_path):
    picture = tmp_path / "growth.png"
    figures, words = figures_of(
        "growth",
        "--quick",
        "--seconds",
        "0.01",
        "--curves",
        "rows,branches,cooperation",
        "--png",
        str(picture),
    )
    assert "prediction" in words and picture.read_bytes().startswith(b"\x89PNG")
    assert list(figures["rows_seconds"]) == ["10000", "100000", "1000000"]
    assert list(figures["branches_seconds"]) == ["1", "3", "5"]
    for name in ("rows", "branches", "cooperation"):
        assert math.isfinite(figures[f"{name}_exponent"]) and math.isfinite(figures[f"{name}_last_exponent"])
    assert figures["branches_seconds"]["5"] > figures["branches_seconds"]["1"]


def test_same_start_trains_our_side_and_leaves_a_peer_what_it_needs():
    figures = figures_of_script("same_start", "--quick", "--protocol")
    assert figures["auc_ours/small/dnn/best"] > 0.5
    assert figures["largest_difference/small/dnn/best"] is None  # no FuxiCTR here
    assert figures["other_epoch/small/dnn"] is None


def test_same_start_compares_the_epoch_that_each_side_chose(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    same_start = importlib.import_module("same_start")
    labels = {split: np.array([0, 1, 0, 1]) for split in ("valid", "test")}
    right, wrong, half = (
        np.array(rows) for rows in ([0.1, 0.9, 0.2, 0.8], [0.9, 0.1, 0.8, 0.2], [0.1, 0.3, 0.6, 0.5])
    )
    early = [{"valid": right, "test": half}, {"valid": wrong, "test": right}]
    late = [{"valid": wrong, "test": half}, {"valid": right, "test": right}]
    figures = same_start.compare_all("rows/dnn", labels, [(early, late), (late, late)], True)
    assert figures["auc_ours/rows/dnn/best"] == (0.5 + 1) / 2 and figures["auc_peer/rows/dnn/best"] == 1
    assert figures["auc_difference/rows/dnn/best"] == -0.25 and figures["auc_apart/rows/dnn/best"] == 0.5
    assert figures["other_epoch/rows/dnn"] == 1
    assert figures["largest_difference/rows/dnn/best"] == pytest.approx(0.6)


def test_given_masks_drop_the_same_elements_of_two_models(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    give_masks = importlib.import_module("peer_code.given_masks").give_masks
    x, outputs = torch.ones(50, 40), []
    for kind in (nn.Dropout, Dropout):
        model = nn.Sequential(kind(0.2), nn.Identity(), kind(0.5))
        give_masks(model, seed=3)
        outputs += [model(x), model(x)]
        model.eval()
        assert torch.equal(model(x), x)
    assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[3])
    assert not torch.equal(outputs[0], outputs[1]), "a mask a call"
    assert 0.3 < float((outputs[0] > 0).float().mean()) < 0.5 and set(outputs[0].unique().tolist()) == {
        0.0,
        2.5,
    }


def test_growth_leaves_out_tables_that_do_not_fit(figures_of, monkeypatch):
    growth = importlib.import_module("growth")
    monkeypatch.setattr(growth, "free_bytes", lambda: 1e8)
    figures, words = figures_of("growth", "--quick", "--seconds", "0.01", "--curves", "rows")
    assert "rows: 1,000,000 a table do not fit" in words
    assert list(figures["rows_seconds"]) == ["10000", "100000"]


def test_an_exponent_is_that_of_a_power_law(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    fitted_exponent = importlib.import_module("side_by_side").fitted_exponent
    assert fitted_exponent([1, 4, 64], [3 * size**0.7 for size in (1, 4, 64)]) == pytest.approx(0.7)


def test_scaling_names_the_wall_and_what_was_not_tried(figures_of, tmp_path):
    picture = tmp_path / "scaling.png"
    figures, words = figures_of("scaling", "--sizes", "1,8", "--search-seconds", "0.2", "--png", str(picture))
    assert "1 does not fit" in words and set(figures["wall_at"]) == {"8"}
    assert figures["wall_at"]["8"] in ("compute", "memory", "network", "input")
    assert figures["samples_per_second"]["8"] > 0 and picture.read_bytes().startswith(b"\x89PNG")
    assert figures["not_tried"] and all(f"not tried: {each}" in words for each in figures["not_tried"])


def test_ranks_compares_two_ranks_with_two_threads():
    figures = figures_of_script("ranks", "--quick", "--batch", "16", "--max-rows", "50", "--seconds", "0.1")
    assert figures["batch"] == 16 and figures["rounds"] >= 3
    # no upper bound: in a tenth of a second another process can stop one side for most of a round
    assert 0 < figures["ranks_efficiency"] < math.inf and figures["rank_step_seconds"] > 0


def test_startup_cuts_the_time_to_the_first_step_into_phases():
    figures = figures_of_script("startup", "--quick", "--ranks", "1")
    phases = [
        figures[f"first_step_{phase}_seconds"] for phase in ("agent", "import", "join", "build", "step")
    ]
    assert all(phase > 0 for phase in phases)
    assert sum(phases) == pytest.approx(figures["first_step_seconds"])
    assert figures["heavy_modules"] == [] and figures["imported_modules"] < 200
    assert "matplotlib" not in figures["modules_of_training"]


def test_gpu_runs_on_a_cpu_and_says_what_that_cannot_tell(figures_of):
    figures, words = figures_of("gpu", "--quick", "--device", "cpu", "--batch", "32", "--max-rows", "100")
    assert figures["device"] == "cpu" and figures["fields"] == 192
    for name in ("samples_per_second", "share_of_product", "lookup_bandwidth_share"):
        assert figures[name] > 0, name
    for name in ("share_of_peak", "launch_gap_share", "compiled_speedup", "peak_memory_bytes"):
        assert figures[name] is None and f"not measured: {name}: " in words
    assert set(figures["not_measured"]) == {name for name, value in figures.items() if value is None}
