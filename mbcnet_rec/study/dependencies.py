"""What the numbers of a run depend on, as JSON values: config, schema, vocabularies, data, other runs and plans, the models' code.

A study names its runs' folders by a hash of it; tuning keeps it beside its trials, and says what differs when it is started again.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import mbcnet_rec.model
from data.errors import some_of
from data.reading.files import resolve_files
from data.reading.fingerprint import mark_differences, mark_files
from data.reading.storage import path_parts
from data.schema import format_schema, load_schema
from data.schema.parse import to_toml_value
from mbcnet_rec.checkpoints.manifest import sha256_of
from mbcnet_rec.checkpoints.run_folder import storage_of
from mbcnet_rec.checkpoints.storage import best_step
from mbcnet_rec.config import RunConfig, flat
from mbcnet_rec.doctor import installed
from mbcnet_rec.scoring.trained_run import TrainedRun, load_run

# Keys that change no number, and paths whose content counts instead
APART = (
    "name", "schema", "data.train", "data.valid", "data.test", "data.attempts", "data.timeout_seconds", "sharding.plan", "train.out",
    "train.warm_start", "train.checkpoint_folder", "train.tracking", "train.timeout_seconds", "train.stall_seconds", "train.profile",
    "train.cuda_graph",
)  # fmt: skip
SHOWN = 3
LONGEST_SHOWN = 120  # characters of a value before and after
Known = dict[tuple[Any, ...], Any]  # what one command has read already: its runs share schema and data


def dependencies(config: RunConfig, known: Known) -> dict[str, Any]:
    """All that decides what a run of this config learns.

    Raises:
        InputError: the schema, a vocabulary, the data or the run of a warm start is missing.
    """

    def once(key: tuple[Any, ...], read: Callable[[], Any]) -> Any:
        if key not in known:
            known[key] = read()
        return known[key]

    splits = {split: getattr(config.data, split) for split in ("train", "valid", "test")}
    started, plan = config.train.warm_start, config.sharding.plan
    return {
        "config": {key: str(value) for key, value in flat(to_toml_value(config)) if key not in APART},
        **once(("schema", config.schema), partial(_schema, config.schema)),
        "data": {name: once(paths, partial(_marks, paths)) for name, paths in splits.items()},
        "warm start": once(("run", started), partial(_run, started)),
        "plan": once(("plan", plan), lambda: sha256_of(Path(plan)) if plan else ""),
        "code of the models": f"{installed('mbcnet-rec')} {_code()}",  # our version, where it is installed
    }


def digest_of(depends: Mapping[str, Any]) -> str:
    """SHA-256 of dependencies, as hex digits."""
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """In what dependencies differ, in words; an empty string if in nothing."""
    found: list[str] = []
    for part in now:
        old, new = before.get(part, {}), now[part]
        if old == new:
            continue
        if part == "data":
            found += [
                f"data.{split}: {words}" for split in new if (words := mark_differences(old.get(split, []), new[split]))
            ]
        elif isinstance(new, dict):
            prefix = "" if part == "config" else f"{part} "
            pairs = {key: (old.get(key, "none"), new.get(key, "none")) for key in {**old, **new}}
            found += [
                f"{prefix}{key}" + (f" {then} -> {here}" if len(then) + len(here) < LONGEST_SHOWN else "")
                for key, (then, here) in pairs.items()
                if then != here
            ]
        else:
            found.append(part)
    return some_of(found, SHOWN)


def _schema(path: str) -> dict[str, Any]:
    """A schema line by line, without comments and blanks, and its vocabularies' hashes."""
    schema = load_schema(path)
    lines = [line for line in format_schema(schema).splitlines() if line]
    files = sorted({each.vocabulary for each in schema.features if each.encoding == "vocabulary"})
    return {
        "schema": {line.partition(" = ")[0].strip(): line.partition(" = ")[2] for line in lines},
        "vocabulary": {name: sha256_of(schema.folder / name) for name in files},
    }


def _marks(paths: tuple[str, ...]) -> list[list[Any]]:
    """The marks of a split's files, by all that they hold; folders of Hive partitions, which hold values, are part of the name."""
    files = resolve_files(paths) if paths else []
    folders = ["/".join(part for part in path_parts(file)[:-1] if "=" in part) for file in files]
    marks = zip(folders, mark_files(files, contents=True), strict=True)
    return [[f"{folder}/{mark.name}".lstrip("/"), mark.size, mark.sha256] for folder, mark in marks]


def _run(folder: str) -> str:
    if not folder:
        return ""
    config = load_run(Path(folder))
    step = best_step(storage_of(config.train, Path(folder)))
    return "" if step is None else TrainedRun(config, Path(folder), step).digest()


@cache
def _code() -> str:
    """A hash of the models' files, which people change while a study runs."""
    root = Path(mbcnet_rec.model.__file__).parent
    texts = [path.read_bytes() for path in sorted(root.rglob("*.py"))]
    return hashlib.sha256(b"".join(texts)).hexdigest()
