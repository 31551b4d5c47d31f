"""What checkpoints cost a run of two ranks, and how soon a killed one continues.

    python benchmarks/checkpoint.py [--quick] [--json]

save_overhead             share of its time that a run loses to one checkpoint per 100 steps of a state of about 200 MB. One run alternates
                          between 100 steps that begin with a checkpoint and 100 that have none; the checkpoint is written beside them
state_mb                  of the checkpoint
stall_seconds             of the overhead, how long training stands still
written_seconds           from the copy to the rename
restart_seconds           from SIGKILL of a rank to the end of the first step that had not been trained before: torchelastic sees it, ends
                          the other rank, starts both; they build the model, verify and load the state. Without imports: ranks are forked
load_seconds              of that, from the restarted rank's first line of code to its first step
"""

import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from crash_storm import run_elastic
from side_by_side import parser_of, print_figures
from small_log import CONFIG

STEPS = 100  # per checkpoint
SCHEMA = """
name = "large"
label = "click"
[fields]
user = {{ kind = "categorical", num_embeddings = {rows}, embedding_dim = 16 }}
item = {{ kind = "categorical", num_embeddings = 1000, embedding_dim = 16 }}
price = {{ kind = "numeric", transform = "log1p" }}
[groups]
taste = ["user", "item"]
content = ["item", "price"]
"""
MODEL = (
    "model.mbcnet.branch_dim=128", "model.mbcnet.top=[128, 64]", "model.mbcnet.efgc.hidden=[256, 128]",
    "model.mbcnet.deep.hidden=[512, 256, 128]", "data.valid=[]", "data.test=[]", "train.epochs=100000",
    "train.eval_every=1000000", "train.keep_last=2", "train.timeout_seconds=60.0", "train.stall_seconds=30.0",
)  # fmt: skip


def write_data(folder: Path, rows: int) -> Path:
    """A log of a large table of users: with 16 numbers and one of optimizer state a row, 3 million rows are 204 MB."""
    rng, count = np.random.default_rng(0), 200_000
    table = {
        "user": rng.integers(0, rows, count),
        "item": rng.integers(0, 1000, count),
        "price": rng.gamma(2.0, 10.0, count),
        "click": (rng.random(count) < 0.3).astype(np.int8),
    }
    pq.write_table(pa.table(table), folder / "train.parquet", row_group_size=50_000, write_page_checksum=True)
    (folder / "schema.toml").write_text(SCHEMA.format(rows=rows))
    config = folder / "large.toml"
    config.write_text(CONFIG.format(folder=folder))
    return config


def state_bytes(run: Path) -> int:
    """Size of a run's newest checkpoint."""
    newest = max((run / "checkpoints").glob("step_*"), key=lambda path: int(path.name[5:]))
    return sum(path.stat().st_size for path in newest.iterdir())


def overhead(config: Path, folder: Path, model: list[str], pairs: int) -> dict[str, Any]:
    """Train blocks of STEPS steps, every other one beside the writing of a checkpoint."""
    run = folder / "overhead"
    steps = STEPS * (2 * pairs + 2)
    settings = [*model, f"train.out={run}", f"train.max_steps={steps}", f"train.log_every={STEPS}"]
    run_elastic(config, [*settings, f"train.checkpoint_every={2 * STEPS}"], [], folder / "overhead-notes")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    blocks = [line for line in lines if line["split"] == "train"][2:]  # the first two warm up
    beside = [line for line in blocks if line["step"] // STEPS % 2 == 1]  # steps 201 to 300, 401 to 500, ...
    without = [line for line in blocks if line["step"] // STEPS % 2 == 0]
    slow, fast = (statistics.median(line["step_seconds"] for line in part) for part in (beside, without))
    return {
        "save_overhead": round(slow / fast - 1.0, 4),
        "stall_seconds": round(statistics.median(line["checkpoint_stall_seconds"] for line in beside), 4),
        "written_seconds": round(statistics.median(line["checkpoint_seconds"] for line in without), 3),
        "step_seconds": round(fast, 4),
        "blocks": len(blocks),
        "state_mb": round(state_bytes(run) / 1e6),
    }


def restarts(config: Path, folder: Path, model: list[str], kills: int) -> dict[str, Any]:
    """Kill rank 1 a few steps after a checkpoint, each time it has been started; time what follows."""
    run, notes, every = folder / "restarts", folder / "restart-notes", 5
    schedule = [{"kind": "step", "rank": 1, "steps": every + 2, "seconds": 0.0, "tick": 0}] * kills
    settings = [*model, f"train.out={run}", f"train.max_steps={(kills + 2) * every}", "train.log_every=1"]
    run_elastic(config, [*settings, f"train.checkpoint_every={every}"], schedule, notes)
    whole, loads = [], []
    for attempt in range(kills):
        killed = (notes / f"kill_{attempt}").stat().st_mtime
        before = read_times(notes / f"times_{attempt}_0")
        after = read_times(notes / f"times_{attempt + 1}_0")
        new = max(before)  # this step had begun; the next one's beginning is its end
        whole.append(after.get(new + 1, max(after.values())) - killed)
        loads.append(min(when for step, when in after.items() if step) - after[0])
    return {
        "restart_seconds": round(statistics.median(whole), 2),
        "slowest_restart_seconds": round(max(whole), 2),
        "load_seconds": round(statistics.median(loads), 2),
        "restarts": kills,
    }


def read_times(path: Path) -> dict[int, float]:
    """Step -> when it began; 0 -> when the rank did."""
    return {int(step): float(when) for step, when in (line.split() for line in path.read_text().splitlines())}


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--pairs", type=int, default=8, help="of 100 steps with and 100 without a checkpoint")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    rows, batch, pairs, kills = (300_000, 256, 1, 1) if args.quick else (3_000_000, 4096, args.pairs, 5)
    model = [*MODEL, f"data.batch_size={batch}", "data.lanes=4"]
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as name:
        folder = Path(name)
        config = write_data(folder, rows)
        result = overhead(config, folder, model, pairs) | restarts(config, folder, model, kills)
    print_figures(result, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
