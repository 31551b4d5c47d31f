"""Wrong values for every key of a run's config: each is trained with for a step, or refused in one line. Never a traceback.

    python benchmarks/config_fuzz.py --mutations 500 --seed 0

Every mutation runs `mbcnet train` in a process of its own, forked from one that has torchrec imported, with a limit on its memory.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import typing
from pathlib import Path
from typing import Any

import torch
from crash_storm import write_data

from mbcnet_rec.cli import main as mbcnet
from mbcnet_rec.config import RunConfig
from mbcnet_rec.train import run_training  # noqa: F401 (imports torchrec once, before the forks)

NUMBERS = (0, -1, 1, 2, 3, 7, 2**31, 2**63, 10**18, 0.5, 1e-300, 1e300, -0.0)
TEXTS = ("", "x", "none", "../..", "/dev/null/x", "a\nb", "\x00", "é" * 300, "s3://", "auto", "true", "[0]")
LISTS = ([], [0], [-1], [1, 1], ["x"], [8, 8], [10**9], [[]], [0.5])
MEMORY_BYTES = 6 << 30
SECONDS = 60.0
OK = (0, 2)


def keys_of(cls: Any, path: str = "") -> dict[str, Any]:
    """Dotted key -> type hint, for every leaf of a config."""
    found = {}
    for name, hint in typing.get_type_hints(cls).items():
        if name not in {each.name for each in dataclasses.fields(cls) if each.init}:
            continue
        if dataclasses.is_dataclass(hint):
            found |= keys_of(hint, f"{path}{name}.")
        else:
            found[f"{path}{name}"] = hint
    return found


def mutation(rng: random.Random, keys: dict[str, Any]) -> list[str]:
    """One to three overrides; half of the values are of the key's own type."""
    overrides = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        key = rng.choice(sorted(keys))
        hint, origin = keys[key], typing.get_origin(keys[key])
        own: tuple[Any, ...] = TEXTS
        if origin is typing.Literal:
            own = typing.get_args(hint)
        elif origin is tuple:
            own = LISTS
        elif hint in (int, float):
            own = NUMBERS
        elif hint is bool:
            own = (True, False)
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
    args = ["train", "--config", str(config)]
    for setting in (f"train.out={out}", "train.epochs=1", "train.max_steps=1", *overrides):
        args += ["--set", setting]
    code = mbcnet(args)
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
    config, rng = write_data(folder), random.Random(seed)
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mutations", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="60 mutations")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="config-fuzz-"))
    start = time.perf_counter()
    try:
        result = run(folder, min(args.mutations, 60) if args.quick else args.mutations, args.seed)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(
        f"{result['mutations']} mutations in {time.perf_counter() - start:.0f} s: {result['trained']} trained, "
        f"{result['refused']} refused in one line, {result['failures']} failures"
    )
    if args.json:
        print(json.dumps(result))
    sys.exit(1 if result["failures"] else 0)


if __name__ == "__main__":
    main()
