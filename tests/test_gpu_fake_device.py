"""Without a GPU: every model's step stays on a fake "cuda" device, a training step waits once for it, and the first of 8 ranks builds
plan, shards, optimizers and pipeline of every sharding type.
"""

import copy
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from fake_gpu_guard import COMPILER
from tiny_run import environment

from mbcnet_rec.model.input_layout import InputLayout
from mbcnet_rec.model.mbcnet import BranchArch, MBCNetConfig
from mbcnet_rec.training.cuda_graph import Replayed

NEEDS_COMPILER = pytest.mark.skipif(not COMPILER, reason="no C++ compiler for the guard of the fake device")
SCRIPT = Path(__file__).with_name("fake_gpu_cases.py")


def results_of(folder, *cases):
    command = [sys.executable, str(SCRIPT), str(folder), *cases]
    done = subprocess.run(
        command, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, timeout=840
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    # two processes at once; caches loads what waits has saved
    halves = ["architectures,graph_of_one_network", "streams,wrong_device,places,waits,caches"]
    return results_of(tmp_path_factory.mktemp("fake_gpu"), *(halves if COMPILER else ["architectures"]))


@pytest.fixture(scope="module")
def more(tmp_path_factory):
    """Cases of the long lane."""
    return results_of(
        tmp_path_factory.mktemp("fake_gpu"), "in_bf16", *(["taught,graph_of_branches"] if COMPILER else [])
    )


@pytest.mark.parametrize(
    ("lane", "case", "count"),
    [("found", "architectures", 17), pytest.param("more", "in_bf16", 13, marks=pytest.mark.long)],
)
def test_every_model_steps_on_the_device_alone_and_computes_what_a_cpu_does(request, lane, case, count):
    steps = request.getfixturevalue(lane)[case]
    assert len(steps) == count
    for name, (gpu, cpu) in steps.items():
        assert gpu["devices"] == ["cuda:0" if COMPILER else "meta"], name
        assert gpu["dtypes"] == cpu["dtypes"] == ["torch.float32"], (
            f"{name}: losses and gradients stay float32 under autocast"
        )
        assert gpu["without gradient"] == cpu["without gradient"], name
        if COMPILER and "five" not in name:  # dropout draws otherwise there
            assert math.isclose(gpu["loss"], cpu["loss"], rel_tol=1e-3 if "bf16" in name else 1e-6), name


# kind of model -> its parts that do not depend on each other
PARTS = {
    "mbcnet": 3, "mbcnet, five branches": 5, "dcnv2": 2, "finalmlp": 2, "deepfm": 2, "wide_deep": 2, "mmoe": 5, "dnn": 0,
}  # fmt: skip


@NEEDS_COMPILER
def test_independent_parts_of_an_evaluation_s_graph_are_on_streams_that_wait_for_each_other(found):
    """Each part has a stream, its output's memory is kept for the caller's, nothing is read early, and no number changes."""
    streams = found["streams"]
    assert streams.pop("no wait") == 2
    assert streams.keys() == PARTS.keys()
    for name, parts in PARTS.items():
        seen = streams[name]
        assert seen == {"equal": True, "streams": [1, 1 + parts], "kept": parts, "races": 0}, name


@NEEDS_COMPILER
@pytest.mark.parametrize(
    ("lane", "case"),
    [("found", "graph_of_one_network"), pytest.param("more", "graph_of_branches", marks=pytest.mark.long)],
)
def test_a_graph_of_the_dense_part_takes_the_plain_steps(request, lane, case):
    """Losses, logits that are kept, parameters and buffers bit for bit; a smaller batch is in no graph; a step calls fewer operators."""
    for name, seen in request.getfixturevalue(lane)[case].items():
        assert all(seen["equal"]), name
        assert seen["replays"] == [2, 2, 1, 0], f"{name}: training forwards and backwards, evaluation forwards"
        assert seen["calls"][0] < seen["calls"][1], name
        assert seen["hooked"][0] == seen["hooked"][1] > 0, (
            f"{name}: no capture goes through parameters' own nodes of autograd"
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("autocast", [False, True])
def test_a_graph_of_the_dense_part_on_a_gpu(autocast):
    """The same, by real graphs and streams: MBCnet with batch norm, in training and evaluation."""
    layout = InputLayout(dict.fromkeys("abcd", 32), {}, {"ab": ("a", "b"), "cd": ("c", "d"), "a": ("a",)})
    config = MBCNetConfig(batch_norm=True, fusion="gated")
    torch.manual_seed(0)
    plain = BranchArch(config, layout).cuda()
    graphed = copy.deepcopy(plain)
    graphed.forward = Replayed(graphed)
    results = []
    for arch in (plain, graphed):
        optimizer, kept = torch.optim.SGD(arch.parameters(), lr=0.01), []
        for step, rows in enumerate([512, 512, 512, 100, 512, 512]):
            torch.manual_seed(step)
            full = torch.randn(rows, 128).cuda().requires_grad_()
            features = {"all": full, "ab": full[:, :64], "cd": full[:, 64:], "a": full[:, :32]}
            arch.train(step < 4)
            with torch.set_grad_enabled(step < 4), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                output = arch(features)
            kept += [*output]  # with their graph of autograd, which belongs to the default stream
            if step < 4:
                optimizer.zero_grad()
                output.fused_logits.square().mean().backward()
                optimizer.step()
                kept.append(full.grad)
        results.append([each.detach().cpu() for each in (*kept, *arch.parameters(), *arch.buffers())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2 if autocast else 1e-5, atol=1e-2 if autocast else 1e-6)


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


@pytest.mark.long
@NEEDS_COMPILER
def test_teachers_on_one_gpu_make_no_step_wait(more):
    """Their logits stay on the device, where the student's batch is not copied again."""
    steps = more["taught"]["steps"]
    assert [waits_by_file(steps[f"step {step}"]) for step in (2, 3)] == [VERDICT, VERDICT]
    assert not any(steps[f"step {step}"]["pageable"] for step in (2, 3))


@NEEDS_COMPILER
def test_the_trainer_on_one_gpu_takes_the_steps_of_a_cpu(found):
    assert found["waits"]["cuda"]["loss"] == pytest.approx(found["waits"]["cpu"]["loss"], rel=1e-5)


@NEEDS_COMPILER
def test_a_load_forgets_the_rows_and_locks_of_caches(found):
    assert found["caches"] == {"before": [[[7], [1]]] * 3, "after": [[[-1], [0]]] * 3}
