"""Whether this tree does what another commit does: losses, tables, optimizer state, metrics and scores, bit for bit, on this machine.

    python benchmarks/same_as.py --against COMMIT [--quick] [--json]

The other commit is checked out beside this tree (git worktree) and both are driven as a user drives them, by the `mbcnet` command, one after
the other in folders of their own, by the other's configs and prepared schemas, since shipped ones may change on purpose. Three runs of 30 steps, each by one process and by two ranks: the demo on 20,000 synthetic rows, Adult
(left out where its files are not beside the repository), and a log with a field of every kind and encoding. Compared are the data files
that are written, every number of metrics.jsonl that is not a time, every tensor of the last checkpoint, what `mbcnet evaluate --json`
prints and what `mbcnet predict` writes; and this tree's evaluation of the other's run folder, for old checkpoints have to load.
`--quick`: the log of every kind, one process. Exit code 1 and one line for each difference if there is any.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from safetensors.numpy import load_file
from side_by_side import ROOT, mbcnet, parser_of, settings
from small_log import write_log

from mbcnet_rec.config import EARLIER
from mbcnet_rec.logs.metrics_log import TIMINGS

STEPS = 30
RUN = (
    f"train.max_steps={STEPS}", "train.log_every=1", "train.eval_every=15", "train.device=cpu", "train.keep_last=3",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One run that both trees make."""

    name: str
    config: str  # TOML file, relative to the tree, or to the working folder
    scored: str  # the data that `mbcnet predict` scores
    out: str = ""  # folder into which data are prepared
    prepare: tuple[str, ...] = ()  # arguments of the `mbcnet` command that does it; empty: they lie there


ADULT = ROOT.parent / "shared" / "datasets" / "adult"
CASES = (
    Case("kinds", "kinds/run.toml", "kinds/test.parquet"),
    Case("demo", "mbcnet_rec/configs/demo.toml", "prepared/demo/ds=2024-05-14", "prepared/demo",
         ("data", "synth", "--rows", "20000")),
    Case("adult", "mbcnet_rec/configs/adult.toml", "prepared/adult/test", "prepared/adult",
         ("data", "prepare", "adult", "--src", str(ADULT))),
)  # fmt: skip


LATER = ("dead", "zch_admissions/", "unseen/")  # keys that lines have had since


def make_run(tree: Path, folder: Path, case: Case, run: str, other: Path) -> None:
    """Train by the other tree's config, with what its defaults were where options have come since."""
    config = str(other / case.config) if (other / case.config).exists() else case.config
    options = EARLIER if "EARLIER" in (tree / "mbcnet_rec/config.py").read_text(encoding="utf-8") else ()
    words = ("train", "--config", config, *settings(f"train.out={run}", *RUN, *options))
    mbcnet(*words, folder=folder, tree=tree, ranks=int(run.rpartition("-")[2]))


