"""The ranks of tests/test_checkpoints_reshard.py: a checkpoint is saved and loaded at every world size and under every kind of plan.

    reshard_ranks.py FOLDER short|long

What is loaded is compared with the first checkpoint as the safetensors library reads it: the reader under test has no part in that.
"""

import itertools
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from forked_ranks import report, run_ranks, training
from parity_worker import plan_of
from safetensors.torch import load_file
from small_data import write_small

from data.errors import InputError
from data.schema import load_schema
from mbcnet_rec.build import build, schema_with_wide
from mbcnet_rec.checkpoints.compatibility import load_checked
from mbcnet_rec.checkpoints.shards import Saved, shards_of
from mbcnet_rec.checkpoints.storage import CheckpointStorage
from mbcnet_rec.checkpoints.writer import Keep, Saver
from mbcnet_rec.config import load_config
from mbcnet_rec.runtime.process import joined_process
from mbcnet_rec.training.hooks import Hooks
from sharding.bridge.blocks import table_rows

LONG = sys.argv[2:] == ["long"]
WORLDS = (1, 2, 3, 4) if LONG else (1, 2)
FIRST, MORE = 10, (100 if LONG else 20)
ANY = ("table_wise", "row_wise", "table_row_wise", "data_parallel")
# settings of a run -> kinds of plan between which its checkpoints go
FAMILIES = {
    "adagrad": (["optim.embedding.name=adagrad", "model.mbcnet.embeddings=per_branch"], (*ANY, "column_wise")),
    "batch_norm": (["model.kind=dnn", "model.dnn.batch_norm=true"], ANY[:2]),
}
if LONG:
    FAMILIES |= {
        "rowwise_adagrad": (["optim.embedding.name=rowwise_adagrad"], ANY),
        "sgd": (["optim.embedding.name=sgd"], (*ANY, "column_wise")),
        "wide": (["optim.embedding.name=adagrad", "model.kind=wide_deep"], ANY),
    }


def pairs_of(kinds):
    """Every kind to every kind; in the short lane each kind to the next, so that each writes once and reads once."""
    return itertools.product(kinds, kinds) if LONG else zip(kinds, (*kinds[1:], kinds[0]), strict=True)


def reference(folder):
    """Logical tensor -> its values, of a checkpoint that one process wrote whole."""
    body = json.loads((folder / "manifest.json").read_text())["body"]
    (file,) = body["files"]
    tensors = load_file(folder / file["file"])
    return {name.split("@")[0]: tensors[str(index)] for index, (name, _, _) in enumerate(file["pieces"])}


def compare(shards, wanted, process):
    """Names of tensors that differ in a bit, or that the ranks do not cover together."""
    wrong, sizes = [], {}
    for shard in shards:
        values = wanted[shard.name]
        own = values[tuple(slice(o, o + n) for o, n in zip(shard.offsets, shard.tensor.shape, strict=True))]
        if shard.tensor.detach().contiguous().numpy().tobytes() != own.contiguous().numpy().tobytes():
            wrong.append(shard.name)
        # what every rank holds whole counts once
        share = shard.tensor.numel() / (process.world_size if shard.replicated or shard.per_rank else 1)
        sizes[shard.name] = sizes.get(shard.name, 0) + share
    everyone = [None] * process.world_size
    dist.all_gather_object(everyone, (wrong, sizes))
    found = {name for names, _ in everyone for name in names}
    for name, values in wanted.items():
        if abs(sum(each.get(name, 0) for _, each in everyone) - values.numel()) > 1e-6:
            found.add(f"{name} is not covered")
    return sorted(found)


def on_ranks(name, action, world=2):
    """What action(process) returns on rank 0, when it has ended well on every rank."""

    def run(rank):
        with joined_process("cpu", 30.0) as process:
            result = action(process)
            print(json.dumps(result))

    done = run_ranks(run, FOLDER / "logs" / name, world=world, limit=400)
    assert done["codes"] == [0] * world, done
    return json.loads(done["words"][0].splitlines()[-1])


def built_for(process, values=(), kind=""):
    config = load_config(CONFIG, values)
    schema = load_schema(config.schema)
    plan = plan_of(kind, schema_with_wide(config.model, schema), process) if kind else None
    return build(config, schema, process, plan)


def move(built, process, source, target=None):
    """Load a checkpoint over other values, and with a target save it there again; return the shards."""
    for shard in shards_of(built.model, built.optimizer):
        with torch.no_grad():
            shard.tensor.fill_(7)
    saved = Saved(source)
    notes = load_checked(saved, built, process)
    assert not notes, notes
    shards = shards_of(built.model, built.optimizer)
    if target is not None:
        saver = Saver(CheckpointStorage(target), process, 20.0, folder=source.parents[1])
        saver.save(FIRST, shards, saved.manifest.extra, Keep(last=1))
        saver.finish()
    return shards


def run_on(name, world, steps, *more):
    """Train a run up to a step, from its last checkpoint if it has one."""
    settings = [
        f"train.out={FOLDER / name}",
        f"train.max_steps={steps}",
        "train.eval_every=1000",
        "train.log_every=1",
        "train.keep_last=1",
        "train.epochs=9",
        # rounding grows as fast as a run learns: the rates of small_data are for runs of a few steps
        "optim.dense_lr=2e-4",
        "optim.embedding.lr=0.01",
        *more,
    ]
    action = training(CONFIG, settings, lambda rank: Hooks(), resume=True)
    done = run_ranks(action, FOLDER / "logs" / name, world=world, limit=400)
    assert done["codes"] == [0] * world, done
    return FOLDER / name


