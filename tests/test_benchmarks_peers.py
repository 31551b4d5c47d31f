"""Proves that benchmarks/peers.py times whole runs of our trainer between two optimizer steps, gives both sides the same rows and sizes, and
says null where a peer is not named. The peers themselves are not installed here."""

import importlib.util
import io
import itertools
import json
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from data.schema import load_schema
from mbcnet_rec.cpu.linear import bf16_in_hardware

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def peers():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("benchmarks_peers", BENCHMARKS / "peers.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["benchmarks_peers"] = module
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def rows(peers, tmp_path_factory):
    size = peers.Size(3, 20, 4, 16, (8,), (4,), warm_up=4, steps=4)
    folder = tmp_path_factory.mktemp("peers") / "tiny"
    peers.write_rows(size, folder)
    return size, folder


def test_without_a_peer_our_rate_is_measured_and_the_peers_figures_are_null(peers, monkeypatch, capsys):
    monkeypatch.setattr(peers, "QUICK", peers.Size(3, 20, 4, 16, (8,), (4,), warm_up=4, steps=4))
    monkeypatch.setattr(sys, "argv", ["peers.py", "--quick", "--json", "--only", "fuxictr"])
    assert peers.main() == 0
    out = capsys.readouterr().out
    figures = json.loads(out.splitlines()[-1])
    for key in ("fuxictr_speedup/small/dnn", "fuxictr_per_second/small/dnn", "least_fuxictr_speedup"):
        assert figures[key] is None
    for case in ("ours", "ours_as_shipped"):
        assert figures[f"{case}_per_second/small/dnn"] > 0
    assert figures.get("ours_bf16_per_second/small/dnn", 0) > 0 or not bf16_in_hardware()
    assert "fuxictr: not named, so its figures are null" in out


def test_the_clock_counts_steps_of_the_optimizer_that_makes_most():
    sys.path.insert(0, str(BENCHMARKS / "peer_code"))
    from timed_steps import StepClock

    sys.path.pop(0)
    weights = [torch.zeros(2, requires_grad=True) for _ in range(2)]
    often, seldom = (torch.optim.SGD([weight], lr=0.1) for weight in weights)
    for weight in weights:
        weight.grad = torch.ones(2)
    with StepClock() as clock:
        seldom.step()
        for step in range(8):
            time.sleep(0.05 if step < 3 else 0.01)
            often.step()
    often.step()  # nobody counts any more
    assert 0.01 <= clock.seconds_a_step(3, 5) < 0.05, "the slow steps before are warm-up"
    with pytest.raises(ValueError, match="8 steps were made, wanted 9"):
        clock.seconds_a_step(4, 5)


def test_both_sides_get_the_same_file_sizes_and_settings(peers, rows):
    size, folder = rows
    table = pq.read_table(folder / "train.parquet")
    assert table.num_rows == (4 + 4 + peers.TAIL) * 16
    schema = load_schema(folder / "schema.toml")
    described = json.loads((folder / "feature_map.json").read_text())
    assert [next(iter(each)) for each in described["features"]] == [
        feature.name for feature in schema.features
    ]
    ids = table["field_0"].to_numpy()
    assert ids.min() >= 1 and ids.max() < 20, "id 0 is FuxiCTR's padding"
    adam = {"name": "adam", "lr": peers.RATE}
    for kind in peers.MODELS:
        ours = peers.our_task(peers.our_model(kind, size), size, folder, adam)
        theirs = peers.fuxictr_task(kind, size, folder, "FUXICTR", 0.0, 1)
        assert ours["config"]["data"]["train"] == [theirs["train"]]
        assert {key: ours[key] for key in ("warm_up", "steps", "batch")} == {
            key: theirs[key] for key in ("warm_up", "steps", "batch")
        }
        params, config = theirs["params"], ours["config"]
        assert params["batch_size"] == config["data"]["batch_size"] == 16
        assert params["max_gradient_norm"] == config["train"]["max_grad_norm"]
        assert params["learning_rate"] == config["optim"]["dense_lr"] == config["optim"]["embedding"]["lr"]


@pytest.mark.parametrize("kind", ["dcnv2", "finalmlp"])
def test_our_models_of_the_comparison_train(peers, rows, kind, monkeypatch):
    size, folder = rows
    task = peers.our_task(peers.our_model(kind, size), size, folder, {"name": "adam", "lr": 1e-3})
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    peers.train_ours(task)
    assert json.loads((folder / "run" / "DONE").read_text())["step"] == 4 + 4 + peers.TAIL


def test_our_dlrm_has_the_peers_multiply_adds(peers):
    from data.schema.parse import parse_dataclass
    from mbcnet_rec.config import RunConfig

    size = peers.DLRM
    config = parse_dataclass(
        RunConfig, peers.our_task(peers.our_dlrm(), size, Path(), {"name": "adagrad"})["config"], "the task"
    )
    assert config.model.kind == "dcnv2" and config.model.dcnv2.cross.low_rank == peers.OUR_RANK
    our_rank, their_rank, layers, hidden = peers.OUR_RANK, peers.DLRM_RANK, size.cross_layers, size.hidden

    def chain(widths):
        return sum(a * b for a, b in itertools.pairwise(widths))

    width = size.fields * size.width + size.numbers
    ours = layers * (2 * width * our_rank + our_rank * our_rank) + chain((width, *hidden))
    their_width = (size.fields + 1) * size.width
    theirs = layers * 2 * their_width * their_rank + chain((13, 512, 256, 64)) + chain((their_width, *hidden))
    assert 0.99 < ours / theirs < 1.01
