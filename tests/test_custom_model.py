"""Proves that GDCN of examples/custom_model.py is the paper's formula, that the example runs, and that `mbcnet model new` writes a model that trains."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from forked_ranks import run_code
from small_data import write_small
from tiny_run import train

from data.plugins import load_plugin, pinned
from mbcnet_rec.cli import main
from mbcnet_rec.model.input_layout import ALL, InputLayout

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "custom_model.py"
LAYOUT = InputLayout({"user": 4, "item": 4}, {"price": (0, 1)}, {})


def test_gdcn_is_its_formula_row_by_row():
    """c_{l+1} = c_0 * (W^c c_l + b) * sigmoid(W^g c_l) + c_l (arXiv 2311.04635), and a deep network beside it."""
    gdcn = load_plugin(pinned(str(EXAMPLE), "test"))
    torch.manual_seed(0)
    arch = gdcn.GDCNArch(gdcn.GDCNConfig(num_layers=2, hidden=(6, 5)), LAYOUT).double()
    x = torch.randn(7, LAYOUT.width(), dtype=torch.float64)
    logits = arch({ALL: x}).fused_logits
    weights = {name: value.detach().numpy() for name, value in arch.named_parameters()}
    for row, logit in zip(x.numpy(), logits.detach().numpy(), strict=True):
        c = row
        for layer in range(2):
            crossed = weights[f"cross.cross.{layer}.weight"] @ c + weights[f"cross.cross.{layer}.bias"]
            gate = 1 / (1 + np.exp(-weights[f"cross.gate.{layer}.weight"] @ c))
            c = np.array([row[i] * crossed[i] * gate[i] + c[i] for i in range(len(c))])
        h = row
        for place in (0, 2):
            h = np.maximum(weights[f"deep.{place}.weight"] @ h + weights[f"deep.{place}.bias"], 0)
        wanted = weights["logit.weight"][0] @ np.concatenate([c, h]) + weights["logit.bias"][0]
        np.testing.assert_allclose(logit, wanted, rtol=1e-12)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in arch.parameters())


@pytest.mark.long
def test_a_short_run_of_the_example(capfd):
    load_plugin(pinned(str(EXAMPLE), "test")).main(rows=2_000, steps=2)
    assert "test AUC 0." in capfd.readouterr().out


@pytest.mark.long
def test_the_example_runs(tmp_path):
    env = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, str(EXAMPLE)], capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "test AUC 0." in done.stdout and not list(tmp_path.glob("tmp*"))


def test_a_new_model_is_a_skeleton_whose_test_passes_and_that_trains(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert main(["model", "new", "deep_gate"]) == 0
    assert len((tmp_path / "deep_gate.py").read_text().splitlines()) <= 40
    own = "import sys, pytest; sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', 'test_deep_gate.py']))"
    code, said = run_code(own)
    assert code == 0 and " passed" in said, said[-2000:]
    config = write_small(tmp_path)
    words = ("train.max_steps=3", "train.eval_every=3", "model.kind=deep_gate")
    assert train(config, "plugins+=deep_gate.py", *words) == 0
    capfd.readouterr()
    for name, said in (("deep_gate", "exists already"), ("Deep", "small letters"), ("class", "small letters")):
        assert main(["model", "new", name]) == 2
        assert said in capfd.readouterr().err


@pytest.mark.parametrize("template", ["model.txt", "model_test.txt"])
def test_the_skeletons_are_formatted(template, tmp_path):
    text = (ROOT / "mbcnet_rec" / "templates" / template).read_text()
    (tmp_path / "gate.py").write_text(
        text.replace("$name", "gate").replace("${title}", "Gate").replace("$title", "Gate")
    )
    subprocess.run(
        [sys.executable, "-m", "ruff", "format", "--check", "--config", str(ROOT / "pyproject.toml"), str(tmp_path)],
        check=True,
    )
