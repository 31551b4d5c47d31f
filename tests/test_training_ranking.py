"""Proves that a run stops, and keeps its best checkpoint, by a metric of the ranking inside groups."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_run import train

from data.errors import InputError
from mbcnet_rec.scoring.tasks import Judge

SCHEMA = """
name = "noise"
label = "y"
group_column = "user"
[fields]
user = { kind = "categorical", num_embeddings = 60, embedding_dim = 4 }
item = { kind = "categorical", num_embeddings = 90, embedding_dim = 4 }
"""
CONFIG = """
name = "noise"
schema = "FOLDER/schema.toml"
data = { train = ["FOLDER/log.parquet"], valid = ["FOLDER/log.parquet"], batch_size = 64, lanes = 2 }
model = { kind = "dnn", dnn = { hidden = [8] } }
optim = { dense_lr = 0.05, embedding = { lr = 0.5 } }
[train]
device = "cpu"
out = "FOLDER/run"
epochs = 6
eval_every = 3
patience = 3
ranking_k = [10]
early_stop = "ndcg@10"
"""


def test_early_stop_and_the_best_checkpoint_go_by_ndcg(tmp_path):
    """Labels are noise, and so AUC and NDCG do not rise together."""
    rng = np.random.default_rng(3)
    log = {"y": (rng.random(800) < 0.2).astype(int), "user": rng.integers(0, 60, 800), "item": rng.integers(0, 90, 800)}
    pq.write_table(pa.table(log), tmp_path / "log.parquet", row_group_size=200)
    (tmp_path / "schema.toml").write_text(SCHEMA)
    (tmp_path / "run.toml").write_text(CONFIG.replace("FOLDER", str(tmp_path)))
    assert train(tmp_path / "run.toml") == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    valid = {line["step"]: line for line in lines if line["split"] == "valid"}
    steps, found = list(valid), [line["ndcg@10"] for line in valid.values()]
    best = steps[int(np.argmax(found))]
    assert json.loads((tmp_path / "run/checkpoints/best.json").read_text())["step"] == best
    assert best != max(valid, key=lambda step: valid[step]["auc"])
    assert steps[-1] == best + 9 or steps[-1] == 78
    assert all(0 < each[name] <= 1 for each in valid.values() for name in ("mrr", "recall@10", "hit_rate@10"))


def test_a_place_that_is_not_measured_is_refused():
    assert Judge("ndcg@10", (), (), ranking_k=(5, 10)).value({"ndcg@10": 0.4}) == 0.4
    for ks in ((5,), None):
        with pytest.raises(InputError, match=r"train\.early_stop = 'ndcg@10': wanted one of auc, log_loss"):
            Judge("ndcg@10", (), (), ranking_k=ks)
