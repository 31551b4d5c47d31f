"""Proves that every shipped config loads and trains: on the real files where they are at hand, the demo on small data."""

import json
from pathlib import Path

import pytest
from tiny_run import train

from data.public.prepare import prepare
from data.schema import load_schema
from mbcnet_rec.cli import main
from mbcnet_rec.config import load_config
from mbcnet_rec.plugins import model_config
from mbcnet_rec.study.runner import variant_config
from mbcnet_rec.study.studies import MODELS

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "mbcnet_rec" / "configs").glob("*.toml"))
TUNED = sorted((ROOT / "mbcnet_rec" / "study" / "tuned").glob("*/*.toml"))
SHARED = ROOT.parent / "shared" / "datasets"
# config -> folder of its real files
REAL = {
    "adult": "adult", "ali_ccp": "ali_ccp_sample", "ali_ccp_tasks": "ali_ccp_sample", "aliexpress": "aliexpress_sample", "criteo": "criteo_sample",
    "movielens": "movielens_latest_small", "movielens_history": "movielens_latest_small", "slots": "slots_demo", "taobao_ad": "taobao_ad_sample",
}  # fmt: skip


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_loads_and_says_what_it_is(path):
    config = load_config(path)
    assert config.name == path.stem
    assert path.read_text().startswith("# ")
    assert config.schema == f"prepared/{path.stem}/schema.toml"  # in the working directory, as README prints


@pytest.mark.parametrize("path", TUNED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_tuned_config_is_what_a_study_takes_for_its_model(path):
    """`mbcnet study table3 --tuned mbcnet_rec/study/tuned/DATA` trains it: the same data as DATA's own config, the model of its name."""
    of_data = {"synthetic": ROOT / "mbcnet_rec/study/claims/run.toml"}
    base = load_config(of_data.get(path.parent.name, ROOT / f"mbcnet_rec/configs/{path.parent.name}.toml"))
    config = variant_config(base, MODELS[path.stem], path.parent)
    assert config.model.kind == path.stem and config.model.init == "xavier_normal"
    for key in ("train", "valid", "test"):
        assert getattr(config.data, key) == getattr(base.data, key)
    assert getattr(config.model, path.stem) != getattr(model_config(), path.stem)


@pytest.mark.parametrize(
    "name", [name if name == "slots" else pytest.param(name, marks=pytest.mark.long) for name in REAL]
)
def test_real_data_trains(name, tmp_path, monkeypatch, capfd):
    if not (SHARED / REAL[name]).is_dir():
        pytest.skip(f"the real files are not here ({REAL[name]})")
    prepare(name, SHARED / REAL[name], tmp_path / "prepared" / name)
    monkeypatch.chdir(tmp_path)
    short = ("train.max_steps=3", "train.eval_every=3", "train.log_every=1")
    assert train(ROOT / f"mbcnet_rec/configs/{name}.toml", *short) == 0
    done = json.loads((tmp_path / "runs" / name / "DONE").read_text())
    assert done["step"] <= 3 and 0 < done["log_loss"] < 2
    schema = load_schema(tmp_path / "prepared" / name / "schema.toml")
    plan = json.loads((tmp_path / "runs" / name / "plan.json").read_text())
    assert set(plan["tables"]) == {table.name for table in schema.tables}, "all fields of the data are used"
    capfd.readouterr()


def test_demo_trains_on_small_data(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert main(["data", "synth", "--out", "prepared/demo", "--rows", "7000"]) == 0
    assert train(ROOT / "mbcnet_rec/configs/demo.toml", "train.max_steps=4", "train.log_every=2") == 0
    out = capfd.readouterr().out
    assert "best reachable" in out and "fused" in out and "efgc" in out
    assert "192 fields" in out and "run folder: runs/demo" in out
