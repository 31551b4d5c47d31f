"""Whether this tree does what another commit does: losses, tables, optimizer state, metrics and scores, bit for bit, on this machine.

    python benchmarks/same_as.py --against COMMIT [--quick] [--json]

The other commit is checked out beside this tree (git worktree) and both are driven as a user drives them, by the `mbcnet` command, one after
the other in folders of their own. Three runs of 30 steps, each by one process and by two ranks: the demo on 20,000 synthetic rows, Adult
(left out where its files are not beside the repository), and a log with a field of every kind and encoding. Compared are the data files
that are written, every number of metrics.jsonl that is not a time, every tensor of the last checkpoint, what `mbcnet evaluate --json`
prints and what `mbcnet predict` writes; and this tree's evaluation of the other's run folder, for old checkpoints have to load.
`--quick`: the log of every kind, one process. Exit code 1 and one line for each difference if there is any.
"""

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[1]
STEPS = 30
TIMES = (
    "samples_per_second",
    "step_seconds",
    "input_wait_share",
    "checkpoint_stall_seconds",
    "checkpoint_seconds",
)
SCHEMA = """
name = "kinds"
label = "click"
group_column = "user"

[tables]
thing = { num_embeddings = 60, embedding_dim = 16 }

[fields]
user    = { kind = "categorical", num_embeddings = 120, embedding_dim = 16 }
item    = { kind = "categorical", table = "thing", pooling = "mean" }
history = { kind = "multi_valued", table = "thing", pooling = "mean" }
tags    = { kind = "multi_valued", num_embeddings = 40, embedding_dim = 16 }
likes   = { kind = "weighted_multi_valued", weights = "like_weights", num_embeddings = 30, embedding_dim = 16 }
query   = { kind = "categorical", encoding = "hash", num_embeddings = 50, embedding_dim = 16 }
city    = { kind = "categorical", encoding = "vocabulary", vocabulary = "cities.parquet", num_embeddings = 12, embedding_dim = 16 }
session = { kind = "categorical", encoding = "zch", num_embeddings = 160, embedding_dim = 16 }
price   = { kind = "numeric", transform = "log1p" }
age     = { kind = "numeric", transform = "standardise", mean = 40.0, std = 12.5 }
hour    = { kind = "numeric", transform = "bucketise", boundaries = [6.0, 12.0, 18.0], num_embeddings = 5, embedding_dim = 16 }
image   = { kind = "vector", width = 4 }
sound   = { kind = "vector", width = 6, projection = 4 }

[groups]
taste = ["user", "item", "history", "query"]
content = ["item", "tags", "image", "price", "city"]
moment = ["user", "hour", "likes", "session"]
"""
CONFIG = """
name = "kinds"
schema = "kinds/schema.toml"
[data]
train = ["kinds/train.parquet"]
valid = ["kinds/valid.parquet"]
test = ["kinds/test.parquet"]
batch_size = 96
lanes = 12
[model.mbcnet]
branch_dim = 16
top = [16, 8]
dropout = 0.1
[model.mbcnet.efgc]
hidden = [16, 8]
[model.mbcnet.deep]
hidden = [32, 16]
[optim]
dense_lr = 5e-3
[optim.embedding]
lr = 0.1
"""


@dataclass(frozen=True)
class Case:
    """One run that both trees make.

    Attributes:
        name: of the run's folder.
        config: TOML file, relative to the tree, or to the working folder.
        prepare: arguments of the `mbcnet` command that writes the data; empty: the data lie there.
        overrides: `--set` arguments besides those that all runs have.
    """

    name: str
    config: str
    prepare: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()


def cases(quick: bool) -> list[Case]:
    """The runs to compare."""
    kinds = Case("kinds", "kinds/run.toml")
    if quick:
        return [kinds]
    demo = Case(
        "demo", "mbcnet_rec/configs/demo.toml", ("data", "synth", "--out", "prepared/demo", "--rows", "20000")
    )
    source = ROOT.parent / "shared" / "datasets" / "adult"
    adult = Case(
        "adult",
        "mbcnet_rec/configs/adult.toml",
        ("data", "prepare", "adult", "--src", str(source), "--out", "prepared/adult"),
    )
    return [kinds, demo, adult] if source.is_dir() else [kinds, demo]


