"""Proves that the queries of docs/data.md count as `schema fit` does; run by DuckDB, whose `unnest` is Spark's `explode`."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.profile.fit import write_fitted
from data.schema import load_schema

duckdb = pytest.importorskip("duckdb")
DOCS = Path(__file__).parents[1] / "docs" / "data.md"
SCHEMA = """
name = "shop"
label = "click"
[tables]
item = { embedding_dim = 8 }
[fields]
city = { kind = "categorical", encoding = "vocabulary", vocabulary = "fit", min_count = 2, embedding_dim = 8 }
item_id = { kind = "categorical", encoding = "vocabulary", vocabulary = "fit", min_count = 2, table = "item" }
clicked = { kind = "multi_valued", encoding = "vocabulary", vocabulary = "fit", min_count = 2, table = "item", pooling = "sum" }
age = { kind = "numeric", transform = "standardise", mean = "fit", std = "fit" }
stock = { kind = "numeric", transform = "bucketise", boundaries = "fit", num_buckets = 4, embedding_dim = 8 }
[groups]
"""


def test_the_queries_give_what_fit_gives(tmp_path):
    draw = np.random.default_rng(0)
    rows = 2_000
    log = pa.table(
        {
            "city": pa.array(
                [f"c{n}é" for n in (300 * draw.random(rows) ** 3).astype(int)], mask=draw.random(rows) < 0.1
            ),
            "item_id": pa.array((900 * draw.random(rows) ** 2).astype(int), mask=draw.random(rows) < 0.1),
            "clicked": [(900 * draw.random(n)).astype(int).tolist() for n in draw.integers(0, 4, rows)],
            "age": pa.array(draw.normal(40, 9, rows), mask=draw.random(rows) < 0.1),
            "stock": pa.array(draw.integers(0, 9, rows).astype(float), mask=draw.random(rows) < 0.1),
            "click": draw.integers(0, 2, rows),
        }
    )
    pq.write_table(log, tmp_path / "log.parquet")
    (tmp_path / "s.toml").write_text(SCHEMA)
    fitted = write_fitted(load_schema(tmp_path / "s.toml"), [tmp_path / "log.parquet"], tmp_path / "fit")
    (block,) = re.findall(r"```sql\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    queries = [query.strip() for query in block.replace("explode(", "unnest(").split(";") if query.strip()]
    with duckdb.connect() as database:
        database.register("logs", log)
        city, item, moments, quantiles = (database.execute(query).fetchall() for query in queries)
    for name, found in (("city", city), ("item", item)):
        kept = pq.read_table(tmp_path / "fit" / "vocabulary" / f"{name}.parquet")["value"].to_pylist()
        assert [value for (value,) in found] == kept and len(kept) > 20
    features = {each.name: each for each in fitted.features}
    assert moments[0] == pytest.approx((features["age"].mean, features["age"].std))
    smallest, *levels = quantiles[0]
    assert tuple(sorted({level for level in levels if level > smallest})) == tuple(features["stock"].boundaries)
