"""The small data set with a second label, `buy`, that some rows lack."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from small_data import CONFIG, SCHEMA, small_table

HEADS = """
[model.shared_bottom]
bottom = [16]
tower = [8]

[model.mmoe]
expert = [16]
gate = []
tower = [8]

[model.ple]
levels = 2
expert = [16]
tower = [8]

[model.esmm]
tower = [16, 8]
"""


def table_of(rows: int, seed: int, *, nulls: bool = True) -> pa.Table:
    """Rows of small_table with `buy`: half of the clicks that are cheap, null in a fifth of the rows."""
    table, rng = small_table(rows, seed), np.random.default_rng(seed + 1000)
    price = np.nan_to_num(table["price"].to_numpy(), nan=20.0)
    buy = (table["click"].to_numpy() == 1) & (rng.random(rows) < np.where(price < 20, 0.7, 0.3))
    return table.append_column("buy", pa.array(buy.astype(np.int8), mask=nulls & (rng.random(rows) < 0.2)))


def write_tasks(folder: Path, train_rows: int = 1_900, other_rows: int = 500, *, nulls: bool = True) -> Path:
    """Write data, the schemas of both labels and of each, and the config; return the config's path."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (split, rows) in enumerate({"train": train_rows, "valid": other_rows, "test": other_rows}.items()):
        table = table_of(rows, number + 1, nulls=nulls)
        pq.write_table(table, folder / f"{split}.parquet", row_group_size=300, write_page_checksum=True)
    labels = {"schema": 'labels = ["click", "buy"]', "click": 'label = "click"', "buy": 'label = "buy"'}
    for name, text in labels.items():
        (folder / f"{name}.toml").write_text(SCHEMA.replace('label = "click"', text))
    config = folder / "run.toml"
    config.write_text(CONFIG.format(folder=folder).replace("eval_every = 20", "eval_every = 10") + HEADS)
    return config