def write_kinds(folder: Path) -> None:
    """Write a log with a field of every kind, with nulls and empty lists, from a fixed seed."""
    folder.mkdir(parents=True)
    cities = [f"city {number}" for number in range(10)]
    pq.write_table(pa.table({"value": cities}), folder / "cities.parquet")
    (folder / "schema.toml").write_text(SCHEMA)
    (folder / "run.toml").write_text(CONFIG)
    for seed, (split, rows) in enumerate((("train", 3_000), ("valid", 500), ("test", 500))):
        rng = np.random.default_rng(seed)

        def lists(
            size: int, longest: int, rng: np.random.Generator = rng, rows: int = rows
        ) -> list[list[int]]:
            return [rng.integers(0, size, rng.integers(0, longest + 1)).tolist() for _ in range(rows)]

        user, item, likes = rng.integers(0, 120, rows), rng.integers(0, 60, rows), lists(30, 2)
        logit = np.sin(user) + np.cos(item) + 0.7 * np.sin(user * 7.0) * np.cos(item * 3.0)
        table = {
            "user": user,
            "item": pa.array(item, mask=rng.random(rows) < 0.03),
            "history": lists(60, 4),
            "tags": lists(40, 3),
            "likes": likes,
            "like_weights": [rng.random(len(each)).tolist() for each in likes],
            "query": [f"query {number}" for number in rng.integers(0, 400, rows)],
            "city": pa.array(
                [f"city {number}" for number in rng.integers(0, 12, rows)], mask=rng.random(rows) < 0.1
            ),
            "session": rng.integers(0, 2**50, rows) % 500,
            "price": pa.array(rng.gamma(2.0, 10.0, rows), mask=rng.random(rows) < 0.03),
            "age": rng.normal(40, 12, rows),
            "hour": rng.integers(0, 24, rows),
            "image": rng.normal(size=(rows, 4)).astype(np.float32).tolist(),
            "sound": rng.normal(size=(rows, 6)).astype(np.float32).tolist(),
            "click": (rng.random(rows) < 1 / (1 + np.exp(-logit))).astype(np.int8),
        }
        pq.write_table(
            pa.table(table), folder / f"{split}.parquet", row_group_size=700, write_page_checksum=True
        )


def mbcnet(tree: Path, folder: Path, ranks: int, *args: str) -> str:
    """Run the command of a tree in a folder; return what it printed.

    Raises:
        SystemExit: it failed; with the end of what it said.
    """
    command = [sys.executable, "-m", "mbcnet_rec.cli", *args]
    if ranks > 1:
        run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [sys.executable, *run, "-m", "mbcnet_rec.cli", *args]
    env = os.environ | {"PYTHONPATH": str(tree), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(
            f"{tree}: mbcnet {' '.join(args)} ended with {ran.returncode}:\n{ran.stderr[-2000:]}"
        )
    return ran.stdout


def make_run(tree: Path, folder: Path, case: Case, ranks: int) -> Path:
    """Prepare the data of a case once and train; return the run folder."""
    if case.prepare and not (folder / case.prepare[case.prepare.index("--out") + 1]).exists():
        mbcnet(tree, folder, 1, *case.prepare)
    config = str(tree / case.config) if (tree / case.config).exists() else case.config
    run = f"runs/{case.name}-{ranks}"
    settings = (
        f"train.out={run}", f"train.max_steps={STEPS}", "train.log_every=1", "train.eval_every=15", "train.device=cpu",
        "train.keep_last=3",
    )  # fmt: skip
    sets = [part for setting in settings for part in ("--set", setting)]
    mbcnet(tree, folder, ranks, "train", "--config", config, *sets)
    return folder / run


def logged(run: Path) -> dict[str, Any]:
    """Every number of metrics.jsonl that is no time."""
    found = {}
    for text in (run / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        for key, value in line.items():
            if key not in TIMES:
                found[f"{line['split']} {line['step']} {key}"] = value
    return found


def tensors(run: Path) -> dict[str, str]:
    """Digests of the last checkpoint's tensors, by logical name and place in it. What resumes a log line only is left out."""
    found = {}
    folder = run / "checkpoints" / f"step_{STEPS}"
    body = json.loads((folder / "manifest.json").read_text())["body"]
    for file in body["files"]:
        held = load_file(folder / file["file"])
        for number, (name, offsets, sizes) in enumerate(file["pieces"]):
            if not name.startswith("window"):
                digest = hashlib.sha256(np.ascontiguousarray(held[str(number)]).tobytes()).hexdigest()
                found[f"{name} {offsets} {sizes}"] = digest
    return found


def files(folder: Path) -> dict[str, str]:
    """Digests of every Parquet and TOML file below a folder."""
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix in (".parquet", ".toml")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def scores(folder: Path) -> dict[str, Any]:
    """What `mbcnet predict` wrote, column by column."""
    table = pq.read_table(folder)
    return {
        name: hashlib.sha256(str(table[name].to_pylist()).encode()).hexdigest() for name in table.column_names
    }


def differences(what: str, ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """One line for each key whose values differ; keys of one side only count too."""
    found = []
    for key in dict.fromkeys([*theirs, *ours]):
        a, b = ours.get(key, "absent"), theirs.get(key, "absent")
        same = a == b or (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b))
        if not same:
            found.append(f"{what}: {key}: {str(a)[:60]} here, {str(b)[:60]} there")
    return found


@contextmanager
def checked_out(commit: str, folder: Path) -> Iterator[Path]:
    """A worktree of a commit, removed afterwards."""
    subprocess.run(
        ["git", "-C", str(ROOT), "worktree", "add", "--detach", "-q", str(folder), commit], check=True
    )
    try:
        yield folder
    finally:
        subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(folder)], check=True)


