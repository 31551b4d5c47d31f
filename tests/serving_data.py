"""The small data set with hashed and vocabulary fields besides, the runs that are trained on it, once for all tests of serving."""

import contextlib
import fcntl
import functools
import importlib.metadata
import io
import json
import os
import re
import venv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from forked_ranks import run_script
from small_data import CONFIG, SCHEMA, small_table

from data.profile.fit import fit_schema
from data.schema import format_schema, load_schema
from mbcnet_rec.cli import main

ROOT = Path(__file__).parents[1]
KINDS = ("table_wise", "row_wise")
WIDER = {  # so that it learns enough for AUC to mean something
    "batch_size = 96": "batch_size = 192",
    "branch_dim = 16": "branch_dim = 32",
    "top = [16, 8]": "top = [32, 16]",
    "[model.mbcnet.deep]\nhidden = [32, 16]": "[model.mbcnet.deep]\nhidden = [32, 32]",
    "log_every = 5\neval_every = 20": "log_every = 25\neval_every = 25\nepochs = 2\nranking_k = [2, 5]",
}
MORE_FIELDS = """
shop    = { kind = "categorical", column = "shop_name", encoding = "hash", num_embeddings = 50, embedding_dim = 8 }
words   = { kind = "multi_valued", encoding = "hash", num_embeddings = 40, embedding_dim = 8 }
city    = { kind = "categorical", encoding = "vocabulary", vocabulary = "fit", embedding_dim = 8 }
code    = { kind = "categorical", encoding = "vocabulary", vocabulary = "fit", min_count = 2, embedding_dim = 8 }
clamped = { kind = "categorical", num_embeddings = 10, embedding_dim = 8, on_invalid = "modulo" }
lost    = { kind = "multi_valued", num_embeddings = 10, embedding_dim = 8, on_invalid = "null" }
weight  = { kind = "numeric", transform = "standardise", mean = "fit", std = "fit", on_invalid = "null" }
shop_city  = { kind = "cross", of = ["shop", "city"], num_embeddings = 90, embedding_dim = 8 }
user_words = { kind = "cross", of = ["user", "words"], max_length = 2, num_embeddings = 70, embedding_dim = 8, pooling = "mean" }

[groups]
place = ["shop", "city", "code", "shop_city"]
"""


def serving_table(rows: int, seed: int) -> pa.Table:
    """small_table and columns for MORE_FIELDS, with nulls, unseen values and faults that the schema repairs."""
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
    """Write data, the fitted schema and the config of each run: run_table_wise.toml, and run_row_wise.toml, whose branches read slices of rows."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (split, rows) in enumerate((("train", 4_800), ("valid", 500), ("test", 2_000))):
        table = serving_table(rows, number + 1)
        pq.write_table(table, folder / f"{split}.parquet", row_group_size=300, write_page_checksum=True)
    head, groups = SCHEMA.split("[groups]")
    more, more_groups = MORE_FIELDS.split("[groups]")
    (folder / "unfitted.toml").write_text(head + more + "[groups]" + groups + more_groups)
    fitted = fit_schema(load_schema(folder / "unfitted.toml"), [folder / "train.parquet"], folder)
    (folder / "schema.toml").write_text(format_schema(fitted))
    for kind in KINDS:
        text = CONFIG.format(folder=folder).replace(f'out = "{folder}/run"', f'out = "{folder}/{kind}"')
        own = {"branch_dim": 'embeddings = "per_branch"\nbranch_dim'} if kind == "row_wise" else {}
        for old, new in (WIDER | own).items():
            assert old in text
            text = text.replace(old, new)
        (folder / f"run_{kind}.toml").write_text(text + f'\n[sharding]\nsharding_types = ["{kind}"]\n')


@functools.cache
def trained_runs(base: Path) -> Path:
    """Both kinds of run, trained, evaluated and predicted by serving_ranks.py, once for all of pytest's workers; `base`: its temporary folder."""
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "serving"
    with (folder.parent / "serving.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / "whole").exists():
            return folder
        write_serving_data(folder)
        run_script("serving_ranks.py", str(folder))
        (folder / "whole").touch()
    return folder


@functools.cache
def rank_results(folder: Path) -> dict:
    """What serving_ranks.py noted: scenario -> exit codes and words of each rank."""
    return json.loads((folder / "ranks.json").read_text())


@functools.cache
def long_results(folder: Path) -> dict:
    """The same of the scenarios that only long tests want."""
    run_script("serving_ranks.py", str(folder), "long")
    return json.loads((folder / "long.json").read_text())


def evaluated(folder: Path, scenario: str) -> dict:
    """What `mbcnet evaluate --json` printed in a scenario."""
    found = rank_results(folder).get(scenario) or long_results(folder)[scenario]
    assert set(found["codes"]) == {0}, found["words"]
    return json.loads(found["words"][0].splitlines()[-1])


def printed(action: Callable[[], int]) -> tuple[int, str, str]:
    """The exit code that an action returns, and what it wrote to stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = action()
    return code, out.getvalue(), err.getvalue()


def printed_by(*argv) -> tuple[int, str, str]:
    """Run `mbcnet` in this process: exit code, and what it wrote to stdout and stderr."""
    return printed(lambda: main([str(each) for each in argv]))


def artifact_of(runs: Path, kind: str = "row_wise", rows: str = "int8") -> Path:
    """A trained run as an artifact, exported once for all of pytest's workers."""
    folder = runs / f"{kind}_{rows}"
    with (runs / "artifacts.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            argv = ("export", runs / kind, "--out", folder, "--rows", rows, "--no-aot")
            code, out, err = printed_by(*argv)
            assert code == 0, err
            assert "test, 2,000 rows of 1 file, against the float model" in out and "largest change" in out
    return folder


def bare_environment(folder: Path, packages: list[str]) -> Path:
    """Make an environment that holds these packages of ours and what they need, and no other; return its Python."""
    venv.create(folder, symlinks=True)
    site = next(folder.glob("lib/python*/site-packages"))
    wanted, seen = list(packages), set()
    while wanted:
        name = re.split(r"[^A-Za-z0-9._-]", wanted.pop())[0].lower().replace("_", "-")
        if name in seen:
            continue
        seen.add(name)
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform, or optional
        wanted += [need for need in found.requires or [] if "extra ==" not in need]
        for top in {Path(str(file)).parts[0] for file in found.files or []} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(found.locate_file(top))).resolve())
    return folder / "bin" / "python"
