"""The ranks of tests/test_checkpoints_reshard.py: a checkpoint is saved and loaded at every world size and under every kind of plan.

    reshard_ranks.py FOLDER short|long

What is loaded is compared with the first checkpoint as the safetensors library reads it: the reader under test has no part in that.
"""

import itertools
import json
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from forked_ranks import mbcnet, report, run_ranks
from parity_worker import plan_of
from safetensors.torch import load_file
from small_data import write_small

from data.errors import InputError
from data.schema import load_schema
from mbcnet_rec.build import build, schema_with_wide
from mbcnet_rec.checkpoints.compatibility import load_checked
from mbcnet_rec.checkpoints.shards import Saved, shards_of
from mbcnet_rec.checkpoints.storage import LocalStorage
from mbcnet_rec.checkpoints.writer import Keep, Saver
from mbcnet_rec.config import load_config
from mbcnet_rec.runtime.process import joined_process
from mbcnet_rec.runtime.watchdog import Watchdog

LONG = sys.argv[2:] == ["long"]
WORLDS = (1, 2, 3, 4) if LONG else (1, 2)
FIRST, MORE = 10, (100 if LONG else 20)
ANY = ("table_wise", "row_wise", "table_row_wise", "data_parallel")
# settings of a run -> kinds of plan between which its checkpoints go
FAMILIES = {
    "adagrad": (["optim.embedding.name=adagrad"], (*ANY, "column_wise")),
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


def spoil(shards):
    for shard in shards:
        with torch.no_grad():
            shard.tensor.fill_(7)


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


def move(config, process, built, source, target=None):
    """Load a checkpoint; with a target save it there again, else return what differs from the one it comes from."""
    shards = shards_of(built.model, built.optimizer)
    spoil(shards)
    saved = Saved(source)
    notes = load_checked(saved, built, process)
    assert not notes, notes
    shards = shards_of(built.model, built.optimizer)
    if target is None:
        return shards
    saver = Saver(LocalStorage(target), process, 20.0)
    saver.save(FIRST, shards, saved.manifest.extra, Keep(last=1))
    saver.finish()
    return shards


def settings(name, *more):
    args = ["train", "--config", str(CONFIG), "--resume"]
    out = [
        f"train.out={FOLDER / name}",
        "train.eval_every=1000",
        "train.log_every=1",
        "train.keep_last=1",
        "train.epochs=9",
        # rounding grows as fast as a run learns: the rates of small_data are for runs of a few steps
        "optim.dense_lr=2e-4",
        "optim.embedding.lr=0.01",
    ]
    for setting in (*out, *more):
        args += ["--set", setting]
    return args


def first_run(name, *more):
    """A run of one process, stopped after FIRST steps; returns its checkpoint."""
    result = run_ranks(
        mbcnet(settings(name, f"train.max_steps={FIRST}", *more)), FOLDER / "logs" / name, world=1
    )
    assert result["codes"] == [0], result
    return FOLDER / name / "checkpoints" / f"step_{FIRST}"


def written_by(world):
    return FOLDER / f"by-{world}"


def save_at_each_world_size():
    source = first_run("one")

    def action(rank):
        with joined_process("cpu", 30.0) as process:
            config = load_config(CONFIG)
            built = build(config, load_schema(config.schema), process)
            move(config, process, built, source, written_by(process.world_size))

    return {
        str(world): run_ranks(action, FOLDER / f"logs/save-{world}", world=world)["codes"] for world in WORLDS
    }


def load_at_each_world_size():
    wanted = reference(FOLDER / "one/checkpoints" / f"step_{FIRST}")
    results = {}

    def action(rank):
        with joined_process("cpu", 30.0) as process:
            config = load_config(CONFIG)
            built = build(config, load_schema(config.schema), process)
            found = {}
            for world in WORLDS:
                shards = move(config, process, built, written_by(world) / f"step_{FIRST}")
                found[world] = compare(shards, wanted, process)
            if process.is_first:
                (FOLDER / f"found-{process.world_size}.json").write_text(json.dumps(found))

    for world in WORLDS:
        run = run_ranks(action, FOLDER / f"logs/load-{world}", world=world)
        assert run["codes"] == [0] * world, run
        results[str(world)] = json.loads((FOLDER / f"found-{world}.json").read_text())
    return results


def train_on_at_each_world_size():
    """MORE steps from the checkpoint that another world size wrote: world size -> losses."""
    losses = {}
    for world, other in zip(WORLDS, reversed(WORLDS), strict=True):
        name = f"on-{world}"
        shutil.copytree(FOLDER / "one", FOLDER / name)
        shutil.rmtree(FOLDER / name / "checkpoints")
        shutil.copytree(written_by(other), FOLDER / name / "checkpoints")
        args = settings(name, f"train.max_steps={FIRST + MORE}")
        run = run_ranks(mbcnet(args), FOLDER / "logs" / name, world=world, limit=120)
        assert run["codes"] == [0] * world, run
        lines = [json.loads(line) for line in (FOLDER / name / "metrics.jsonl").read_text().splitlines()]
        losses[str(world)] = [
            line["loss"] for line in lines if line["split"] == "train" and line["step"] > FIRST
        ]
    return losses


def between_kinds_of_plan():
    """Each kind of plan saves what it has loaded, and each kind loads that: family -> KIND>KIND -> what differs."""
    sources = {name: first_run(name, *values) for name, (values, _) in FAMILIES.items()}

    def action(rank):
        found = {}
        with joined_process("cpu", 30.0) as process:
            for name, (values, kinds) in FAMILIES.items():
                config, wanted = load_config(CONFIG, values), reference(sources[name])
                schema = load_schema(config.schema)
                tables = schema_with_wide(config.model, schema)
                built = {
                    kind: build(config, schema, process, plan_of(kind, tables, process)) for kind in kinds
                }
                for kind in kinds:
                    move(config, process, built[kind], sources[name], FOLDER / f"{name}-{kind}")
                for before, after in pairs_of(kinds):
                    source = FOLDER / f"{name}-{before}" / f"step_{FIRST}"
                    shards = move(config, process, built[after], source)
                    found[f"{name}: {before} > {after}"] = compare(shards, wanted, process)
        if rank == 0:
            (FOLDER / "kinds.json").write_text(json.dumps(found))

    run = run_ranks(action, FOLDER / "logs/kinds", limit=120)
    assert run["codes"] == [0, 0], run
    return json.loads((FOLDER / "kinds.json").read_text())


def refused():
    """Rowwise Adagrad's state into column shards."""
    source = FOLDER / "one/checkpoints" / f"step_{FIRST}"

    def action(rank):
        with joined_process("cpu", 30.0) as process:
            config = load_config(CONFIG)
            schema = load_schema(config.schema)
            built = build(config, schema, process, plan_of("column_wise", schema, process))
            before = [shard.tensor.clone() for shard in shards_of(built.model, built.optimizer)]
            try:
                load_checked(Saved(source), built, process, allow_partial=True)
            except InputError as error:
                print(error)
            after = [shard.tensor for shard in shards_of(built.model, built.optimizer)]
            tables = list(zip(before, after, strict=False))
            assert all(torch.equal(one, other) for one, other in tables), "nothing is loaded"

    return run_ranks(action, FOLDER / "logs/refused")


SCENARIOS = (
    save_at_each_world_size, load_at_each_world_size, train_on_at_each_world_size, between_kinds_of_plan, refused,
)  # fmt: skip

if __name__ == "__main__":
    FOLDER = Path(sys.argv[1])
    CONFIG = write_small(FOLDER, train_rows=2_400, other_rows=120)
    # heartbeats of groups that come and go within one process say nothing here
    Watchdog.suspects = lambda self: "not asked"
    torch.set_num_threads(1)
    report({each.__name__: each for each in SCENARIOS}, FOLDER / "results.json")
