"""The scenarios of tests/test_training_planned.py: runs of several ranks under plans of every kind, and what they held and said.

With `python -O` the scenarios of replicas, since TorchRec asserts that DMPCollection is on cuda, where this machine has none.
"""

import itertools
import json
import shutil
import sys
from pathlib import Path

import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from forked_ranks import report, run_ranks, training
from small_data import write_small
from tiny_run import lines_of
from torchrec.distributed.model_parallel import DMPCollection
from torchrec.distributed.train_pipeline import PrefetchTrainPipelineSparseDist

import sharding.plan.placement
import sharding.search.candidates
from mbcnet_rec.checkpoints.manifest import read_manifest
from mbcnet_rec.cli import main
from mbcnet_rec.runtime.process import any_rank, joined_process
from mbcnet_rec.training.hooks import Hooks

FOLDER = Path(sys.argv[1])
CONFIG = write_small(FOLDER, train_rows=2_400, other_rows=120)
STEPS = 20
COMMON = [f"train.max_steps={STEPS}", "train.log_every=5", "train.eval_every=10", "train.timeout_seconds=30"]


def run(name, *settings, resume=False, plan="", hooks=lambda rank: Hooks(), **options):
    every = [f"train.out={FOLDER / name}", f"sharding.plan={plan}", *COMMON, *settings]
    return run_ranks(training(CONFIG, every, hooks, resume=resume), FOLDER / "logs" / name, **options)


def metrics(name):
    """Lines of training and validation; a run that was cut short has tested its last step too."""
    return lines_of(FOLDER / name, "train", "valid")


def again(name, *settings, **options):
    """Lose the last checkpoint of a run, continue from the one before, and compare what is said of the same steps."""
    before = metrics(name)
    shutil.rmtree(FOLDER / name / "checkpoints" / f"step_{STEPS}")
    result = run(name, *settings, resume=True, **options)
    return result | {"before": before, "after": metrics(name)}


def reviewed_plan():
    """A plan file with half rows, half precision between ranks and three types of sharding, made as a user makes it."""
    plan = FOLDER / "plan.json"
    args = ["plan", "--config", str(CONFIG), "--cluster", "1x2:cpu", "-o", str(plan)]
    types = ('tables.user.sharding_types=["row_wise"]', 'tables.likes.sharding_types=["table_row_wise"]')
    for setting in ("data_type=fp16", "forward_precision=fp16", "backward_precision=fp16", *types):
        args += ["--set", setting]
    assert main(args) == 0
    result = run("planned", plan=plan)
    result["same_file"] = (FOLDER / "planned" / "plan.json").read_text() == plan.read_text()
    return result | {"again": again("planned", plan=plan)}


def no_plan():
    """Nor enough rows for every user: those above have their ids taken modulo, and are counted over the ranks."""
    schema = (FOLDER / "schema.toml").read_text()
    short = schema.replace("num_embeddings = 120,", 'num_embeddings = 100, on_invalid = "modulo",')
    (FOLDER / "short.toml").write_text(short)
    settings = ('sharding.sharding_types=["data_parallel"]', f"schema={FOLDER / 'short.toml'}")
    result = run("unplanned", "optim.embedding.name=adam", *settings)
    users = pq.read_table(FOLDER / "train.parquet", columns=["user"])["user"].to_numpy()
    plan = json.loads((FOLDER / "unplanned" / "plan.json").read_text())
    return result | {"lines": metrics("unplanned"), "above": int((users >= 100).sum()), "plan": plan}


def without_device_checks(rank):
    sharding.plan.placement.device_problem = sharding.search.candidates.device_problem = lambda plan: ""


def prefetching():
    """The prefetching pipeline takes the same steps as the other, also over a step that is skipped; its streams are left out."""

    def prefetch_here(self, context):
        context.module_input_post_prefetch.clear()
        context.module_contexts_post_prefetch.clear()
        for module in self._pipelined_modules:
            name = module.forward._name
            context.module_input_post_prefetch[name] = context.input_dist_tensors_requests.pop(name).wait()
            context.module_contexts_post_prefetch[name] = context.module_contexts.pop(name)

    def hooks(rank):
        without_device_checks(rank)
        PrefetchTrainPipelineSparseDist._prefetch = prefetch_here
        return nan_at(5)

    settings = ("train.on_nonfinite=skip", "train.max_grad_norm=0.5")
    plain = run("plain", *settings, hooks=lambda rank: nan_at(5))
    ahead = run("ahead", *settings, "sharding.prefetch=true", hooks=hooks)
    return ahead | {"plain": plain, "equal": metrics("plain") == metrics("ahead"), "lines": metrics("ahead")}


def nan_at(step):
    steps = itertools.count(1)
    return Hooks(on_loss=lambda loss, outputs: (loss * float("nan") if next(steps) == step else loss, outputs))


def replicas_hooks(rank):
    """What DMPCollection does by NCCL, by gloo."""
    without_device_checks(rank)
    remap = DMPCollection._remap_sharding_plan

    def averaged(self, ctx, tensors_dict, annotation, opts=None):
        for tensor in (tensor for tensors in tensors_dict.values() for tensor in tensors):
            dist.all_reduce(tensor, group=ctx.replica_pg)
            tensor /= dist.get_world_size(ctx.replica_pg)

    def on_cpu(self, plan, *args, **options):
        remap(self, plan, *args, **options)
        for parameter in (parameter for module in plan.plan.values() for parameter in module.values()):
            for shard in parameter.sharding_spec.shards if parameter.sharding_spec else []:
                shard.placement = torch.distributed._remote_device(f"rank:{shard.placement._rank}/cpu")

    DMPCollection._allreduce_tensors = averaged
    DMPCollection._remap_sharding_plan = on_cpu
    return Hooks()


def replicas():
    """Two groups of two ranks, each with all tables."""
    settings = ("sharding.replicas=2", 'sharding.sharding_types=["row_wise","table_wise"]')
    options = {"world": 4, "hooks": replicas_hooks}
    result = run("replicas", *settings, **options)
    manifest = read_manifest(FOLDER / "replicas" / "checkpoints" / f"step_{STEPS}")
    blocks = [[entry.name, entry.offsets] for file in manifest.files for entry in file.shards]
    return result | {"blocks": blocks, "again": again("replicas", *settings, **options)}


def joined_twice():
    """As EnKD's student joins after its teachers, by a port that no launcher holds, while something of the first time is still in use."""

    def join(rank):
        held = []
        for _ in "ab":
            with joined_process("cpu", 30.0) as process:
                held.append(process)
                assert any_rank(rank == 1)
        return 0

    return run_ranks(join, FOLDER / "logs" / "twice")


if __name__ == "__main__":
    torch.set_num_threads(1)
    chosen = (replicas,) if sys.flags.optimize else (reviewed_plan, no_plan, prefetching, joined_twice)
    report({each.__name__: each for each in chosen}, FOLDER / "results.json")