def first_run(name, *more):
    """The checkpoint of a run of one process, stopped after FIRST steps."""
    return run_on(name, 1, FIRST, *more) / "checkpoints" / f"step_{FIRST}"


def written_by(world):
    return FOLDER / f"by-{world}"


def every_world_size_reads_every_other():
    """World size that reads -> world size that wrote -> what differs."""
    source = first_run("one")
    wanted = reference(source)

    def save(process):
        move(built_for(process), process, source, written_by(process.world_size))

    def load(process):
        built = built_for(process)
        return {
            world: compare(move(built, process, written_by(world) / f"step_{FIRST}"), wanted, process)
            for world in WORLDS
        }

    for world in WORLDS:
        on_ranks(f"save-{world}", save, world)
    return {world: on_ranks(f"load-{world}", load, world) for world in WORLDS}


def train_on_at_each_world_size():
    """MORE steps from the checkpoint that another world size wrote: world size -> losses."""
    losses = {}
    for world, other in zip(WORLDS, reversed(WORLDS), strict=True):
        folder = FOLDER / f"on-{world}"
        shutil.copytree(FOLDER / "one", folder, ignore=shutil.ignore_patterns("checkpoints"))
        shutil.copytree(written_by(other), folder / "checkpoints")
        run_on(folder.name, world, FIRST + MORE)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses[world] = [line["loss"] for line in lines if line["split"] == "train" and line["step"] > FIRST]
    return losses


def between_kinds_of_plan():
    """Each kind of plan saves what it has loaded, and each kind loads that: FAMILY: KIND > KIND -> what differs."""
    sources = {name: first_run(name, *values) for name, (values, _) in FAMILIES.items()}

    def action(process):
        found = {}
        for name, (values, kinds) in FAMILIES.items():
            wanted = reference(sources[name])
            built = {kind: built_for(process, values, kind) for kind in kinds}
            for kind in kinds:
                move(built[kind], process, sources[name], FOLDER / f"{name}-{kind}")
            for before, after in pairs_of(kinds):
                shards = move(built[after], process, FOLDER / f"{name}-{before}" / f"step_{FIRST}")
                found[f"{name}: {before} > {after}"] = compare(shards, wanted, process)
        return found

    return on_ranks("kinds", action)


def into_tables_that_have_grown():
    """World size and kind of plan -> what differs of the checkpoint's rows, and of initial rows and state where rows are new or begin anew."""
    name, (values, kinds) = "adagrad", FAMILIES["adagrad"]
    source, grown, anew = FOLDER / name / "checkpoints" / f"step_{FIRST}", FOLDER / "grown.toml", np.array([2, 70, 119])
    grown.write_text((FOLDER / "schema.toml").read_text().replace("num_embeddings = 120", "num_embeddings = 151"))
    wanted, config = reference(source), load_config(CONFIG, values)
    for key in [key for key in wanted if "embedding_bags.user." in key]:
        old = wanted[key]
        ((_, initial),) = table_rows(config.train.seed, "user", 0, 151, 16, config.optim.embedding.init_std)
        wanted[key] = initial.clone() if key.startswith("model/") else torch.zeros(151, *old.shape[1:])
        kept = np.setdiff1d(np.arange(len(old)), anew)
        wanted[key][kept] = old[kept]

    def action(process):
        found = {}
        for kind in kinds:
            built = built_for(process, [*values, f"schema={grown}"], kind)
            assert load_checked(Saved(source), built, process, anew={"user": anew}) == []
            found[kind] = compare(shards_of(built.model, built.optimizer), wanted, process)
        return found

    # 16 columns cannot be cut in three
    return {world: on_ranks(f"grown-{world}", action, world) for world in WORLDS if world != 3}


def rowwise_state_into_column_shards():
    """What each rank is told, though it asked for a partial load; nothing is loaded."""

    def action(process):
        built = built_for(process, kind="column_wise")
        before = [shard.tensor.clone() for shard in shards_of(built.model, built.optimizer)]
        with pytest.raises(InputError) as caught:
            load_checked(Saved(FOLDER / f"one/checkpoints/step_{FIRST}"), built, process, allow_partial=True)
        after = [shard.tensor for shard in shards_of(built.model, built.optimizer)]
        assert all(torch.equal(one, other) for one, other in zip(before, after, strict=False))
        return str(caught.value)

    return on_ranks("refused", action)


SCENARIOS = (
    every_world_size_reads_every_other, train_on_at_each_world_size, between_kinds_of_plan, into_tables_that_have_grown,
    rowwise_state_into_column_shards,
)  # fmt: skip

if __name__ == "__main__":
    FOLDER = Path(sys.argv[1])
    CONFIG = write_small(FOLDER, train_rows=2_400, other_rows=120)
    torch.set_num_threads(1)
    report({each.__name__: each for each in SCENARIOS}, FOLDER / "results.json")
