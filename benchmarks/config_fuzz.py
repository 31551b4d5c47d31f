"""Wrong values for every key of a run's config: each is trained with for a step, or refused in one line. Never a traceback.

    python benchmarks/config_fuzz.py --mutations 500 --seed 0

Every mutation runs `mbcnet train` in a process of its own, forked from one that has torchrec imported, with a limit on its memory.
"""

import dataclasses
import json
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import typing
from pathlib import Path
from typing import Any

import torch
from side_by_side import parser_of, print_figures, settings
from small_log import LONG_RUN, write_log

from mbcnet_rec.cli import main as mbcnet
from mbcnet_rec.config import RunConfig
from mbcnet_rec.plugins import model_class
from mbcnet_rec.run_training import run_training  # noqa: F401 (imports torchrec once, before the forks)

NUMBERS = (0, -1, 1, 2, 3, 7, 2**31, 2**63, 10**18, 0.5, 1e-300, 1e300, -0.0)
TEXTS = ("", "x", "none", "../..", "/dev/null/x", "a\nb", "\x00", "é" * 300, "s3://", "auto", "true", "[0]")
LISTS = ([], [0], [-1], [1, 1], ["x"], [8, 8], [10**9], [[]], [0.5])
MEMORY_BYTES = 6 << 30
SECONDS = 60.0
OK = (0, 2)


def keys_of(cls: Any, path: str = "") -> dict[str, Any]:
    """Dotted key -> type hint, for every leaf of a config; of [model] with the tables of all models."""
    found, hints = {}, typing.get_type_hints(cls)
    hints |= {"model": model_class()} if cls is RunConfig else {}
    for name in (each.name for each in dataclasses.fields(cls) if each.init):
        inner = dataclasses.is_dataclass(hints[name])
        found |= keys_of(hints[name], f"{path}{name}.") if inner else {f"{path}{name}": hints[name]}
    return found


def mutation(rng: random.Random, keys: dict[str, Any]) -> list[str]:
    """One to three overrides; half of the values are of the key's own type."""
    overrides = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        key = rng.choice(sorted(keys))
        hint, origin = keys[key], typing.get_origin(keys[key])
        by_origin = {typing.Literal: typing.get_args(hint), tuple: LISTS}
        by_hint = {int: NUMBERS, float: NUMBERS, bool: (True, False)}
        own: tuple[Any, ...] = by_origin.get(origin) or by_hint.get(hint) or TEXTS
        value = rng.choice(own if rng.random() < 0.7 else (*NUMBERS, *TEXTS, *LISTS))
        overrides.append(f"{key}={json.dumps(value)}")
    return overrides


def child(config: Path, out: Path, overrides: list[str], log: Path) -> None:
    """Train one step with the overrides; the exit code is the command's."""
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    torch.set_num_threads(1)
    os.chdir(out.parent)
    common = (*LONG_RUN, f"train.out={out}", "train.epochs=1", "train.max_steps=1")
    code = mbcnet(["train", "--config", str(config), *settings(*common, *overrides)])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def judge(code: int | None, words: str) -> str:
    """What is wrong with an outcome, or an empty string."""
    if "Traceback" in words:
        return "traceback"
    if code is None:
        return f"not over after {SECONDS:g} s"
    if code not in OK:
        return f"exit code {code}"
    said = [line for line in words.splitlines() if line.startswith("mbcnet: ") and "warning: " not in line]
    return "refused without a line" if code == 2 and len(said) != 1 else ""


def run(folder: Path, mutations: int, seed: int) -> dict[str, Any]:
    """Try mutations; return how many were trained, refused, and what failed."""
    config, rng = write_log(folder), random.Random(seed)
    keys = keys_of(RunConfig)
    context = multiprocessing.get_context("fork")
    counts = {"trained": 0, "refused": 0}
    failures = []
    for number in range(mutations):
        overrides = mutation(rng, keys)
        room = folder / f"try_{number}"
        room.mkdir()
        log = room / "log"
        process = context.Process(target=child, args=(config, room / "run", overrides, log))
        process.start()
        process.join(SECONDS)
        code = process.exitcode
        if code is None:
            process.kill()
            process.join()
        words = log.read_text(errors="replace")
        problem = judge(code, words)
        if problem:
            failures.append({"overrides": overrides, "problem": problem, "words": words[-600:]})
            print(f"{problem}: {overrides}\n{words[-600:]}", flush=True)
        else:
            counts["trained" if code == 0 else "refused"] += 1
        shutil.rmtree(room, ignore_errors=True)
    return {"mutations": mutations, **counts, "failures": len(failures), "seed": seed}


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--mutations", type=int, default=500, help="at most 30 with --quick")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="config-fuzz-") as name:
        result = run(Path(name), min(args.mutations, 30) if args.quick else args.mutations, args.seed)
    print_figures(result, args.json)
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
