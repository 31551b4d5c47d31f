"""The scenarios of tests/test_model_sequences.py: runs on a log with histories, on one, two and four ranks, under each kind of plan.

sequence_ranks.py FOLDER WORLD [PLAN...]
"""

import shutil
import sys
from pathlib import Path

import torch
from forked_ranks import report, run_ranks, training
from sequence_data import write_seen
from tiny_run import lines_of

from mbcnet_rec.checkpoints.shards import Saved
from mbcnet_rec.training.hooks import Hooks

FOLDER, WORLD, CHOSEN = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
CONFIG = write_seen(FOLDER, train_rows=2_400, other_rows=200)
STEPS = 12
PLANS = {
    "table_wise": (),
    "row_wise": ('sharding.sharding_types=["row_wise"]',),
    # column shards make rowwise Adagrad another optimizer
    "column_wise": (
        'sharding.tables.item.sharding_types=["column_wise"]', f"sharding.tables.item.min_partition={16 // WORLD}",
        "optim.embedding.name=adagrad",
    ),
    "wide": ("model.kind=wide_deep", "model.wide_deep.hidden=[16,8]", 'sharding.sharding_types=["row_wise","table_wise"]'),
    "per_branch": ("model.kind=mbcnet", "model.mbcnet.embeddings=per_branch"),
}  # fmt: skip


def train(name, *settings, world=1, resume=False):
    every = (
        f"train.out={FOLDER / name}", f"train.max_steps={STEPS}", "train.eval_every=6", "train.checkpoint_every=6", "train.keep_last=9",
        "train.timeout_seconds=60", *settings,
    )  # fmt: skip
    result = run_ranks(
        training(CONFIG, list(every), lambda rank: Hooks(), resume=resume), FOLDER / "logs" / name, world=world
    )
    assert set(result["codes"]) == {0}, result["words"]
    return [line["loss"] for line in lines_of(FOLDER / name, "train")]


def tensors(name, step=STEPS):
    saved = Saved(FOLDER / name / "checkpoints" / f"step_{step}")
    return {tensor: saved.whole(tensor) for tensor in saved.shapes}


def largest(left, right):
    """The largest difference of a tensor of the model or of a table's state, and how many such tensors there are."""
    left, right = tensors(left), tensors(right)
    assert left.keys() == right.keys()
    own = [name for name in left if name.startswith("model/") or "embedding" in name]
    return {
        "largest": max(float((left[name].double() - right[name].double()).abs().max()) for name in own),
        "sequences": sum("ec_" in name for name in own),
        "different": [name for name in left if not torch.equal(left[name], right[name])],
    }


def equal(kind):
    alone = [each for each in PLANS[kind] if not each.startswith("sharding")]
    losses = [train(f"{kind}-1", *alone), train(f"{kind}-{WORLD}", *PLANS[kind], world=WORLD)]
    return largest(f"{kind}-1", f"{kind}-{WORLD}") | {"losses": losses}


def again(world):
    """Lose the last checkpoint of a run, and continue from the one before on `world` ranks."""
    name = f"again-{world}"
    shutil.copytree(FOLDER / f"row_wise-{WORLD}", FOLDER / name)
    (FOLDER / name / "DONE").unlink()
    shutil.rmtree(FOLDER / name / "checkpoints" / f"step_{STEPS}")
    train(name, *PLANS["row_wise"], world=world, resume=True)
    return largest(f"row_wise-{WORLD}", name)


if __name__ == "__main__":
    scenarios = {kind: lambda kind=kind: equal(kind) for kind in CHOSEN or PLANS}
    scenarios |= {"resumed": lambda: again(WORLD), "resharded": lambda: again(1)}
    report(scenarios, FOLDER / "results.json")