def compare(case: Case, ranks: int, trees: dict[str, Path], work: Path) -> list[str]:
    """Make one run in both trees and compare everything that it left."""
    runs = {side: make_run(tree, work / side, case, ranks) for side, tree in trees.items()}
    where = f"{case.name}, {ranks} rank{'s' if ranks > 1 else ''}"
    found = differences(f"{where}: metrics.jsonl", logged(runs["here"]), logged(runs["there"]))
    found += differences(f"{where}: checkpoint", tensors(runs["here"]), tensors(runs["there"]))
    if case.prepare:
        out = case.prepare[case.prepare.index("--out") + 1]
        found += differences(f"{where}: data", files(work / "here" / out), files(work / "there" / out))
    run = f"runs/{case.name}-{ranks}"
    evaluated = {
        side: json.loads(mbcnet(tree, work / side, 1, "evaluate", run, "--json"))
        for side, tree in trees.items()
    }
    evaluated["old run"] = json.loads(mbcnet(trees["here"], work / "there", 1, "evaluate", run, "--json"))
    found += differences(f"{where}: evaluate", flat(evaluated["here"]), flat(evaluated["there"]))
    found += differences(
        f"{where}: evaluate of the other's run", flat(evaluated["old run"]), flat(evaluated["there"])
    )
    data = {
        "kinds": "kinds/test.parquet",
        "demo": "prepared/demo/ds=2024-05-14",
        "adult": "prepared/adult/test",
    }
    for side, tree in trees.items():
        mbcnet(
            tree,
            work / side,
            1,
            "predict",
            run,
            "--data",
            data[case.name],
            "--out",
            f"scored/{case.name}-{ranks}",
        )
    sides = [scores(work / side / f"scored/{case.name}-{ranks}") for side in ("here", "there")]
    return found + differences(f"{where}: predict", *sides)


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Numbers of nested JSON by path; seconds are left out."""
    if isinstance(value, dict):
        pairs = [flat(child, f"{prefix}/{key}") for key, child in value.items() if "second" not in key]
    elif isinstance(value, list):
        pairs = [flat(child, f"{prefix}/{number}") for number, child in enumerate(value)]
    else:
        return {prefix: value}
    return {key: leaf for each in pairs for key, leaf in each.items()}


def main() -> int:
    """Compare and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--against", default="HEAD", metavar="COMMIT", help="the other commit (default: HEAD)"
    )
    parser.add_argument("--only", nargs="+", choices=("kinds", "demo", "adult"), help="these runs")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--quick", action="store_true", help="the log of every kind of field, one process")
    parser.add_argument("--json", action="store_true", help="one object as the last line")
    args = parser.parse_args()
    found: list[str] = []
    made = 0
    with (
        tempfile.TemporaryDirectory() as temporary,
        checked_out(args.against, Path(temporary) / "tree") as tree,
    ):
        work = Path(temporary)
        for side in ("here", "there"):
            write_kinds(work / side / "kinds")
        for case in cases(args.quick):
            if args.only and case.name not in args.only:
                continue
            for ranks in [1] if args.quick else args.ranks:
                lines = compare(case, ranks, {"here": ROOT, "there": tree}, work)
                made += 1
                print(f"{case.name}, {ranks} rank(s): {len(lines) or 'no'} differences", flush=True)
                for line in lines[:40]:
                    print(f"  {line}", flush=True)
                found += lines
    if args.json:
        print(
            json.dumps({"against": args.against, "runs": made, "differences": len(found), "same": not found})
        )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
