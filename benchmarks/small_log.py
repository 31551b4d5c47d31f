"""A log with a field of every kind and encoding and a small MBCnet on it, and a hook into each step: what the benchmarks of whole runs share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mbcnet_rec.training.hooks import Hooks

SCHEMA = """
name = "kinds"
label = "click"
group_column = "user"

[tables]
thing = { num_embeddings = 60, embedding_dim = 16 }

[fields]
user    = { kind = "categorical", num_embeddings = 120, embedding_dim = 16 }
item    = { kind = "categorical", table = "thing", pooling = "mean" }
history = { kind = "multi_valued", table = "thing", pooling = "mean" }
tags    = { kind = "multi_valued", num_embeddings = 40, embedding_dim = 16 }
likes   = { kind = "weighted_multi_valued", weights = "like_weights", num_embeddings = 30, embedding_dim = 16 }
query   = { kind = "categorical", encoding = "hash", num_embeddings = 50, embedding_dim = 16 }
city    = { kind = "categorical", encoding = "vocabulary", vocabulary = "cities.parquet", num_embeddings = 12, embedding_dim = 16 }
session = { kind = "categorical", encoding = "zch", num_embeddings = 160, embedding_dim = 16 }
price   = { kind = "numeric", transform = "log1p" }
age     = { kind = "numeric", transform = "standardise", mean = 40.0, std = 12.5 }
hour    = { kind = "numeric", transform = "bucketise", boundaries = [6.0, 12.0, 18.0], num_embeddings = 5, embedding_dim = 16 }
image   = { kind = "vector", width = 4 }
sound   = { kind = "vector", width = 6, projection = 4 }

[groups]
taste = ["user", "item", "history", "query"]
content = ["item", "tags", "image", "price", "city"]
moment = ["user", "hour", "likes", "session"]
"""
CONFIG = """
name = "kinds"
schema = "{folder}/schema.toml"
[data]
train = ["{folder}/train.parquet"]
valid = ["{folder}/valid.parquet"]
test = ["{folder}/test.parquet"]
batch_size = 96
lanes = 12
[model.mbcnet]
branch_dim = 16
top = [16, 8]
dropout = 0.1
[model.mbcnet.efgc]
hidden = [16, 8]
[model.mbcnet.deep]
hidden = [32, 16]
[optim]
dense_lr = 5e-3
[optim.embedding]
lr = 0.1
"""
# Runs that are killed or stopped: many epochs, faults seen soon
LONG_RUN = (
    "train.device=cpu", "train.epochs=1000", "train.timeout_seconds=20.0", "train.stall_seconds=10.0",
    "data.window_rows=512",
)  # fmt: skip


def write_log(folder: Path) -> Path:
    """Write the log, with nulls and empty lists, from a fixed seed, its schema and a config; return the config."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"value": [f"city {number}" for number in range(10)]}), folder / "cities.parquet")
    for seed, (split, rows) in enumerate((("train", 3_000), ("valid", 500), ("test", 500))):
        table = pa.table(columns(np.random.default_rng(seed), rows))
        pq.write_table(table, folder / f"{split}.parquet", row_group_size=700, write_page_checksum=True)
    (folder / "schema.toml").write_text(SCHEMA)
    config = folder / "run.toml"
    config.write_text(CONFIG.format(folder=folder))
    return config


def columns(rng: np.random.Generator, rows: int) -> dict[str, Any]:
    """Columns of one split; clicks depend on users and items."""

    def lists(size: int, longest: int) -> list[list[int]]:
        return [rng.integers(0, size, rng.integers(0, longest + 1)).tolist() for _ in range(rows)]

    user, item, likes = rng.integers(0, 120, rows), rng.integers(0, 60, rows), lists(30, 2)
    logit = np.sin(user) + np.cos(item) + 0.7 * np.sin(user * 7.0) * np.cos(item * 3.0)
    cities = [f"city {number}" for number in rng.integers(0, 12, rows)]
    return {
        "user": user,
        "item": pa.array(item, mask=rng.random(rows) < 0.03),
        "history": lists(60, 4),
        "tags": lists(40, 3),
        "likes": likes,
        "like_weights": [rng.random(len(each)).tolist() for each in likes],
        "query": [f"query {number}" for number in rng.integers(0, 400, rows)],
        "city": pa.array(cities, mask=rng.random(rows) < 0.1),
        "session": rng.integers(0, 2**50, rows) % 500,
        "price": pa.array(rng.gamma(2.0, 10.0, rows), mask=rng.random(rows) < 0.03),
        "age": rng.normal(40, 12, rows),
        "hour": rng.integers(0, 24, rows),
        "image": rng.normal(size=(rows, 4)).astype(np.float32).tolist(),
        "sound": rng.normal(size=(rows, 6)).astype(np.float32).tolist(),
        "click": (rng.random(rows) < 1 / (1 + np.exp(-logit))).astype(np.int8),
    }


def at_each_step(note: Callable[[int], None]) -> Hooks:
    """Hooks that call note(step) before every training step of a run."""

    def reached(place: str) -> None:
        if place.startswith("step "):
            note(int(place[5:]))

    return Hooks(on_place=reached)
