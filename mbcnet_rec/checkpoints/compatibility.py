"""Compares a checkpoint with a run before anything is loaded, and loads what fits: to resume, in part, or to start warm.

What fits is compared by logical tensors, so world size and plan do not matter, with one exception: rowwise Adagrad keeps one
number a row and column shard, so its state cannot move between cuts into columns.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.errors import InputError, some_of
from data.schema import Schema, load_schema
from data.schema.parse import read_toml
from mbcnet_rec.checkpoints.run_folder import CONFIG, storage_of, train_config_of
from mbcnet_rec.checkpoints.run_schema import other_ids, own_schema, saved_run
from mbcnet_rec.checkpoints.shards import Saved, Shape, TensorShard, shards_of
from mbcnet_rec.checkpoints.storage import best_step
from mbcnet_rec.checkpoints.zch_state import check_rows, tables_of_other_ids, zch_table_of
from mbcnet_rec.runtime.process import Process, agreed, from_all_ranks
from mbcnet_rec.training.built import Built
from mbcnet_rec.training.config import TrainConfig
from sharding.bridge.allocated import purge_caches
from sharding.plan.placement import plan_text

_TABLE = re.compile(r"embedding(?:_bag)?s\.([^/]+)\.weight")
_FACTS = (
    ("optimizer", "optimizer of the tables", ", its state starts fresh"),
    ("data_type", "numbers of the tables", ""),
    ("schema", "schema", ""),
)
FRESH, NEW_ROWS = ", starts fresh", ", its new rows start fresh"
SHOWN = 8
RowsAnew = Mapping[str, np.ndarray]  # table -> ascending rows whose value is another one than in the checkpoint
NO_ROWS = np.zeros(0, np.int64)


def describe_run(built: Built) -> dict[str, Any]:
    """The facts about its model that a checkpoint stores besides tensors, as JSON values; see run_start.py for those about its start."""
    plan = built.plan
    return {
        "schema": plan.schema,
        "plan": hashlib.sha256(plan_text(plan).encode()).hexdigest()[:12],
        "optimizer": built.optim.embedding.name,
        "data_type": plan.data_type,
        "column_shards": {
            name: len(table.ranks)
            for name, table in plan.tables.items()
            if table.sharding_type == "column_wise" and len(table.ranks) > 1
        },
        "zch_buckets": {name: table.zch_buckets for name, table in plan.tables.items() if table.zch_buckets},
        "seed": built.seed,
    }


def init_states(built: Built) -> None:
    """Create the optimizer state that torch creates at the first step only: state that does not exist is not loaded.

    TorchRec creates it by a step with zero gradients. At a learning rate of 0 that decays no weight, and the step is not counted.
    """
    for name, optimizer in built.optimizer.optimizers:
        if name == "fused":
            continue
        groups: list[Any] = list(optimizer.param_groups)
        rates = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = 0.0
        optimizer.init_state()
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
        for state in optimizer.state.values():
            if isinstance(state.get("step"), Tensor):
                state["step"].zero_()


@dataclass
class Differences:
    """How a checkpoint and a run differ."""

    other_ids: set[str]  # tables whose rows belong to other ids
    other_optimizer: bool  # whether the tables' optimizer is another one
    recut: list[str]  # tables whose optimizer state is of another cut into columns, with both numbers of shards
    # every difference, each with what starts fresh where the rest is loaded
    phrases: list[tuple[str, str]] = field(default_factory=list)
    fresh: set[str] = field(default_factory=set)  # logical tensors that cannot be loaded


def compare(saved: Saved, wanted: dict[str, Shape], built: Built) -> Differences:
    """Compare a checkpoint with a run that wants these logical tensors, of all ranks."""
    old, run = saved_run(saved.manifest, saved.folder), describe_run(built)
    other_ids = tables_of_other_ids(saved.shapes, wanted, old.get("zch_buckets", {}), run["zch_buckets"])
    recut: list[str] = []
    if old.get("optimizer") == run["optimizer"] == "rowwise_adagrad":
        before, now = old.get("column_shards", {}), run["column_shards"]
        for table in sorted({table_of(name) for name in wanted} & {*before, *now}):
            if before.get(table, 1) != now.get(table, 1):
                recut.append(f"table {table}: {before.get(table, 1)} -> {now.get(table, 1)}")
    found = Differences(other_ids, old.get("optimizer") != run["optimizer"], recut)
    for key, what, outcome in _FACTS:
        if old.get(key) != run[key]:
            found.phrases.append((f"{what}: {str(old.get(key))[:80]} -> {run[key]}", outcome))
    for table in sorted(other_ids):
        found.phrases.append((f"table {table}: rows of other ids (encoding zch, num_embeddings or zch_buckets)", FRESH))
    dense: dict[tuple[bool, ...], list[str]] = {}  # hundreds of tensors: told by kind of difference
    grown: set[str] = set()
    parameters = {name for name in saved.shapes if name.startswith("model/")}
    # sorted: a parameter, "model/...", comes before its optimizer state, "optim/..."
    for name in sorted(parameters | wanted.keys()):
        before, now = saved.shapes.get(name), wanted.get(name)
        table, is_state, parameter = table_of(name), name.startswith("optim/"), "model/" + name.split("/")[1]
        longer = bool(table and before and now and before[1:] == now[1:] and before[0] < now[0])
        without_state = is_state and bool(table) and found.other_optimizer
        if without_state or table in other_ids or parameter in found.fresh:
            found.fresh.add(name)
        elif before == now or (longer and parameter in grown):
            continue
        elif longer and not is_state:
            grown.add(name)
            found.phrases.append((f"table {table}: {_change(before, now)}", NEW_ROWS))
        else:
            if now is not None:
                found.fresh.add(name)
            what = f"{'optimizer state ' if is_state else ''}{_change(before, now)}"
            if table:
                found.phrases.append((f"table {table}: {what}", FRESH if now is not None else ""))
            else:
                kind = (is_state, before is None, now is None)
                dense.setdefault(kind, []).append(f"{name.split('/', 1)[1]}: {what}")
    for (_, _, is_gone), each in dense.items():
        found.phrases.append((f"dense part: {len(each)} tensors such as {each[0]}", "" if is_gone else FRESH))
    return found


def _change(before: Shape | None, now: Shape | None) -> str:
    if before is None or now is None:
        return "added" if before is None else "removed"
    then, here = ("x".join(map(str, shape)) or "scalar" for shape in (before, now))
    return f"shape {then} -> {here}"


def table_of(name: str) -> str:
    """The table that a logical tensor belongs to; empty for those of the dense part."""
    found = _TABLE.search(name)
    return found[1] if found else zch_table_of(name)


def all_shapes(shards: Iterable[TensorShard], process: Process) -> dict[str, Shape]:
    """Logical tensor -> shape over all ranks; a collective."""
    own = {shard.name: shard.global_shape for shard in shards}
    return {name: tuple(shape) for part in from_all_ranks(own, process) for name, shape in part.items()}


def load_checked(
    saved: Saved, built: Built, process: Process, *, allow_partial: bool = False, anew: RowsAnew | None = None
) -> list[str]:
    """Load a checkpoint after a comparison, on every rank; with `anew` tables may have grown. Returns what a partial load did, a line each.

    InputError if they differ and `allow_partial` is not set, or no partial load bridges the difference.
    """
    init_states(built)
    shards = shards_of(built.model, built.optimizer)
    report = compare(saved, all_shapes(shards, process), built)
    if report.recut:
        raise InputError(
            f"{saved.folder}: {report.recut[0]} column shards: rowwise Adagrad keeps one number a row and shard, "
            "which cannot be cut or joined; keep the table's columns as they were in the plan, use a plan without column_wise "
            "from the start, or train with optim.embedding.name = 'adagrad'"
        )
    if anew is not None:
        report.phrases = [each for each in report.phrases if each[1] != NEW_ROWS and not each[0].startswith("schema: ")]
    phrases = [what for what, _ in report.phrases]
    if phrases and not allow_partial:
        raise InputError(
            f"{saved.folder}: belongs to another model: {some_of(phrases, SHOWN)}; use that run's config and "
            "schema, or load what fits with --allow-partial"
        )
    _load(saved, built, process, [shard for shard in shards if shard.name not in report.fresh], anew or {})
    return [f"partial load: {what}{outcome}" for what, outcome in report.phrases]


def warm_start(train: TrainConfig, built: Built, schema: Schema, process: Process) -> str:
    """Copy tables and their optimizer state from the best checkpoint of `train.warm_start`; return a line on it. Every rank calls it.

    A table may have more rows here: the first ones are copied, so its ids must mean the same there (those of another hash size or another
    vocabulary do not, unless that one has only grown). Without `train.warm_start_tables` every table that both runs have is taken.
    InputError if there is no such run or table, a table is wider or longer there, or its rows are of other ids.
    """
    other, where = Path(train.warm_start), f"train.warm_start = {train.warm_start!r}"
    theirs = train_config_of(other)
    if theirs is None:
        raise InputError(f"{where}: no run folder (it has no {CONFIG}); name what `mbcnet train` wrote")
    storage = storage_of(theirs, other)
    step = best_step(storage)
    if step is None:
        raise InputError(f"{where}: holds no whole checkpoint; train it first")
    init_states(built)
    with storage.fetched(step) as folder:
        saved = Saved(folder)
        shards = shards_of(built.model, built.optimizer)
        wanted = all_shapes(shards, process)
        tables = _chosen_tables(train, saved, wanted)
        report = compare(saved, wanted, built)
        same_state = not report.other_optimizer and not report.recut
        taken = {name for name in wanted if table_of(name) in tables and (same_state or name.startswith("model/"))}
        before = own_schema(other, storage, step)
        # a run without a copy: what its config names, if it is still there
        with suppress(InputError, KeyError, TypeError):
            before = before or load_schema(read_toml(other / CONFIG)["schema"])
        why = other_ids(before, schema) if before is not None else {}
        why |= dict.fromkeys(report.other_ids, "encoding zch, num_embeddings or zch_buckets differ")
        for table in sorted(tables & why.keys()):
            raise InputError(
                f"{where}: table {table}: its rows are of other ids ({why[table]}); make the schemas equal there, "
                f"or leave the table out of train.warm_start_tables = {sorted(tables - why.keys())}"
            )
        for name in sorted(taken & report.fresh):
            raise InputError(
                f"train.warm_start: table {table_of(name)} has shape {saved.shapes.get(name)} there and {wanted[name]} here; wanted "
                "equal columns and at least as many rows here: change the schema, or leave the table out of "
                "train.warm_start_tables"
            )
        _load(saved, built, process, [shard for shard in shards if shard.name in taken])
    note = "with" if same_state else "without"
    return f"warm start from step {step} of {other}: {note} optimizer state: {', '.join(sorted(tables))}"


def _chosen_tables(train: TrainConfig, saved: Saved, wanted: Iterable[str]) -> set[str]:
    own, theirs = ({table_of(name) for name in names} - {""} for names in (wanted, saved.shapes))
    for name in train.warm_start_tables:
        for where, known in (("this run", own), (train.warm_start, theirs)):
            if name not in known:
                raise InputError(
                    f"train.warm_start_tables: {name!r} is not a table of {where}; wanted some of: {', '.join(sorted(own & theirs))}"
                )
    return set(train.warm_start_tables) or own & theirs


def _load(
    saved: Saved, built: Built, process: Process, shards: Iterable[TensorShard], anew: RowsAnew = MappingProxyType({})
) -> None:
    with agreed(process):
        for shard in shards:
            rows, live = torch.from_numpy(anew.get(table_of(shard.name), NO_ROWS)), shard.tensor.detach()
            # a state that is one number for the whole table has no rows
            stays = live.dim() > 0 and len(rows) > 0 and shard.global_shape[0] > int(rows[-1])
            if stays:
                rows = rows - shard.offsets[0]
                rows = rows[(rows >= 0) & (rows < len(live))].to(live.device)
            kept = live[rows] if stays else None
            saved.copy_into(shard, process.rank, process.world_size)
            if kept is not None:
                live[rows] = kept
        purge_caches(built.model)
        check_rows(saved, built.model)
