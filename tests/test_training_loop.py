"""Proves when checkpoints are written and kept, that a resumed run is the uninterrupted one bit by bit under every switch that keeps state,
that gradients are clipped and logged, and that a run which cannot continue from its checkpoints says so."""

import json
import re
import shutil

import numpy as np
import pytest
from small_data import write_small
from tiny_run import lines_of, train

from mbcnet_rec.checkpoints.shards import Saved
from mbcnet_rec.config import load_config
from mbcnet_rec.cpu import layers
from mbcnet_rec.run_training import warnings_of
from mbcnet_rec.training.faults import SPIKE_LINES, loss_spike
from mbcnet_rec.training.state import TrainState


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("loop"), train_rows=960, other_rows=96)


def run(config, folder, *settings, **options):
    """Exit code and folder of a run without a test split and without pictures."""
    return train(config, f"train.out={folder}", "data.test=[]", *settings, **options), folder


def steps_of(folder):
    return sorted(int(path.parent.name[5:]) for path in folder.glob("checkpoints/step_*/manifest.json"))


def tensors_of(folder, step):
    saved = Saved(folder / f"checkpoints/step_{step}")
    found = {entry.name: tensor for entry, tensor in saved.tensors()}
    return {name: (value.shape, value.numpy().tobytes()) for name, value in found.items()}


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        (["train.checkpoint_every=4", "train.keep_last=9"], [4, 8, 10]),
        (["train.checkpoint_every=4", "train.keep_last=1", "data.valid=[]"], [10]),
        (["train.checkpoint_minutes=1e-9", "train.keep_last=99"], list(range(1, 11))),
        (["train.checkpoint_minutes=60", "train.keep_last=99"], [10]),
        (["train.eval_every=3", "train.keep_last=9"], [3, 6, 9, 10]),
        (["train.eval_every=3", "train.keep_last=1", "train.keep_step=2", "data.valid=[]"], [2, 10]),
    ],
)
def test_checkpoints_are_due_by_steps_minutes_and_evaluations(config, tmp_path, settings, steps):
    code, folder = run(config, tmp_path / "run", "train.max_steps=10", *settings)
    assert code == 0 and steps_of(folder) == steps


def test_the_last_and_the_best_are_kept(config, tmp_path):
    settings = ["train.max_steps=10", "train.eval_every=1", "train.keep_last=2", "train.keep_best=3"]
    code, folder = run(config, tmp_path / "run", *settings)
    valid = sorted(lines_of(folder, "valid"), key=lambda line: (-line["auc"], line["step"]))
    assert code == 0 and steps_of(folder) == sorted({line["step"] for line in valid[:3]} | {9, 10})
    best = json.loads((folder / "checkpoints/best.json").read_text())
    assert best == {"step": valid[0]["step"], "auc": valid[0]["auc"]}

    # a disk that the last checkpoint has filled had no room for this; started again, no step is left to train
    (folder / "checkpoints/best.json").write_text('{"step": 9, "auc": 0.1}\n')
    assert run(config, folder, *settings, resume=True)[0] == 0
    assert json.loads((folder / "checkpoints/best.json").read_text()) == best


