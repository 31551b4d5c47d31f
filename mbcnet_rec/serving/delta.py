"""What one artifact changes of another: changed rows of each table, ids that have lost or got a row, new values, and the small files whole.

    OUT/delta.json  changes.safetensors  vocabulary.json  and each file of the artifact that is another one, model.json among them

Rows are compared as they are served, so a row whose quantised bytes are the same is not in it. loader.py applies it.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from data.whole_folder import whole_folder
from mbcnet_rec.serving import loader as serving

CHUNK_ROWS = 1 << 20  # compared at a time
# files that a delta and an artifact write each in their way
OF_ONE = (serving.DELTA, serving.CHANGES, serving.TABLES, serving.VOCABULARY)


def write_delta(before: serving.ServingModel, parent: Path, child: Path, out: Path) -> dict[str, Any]:
    """Write what leads from the artifact in `parent`, which is loaded, to that in `child`; return rows and bytes of it and of the whole."""
    after = serving.load(child)
    changes: dict[str, Tensor] = {}
    rows = all_rows = 0
    for pooling, tables in after.tables.items():
        known = before.tables.get(pooling)
        earlier = serving.rows_of(known, before.spec["tables"][pooling]) if known is not None else {}
        for name, table in serving.rows_of(tables, after.spec["tables"][pooling]).items():
            places = changed_rows(table, earlier.get(name, table[:0]))
            changes |= {
                f"{pooling}/{name}/places": places.int() if len(table) < 2**31 else places,
                f"{pooling}/{name}/rows": table[places],
            }
            rows, all_rows = rows + len(places), all_rows + len(table)
    for name, pairs in after.id_rows.items():
        old = before.id_rows.get(name, pairs[:, :0])
        changes[name] = pairs[:, ~_held(pairs, old)].contiguous()
        changes[f"{name}/gone"] = old[0, ~_held(old, pairs)].contiguous()
    with whole_folder(out) as partial:
        save_file(changes, partial / serving.CHANGES)
        listed = {name: _changed(before, name, values.to_pylist()) for name, values in after.vocabularies.items()}
        (partial / serving.VOCABULARY).write_text(json.dumps(listed), encoding="utf-8")
        sums = {serving.MODEL: after.digest} | after.spec["files"]
        always = (serving.MODEL, serving.DENSE, serving.SCHEMA)
        for name, sha256 in sums.items():
            is_other = name in always or before.spec["files"].get(name) != sha256
            if is_other and name not in (serving.TABLES, serving.VOCABULARY):
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(child / name, partial / name)
        files = [path for path in sorted(partial.rglob("*")) if path.is_file()]
        written = {path.relative_to(partial).as_posix(): serving.sha256_of(path) for path in files}
        said = {"parent": before.digest, "files": written}
        (partial / serving.DELTA).write_text(json.dumps(said, indent=1), encoding="utf-8")
    size, whole = (sum(path.stat().st_size for path in each.rglob("*") if path.is_file()) for each in (out, child))
    freed = sum(values[: len(places)].count(None) for _, places, values in listed.values())
    return {"rows": rows, "all_rows": all_rows, "freed": freed, "bytes": size, "whole_bytes": whole}


def write_child(parent: Path, delta: Path, out: Path) -> None:
    """Write the artifact that a delta leads to, the parent's check.json besides; ValueError if it is damaged, or of another artifact."""
    model = serving.load(parent, verify=False).updated(delta)
    with whole_folder(out) as partial:
        for source in (parent, delta):
            unlike = shutil.ignore_patterns(*OF_ONE, serving.COMPILED)
            shutil.copytree(source, partial, ignore=unlike, dirs_exist_ok=True)
        rows = {pooling: tables.weights_host for pooling, tables in model.tables.items()} | model.id_rows
        save_file(rows, partial / serving.TABLES)
        vocabularies = {name: values.to_pylist() for name, values in model.vocabularies.items()}
        (partial / serving.VOCABULARY).write_text(json.dumps(vocabularies), encoding="utf-8")


def changed_rows(table: Tensor, before: Tensor) -> Tensor:
    """The places, ascending, of the rows that are other bytes than before, or were not there; (rows, bytes) uint8 each."""
    if table.shape[1:] != before.shape[1:]:
        return torch.arange(len(table))
    common = min(len(table), len(before))
    pairs = zip(table[:common].split(CHUNK_ROWS), before[:common].split(CHUNK_ROWS), strict=True)
    is_new = torch.ones(len(table) - common, dtype=torch.bool)
    return torch.cat([*((now != then).any(1) for now, then in pairs), is_new]).nonzero()[:, 0]


def _held(pairs: Tensor, others: Tensor) -> Tensor:
    """Which (id, row) pairs, (2, n) by ascending ids, are among others."""
    if not others.shape[1]:
        return torch.zeros(pairs.shape[1], dtype=torch.bool)
    place = torch.searchsorted(others[0].contiguous(), pairs[0].contiguous()).clamp_(max=others.shape[1] - 1)
    return (others[:, place] == pairs).all(0)


def _changed(before: serving.ServingModel, name: str, values: list[Any]) -> tuple[int, list[int], list[Any]]:
    """How many values there are, the places of those that take another's place (null: a row that is free), and these and the new ones at the end."""
    old = before.vocabularies[name].to_pylist() if name in before.vocabularies else []
    places = [place for place, (one, other) in enumerate(zip(old, values, strict=False)) if one != other]
    return len(values), places, [values[place] for place in places] + values[len(old) :]
