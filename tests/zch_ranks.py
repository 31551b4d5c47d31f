"""The scenarios of tests/test_bridge_zch.py: runs on a log with unbounded ids, on one and two ranks."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from forked_ranks import mbcnet, report, run_ranks
from small_data import CONFIG
from tiny_run import lines_of

from mbcnet_rec.checkpoints.shards import Saved
from mbcnet_rec.serving import loader as serving

FOLDER = Path(sys.argv[1])
STEPS = 24
SCHEMA = """
name = "unbounded"
label = "click"

[tables]
thing = { num_embeddings = 64, embedding_dim = 8 }

[fields]
user    = { kind = "categorical", encoding = "zch", num_embeddings = 200, embedding_dim = 8 }
item    = { kind = "categorical", encoding = "zch", table = "thing", pooling = "mean", eviction = "lru", eviction_interval = 3 }
history = { kind = "multi_valued", encoding = "zch", table = "thing", pooling = "mean", eviction = "lru", eviction_interval = 3 }
likes   = { kind = "weighted_multi_valued", encoding = "zch", weights = "like_weights", num_embeddings = 48, embedding_dim = 8, eviction = "lfu" }
city    = { kind = "categorical", num_embeddings = 10, embedding_dim = 8 }
age     = { kind = "numeric" }
"""
SETTINGS = [
    "model.kind=dnn", "model.dnn.hidden=[16,8]", "train.eval_every=12", "train.checkpoint_every=7", "train.keep_last=9",
    "train.timeout_seconds=60",
]  # fmt: skip


def rows(count, seed):
    """Users are any 64-bit integers, more than there are rows of the table; items are strings."""
    rng, world = np.random.default_rng(seed), np.random.default_rng(0)
    users = world.integers(-(2**63), 2**63 - 1, 400, dtype=np.int64)
    items = np.asarray([f"item {number:x}" for number in world.integers(0, 2**40, 90)])
    taste, quality = world.normal(size=400), world.normal(size=90)
    user, item = rng.integers(0, 400, count), rng.integers(0, 90, count)
    likes = rng.integers(0, 3, count)
    click = rng.random(count) < 1 / (1 + np.exp(-taste[user] - quality[item]))
    return pa.table(
        {
            "user": pa.array(users[user], mask=rng.random(count) < 0.05),
            "item": items[item],
            "history": [items[rng.integers(0, 90, length)].tolist() for length in rng.integers(0, 4, count)],
            "likes": [rng.integers(0, 60, length).tolist() for length in likes],
            "like_weights": [rng.random(length).tolist() for length in likes],
            "city": rng.integers(0, 10, count),
            "age": rng.normal(size=count),
            "click": click.astype(np.int8),
        }
    )


def write_run():
    for split, count, seed in (("train", 96 * STEPS, 1), ("valid", 300, 2), ("test", 500, 3)):
        path = FOLDER / f"{split}.parquet"
        pq.write_table(rows(count, seed), path, row_group_size=200, write_page_checksum=True)
    (FOLDER / "schema.toml").write_text(SCHEMA)
    (FOLDER / "cut.toml").write_text(SCHEMA.replace("= 200,", "= 200, zch_buckets = 4,"))
    for schema in ("schema", "cut"):
        config = CONFIG.format(folder=FOLDER).replace("schema.toml", f"{schema}.toml")
        (FOLDER / f"{schema}_run.toml").write_text(config)


def train(name, *settings, world=2, resume=False, schema="schema"):
    args = ["train", "--config", str(FOLDER / f"{schema}_run.toml"), *(["--resume"] if resume else [])]
    every = (f"train.out={FOLDER / name}", *SETTINGS, *settings)
    for setting in {each.partition("=")[0]: each for each in every}.values():  # the last of each
        args += ["--set", setting]
    return run_ranks(mbcnet(args), FOLDER / "logs" / name, world=world)


def tensors(name, step=STEPS):
    """Logical tensor -> its values, of a checkpoint."""
    saved = Saved(FOLDER / name / "checkpoints" / f"step_{step}")
    return {tensor: saved.whole(tensor) for tensor in saved.shapes}


def compared(left, right):
    """Names that differ in a bit, those among them that tell of ids, and the largest difference of weights."""
    assert left.keys() == right.keys()
    different = sorted(name for name in left if not torch.equal(left[name], right[name]))
    weights = [name for name in left if name.startswith("model/")]
    return {
        "different": different,
        "ids": [name for name in different if "_collision_modules" in name or name.startswith("zch/")],
        "largest": max(float((left[name].double() - right[name].double()).abs().max()) for name in weights),
    }


def one_and_two():
    done = [train("one", world=1), train("two")]
    tested = [lines_of(FOLDER / name, "test") for name in ("one", "two")]
    logged = lines_of(FOLDER / "one", "train")
    return compared(tensors("one"), tensors("two")) | {"done": done, "logged": logged, "tested": tested}


def again(name, **options):
    shutil.copytree(FOLDER / "two", FOLDER / name)
    (FOLDER / name / "DONE").unlink()
    for step in (12, 14, 21, STEPS):  # what is left is step 7, between two admissions
        shutil.rmtree(FOLDER / name / "checkpoints" / f"step_{step}")
    done = train(name, resume=True, **options)
    return {"done": done} | compared(tensors("two"), tensors(name))


def served():
    """The artifact and `mbcnet predict` score rows, half of whose users nobody has trained."""
    fresh = rows(200, 4).to_pydict()
    fresh["user"] = [user if number % 2 else number + 5 for number, user in enumerate(fresh["user"])]
    pq.write_table(pa.table(fresh), FOLDER / "fresh.parquet")
    out = str(FOLDER / "scores")
    done = [
        run_ranks(mbcnet(args), FOLDER / "logs" / args[0], world=1)
        for args in (
            ["export", str(FOLDER / "two"), "--out", str(FOLDER / "artifact"), "--rows", "fp32", "--no-aot"],
            ["predict", str(FOLDER / "two"), "--data", str(FOLDER / "fresh.parquet"), "--out", out],
        )
    ]
    predicted = pq.read_table(out).to_pydict()
    column = next(name for name in predicted if name.startswith("p"))
    model = serving.load(FOLDER / "artifact")
    from_file = np.concatenate(list(model.predict_parquet(FOLDER / "fresh.parquet")))
    scores = {"from_file": from_file.tolist(), "from_lists": model.predict(fresh).tolist()}
    return scores | {"done": done, "predicted": predicted[column]}


def refused():
    warm = f"train.warm_start={FOLDER / 'two'}"
    return {
        "wide": train("wide", "model.kind=wide_deep", world=1),
        "adam": train("adam", "optim.embedding.name=adam", world=1),
        "warm": train("warm", warm, world=1, schema="cut"),
        "written": [name for name in ("wide", "adam") if (FOLDER / name).exists()],
    }


def warm():
    """A warm start takes ids and rows along."""
    done = train("warmed", f"train.warm_start={FOLDER / 'two'}", "train.max_steps=1", "train.eval_every=0", world=1)
    before, after = tensors("two"), tensors("warmed", step=1)
    names = [name for name in before if name.endswith(("thing.raw_ids", "thing.slots"))]
    return {"done": done, "same": [bool(torch.equal(before[name], after[name])) for name in names]}


if __name__ == "__main__":
    write_run()
    report(
        {
            "one_and_two": one_and_two,
            "again_on_two": lambda: again("again"),
            "again_on_one": lambda: again("alone", world=1),
            "served": served,
            "refused": refused,
            "warm": warm,
        },
        FOLDER / "results.json",
    )
