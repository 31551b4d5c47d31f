"""`train.profile` writes a Chrome trace of some steps and says what each line of ours asks of the device; the numbers of a run stay."""

import json

import pytest
from small_data import write_small
from tiny_run import learned, train

from mbcnet_rec.training.profile import calls_by_line, table_lines

SMALL = ("model.kind=dnn", "model.dnn.hidden=[8]", "data.test=[]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    write_small(folder, train_rows=960, other_rows=96)
    return folder


def test_a_profiled_run_says_what_a_step_asks_for(folder, capfd):
    common = [folder / "run.toml", *SMALL, "train.max_steps=8", "data.valid=[]"]
    assert train(*common, f"train.out={folder / 'plain'}") == 0
    assert train(*common, f"train.out={folder / 'seen'}", "train.profile=2") == 0
    said = "".join(capfd.readouterr())
    assert f"profile of steps 6 to 7: {folder}/seen/profile/rank_0.json" in said
    assert "operators, 0.0 launches, 0.0 syncs, 0.0 copies" in said
    assert "mbcnet_rec/model/" in said and "mbcnet_rec/cpu/fast_path.py:" in said
    events = json.loads((folder / "seen/profile/rank_0.json").read_text())["traceEvents"]
    names = [each["name"] for each in events if str(each.get("name", "")).startswith("training step ")]
    assert sorted(names) == ["training step 6", "training step 7"]
    assert learned(folder / "seen") == learned(folder / "plain")


@pytest.mark.parametrize(("steps", "told"), [(1, "steps 1 to 1"), (4, "steps 4 to 8"), (0, "")])
def test_a_short_run_is_profiled_to_its_end(folder, capfd, steps, told):
    """Fewer steps than are asked for, an evaluation between them, and none."""
    wanted = 5 if steps else 0
    settings = ["train.max_steps=8" if steps == 4 else "train.max_steps=1", "train.eval_every=4"]
    assert (
        train(folder / "run.toml", *SMALL, *settings, f"train.out={folder / str(steps)}", f"train.profile={wanted}")
        == 0
    )
    said = "".join(capfd.readouterr())
    assert (told in said) if told else ("profile of" not in said)


def event(name, cat, ts, dur, tid=1):
    return {"ph": "X", "name": name, "cat": cat, "ts": ts, "dur": dur, "pid": 1, "tid": tid}


def test_calls_of_a_gpu_are_counted_by_line():
    """Two steps; what is outside of them, inside another operator, or on the device itself counts nothing."""
    trace = [
        event("training step 6", "user_annotation", 0, 100),
        event("at mbcnet_rec/a.py:1", "user_annotation", 10, 30),
        event("aten::addmm", "cpu_op", 12, 20), event("aten::t", "cpu_op", 13, 2), event("cudaLaunchKernel", "cuda_runtime", 20, 2),
        event("gemm", "kernel", 22, 50, tid=7),
        event("at mbcnet_rec/b.py:2", "user_annotation", 50, 20),
        event("cudaMemcpyAsync", "cuda_runtime", 52, 2), event("cudaStreamSynchronize", "cuda_runtime", 55, 10),
        event("cuLaunchKernelEx", "cuda_driver", 60, 1, tid=2),
        event("training step 7", "user_annotation", 200, 100),
        event("at mbcnet_rec/b.py:2", "user_annotation", 250, 20), event("cudaStreamSynchronize", "cuda_runtime", 255, 10),
        event("cudaStreamSynchronize", "cuda_runtime", 150, 10), {"ph": "M", "name": "process_name"},
    ]  # fmt: skip
    counts = calls_by_line(trace)
    assert {line: dict(own) for line, own in counts.items()} == {
        "mbcnet_rec/a.py:1": {"operators": 1, "launches": 1},
        "mbcnet_rec/b.py:2": {"copies": 1, "syncs": 2},
        "another thread: the backward pass, or TorchRec's": {"launches": 1},
    }
    assert table_lines(counts, 2)[0] == "a step: 0.5 operators, 1.0 launches, 1.0 syncs, 0.5 copies"
    assert table_lines(counts, 2)[2].split() == ["0.0", "0.0", "1.0", "0.5", "mbcnet_rec/b.py:2"]
