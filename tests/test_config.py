"""Proves that run configs are read strictly: every key typed, overrides by path, contradictions named, round trip exact."""

from pathlib import Path

import pytest
from small_data import CONFIG

from data.errors import InputError
from mbcnet_rec.config import config_text, load_config


@pytest.fixture
def path(tmp_path) -> Path:
    file = tmp_path / "run.toml"
    file.write_text(CONFIG.format(folder=tmp_path))
    return file


def test_resolved_text_gives_the_same_config(path, tmp_path):
    config = load_config(path, ["optim.dense_lr=0.5", "train.schedule=plateau", "model.mbcnet.branches=['deep']"])
    assert config.optim.dense_lr == 0.5 and config.train.schedule == "plateau"
    assert config.model.mbcnet.branches == ("deep",)
    (tmp_path / "resolved.toml").write_text(config_text(config))
    assert load_config(tmp_path / "resolved.toml") == config


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.epochs", "wanted key.path=value"),
        (".x=1", "wanted key.path=value"),
        ("name.first=1", "'name' is 'small', not a table"),
        ("train.patience=3.5", "wanted an integer"),
        ("data.valid=[]", ""),
        ("optim.dense_lr=nan", "wanted a number"),
        ("train.schedule=slow", "'constant', 'plateau'"),
        ("name=a/b", "plain word"),
    ],
)
def test_overrides(path, override, words):
    if not words:
        assert load_config(path, [override]).data.valid == ()
        return
    with pytest.raises(InputError) as caught:
        load_config(path, [override])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keys", [["train.patience=2"], ["train.schedule=plateau"]])
def test_what_reads_validation_needs_it(path, keys):
    with pytest.raises(InputError, match=r"data\.valid is empty"):
        load_config(path, ["data.valid=[]", *keys])
