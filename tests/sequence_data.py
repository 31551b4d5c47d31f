"""A log with a user's history for tests: whether the candidate's kind stands in the history decides the label, and nothing else does."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ITEMS, KINDS, LONGEST = 240, 12, 12
SCHEMA = """
name = "seen"
label = "click"
group_column = "user"

[tables]
item = {{ num_embeddings = 241, embedding_dim = 16 }}
kind = {{ num_embeddings = 13, embedding_dim = 8 }}

[fields]
user  = {{ kind = "categorical", num_embeddings = 50, embedding_dim = 8 }}
item  = {{ kind = "categorical", table = "item" }}
kind  = {{ kind = "categorical", table = "kind" }}
price = {{ kind = "numeric" }}
tags  = {{ kind = "multi_valued", num_embeddings = 20, embedding_dim = 8 }}
kinds = {{ kind = "sequence", beside = "seen", table = "kind"{target_kind} }}
seen  = {{ kind = "sequence", table = "item", max_length = 8, pooling = "{pooling}"{target} }}
ages  = {{ kind = "sequence", beside = "seen", encoding = "gap", num_embeddings = 12, embedding_dim = 4 }}

[groups]
taste = ["user", "seen", "item"]
content = ["kind", "kinds", "ages", "tags", "price"]
"""
RUN = """
name = "seen"
schema = "{folder}/schema.toml"
[data]
train = ["{folder}/train.parquet"]
valid = ["{folder}/valid.parquet"]
test = ["{folder}/test.parquet"]
batch_size = 96
lanes = 12
[model]
kind = "dnn"
[model.dnn]
hidden = [32, 16]
[model.mbcnet]
branch_dim = 16
top = [16, 8]
[model.mbcnet.efgc]
hidden = [16, 8]
[model.mbcnet.deep]
hidden = [32, 16]
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


def schema_text(pooling: str = "target_attention") -> str:
    """The schema with one pooling; a mean or a sum has no target."""
    named = pooling in ("target_attention", "transformer")
    return SCHEMA.format(
        pooling=pooling, target=', target = "item"' if named else "", target_kind=', target = "kind"' if named else ""
    )


def seen_table(rows: int, seed: int) -> pa.Table:
    """Rows whose clicks depend on how much of the newest history is of the candidate's kind."""
    rng = np.random.default_rng(seed)
    kind_of = np.random.default_rng(0).integers(0, KINDS, ITEMS)
    lengths = rng.integers(0, LONGEST + 1, rows)
    item = rng.integers(0, ITEMS, rows)
    seen = [rng.integers(0, ITEMS, length) for length in lengths]
    match = np.array([(kind_of[each[-8:]] == kind_of[one]).sum() for each, one in zip(seen, item, strict=True)])
    click = rng.random(rows) < np.where(match > 0, 0.85, 0.15)
    ages = [np.sort(rng.gamma(2.0, 50.0, length))[::-1] for length in lengths]
    return pa.table(
        {
            "user": rng.integers(0, 50, rows),
            "item": pa.array(item, mask=rng.random(rows) < 0.02),
            "kind": kind_of[item],
            "price": rng.gamma(2.0, 1.0, rows),
            "tags": [rng.integers(0, 20, n).tolist() for n in rng.integers(0, 3, rows)],
            "seen": [each.tolist() for each in seen],
            "kinds": [kind_of[each].tolist() for each in seen],
            "ages": [each.tolist() for each in ages],
            "click": click.astype(np.int8),
        }
    )


def write_seen(folder: Path, train_rows: int = 2_880, other_rows: int = 480, pooling: str = "target_attention") -> Path:
    """Write rows, schema and config; return the config's path."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (split, rows) in enumerate({"train": train_rows, "valid": other_rows, "test": other_rows}.items()):
        pq.write_table(seen_table(rows, number + 1), folder / f"{split}.parquet", row_group_size=700)
    (folder / "schema.toml").write_text(schema_text(pooling))
    config = folder / "run.toml"
    config.write_text(RUN.format(folder=folder))
    return config
