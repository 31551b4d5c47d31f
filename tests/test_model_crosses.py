"""Proves that Wide & Deep's wide part learns the schema's crosses, which its deep part does not read, and that the run serves as it trains."""

import json
import tomllib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_run import train

from data.schema import load_schema, parse_schema
from mbcnet_rec.checkpoints.run_schema import other_ids
from mbcnet_rec.cli import main
from mbcnet_rec.model.input_layout import ALL, WIDE
from mbcnet_rec.model.models import model_layout, schema_with_wide
from mbcnet_rec.plugins import model_config
from mbcnet_rec.serving.loader import load

VALUES = 40
FIELDS = """
name = "planted"
label = "y"
[fields]
a = { kind = "categorical", encoding = "hash", num_embeddings = 4000, embedding_dim = 4 }
b = { kind = "multi_valued", encoding = "hash", num_embeddings = 4000, embedding_dim = 4 }
n = { kind = "numeric" }
"""
CROSS = 'x = { kind = "cross", of = ["a", "b"], max_length = 4, num_embeddings = 20000, embedding_dim = 8 }\n'
CONFIG = """
schema = "FOLDER/SCHEMA.toml"
[data]
train = ["FOLDER/train.parquet"]
test = ["FOLDER/test.parquet"]
batch_size = 256
lanes = 4
[model]
kind = "wide_deep"
[model.wide_deep]
hidden = [8]
EMBEDDINGS
[optim.embedding]
lr = 0.3
[train]
device = "cpu"
epochs = 2
"""


def write_log(path, rows, seed):
    """A click is likely where one of the row's pairs (a, b) is good; a and b alone say nothing."""
    rng = np.random.default_rng(seed)
    good = np.random.default_rng(0).random((VALUES, VALUES)) < 0.5
    a, b = rng.integers(0, VALUES, rows), [rng.integers(0, VALUES, size) for size in rng.integers(1, 3, rows)]
    rate = np.asarray([0.05 + 0.85 * good[each, others].mean() for each, others in zip(a, b, strict=True)])
    columns = {
        "y": (rng.random(rows) < rate).astype(int),
        "a": [f"a{each}" for each in a],
        "b": [each.tolist() for each in b],
    }
    pq.write_table(pa.table(columns | {"n": rng.normal(size=rows)}), path, row_group_size=2_000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    write_log(folder / "train.parquet", 24_000, 1)
    write_log(folder / "test.parquet", 4_000, 2)
    (folder / "plain.toml").write_text(FIELDS)
    (folder / "crossed.toml").write_text(FIELDS + CROSS + '[groups]\npair = ["x"]\nrest = ["x", "a"]\n')
    return folder


def run_of(folder, schema, embeddings="shared"):
    name = f"{schema}_{embeddings}"
    text = (
        CONFIG.replace("FOLDER", str(folder))
        .replace("SCHEMA", schema)
        .replace("EMBEDDINGS", f'embeddings = "{embeddings}"')
    )
    (folder / f"{name}.run.toml").write_text(f'name = "{name}"' + text)
    run = folder / name
    assert train(folder / f"{name}.run.toml", f"train.out={run}") == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return run, next(line["auc"] for line in reversed(lines) if line["split"] == "test")


@pytest.fixture(scope="module")
def plain(folder) -> float:
    """The AUC without the cross."""
    return run_of(folder, "plain")[1]


@pytest.mark.parametrize("embeddings", ["shared", pytest.param("per_branch", marks=pytest.mark.long)])
def test_only_the_cross_predicts_and_the_artifact_says_the_same(folder, plain, embeddings):
    run, crossed = run_of(folder, "crossed", embeddings)
    assert crossed > plain + 0.15, (plain, crossed)
    assert main(["predict", str(run), "--data", str(folder / "test.parquet"), "--out", f"{run}.scores"]) == 0
    assert main(["export", str(run), "--out", f"{run}.artifact", "--rows", "fp32", "--no-aot"]) == 0
    table = pq.read_table(folder / "test.parquet")
    found = load(f"{run}.artifact").predict(table.select(["a", "b", "n"]))
    wanted = pq.read_table(f"{run}.scores")["probability"].to_numpy()
    assert np.abs(found - wanted).max() < 1e-5
    as_codes = table.select(["b", "n"]).append_column("a", table["a"].combine_chunks().dictionary_encode())
    assert np.array_equal(load(f"{run}.artifact").predict(as_codes), found)


def test_the_wide_part_alone_holds_the_cross(folder):
    schema, config = load_schema(folder / "crossed.toml"), model_config(kind="wide_deep")
    layout = model_layout(config, schema)
    assert layout.keys(WIDE) == ("a", "b", "x", "n") and layout.keys(ALL) == ("a", "b", "n")
    names = {table.name for table in schema_with_wide(config, schema).tables}
    assert names == {"a", "b", "wide_a", "wide_b", "wide_x"}
    deepfm = model_config(kind="deepfm")
    assert {"x", "wide_x"} < {table.name for table in schema_with_wide(deepfm, schema).tables}
    assert "x" in model_layout(deepfm, schema).keys(ALL)


def test_a_changed_cross_has_other_ids(folder):
    def schema_of(text):
        return parse_schema(tomllib.loads(text), "s", folder)

    before = schema_of(FIELDS + CROSS)
    for old, new, why in (
        ('["a", "b"]', '["b", "a"]', "cross of a x b -> cross of b x a"),
        ("20000", "30000", "divides the ids"),
        ('encoding = "hash", num', 'encoding = "hash", type = "text", num', ""),
    ):
        found = other_ids(before, schema_of((FIELDS + CROSS).replace(old, new)))
        assert why in found.get("x", "") and bool(why) == ("x" in found)
    typed = [
        schema_of((FIELDS + CROSS).replace('"hash", num', f'"hash", type = "{kind}", num'))
        for kind in ("text", "integer")
    ]
    assert "ids of another type" in other_ids(*typed)["x"]
