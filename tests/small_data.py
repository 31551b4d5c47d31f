"""A small data set that has every kind of field, for tests that train."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA = """
name = "small"
label = "click"
group_column = "user"

[tables]
thing = { num_embeddings = 60, embedding_dim = 16 }

[fields]
user    = { kind = "categorical", num_embeddings = 120, embedding_dim = 16 }
item    = { kind = "categorical", table = "thing", pooling = "mean" }
history = { kind = "multi_valued", table = "thing", pooling = "mean" }
tags    = { kind = "multi_valued", num_embeddings = 40, embedding_dim = 16, pooling = "sum" }
likes   = { kind = "weighted_multi_valued", weights = "like_weights", num_embeddings = 30, embedding_dim = 16 }
price   = { kind = "numeric", transform = "log1p" }
hour    = { kind = "numeric", transform = "bucketise", boundaries = [2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0, 16.0, 18.0, 20.0, 22.0], num_embeddings = 13, embedding_dim = 16 }
image   = { kind = "vector", width = 4 }

[groups]
taste = ["user", "item", "history"]
content = ["item", "tags", "image", "price"]
moment = ["user", "hour", "likes"]
"""

CONFIG = """
name = "small"
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

[model.mbcnet.efgc]
hidden = [16, 8]

[model.mbcnet.deep]
hidden = [32, 16]

[model.dnn]
hidden = [32, 16, 8]

[optim]
dense_lr = 5e-3

[optim.embedding]
lr = 0.1

[train]
out = "{folder}/run"
device = "cpu"
log_every = 5
eval_every = 20
"""


def lists(rng, rows, size, longest):
    lengths = rng.integers(0, longest + 1, rows)
    return [rng.integers(0, size, n).tolist() for n in lengths]


def small_table(rows: int, seed: int) -> pa.Table:
    """Rows whose clicks depend on user x item, tags and price, with nulls and empty lists among them."""
    rng = np.random.default_rng(seed)
    world = np.random.default_rng(0)
    taste, kind = world.normal(size=(120, 3)), world.normal(size=(60, 3))
    user, item = rng.integers(0, 120, rows), rng.integers(0, 60, rows)
    price = rng.gamma(2.0, 10.0, rows)
    tags = lists(rng, rows, 40, 3)
    likes = lists(rng, rows, 30, 2)
    logit = (taste[user] * kind[item]).sum(1) + 2.0 * taste[user, 0] + 2.0 * (np.log1p(price) - 2.8)
    logit += np.array([len(each) for each in tags]) - 2.0
    click = (rng.random(rows) < 1 / (1 + np.exp(-logit))).astype(np.int8)
    return pa.table(
        {
            "user": user,
            "item": pa.array(item, mask=rng.random(rows) < 0.03),
            "history": lists(rng, rows, 60, 4),
            "tags": tags,
            "likes": likes,
            "like_weights": [rng.random(len(each)).tolist() for each in likes],
            "price": pa.array(price, mask=rng.random(rows) < 0.03),
            "hour": rng.integers(0, 24, rows),
            "image": [row.tolist() for row in rng.normal(size=(rows, 4)).astype(np.float32)],
            "click": click,
        }
    )


def write_small(folder: Path, train_rows: int = 4_850, other_rows: int = 500) -> Path:
    """Write data, schema and config; return the config's path."""
    folder.mkdir(parents=True, exist_ok=True)
    rows_of = {"train": train_rows, "valid": other_rows, "test": other_rows}
    for number, (split, rows) in enumerate(rows_of.items()):
        table = small_table(rows, number + 1)
        pq.write_table(table, folder / f"{split}.parquet", row_group_size=700, write_page_checksum=True)
    (folder / "schema.toml").write_text(SCHEMA)
    config = folder / "run.toml"
    config.write_text(CONFIG.format(folder=folder))
    return config
