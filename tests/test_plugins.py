"""Proves that a model or branch in one file outside of the tree trains on two ranks, resumes, is studied, tuned, scored, exported and planned, and that nothing else lists models."""

import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from forked_ranks import run_code, run_script
from small_data import write_small
from tiny_run import lines_of, train
from torch import nn

import mbcnet_rec
from data.errors import InputError
from data.plugins import ALSO
from mbcnet_rec.cli import main
from mbcnet_rec.config import load_config
from mbcnet_rec.plugins import model_class
from mbcnet_rec.serving.artifact import graph_spec

ROOT = Path(__file__).parents[1]
GDCN = ROOT / "examples" / "custom_model.py"
# a model with branches of its own, and a branch for MBCnet
PLUGIN = """
from dataclasses import dataclass

import torch
from torch import nn

from mbcnet_rec.model.input_layout import ALL
from mbcnet_rec.model.kinds import BranchKind, LossKind, ModelKind, ModelOutput
from mbcnet_rec.model.layers import MLP, Logit, Regularisation
from mbcnet_rec.model.losses import CoteachingConfig, bce_with_logits, row_mean


@dataclass(frozen=True)
class PairConfig(Regularisation):
    hidden: tuple[int, ...] = (8, 4)
    branches: tuple[str, ...] = ("thin", "thick")
    coteaching: CoteachingConfig = CoteachingConfig(threshold="base_rate")


class Pair(nn.Module):
    def __init__(self, config, layout):
        super().__init__()
        self.branches = nn.ModuleDict({name: MLP(layout.width(), config.hidden, config) for name in config.branches})
        self.latent_dim = config.hidden[-1]
        self.logits = nn.ModuleList(Logit(self.latent_dim) for _ in range(3))

    def forward(self, features):
        latents = torch.stack([branch(features[ALL]) for branch in self.branches.values()])
        own = [layer(latent) for layer, latent in zip(self.logits, latents)]
        return ModelOutput(latents, torch.stack(own), self.logits[2](latents.mean(0)))


@dataclass(frozen=True)
class SquareConfig:
    scale: float = 0.5


class Square(nn.Module):
    def __init__(self, config, layout):
        super().__init__()
        self.scale = config.square.scale
        self.mlp = MLP(layout.width(), (config.branch_dim,), config)

    def forward(self, features):
        return self.mlp(self.scale * features[ALL] ** 2)


PAIR = ModelKind("pair", PairConfig, Pair, "Pair")
SQUARE = BranchKind("square", Square, SquareConfig)


@dataclass(frozen=True)
class FocalConfig:
    '''The focal loss of the fused logit (Lin et al., 2017).'''

    weight: float = 1.0
    gamma: float = 2.0


def focal(config, output, labels, weights, mean_over_ranks):
    bce = bce_with_logits(output.fused_logits, labels)
    return config.weight * row_mean((1 - torch.exp(-bce)) ** config.gamma * bce, weights)


FOCAL = LossKind("focal", FocalConfig, focal)
"""
SHORT = ("train.max_steps=8", "train.eval_every=4", "train.log_every=4", "train.checkpoint_every=4")


def settings(*words):
    return [part for word in words for part in ("--set", word)]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plugins")
    write_small(folder)
    (folder / "mine.py").write_text(PLUGIN)
    return folder


@pytest.fixture(scope="module")
def pair(home) -> Path:
    """A run of the model with branches, on two ranks."""
    out = home / "pair"
    words = (f"plugins+={home / 'mine.py'}", "model.kind=pair", f"train.out={out}", *SHORT)
    run_script("training_ranks.py", str(home / "logs"), str(home / "run.toml"), *words)
    return out


def test_two_ranks_train_it_with_diagnostics_of_its_branches(pair):
    lines = lines_of(pair, timing=True)
    keys = {*next(line for line in lines if line["split"] == "train")}
    assert {"auc/thin", "log_loss/thick", "disagreement/thin>thick", "latent_norm/thin", "coteaching_loss"} <= keys
    assert "gradient_share/thin" in keys or any("thin" in key and "grad" in key for key in keys), sorted(keys)
    assert (pair / "plugins" / "mine.py").read_text() == PLUGIN
    config = load_config(pair / "config.toml")
    assert config.model.own.branches == ("thin", "thick") and "#sha256=" in config.plugins[0]