def logged(run: Path) -> dict[str, Any]:
    """Every number of metrics.jsonl that is no time."""
    found = {}
    for text in (run / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        for key, value in line.items():
            if line["split"] != "ids" and key not in TIMINGS and not key.startswith(LATER):
                found[f"{line['split']} {line['step']} {key}"] = value
    return found


def tensors(run: Path, step: int = STEPS) -> dict[str, str]:
    """Digests of a checkpoint's tensors, by logical name and place in it. What resumes a log line only is left out."""
    folder, found = run / "checkpoints" / f"step_{step}", {}
    for file in json.loads((folder / "manifest.json").read_text())["body"]["files"]:
        held = load_file(folder / file["file"])
        for number, (name, offsets, sizes) in enumerate(file["pieces"]):
            if not name.startswith("window"):
                digest = hashlib.sha256(np.ascontiguousarray(held[str(number)]).tobytes()).hexdigest()
                found[f"{name} {offsets} {sizes}"] = digest
    return found


def files(folder: Path) -> dict[str, str]:
    """Digests of every Parquet file below a folder, and of what every TOML file says, but for the types of ids that `schema fit` adds, and widths."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".toml":
            table = tomllib.loads(path.read_text(encoding="utf-8"))
            for entry in (table, *table.get("fields", {}).values()):
                for key in ("type", "group_type", "embedding_dim"):
                    entry.pop(key, None)
            found[str(path.relative_to(folder))] = hashlib.sha256(repr(table).encode()).hexdigest()
        elif path.suffix == ".parquet":
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def scores(folder: Path) -> dict[str, str]:
    """Digests of what `mbcnet predict` wrote, column by column."""
    table = pq.read_table(folder)
    values = {name: str(table[name].to_pylist()) for name in table.column_names}
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in values.items()}


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Numbers of nested JSON by path; seconds, and how many files there were, are left out."""
    if isinstance(value, dict):
        told = {key: child for key, child in value.items() if "second" not in key and key != "files"}
        pairs = [flat(child, f"{prefix}/{key}") for key, child in told.items()]
    elif isinstance(value, list):
        pairs = [flat(child, f"{prefix}/{number}") for number, child in enumerate(value)]
    else:
        return {prefix: value}
    return {key: leaf for each in pairs for key, leaf in each.items()}


def differences(what: str, ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """One line for each key whose values differ; keys of one side only count too. repr: NaN is equal to NaN, and every bit counts."""
    sides = {key: (ours.get(key, "absent"), theirs.get(key, "absent")) for key in {**theirs, **ours}}
    return [
        f"{what}: {key}: {str(a)[:60]} here, {str(b)[:60]} there" for key, (a, b) in sides.items() if repr(a) != repr(b)
    ]


@contextmanager
def checked_out(commit: str, folder: Path) -> Iterator[Path]:
    """A worktree of a commit, removed afterwards."""
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--detach", "-q", str(folder), commit], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def compare(case: Case, ranks: int, other: Path, work: Path) -> list[str]:
    """Make one run in both trees and compare everything that it left."""
    run, scored = f"runs/{case.name}-{ranks}", f"scored/{case.name}-{ranks}"
    sides = {"there": other, "here": ROOT}
    seen: dict[str, dict[str, dict[str, Any]]] = {}
    for side, tree in sides.items():
        folder = work / side
        if case.prepare and not (folder / case.out).exists():
            mbcnet(*case.prepare, "--out", case.out, folder=folder, tree=tree)
        written = files(folder / case.out) if case.prepare else {}
        if case.prepare:
            shutil.copy(work / "there" / case.out / "schema.toml", folder / case.out / "schema.own.toml")
            os.replace(folder / case.out / "schema.own.toml", folder / case.out / "schema.toml")
        make_run(tree, folder, case, run, other)
        evaluated = json.loads(mbcnet("evaluate", run, "--json", folder=folder, tree=tree))
        mbcnet("predict", run, "--data", case.scored, "--out", scored, folder=folder, tree=tree)
        seen[side] = {
            "metrics.jsonl": logged(folder / run),
            "checkpoint": tensors(folder / run),
            "data": written,
            "evaluate": flat(evaluated),
            "predict": scores(folder / scored),
        }
    where, found = f"{case.name}, {ranks} rank(s)", []
    for what, theirs in seen["there"].items():
        found += differences(f"{where}: {what}", seen["here"][what], theirs)
    old_run = json.loads(mbcnet("evaluate", run, "--json", folder=work / "there"))
    return found + differences(f"{where}: evaluate of the other's run", flat(old_run), seen["there"]["evaluate"])


def main() -> int:
    parser = parser_of(__doc__)
    words = "the other commit (default: HEAD)"
    parser.add_argument("--against", default="HEAD", metavar="COMMIT", help=words)
    parser.add_argument("--only", nargs="+", choices=[case.name for case in CASES], help="these runs")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    args = parser.parse_args()
    there = [case for case in CASES if case.name != "adult" or ADULT.is_dir()]
    chosen = there[:1] if args.quick else [case for case in there if case.name in (args.only or case.name)]
    found: list[str] = []
    made = [(case, ranks) for case in chosen for ranks in ([1] if args.quick else args.ranks)]
    with tempfile.TemporaryDirectory() as name, checked_out(args.against, Path(name) / "tree") as other:
        for side in ("here", "there"):
            write_log(Path(name) / side / "kinds")
        for case, ranks in made:
            lines = compare(case, ranks, other, Path(name))
            print(f"{case.name}, {ranks} rank(s): {len(lines) or 'no'} differences", flush=True)
            print("\n".join(f"  {line}" for line in lines[:40]), flush=True)
            found += lines
    if args.json:
        result = {"against": args.against, "runs": len(made), "differences": len(found), "same": not found}
        print(json.dumps(result))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
