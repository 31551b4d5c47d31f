"""What a second label is worth: the AUC of a purchase over all impressions, learned alone and together with the click.

    python benchmarks/tasks.py [--rows 60000] [--seeds 3] [--quick] [--json]

A planted log of 400 users and 300 items: one row in ten is clicked, and one click in four leads to a purchase; both follow from tastes that they share in
part. `dnn` and `mbcnet, buy alone` learn the purchase as their only label; the rest learn click and purchase. ESMM's purchase is its product.
Beside them: the AUC of the probabilities that the labels are drawn from, and a step's milliseconds on this machine with one thread.
Prediction: each model of two labels is above the one of the same network that learns the purchase alone.
"""

import io
import json
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from side_by_side import parser_of
from small_log import at_each_step

from mbcnet_rec.config import load_config
from mbcnet_rec.run_training import run_training
from mbcnet_rec.scoring.metrics import auc

SCHEMA = """
name = "purchases"
{labels}
[fields]
user = {{ kind = "categorical", num_embeddings = 400, embedding_dim = 8 }}
item = {{ kind = "categorical", num_embeddings = 300, embedding_dim = 8 }}
hour = {{ kind = "categorical", num_embeddings = 24, embedding_dim = 4 }}
price = {{ kind = "numeric" }}
[groups]
taste = ["user", "item"]
moment = ["user", "hour", "price"]
"""
CONFIG = """
name = "purchases"
schema = "{folder}/{schema}.toml"
[data]
train = ["{folder}/train.parquet"]
test = ["{folder}/test.parquet"]
batch_size = 256
[model.mbcnet]
branch_dim = 32
top = [32, 16]
efgc = {{ hidden = [32, 16] }}
deep = {{ hidden = [64, 32] }}
[model.dnn]
hidden = [64, 32, 16]
[model.shared_bottom]
bottom = [64, 32]
tower = [16]
[model.mmoe]
expert = [64, 32]
gate = []
tower = [16]
[model.ple]
expert = [64, 32]
tower = [16]
[model.esmm]
tower = [64, 32, 16]
[train]
device = "cpu"
log_every = 1000
"""
# what is shown -> model, schema, metric of the purchase
CASES = {
    "dnn, buy alone": ("dnn", "buy", "auc"),
    "shared_bottom": ("shared_bottom", "both", "auc/buy"),
    "mmoe": ("mmoe", "both", "auc/buy"),
    "ple": ("ple", "both", "auc/buy"),
    "esmm": ("esmm", "both", "auc/click_and_buy"),
    "mbcnet, buy alone": ("mbcnet", "buy", "auc"),
    "mbcnet": ("mbcnet", "both", "auc/buy"),
}
QUICK = ("dnn, buy alone", "esmm", "mbcnet")


def write_log(folder: Path, rows: int) -> dict[str, float]:
    """Write the log and its schemas; the AUCs that nothing can be expected to exceed."""
    world, best = np.random.default_rng(0), {}
    users, items = world.normal(size=(400, 4)), world.normal(size=(300, 4))
    for number, (split, count) in enumerate({"train": rows, "test": 40_000}.items()):
        rng = np.random.default_rng(number + 1)
        user, item, hour = (rng.integers(0, size, count) for size in (400, 300, 24))
        price = rng.normal(size=count)
        shared = (users[user, :3] * items[item, :3]).sum(1)
        click = sigmoid(0.9 * shared + 0.5 * np.sin(hour / 4) - 3.0)
        buy = click * sigmoid(0.7 * shared + 0.7 * users[user, 3] * items[item, 3] - 0.7 * price - 3.0)
        draw = rng.random(count)
        labels = {"click": (draw < click).astype(np.int8), "buy": (draw < buy).astype(np.int8)}
        table = pa.table({"user": user, "item": item, "hour": hour, "price": price} | labels)
        pq.write_table(table, folder / f"{split}.parquet", row_group_size=8192, write_page_checksum=True)
        best = {name: auc(p, labels[name]) for name, p in (("click", click), ("buy", buy))}
        best |= {f"{name}_rate": float(own.mean()) for name, own in labels.items()}
    for name, text in {"buy": 'label = "buy"', "both": 'labels = ["click", "buy"]'}.items():
        (folder / f"{name}.toml").write_text(SCHEMA.format(labels=text))
    return best


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def train(folder: Path, case: str, seed: int) -> tuple[float, float]:
    """The AUC of the purchase on the test rows, and milliseconds a step."""
    kind, schema, metric = CASES[case]
    (folder / "run.toml").write_text(CONFIG.format(folder=folder, schema=schema))
    out, times = folder / f"{case.replace(', ', '_').replace(' ', '_')}_{seed}", []
    config = load_config(
        folder / "run.toml", [f"model.kind={kind}", f"train.out={out}", f"train.seed={seed}", "train.epochs=2"]
    )
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        run_training(config, hooks=at_each_step(lambda step: times.append(time.perf_counter())))
    steps = np.diff(times)[3:]
    return json.loads((out / "DONE").read_text())[metric], 1e3 * float(np.median(steps))


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--seeds", type=int, default=3, help="0 to N - 1")
    args = parser.parse_args()
    rows, seeds, cases = (6_000, 1, QUICK) if args.quick else (args.rows, args.seeds, tuple(CASES))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        best = write_log(Path(temporary), rows)
        print(
            f"{rows:,} rows, clicks {best['click_rate']:.1%}, purchases {best['buy_rate']:.2%}; best {best['buy']:.4f}"
        )
        result: dict[str, object] = {"rows": rows, "best": best}
        for case in cases:
            found = [train(Path(temporary), case, seed) for seed in range(seeds)]
            aucs = [each for each, _ in found]
            spread = f" +-{statistics.stdev(aucs):.4f}" if seeds > 1 else ""
            milliseconds = statistics.median(each for _, each in found)
            print(f"{case:<20}{statistics.fmean(aucs):.4f}{spread}   {milliseconds:.1f} ms a step", flush=True)
            result[case] = {"auc": aucs, "step_milliseconds": milliseconds}
    if args.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
