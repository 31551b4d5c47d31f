"""The proof on the stubbed GPU (tests/gpu, run by hand) leaves out nothing that a config may say without giving the reason."""

import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from small_data import write_small

from mbcnet_rec.config import load_config
from mbcnet_rec.plugins import model_class
from mbcnet_rec.training.config import EmbeddingOptimConfig, TrainConfig
from sharding.plan.constraints import KernelName, ShardingConfig, ShardingTypeName

sys.path.append(str(Path(__file__).with_name("gpu")))
from cases import GPU_ONLY, LEFT_OUT, SMALL, all_cases

FOLDER = Path(__file__).with_name("gpu")
CASES = all_cases()


def values_of(config, key):
    return get_args(get_type_hints(config)[key])


# what a config may say, by the part of a setting before the value
SAID = {
    # esmm takes two labels, which no case has
    "model.kind=": tuple(kind for kind in model_class().kinds if kind != "esmm"),
    "optim.embedding.name=": values_of(EmbeddingOptimConfig, "name"),
    "train.autocast=": values_of(TrainConfig, "autocast"),
    "sharding.data_type=": values_of(ShardingConfig, "data_type"),
    "sharding.forward_precision=": values_of(ShardingConfig, "forward_precision"),
    "sharding.backward_precision=": values_of(ShardingConfig, "backward_precision"),
    'sharding_types=["': get_args(ShardingTypeName),
    'compute_kernels=["': get_args(KernelName),
    "sharding.prefetch=": ("true",),
    "sharding.replicas=": ("2",),
    "train.cuda_graph=": ("true",),
}
DEFAULTS = {"train.autocast=none", "sharding.data_type=fp32"}
ON_TWO_ONLY = ("sharding.forward_precision=", "sharding.backward_precision=", "sharding.replicas=")


@pytest.mark.parametrize("key", SAID)
def test_every_choice_of_a_config_is_trained_on_one_and_two_ranks(key):
    for value in SAID[key]:
        ranks = {each.ranks for each in CASES if any(f"{key}{value}" in setting for setting in each.settings)}
        assert ranks == ({2} if key in ON_TWO_ONLY else {1, 2}) or f"{key}{value}" in DEFAULTS, f"{key}{value}: {ranks}"


def test_every_command_has_its_case():
    for step in ("resume", "evaluate", "predict", "export", "profile"):
        assert {each.ranks for each in CASES if step in each.then} == {1, 2}, step
    assert {each.ranks for each in CASES if each.data == "unbounded"} == {1, 2}
    names = [each.name for each in CASES]
    assert len({*names}) == len(names)


def test_every_case_is_a_config(tmp_path):
    config = write_small(tmp_path, 20, 20)
    for case in CASES:
        device = load_config(config, [*SMALL, "train.device=cuda", *case.settings]).train.device
        assert device == "cuda", case.name


def test_what_a_cpu_lacks_is_left_out_of_its_run_and_what_is_left_out_has_a_reason():
    cached = next(each for each in CASES if each.name == "prefetch, 2 ranks")
    assert len(cached.settings) == 3 and cached.on_cpu == ("model.kind=dnn",)
    assert all(any(setting.startswith(key) for each in CASES for setting in each.settings) for key in GPU_ONLY)
    assert len(LEFT_OUT) > 3 and all(len(reason) > 10 for reason in LEFT_OUT.values())


def test_the_script_says_what_it_is_and_what_is_wrong():
    def run(*args):
        return subprocess.run([sys.executable, str(FOLDER / "prove.py"), *args], capture_output=True, text=True)

    assert "--python" in run("--help").stdout
    wrong = run("--python", sys.executable, "--only", "no such case")
    assert wrong.returncode == 2 and "no case has 'no such case' in its name" in wrong.stderr