SWITCHES = {
    "slices, cooperation warm-up, bf16, importance weights, plateau": [
        "model.mbcnet.embeddings=per_branch",
        "model.mbcnet.coteaching.threshold=base_rate",
        "model.mbcnet.differentiation.latents=unit",
        "model.mbcnet.coteaching.warmup_steps=8",
        "model.mbcnet.differentiation.warmup_steps=8",
        "train.autocast=bf16",
        "data.keep_negatives=0.7",
        "data.negative_weights=importance",
        "train.schedule=plateau",
        "train.patience=9",
        "train.max_grad_norm=0.5",
        "optim.weight_decay=0.1",
    ],
    "dense Adam with a penalty, dropout, batch norm": [
        "model.kind=dnn",
        "model.dnn.dropout=0.3",
        "model.dnn.batch_norm=true",
        "optim.embedding.name=adam",
        "optim.embedding.l2=0.01",
        "sharding.sharding_types=['data_parallel']",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", SWITCHES)
def test_a_resumed_run_is_the_uninterrupted_one(config, tmp_path, name):
    """Stopped between log lines and evaluations: moments, schedules, random numbers and the cursor come back."""
    settings = [
        *SWITCHES[name],
        "train.log_every=4",
        "train.eval_every=5",
        "train.checkpoint_every=3",
        "train.epochs=3",
    ]
    code, whole = run(config, tmp_path / "whole", *settings, "train.max_steps=14", "train.keep_last=9")
    assert code == 0
    parts = shutil.copytree(whole, tmp_path / "parts")
    for step in (14, 12, 10, 9):
        shutil.rmtree(parts / f"checkpoints/step_{step}")
    assert steps_of(parts)[-1] == 6, "between the lines of steps 4 and 8, and between evaluations"
    code, parts = run(config, tmp_path / "parts", *settings, "train.max_steps=14", resume=True)
    assert code == 0
    before, after = tensors_of(whole, 14), tensors_of(parts, 14)
    assert before.keys() == after.keys()
    assert [key for key in before if before[key] != after[key]] == []
    assert lines_of(whole, "valid") == lines_of(parts, "valid")
    one, other = lines_of(whole, "train"), lines_of(parts, "train")
    assert [line["step"] for line in one] == [line["step"] for line in other] == [4, 8, 12]
    assert one[0] == other[0] and one[2] == other[2], "the line of step 8 tells of the steps after the resume only"
    if "model.kind=dnn" not in settings:  # slices and logits go by the order of branches
        order = "model.mbcnet.branches=['deep','cross','efgc']"
        assert run(config, parts, *settings, order, "train.max_steps=16", resume=True)[0] == 2


@pytest.mark.parametrize("name", SWITCHES)
def test_the_fast_path_of_a_cpu_takes_the_same_steps(config, tmp_path, name, monkeypatch):
    """With `train.cpu_fast_path` off, TorchRec's own pipeline, lookups, Adam and torch's layers come to the same numbers."""
    monkeypatch.setattr(layers, "ONE_DNN_FROM", 1)  # small layers too
    settings = ["model.dnn.dropout=0", "train.autocast=none", "train.epochs=4", "train.max_steps=30"]
    # early predictions lie near the base rate, where rounding alone makes a branch strong or weak
    settings.append("model.mbcnet.coteaching.threshold=0.5")
    outputs = []
    for fast in ("true", "false"):
        mine = [each.partition("=")[0] for each in settings]  # dropout draws other masks
        one = [each for each in SWITCHES[name] if each.partition("=")[0] not in mine]
        one += [*settings, f"train.cpu_fast_path={fast}"]
        code, folder = run(config, tmp_path / fast, *one)
        assert code == 0
        outputs.append((tensors_of(folder, 30), lines_of(folder, "train")))
    (fast, fast_lines), (slow, slow_lines) = outputs
    assert fast.keys() == slow.keys()
    # batch norm takes a layer's bias out again: its gradient is rounding alone, which Adam makes steps of
    is_normed = "model.dnn.batch_norm=true" in one
    unlike = re.compile(r"^window/" + (r"|mlp\.[036]\.bias$|running_mean" if is_normed else ""))
    for key, (shape, values) in fast.items():
        assert shape == slow[key][0], key
        if "int" not in key and not unlike.search(key):
            ours, theirs = (
                np.frombuffer(each, np.float32 if len(each) % 4 == 0 else np.uint8) for each in (values, slow[key][1])
            )
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 if is_normed else 1e-6, err_msg=key)
    assert [line["loss"] for line in fast_lines] == pytest.approx([line["loss"] for line in slow_lines], abs=1e-6)


def damage(folder, step):
    (path,) = folder.glob(f"checkpoints/step_{step}/rank_00000.*")
    path.write_bytes(b"damage")


def test_damaged_checkpoints_are_passed_over_aloud_and_never_thrown_away(config, tmp_path, capfd):
    settings = ["train.max_steps=6", "train.checkpoint_every=3", "data.valid=[]"]
    code, folder = run(config, tmp_path / "run", *settings)
    damage(folder, 6)
    capfd.readouterr()
    code, _ = run(config, tmp_path / "run", *settings, resume=True)
    out, err = capfd.readouterr()
    assert code == 0 and "from step 3" in out
    told = [line for line in err.splitlines() if line.startswith("mbcnet: warning: ")]
    assert len(told) == 1 and re.search(r"step_6/rank_00000.*: changed since it was written", told[0])
    for step in (3, 6):
        damage(folder, step)
    code, _ = run(config, tmp_path / "run", *settings, resume=True)
    error = capfd.readouterr().err.splitlines()[-1]
    assert code == 2 and "of 2 checkpoints none is whole; bring one back, or begin anew with --overwrite" in error
    assert steps_of(folder) == [3, 6], "nothing is removed"


def test_a_place_that_cannot_be_written_is_refused_at_the_start(config, tmp_path, capfd):
    """Not at the first checkpoint, an hour later."""
    (tmp_path / "file").write_text("in the way")
    code, folder = run(config, tmp_path / "run", f"train.checkpoint_folder={tmp_path}/file/checkpoints")
    error = capfd.readouterr().err.strip()
    assert code == 2 and len(error.splitlines()) == 1
    assert "train.checkpoint_folder" in error and "no folder can be there (Not a directory)" in error
    assert not folder.exists()


def test_a_run_whose_report_fails_is_done_all_the_same(config, tmp_path, capfd):
    def fails(folder):
        raise ValueError("no such backend")

    code, folder = run(config, tmp_path / "run", "train.max_steps=2", "data.valid=[]", report=fails)
    assert code == 0 and (folder / "DONE").exists()
    out, error = capfd.readouterr()
    assert f"next: mbcnet report {folder}" in out + error
    assert f"note: {folder}: its report was not written (ValueError: no such backend)" in out


@pytest.mark.parametrize(
    ("autocast", "device", "has_bf16", "told"),
    [
        ("bf16", "cpu", False, "has no fast bf16 products"), ("bf16", "cpu", True, ""), ("bf16", "cuda", False, ""),
        ("none", "cuda", False, "without tensor cores"), ("none", "cpu", False, ""),
    ],
)  # fmt: skip
def test_products_of_a_slow_kind_are_told(config, autocast, device, has_bf16, told):
    """They are several times slower than they could be there: a user who hoped for speed must not have to find out."""
    said = " ".join(warnings_of(load_config(config, [f"train.autocast={autocast}"]), device, has_bf16))
    assert told in said and bool(said) == bool(told)


def test_the_norm_is_logged_and_a_clip_changes_the_run(config, tmp_path):
    settings = ["train.max_steps=10", "data.valid=[]"]
    _, free = run(config, tmp_path / "free", *settings)
    _, tight = run(config, tmp_path / "tight", *settings, "train.max_grad_norm=1e-6")
    free_norms, tight_norms = ([line["grad_norm"] for line in lines_of(each, "train")] for each in (free, tight))
    assert len(free_norms) == 2 and all(norm > 0.01 for norm in free_norms + tight_norms)
    assert free_norms != tight_norms


def test_the_alarm_is_armed_by_some_lines_and_rises_for_a_jump():
    state = TrainState()
    steady = [2.0 - 0.01 * line + 0.02 * (-1) ** line for line in range(40)]
    assert [loss_spike(state, loss, 6.0) for loss in steady] == [None] * 40, "a loss that falls is no alarm"
    z = loss_spike(state, 3.0, 6.0)
    assert z is not None and z > 6.0
    assert loss_spike(state, float("nan"), 6.0) is None and state.loss_lines == 41, "another check's affair"
    young = TrainState()
    jumps = [loss_spike(young, 1.0 + line % 2, 6.0) for line in range(SPIKE_LINES - 1)]
    assert loss_spike(young, 100.0, 6.0) is None and jumps == [None] * (SPIKE_LINES - 1), "too few lines to judge by"
    off = TrainState(loss_mean=1.0, loss_variance=0.01, loss_lines=99)
    assert loss_spike(off, 100.0, 0.0) is None
