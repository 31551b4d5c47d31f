"""What a model that is trained day after day costs beside one long run, and a delta beside a whole artifact.

    python benchmarks/daily.py [--quick] [--json]

Seconds are of the processor, one thread.
one_run_seconds           `mbcnet train` over all days at once, from the command to its end; likewise days_seconds, a command a day
continue_seconds          of that what a further day costs beside its rows: start, load, plan and a checkpoint
grow_rows_per_second      of `mbcnet schema fit --grow` for a day with a vocabulary of as many values as the table has rows, a tenth of them new
collisions_seconds        at the end of a day, to find which rows of a hash table of as many rows were trained
whole_seconds             to write a whole artifact of int8 rows; whole_bytes
delta_seconds/1           to compare with it the artifact of another day, in which 1 % of the rows of the table are others, and to write the
                          delta; likewise 10 and 100 %, and delta_bytes/1 and so on, and delta_share/1 of the whole
apply_seconds/1           until a server that has the one artifact has the other
"""

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from checkpoint import SCHEMA
from side_by_side import mbcnet, parser_of, print_figures, settings
from small_log import CONFIG

from data.profile.fit import write_fitted
from data.profile.grow import grow_fitted
from data.schema import load_schema
from mbcnet_rec.daily import HASHED_ROWS
from mbcnet_rec.scoring.trained_run import opened_run
from mbcnet_rec.serving import loader as serving
from mbcnet_rec.serving.artifact import load_weights, take_apart, with_rows, write_artifact
from mbcnet_rec.serving.delta import write_delta
from sharding.bridge.blocks import initial_rows

PREDICTION = (
    "prediction: a day costs 6 to 10 s beside its rows, nearly all of them the imports; a delta has 28 bytes a row that was touched (20 of int8\n"
    "and its scale, 8 of its place) and a fixed part below 1 MB, so 1 % of the table about 0.05 of the whole artifact, 10 % 0.15, 100 % 1.4"
)


def timed(action: Callable[[], object]) -> float:
    """Processor seconds of this process and of those that it waits for: meaningful on a busy machine."""

    def used() -> float:
        return sum(os.times()[:4])

    start = used()
    action()
    return used() - start


def write_days(folder: Path, days: int, count: int, rows: int) -> Path:
    """Days of a log with a large table of users; its config."""
    rng = np.random.default_rng(0)
    for day in range(days):
        table = {
            "user": rng.integers(0, rows, count),
            "item": rng.integers(0, 1000, count),
            "price": rng.gamma(2.0, 10.0, count),
            "click": (rng.random(count) < 0.3).astype(np.int8),
        }
        (folder / f"log/ds={day}").mkdir(parents=True)
        pq.write_table(pa.table(table), folder / f"log/ds={day}/part.parquet", row_group_size=50_000)
    (folder / "schema.toml").write_text(SCHEMA.format(rows=rows))
    config = folder / "run.toml"
    config.write_text(CONFIG.format(folder=folder))
    return config


def continuing(folder: Path, config: Path, days: int) -> dict[str, float]:
    common = settings(
        "data.valid=[]", "data.test=[]", "data.batch_size=1020", 'data.order="chronological"', "train.device=cpu"
    )
    files = [f'data.train=["{folder}/log/ds={day}"]' for day in range(days)]
    first = ["train", "--config", str(config), *common]
    whole = timed(lambda: mbcnet(*first, *settings(f"train.out={folder}/one", f'data.train=["{folder}/log"]')))
    begun = timed(lambda: mbcnet(*first, *settings(f"train.out={folder}/run", files[0])))
    later = [
        timed(lambda day=day: mbcnet("train", "--continue", f"{folder}/run", "--data", f"ds={day}"))
        for day in range(1, days)
    ]
    return {
        "one_run_seconds": whole,
        "days_seconds": begun + sum(later),
        "continue_seconds": (begun + sum(later) - whole) / (days - 1),
    }


def growing(folder: Path, rows: int) -> float:
    """Rows a second of a growth."""
    field = 'user = { kind = "categorical", encoding = "vocabulary", vocabulary = "fit", embedding_dim = 16 }'
    (folder / "words.toml").write_text(f'name = "w"\nlabel = "click"\n[groups]\n[fields]\n{field}\n')
    for day in range(2):
        values = np.random.default_rng(day).permutation(rows) + day * rows // 10
        pq.write_table(pa.table({"user": values, "click": np.zeros(rows, np.int8)}), folder / f"words_{day}.parquet")
    fitted = write_fitted(load_schema(folder / "words.toml"), [folder / "words_0.parquet"], folder / "fit")
    return rows / timed(lambda: grow_fitted(fitted, [folder / "words_1.parquet"], folder / "grown"))


def collisions_seconds(rows: int) -> float:
    table = torch.zeros(rows, 16)
    pieces = initial_rows({"user": table}, {"user": "user"}, seed=1, std=0.01, most=HASHED_ROWS)
    return timed(lambda: sum(int((held != initial).any(1).sum()) for _, _, held, initial in pieces))


def deltas(folder: Path) -> dict[str, float]:
    """Write the delta of a share of the rows of the large table, for several."""
    with opened_run(folder / "run") as (run, _):
        weights = load_weights(run)
    apart, config, parent = take_apart(weights), run.config, folder / "parent"
    found = {"whole_seconds": timed(lambda: write_artifact(with_rows(apart, weights, "int8"), config, parent))}
    before = serving.load(parent)
    rows = weights.rows["user"].clone()
    for share in (1, 10, 100):
        weights.rows["user"] = rows.clone()
        weights.rows["user"][:: 100 // share] += 1.0
        child, out = folder / f"child_{share}", folder / f"delta_{share}"
        write_artifact(with_rows(apart, weights, "int8"), config, child)
        report: dict[str, float] = {}
        found[f"delta_seconds/{share}"] = timed(
            lambda into=report, to=child, at=out: into.update(write_delta(before, parent, to, at))
        )
        found[f"delta_bytes/{share}"], found["whole_bytes"] = report["bytes"], report["whole_bytes"]
        found[f"delta_share/{share}"] = report["bytes"] / report["whole_bytes"]
        found[f"apply_seconds/{share}"] = timed(lambda out=out: before.updated(out))
    return found


def main() -> int:
    args = parser_of(__doc__).parse_args()
    print(PREDICTION)
    days, count, rows = (2, 20_000, 200_000) if args.quick else (4, 60_000, 2_000_000)
    with tempfile.TemporaryDirectory(prefix="daily-") as name:
        folder = Path(name)
        config = write_days(folder, days, count, rows)
        figures = (
            continuing(folder, config, days)
            | {"grow_rows_per_second": growing(folder, rows), "collisions_seconds": collisions_seconds(rows)}
            | deltas(folder)
        )
    print_figures(figures, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