def test_it_resumes_and_is_scored_and_exported(pair, home, capfd):
    longer = ("model.kind=pair", f"train.out={pair}", *SHORT[1:], "train.max_steps=12")
    assert train(home / "run.toml", f"plugins+={home / 'mine.py'}", *longer, resume=True) == 0
    assert json.loads((pair / "DONE").read_text())["step"] == 12
    assert main(["evaluate", str(pair), "--json"]) == 0
    assert "auc/thin" in capfd.readouterr().out
    assert main(["predict", str(pair), "--data", str(home / "test.parquet"), "--out", str(home / "scores")]) == 0
    assert "probability_thick" in pq.read_table(home / "scores").column_names
    assert main(["export", str(pair), "--out", str(home / "artifact"), "--no-aot"]) == 0
    spec = json.loads((home / "artifact" / "model.json").read_text())
    assert spec["kind"] == "pair" and spec["branches"] == ["thin", "thick"]
    assert all(call["call"].startswith(("aten.", "torch.", "_operator", "getitem")) for call in spec["graph"]["calls"])
    latency = [
        "bench",
        "latency",
        str(home / "artifact"),
        "--beside",
        "dnn",
        "--seconds",
        "0",
        "--calls",
        "3",
        "--rows",
        "1",
        "--threads",
        "1",
        "--json",
    ]
    assert main(latency) == 0
    assert "pair" in capfd.readouterr().out


def test_another_version_of_the_file_is_refused_and_the_runs_own_can_stand_in(pair, home, monkeypatch, capfd):
    mine = home / "mine.py"
    try:
        mine.write_text(PLUGIN + "\n# changed\n")
        assert main(["evaluate", str(pair)]) == 2
        said = capfd.readouterr().err
        assert str(mine) in said and "another version" in said and f"{ALSO}={pair}/plugins/mine.py" in said
        monkeypatch.setenv(ALSO, str(pair / "plugins" / "mine.py"))
        assert main(["evaluate", str(pair)]) == 0
        capfd.readouterr()
        words = settings("model.kind=pair", f"train.out={pair}", "train.max_steps=14")
        assert main(["train", "--config", str(home / "run.toml"), "--plugin", str(mine), *words, "--resume"]) == 2
        assert "plugins" in capfd.readouterr().err
    finally:
        mine.write_text(PLUGIN)


def test_a_loss_of_ones_own_is_part_of_the_objective_and_of_the_log(home, capfd):
    words = (f"train.out={home / 'focal'}", "model.kind=dnn", "model.losses.focal.weight=0.5", *SHORT)
    assert train(home / "run.toml", f"plugins+={home / 'mine.py'}", *words) == 0
    line = next(line for line in lines_of(home / "focal") if line["split"] == "train")
    assert line["loss"] == pytest.approx(line["bce"] + line["focal"], rel=1e-5) and line["focal"] > 0
    capfd.readouterr()
    with pytest.raises(InputError, match=r"model\.losses\.focal\.gama is not a known key"):
        load_config(home / "run.toml", [f"plugins+={home / 'mine.py'}", "model.losses.focal.gama=1"])


def test_a_branch_of_ones_own_trains_beside_ours(home, capfd):
    words = (
        f"train.out={home / 'square'}",
        'model.mbcnet.branches=["cross","square"]',
        "model.mbcnet.square.scale=0.25",
        *SHORT,
    )
    assert train(home / "run.toml", f"plugins+={home / 'mine.py'}", *words) == 0
    line = next(line for line in lines_of(home / "square") if line["split"] == "train")
    assert "auc/square" in line and "disagreement/cross>square" in line
    assert load_config(home / "square" / "config.toml").model.mbcnet.square.scale == 0.25
    assert (
        main(["export", str(home / "square"), "--out", str(home / "squared"), "--no-aot", "--branches", "square"]) == 0
    )
    capfd.readouterr()


@pytest.mark.long
def test_it_is_studied_tuned_and_planned(home, monkeypatch, capfd):
    monkeypatch.chdir(home)
    words = ["--config", "run.toml", "--plugin", str(GDCN), *settings("train.max_steps=4")]
    assert main(["study", "table3", *words, "--models", "dnn", "gdcn", "--seeds", "2", "--out", "studied"]) == 0
    assert "GDCN" in capfd.readouterr().out
    (home / "space.toml").write_text('trials = 2\n[space]\n"model.gdcn.num_layers" = { low = 1, high = 2 }\n')
    assert main(["tune", *words, "--models", "gdcn", "--space", "space.toml", "--out", "tuned"]) == 0
    assert load_config(home / "tuned" / "gdcn.toml").model.kind == "gdcn"
    (home / "gdcn.toml").write_text(
        f'plugins = ["{GDCN}"]\n' + (home / "run.toml").read_text() + '\n[model]\nkind = "gdcn"\n'
    )
    capfd.readouterr()
    costs = []
    for file in ("run.toml", "gdcn.toml"):
        assert main(["plan", "make", "--config", file, "--cluster", "1x2:cpu", "-o", f"{file}.plan"]) == 0
        costs.append(json.loads((home / f"{file}.plan").read_text()))
    assert costs[0] != costs[1]


