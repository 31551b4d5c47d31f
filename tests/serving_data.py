"""The small data set with hashed and vocabulary fields besides, and a worker that trains, evaluates and predicts it on many ranks.

As a worker: python -m torch.distributed.run --nproc_per_node N tests/serving_data.py FOLDER STAGE...
"""

import contextlib
import io
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from small_data import CONFIG, SCHEMA, small_table

from data.fit import fit_schema
from data.schema import format_schema, load_schema

MORE_FIELDS = """
shop    = { kind = "categorical", column = "shop_name", encoding = "hash", num_embeddings = 50, embedding_dim = 8 }
words   = { kind = "multi_valued", encoding = "hash", num_embeddings = 40, embedding_dim = 8 }
city    = { kind = "categorical", encoding = "vocabulary", vocabulary = "fit", embedding_dim = 8 }
code    = { kind = "categorical", encoding = "vocabulary", vocabulary = "fit", min_count = 2, embedding_dim = 8 }
clamped = { kind = "categorical", num_embeddings = 10, embedding_dim = 8, on_invalid = "modulo" }
lost    = { kind = "multi_valued", num_embeddings = 10, embedding_dim = 8, on_invalid = "null" }
weight  = { kind = "numeric", transform = "standardise", mean = "fit", std = "fit", on_invalid = "null" }

[groups]
place = ["shop", "city", "code"]
"""


def serving_table(rows: int, seed: int) -> pa.Table:
    """small_table and columns for MORE_FIELDS, with nulls, unseen values and faults that the schema mends."""
    rng = np.random.default_rng(seed + 100)
    table = small_table(rows, seed)
    shops = [f"shop {number}" + "é" * (number % 4) for number in rng.integers(0, 200, rows)]
    words = [[f"w{number}" for number in rng.integers(0, 99, n)] for n in rng.integers(0, 4, rows)]
    cities = [f"city {number}" for number in rng.integers(0, 12, rows)]
    weight = rng.normal(60, 10, rows)
    weight[::50] = np.nan
    more = {
        "shop_name": pa.array(shops, mask=rng.random(rows) < 0.05),
        "words": words,
        "city": pa.array(cities, mask=rng.random(rows) < 0.05),
        "code": pa.array(rng.integers(-30, 1000, rows), mask=rng.random(rows) < 0.05),
        "clamped": rng.integers(-5, 20, rows),
        "lost": [rng.integers(-3, 14, n).tolist() for n in rng.integers(0, 3, rows)],
        "weight": weight,
        "unread": [f"row {number}" for number in range(rows)],
    }
    for name, column in more.items():
        table = table.append_column(name, column if isinstance(column, pa.Array) else pa.array(column))
    return table


def write_serving_data(folder: Path) -> None:
    """Write data, the fitted schema and the config of each run: run_table_wise.toml, run_row_wise.toml."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (split, rows) in enumerate((("train", 4_800), ("valid", 500), ("test", 2_000))):
        table = serving_table(rows, number + 1)
        pq.write_table(table, folder / f"{split}.parquet", row_group_size=700, write_page_checksum=True)
    head, groups = SCHEMA.split("[groups]")
    more, more_groups = MORE_FIELDS.split("[groups]")
    (folder / "unfitted.toml").write_text(head + more + "[groups]" + groups + more_groups)
    fitted = fit_schema(load_schema(folder / "unfitted.toml"), [folder / "train.parquet"], folder)
    (folder / "schema.toml").write_text(format_schema(fitted))
    for kind in ("table_wise", "row_wise"):
        text = CONFIG.format(folder=folder).replace(f'out = "{folder}/run"', f'out = "{folder}/{kind}"')
        (folder / f"run_{kind}.toml").write_text(text + f'\n[sharding]\nsharding_types = ["{kind}"]\n')


def work(folder: Path, stages: list[str]) -> None:
    """One rank: the stages on both runs. Rank 0 writes what evaluate printed."""
    from mbcnet_rec.config import load_config
    from mbcnet_rec.evaluate import run_evaluation
    from mbcnet_rec.predict import run_prediction
    from mbcnet_rec.train import run_training

    for kind in ("table_wise", "row_wise"):
        run = str(folder / kind)
        for stage in stages:
            name, _, number = stage.partition("=")
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                if name == "train":
                    run_training(load_config(folder / f"run_{kind}.toml"))
                elif name == "evaluate":
                    run_evaluation(run, by=["hour"], as_json=True)
                elif name == "stream":
                    run_evaluation(run, by=["hour"], as_json=True, exact_rows=500)
                else:
                    run_prediction(run, [str(folder / "test.parquet")], f"{run}_predicted_{number}")
            if printed.getvalue() and name in ("evaluate", "stream"):
                (folder / f"{kind}_{name}_{number}.json").write_text(printed.getvalue())


if __name__ == "__main__":
    work(Path(sys.argv[1]), sys.argv[2:])
