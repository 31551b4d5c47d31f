"""Without a GPU: every model's step stays on a fake "cuda" device, a training step waits once for it, and the first of 8 ranks builds
plan, shards, optimizers and pipeline of every sharding type.
"""

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from fake_gpu_guard import COMPILER
from tiny_run import environment

NEEDS_COMPILER = pytest.mark.skipif(not COMPILER, reason="no C++ compiler for the guard of the fake device")
SCRIPT = Path(__file__).with_name("fake_gpu_cases.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fake_gpu")
    cases = ("architectures", "wrong_device", "places", "waits", "caches") if COMPILER else ("architectures",)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), *cases],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=840,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "results.json").read_text())


def test_every_model_steps_on_the_device_alone_and_computes_what_a_cpu_does(found):
    assert len(found["architectures"]) == 26
    for name, (gpu, cpu) in found["architectures"].items():
        assert gpu["devices"] == ["cuda:0" if COMPILER else "meta"], name
        assert gpu["dtypes"] == cpu["dtypes"] == ["torch.float32"], (
            f"{name}: losses and gradients stay float32 under autocast"
        )
        assert gpu["without gradient"] == cpu["without gradient"], name
        if COMPILER and "five" not in name:  # dropout draws otherwise there
            assert math.isclose(gpu["loss"], cpu["loss"], rel_tol=1e-3 if "bf16" in name else 1e-6), name


@NEEDS_COMPILER
def test_a_tensor_left_on_the_host_is_found(found):
    assert "at least two devices, cuda:0 and cpu" in found["wrong_device"]


@NEEDS_COMPILER
@pytest.mark.parametrize(
    "kind", ["data_parallel", "table_wise", "row_wise", "table_row_wise", "column_wise", "cached", "replicas"]
)
def test_the_first_of_eight_ranks_holds_what_the_plan_says(kind, found):
    place = found["places"][kind]
    if kind not in ("cached", "replicas"):
        assert kind in place["types"].values()
    assert place["held"] == place["planned"] and place["held"]
    assert place["devices"] == ["cpu" if kind == "data_parallel" else "cuda:0"]
    # a replicated table's optimizer goes by parameters that are not registered for a fake group
    assert kind == "data_parallel" or place["state"] == len(place["held"]), "one state of the optimizer for each shard"
    assert place["kernels"] == [{"data_parallel": "dense", "cached": "fused_uvm_caching"}.get(kind, "fused")]
    assert place["pipeline"] == ("_ReattachedPrefetchPipeline" if kind == "cached" else "TrainPipelineSparseDist")


# what a step makes the host wait for: the verdict, and in a step that ends with a line of the log what that line says
VERDICT = {"mbcnet_rec/runtime/process.py": 1}
LINE = {
    "mbcnet_rec/scoring/scorer.py": 1, "mbcnet_rec/training/evaluation.py": 8, "mbcnet_rec/training/trainer.py": 4,
}  # fmt: skip


def waits_by_file(step):
    counts = Counter()
    for _, line, count in step["waits"]:
        counts[line.partition(":")[0]] += count
    return counts


@NEEDS_COMPILER
def test_a_step_on_one_gpu_waits_once_and_copies_no_pageable_memory(found):
    steps = found["waits"]["cuda"]["steps"]
    for step in (2, 3, 5):  # the first one lets TorchRec check the features, the 4th ends with a line
        assert waits_by_file(steps[f"step {step}"]) == VERDICT
    assert waits_by_file(steps["step 4"]) == VERDICT | LINE
    assert not any(steps[f"step {step}"]["pageable"] for step in (2, 3, 4, 5))


@NEEDS_COMPILER
def test_the_trainer_on_one_gpu_takes_the_steps_of_a_cpu(found):
    assert found["waits"]["cuda"]["loss"] == pytest.approx(found["waits"]["cpu"]["loss"], rel=1e-5)


@NEEDS_COMPILER
def test_a_load_forgets_the_rows_and_locks_of_caches(found):
    assert found["caches"] == {"before": [[[7], [1]]] * 3, "after": [[[-1], [0]]] * 3}