def test_a_call_that_is_no_aten_operator_is_refused_by_its_name():
    class Foreign(nn.Module):
        def forward(self, x):
            return torch.ops.prims.neg(x)

    with pytest.raises(InputError, match=r"the model calls prims\.neg"):
        graph_spec(torch.export.export(Foreign(), (torch.ones(3),)))


def test_faults_name_the_key_the_file_and_the_line(home, tmp_path):
    plugin = f"plugins=['{home / 'mine.py'}']"

    def refused(*overrides):
        with pytest.raises(InputError) as error:
            load_config(home / "run.toml", overrides)
        return str(error.value)

    assert "model.pair.hiden is not a known key; did you mean 'hidden'?" in refused(plugin, "model.pair.hiden=[1]")
    assert "model.mbcnet.square.scal is not a known key" in refused(plugin, "model.mbcnet.square.scal=1")
    assert "model.kind = 'pair': wanted one of 'mbcnet'" in refused("model.kind=pair")
    assert "no_such.py: cannot be read" in refused("plugins+=no_such.py")
    broken = tmp_path / "broken.py"
    broken.write_text("x = 1\nraise ValueError('no luck')\n")
    assert f"{broken}, line 2: ValueError: no luck" in refused(f"plugins+={broken}")
    broken.write_text("x = 1\nx =\n")
    assert f"{broken}, line 2: SyntaxError" in refused(f"plugins+={broken}")
    broken.write_text(PLUGIN.replace('"pair"', '"dnn"'))
    assert "'dnn': there are two of that name" in refused(f"plugins+={broken}")


def test_two_versions_of_a_file_live_side_by_side(home, tmp_path):
    """No global state: what one config loads, another does not see."""
    first, second = tmp_path / "one.py", tmp_path / "two.py"
    first.write_text(PLUGIN)
    second.write_text(PLUGIN.replace("(8, 4)", "(9, 3)"))
    one, two = (load_config(home / "run.toml", [f"plugins+={each}", "model.kind=pair"]) for each in (first, second))
    assert (one.model.own.hidden, two.model.own.hidden) == ((8, 4), (9, 3))
    assert "pair" not in load_config(home / "run.toml").model.kinds


def test_no_other_file_lists_the_models():
    """A model of the tree is one file of zoo/: no list, match or Literal elsewhere holds most of their names."""
    names = {*model_class().kinds}
    package = Path(mbcnet_rec.__file__).parent
    for path in (*package.rglob("*.py"), *(ROOT / "data").rglob("*.py"), *(ROOT / "sharding").rglob("*.py")):
        found = {name for name in names if re.search(rf"[\"']{name}[\"']", path.read_text())}
        others = found - {"efgc", "fm", path.stem}  # the first two are branches as well
        assert len(others) <= 3, f"{path}: {sorted(others)}"


def test_a_file_of_the_zoo_is_found(tmp_path):
    """It needs no other edit: the package's folder is read."""
    text = GDCN.read_text()
    code = (
        "import sys; from mbcnet_rec.model import zoo; zoo.__path__.append(sys.argv[1]);"
        "from mbcnet_rec.plugins import model_config, our_modules; our_modules.cache_clear();"
        "assert model_config('gdcn').own.num_layers == 3"
    )
    (tmp_path / "gdcn.py").write_text(text)
    assert run_code(code, str(tmp_path)) == (0, "")


def test_an_installed_package_offers_a_model_a_branch_and_a_loss(tmp_path):
    """As pip leaves it: a module, and a dist-info folder with entry points."""
    (tmp_path / "theirs.py").write_text(PLUGIN)
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    points = {"models": "pair = theirs:PAIR", "branches": "square = theirs:SQUARE", "losses": "focal = theirs:FOCAL"}
    (info / "entry_points.txt").write_text("".join(f"[mbcnet.{group}]\n{line}\n" for group, line in points.items()))
    code = (
        "from mbcnet_rec.plugins import model_class, model_config; "
        "assert model_config('pair').own.branches == ('thin', 'thick'); "
        "from data.plugins import entry_points; print([len(entry_points(f'mbcnet.{g}')) for g in ('models', 'branches', 'losses')])"
    )
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"
    assert run_code(script) == (0, "[1, 1, 1]\n")
    (tmp_path / "theirs.py").write_text("1 / 0\n")
    code, broken = run_code(script)
    assert (
        code and "package theirs: its entry point 'pair' of mbcnet.models cannot be loaded (ZeroDivisionError" in broken
    )
