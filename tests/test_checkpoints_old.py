"""Proves that a checkpoint of an earlier version loads: tests/old_checkpoint was written by two ranks of commit 35643a0 (format 2, with
the log window that checkpoints had then), and one rank continues from it with the losses that commit had."""

import json
import shutil
from pathlib import Path

import pytest

from mbcnet_rec.cli import main

OLD = Path(__file__).with_name("old_checkpoint")
LOSSES = [0.5747866630554199, 0.6709079742431641, 0.833234965801239, 0.5594176054000854, 0.6266384124755859]


def test_an_old_run_goes_on_with_the_losses_it_had(tmp_path, monkeypatch):
    shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    settings = ["--set", "train.max_steps=8", "--set", "train.log_every=1"]
    assert main(["train", "--config", "run/config.toml", "--resume", *settings]) == 0
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 5, 6, 7, 8]
    assert [line["loss"] for line in lines[1:]] == pytest.approx(LOSSES, rel=1e-5)
