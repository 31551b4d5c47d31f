"""The runs of tests/test_daily.py: three days with a vocabulary that grows, a hash table and a zch table, at 1, 2 and 4 ranks.

day_ranks.py FOLDER
"""

import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from forked_ranks import mbcnet, report, run_ranks
from test_lineage import days
from tiny_run import CONFIG, lines_of, train

from mbcnet_rec.training.hooks import Hooks

FOLDER = Path(sys.argv[1])
ROWS = 240  # of a day: 5 steps
SCHEMA = """
name = "days"
label = "click"

[fields]
user = { kind = "categorical", encoding = "vocabulary", vocabulary = "fit", min_count = 3, embedding_dim = 8 }
item = { kind = "categorical", encoding = "hash", num_embeddings = 101, embedding_dim = 8 }
tags = { kind = "weighted_multi_valued", encoding = "hash", weights = "tag_weights", num_embeddings = 61, embedding_dim = 8 }
shop = { kind = "categorical", encoding = "zch", num_embeddings = 64, eviction_interval = 2, embedding_dim = 8 }
places = { kind = "multi_valued", num_embeddings = 20, on_invalid = "null", embedding_dim = 8 }

[groups]
both = ["user", "item", "tags", "shop"]
"""
PLANTED = {"below": (2, 0, 0), "at": (3, 0, 0), "above": (5, 0, 0), "daily": (1, 1, 1)}  # sightings on each day
ASKED = ["below", "at", "above", "daily", "nobody"]


def day_of(number):
    """Items and shops that the days before did not have are among them."""
    rng = np.random.default_rng(number)
    names = [name for name, times in PLANTED.items() for _ in range(times[number])]
    users = names + [f"u{each}" for each in rng.integers(0, 12, ROWS - len(names))]
    tags = [rng.integers(30 * number, 30 * number + 40, 2).tolist() for _ in range(ROWS)]
    return pa.table(
        {
            "user": users,
            "item": rng.integers(20 * number, 20 * number + 50, ROWS),
            "tags": tags,
            "tag_weights": [[1.0, 0.5]] * ROWS,
            "shop": rng.integers(8 * number, 8 * number + 24, ROWS),
            "places": [rng.integers(0, 30, 3).tolist() for _ in range(ROWS)],
            "click": rng.integers(0, 2, ROWS).astype(np.int8),
        }
    )


def dies():
    """Hooks that end a start in its fourth step."""
    steps = iter(range(3))

    def on_loss(loss, outputs):
        if next(steps, None) is None:
            raise RuntimeError("died")
        return loss, outputs

    return Hooks(on_loss=on_loss)


def play(world):
    """Three days; on the third the fitted folder and the run's copy are lost and grow again from the checkpoint, and training dies once and goes on."""
    here = FOLDER / f"on-{world}"
    for day in range(3):
        (here / f"log/ds={day}").mkdir(parents=True)
        pq.write_table(day_of(day), here / f"log/ds={day}/part.parquet", row_group_size=100)
    (here / "schema.toml").write_text(SCHEMA)
    text = CONFIG.replace("rows/schema", f"{here}/fit/schema").replace("rows/train.parquet", f"{here}/log/ds=0")
    (here / "tiny.toml").write_text(text.replace('test = ["rows/test.parquet"]', ""))
    pq.write_table(asked(), here / "asked.parquet")
    logs = (here / f"logs/{number}" for number in range(99))

    def run(*words, ranks=1):
        done = run_ranks(mbcnet([str(word) for word in words]), next(logs), world=ranks, limit=300)
        assert done["codes"] == [0] * ranks, done
        return done["words"][0]

    found = {"scores": [], "rows": [], "shown": []}
    run("schema", "fit", here / "schema.toml", here / "log/ds=0", "-o", here / "fit")
    for day in range(3):
        if day:
            source = here / "fit"
            if day == 2:
                shutil.rmtree(source)
                shutil.rmtree(here / "run/vocabulary")
                source = here / "run"
            run("schema", "fit", "--grow", source, here / f"log/ds={day}", "-o", here / "fit")
        if day == 2:
            second = (f'data.train=["{here}/log/ds=2"]', "train.checkpoint_every=2")
            died = run_ranks(
                lambda rank: train(here / "run/config.toml", *second, continues=True, progressive=True, hooks=dies()),
                next(logs), world=world, limit=300,
            )  # fmt: skip
            assert 0 not in died["codes"], died
        first = ["--config", here / "tiny.toml", "--set", f"train.out={here}/run"]
        words = ["--continue", here / "run", "--data", f"ds={day}"] if day else first
        found["shown"].append(run("train", *words, "--progressive", ranks=world))
        run("predict", here / "run", "--data", here / "asked.parquet", "--out", here / f"scores-{day}")
        table = pq.read_table(here / f"scores-{day}")
        scores = table[next(name for name in table.column_names if name.startswith("p"))].to_pylist()
        found["scores"].append(dict(zip(ASKED, scores, strict=True)))
        found["rows"].append(rows_of(here / "run/vocabulary"))
    page = (here / "run/report.html").read_text()
    return found | {"days": days(here / "run"), "ids": lines_of(here / "run", "ids", "progressive"), "page": page}


def rows_of(folder):
    """The row of each planted value, and the sightings of what waits."""
    values = pq.read_table(folder / "user.parquet")["value"].to_pylist()
    waiting = pq.read_table(folder / "waiting/user.parquet").to_pydict()
    rows = {name: values.index(name) + 2 if name in values else 1 for name in ASKED}
    return {"rows": rows, "waiting": dict(zip(waiting["value"], waiting["count"], strict=True)), "values": values}


def asked():
    """A row for each planted user and for one whom nobody has seen, otherwise equal."""
    same = {"item": 1, "tags": [1], "tag_weights": [1.0], "shop": 1, "places": [1]}
    return pa.Table.from_pylist([{"user": name} | same for name in ASKED])


if __name__ == "__main__":
    report({str(world): lambda world=world: play(world) for world in (1, 2, 4)}, FOLDER / "results.json")
