"""Compares a checkpoint with a run before anything is loaded: tables added, removed or resized, another optimizer, another schema.

What fits is compared by logical tensors, so world size and plan do not matter, with one exception: rowwise Adagrad keeps one
number a row and column shard, so its state cannot move between cuts into columns.
"""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor

from data.errors import InputError
from mbcnet_rec.checkpoints.shards import Saved, TensorShard, load_shards, shards_of
from mbcnet_rec.checkpoints.zch_state import check_rows, tables_of_other_rows, zch_buckets, zch_table_of
from mbcnet_rec.runtime.process import Process, agreed
from mbcnet_rec.training.built import Built
from sharding.plan.placement import Plan
from sharding.plan.plan_file import plan_text

_TABLE = re.compile(r"embedding_bags\.([^/]+)\.weight")
SHOWN = 8


def describe_run(built: Built) -> dict[str, Any]:
    """The facts about its run that a checkpoint stores besides tensors, as JSON values."""
    return {
        "schema": built.plan.schema,
        "plan": hashlib.sha256(plan_text(built.plan).encode()).hexdigest()[:12],
        "optimizer": built.optim.embedding.name,
        "data_type": built.plan.data_type,
        "column_shards": column_shards(built.plan),
        "zch_buckets": zch_buckets(built.plan),
        "seed": built.seed,
    }


def saved_run(saved: Saved) -> dict[str, Any]:
    """The facts about its run that a checkpoint stores; see `describe_run`.

    Raises:
        InputError: they are missing or malformed.
    """
    run = saved.manifest.extra.get("run", {})
    shards = run.get("column_shards", {}) if isinstance(run, dict) else None
    if not isinstance(shards, dict) or any(type(count) is not int for count in shards.values()):
        raise InputError(f"{saved.folder}: does not say which run wrote it; use another checkpoint")
    return run


def column_shards(plan: Plan) -> dict[str, int]:
    """Tables that are cut into columns, with the number of shards."""
    return {
        name: len(table.ranks)
        for name, table in plan.tables.items()
        if table.sharding_type == "column_wise" and len(table.ranks) > 1
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
    """How a checkpoint and a run differ.

    Attributes:
        lines: one phrase for each difference in a table, the schema or the optimizer.
        dense: kind of difference -> tensors of the dense part that have it.
        fresh: names of logical tensors that keep their initial values in a partial load.
        grown: names of those whose first rows are loaded, since the table has more rows now.
        refusals: differences that even a partial load cannot handle, each with what to do.
    """

    lines: list[str] = field(default_factory=list)
    dense: dict[str, list[str]] = field(default_factory=dict)
    fresh: set[str] = field(default_factory=set)
    grown: set[str] = field(default_factory=set)
    refusals: list[str] = field(default_factory=list)

    def note(self, name: str, difference: str, kind: str) -> None:
        """Record a difference: in full for a table, by its kind for a tensor of the dense part, which has hundreds."""
        if _TABLE.search(name):
            self.lines.append(f"{_what(name)}: {difference}")
        else:
            self.dense.setdefault(kind, []).append(f"{name.split('/', 1)[1]}: {difference}")

    @property
    def phrases(self) -> list[str]:
        """All differences, one phrase each; those of the dense part by number, with the first one."""
        return self.lines + [
            f"dense part: {len(found)} tensors {kind} (such as {found[0]})"
            for kind, found in self.dense.items()
        ]


def compare(saved: Saved, wanted: dict[str, tuple[int, ...]], run: dict[str, Any]) -> Differences:
    """Compare a checkpoint with what a run wants.

    Args:
        saved: the checkpoint.
        wanted: logical tensor -> shape, over all ranks.
        run: describe_run of this run.
    """
    report = Differences()
    old = saved_run(saved)
    _compare_columns(report, old, run, wanted)
    whats = {"optimizer": "optimizer of the tables", "data_type": "numbers of the tables", "schema": "schema"}
    for key, what in whats.items():
        if old.get(key) != run[key]:
            report.lines.append(f"{what}: {str(old.get(key))[:80]} -> {run[key]}")
    other_optimizer = old.get("optimizer") != run["optimizer"]
    parameters = {name for name in wanted if name.startswith("model/")}
    saved_parameters = {name for name in saved.shapes if name.startswith("model/")}
    _compare_ids(report, saved, wanted, tables_of_other_rows(old, run, saved_parameters, parameters))
    for name in sorted(saved_parameters - parameters - report.fresh):
        report.note(name, "removed", "removed")
    for name in sorted(parameters - report.fresh):
        before, now = saved.shapes.get(name), wanted[name]
        if before == now:
            continue
        if before is None:
            report.note(name, "added", "added")
        elif _TABLE.search(name) and before[1:] == now[1:] and before[0] < now[0]:
            report.lines.append(f"{_what(name)}: {before[0]:,} -> {now[0]:,} rows")
            report.grown.add(name)
            continue
        else:
            report.note(name, f"shape {_shape(before)} -> {_shape(now)}", "of another shape")
        report.fresh.add(name)
    for name in sorted(set(wanted) - parameters):
        parameter = "model/" + name.split("/")[1]
        before, now = saved.shapes.get(name), wanted[name]
        if parameter in report.fresh or (other_optimizer and _TABLE.search(name)):
            report.fresh.add(name)
        elif before == now:
            continue
        elif parameter in report.grown and before is not None and before[1:] == now[1:]:
            report.grown.add(name)
        else:
            report.note(
                name, f"optimizer state {_shape(before)} -> {_shape(now)}", "of another optimizer state"
            )
            report.fresh.add(name)
    return report


def _compare_ids(
    report: Differences, saved: Saved, wanted: dict[str, tuple[int, ...]], other_rows: set[str]
) -> None:
    """A table of encoding zch whose rows belong to other ids than in the checkpoint starts fresh as a whole."""
    names = {name for name in (*wanted, *saved.shapes) if name.startswith("model/")}
    resized = {zch_table_of(name) for name in names if wanted.get(name) != saved.shapes.get(name)} - {""}
    for table in sorted(other_rows | resized):
        report.lines.append(
            f"table {table}: its rows are of other ids (encoding zch, num_embeddings or zch_buckets)"
        )
    for name in names:
        if (zch_table_of(name) or table_of(name)) in other_rows | resized:
            report.fresh.add(name)


def _compare_columns(
    report: Differences, old: dict[str, Any], run: dict[str, Any], wanted: dict[str, tuple[int, ...]]
) -> None:
    if run["optimizer"] != "rowwise_adagrad" or old.get("optimizer") != "rowwise_adagrad":
        return
    before, now = old.get("column_shards", {}), run["column_shards"]
    for table in sorted(set(before) | set(now)):
        if before.get(table, 1) == now.get(table, 1):
            continue
        if any(table_of(name) == table for name in wanted):
            report.refusals.append(
                f"table {table}: {before.get(table, 1)} -> {now.get(table, 1)} column shards: rowwise Adagrad keeps one number "
                "a row and shard, which cannot be cut or joined; keep the table's columns as they were in the plan, use a "
                "plan without column_wise from the start, or train with optim.embedding.name = 'adagrad'"
            )


def table_of(name: str) -> str:
    """The table that a logical tensor belongs to; empty for all others."""
    found = _TABLE.search(name)
    return found[1] if found else ""


def _what(name: str) -> str:
    table = table_of(name)
    return f"table {table}" if table else f"tensor {name.split('/', 1)[1]}"


def _shape(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else "x".join(f"{size}" for size in shape) or "scalar"


def all_shapes(shards: Iterable[TensorShard], process: Process) -> dict[str, tuple[int, ...]]:
    """Logical tensor -> shape over all ranks; a collective."""
    own = {shard.name: shard.global_shape for shard in shards}
    if process.world_size == 1:
        return own
    gathered: list[Any] = [None] * process.world_size
    dist.all_gather_object(gathered, own)
    return {name: tuple(shape) for part in gathered for name, shape in part.items()}


def load_checked(saved: Saved, built: Built, process: Process, *, allow_partial: bool = False) -> list[str]:
    """Load a checkpoint after a comparison; every rank calls it.

    Returns:
        What a partial load did, a line each; empty where everything fits.

    Raises:
        InputError: they differ and `allow_partial` is not set, or no partial load bridges the difference.
    """
    init_states(built)
    shards = shards_of(built.model, built.optimizer)
    report = compare(saved, all_shapes(shards, process), describe_run(built))
    if report.refusals:
        raise InputError(f"{saved.folder}: {report.refusals[0]}")
    phrases = report.phrases
    if phrases and not allow_partial:
        more = f"; and {len(phrases) - SHOWN} more" if len(phrases) > SHOWN else ""
        raise InputError(
            f"{saved.folder}: belongs to another model: {'; '.join(phrases[:SHOWN])}{more}; use that run's config and "
            "schema, or load what fits with --allow-partial"
        )
    special = report.fresh | report.grown
    with agreed(process):
        load_shards(
            saved, [shard for shard in shards if shard.name not in special], process.rank, process.world_size
        )
        for shard in shards:
            if shard.name in report.grown:
                saved.fill_rows(shard)
        check_rows(saved, built.model)
    return [f"partial load: {phrase}" for phrase in phrases + _outcome(report)] if phrases else []


def _outcome(report: Differences) -> list[str]:
    """What a partial load left at its initial values, one line for each."""
    tables = {name: _what(name) for name in report.fresh | report.grown if _TABLE.search(name)}
    fresh = {tables[name] for name in report.fresh & tables.keys() if name.startswith("model/")}
    states = {tables[name] for name in report.fresh & tables.keys()} - fresh
    rows = {tables[name] for name in report.grown}
    lines = [f"{what} starts fresh" for what in sorted(fresh)]
    lines += [f"{what} is loaded, its optimizer state starts fresh" for what in sorted(states)]
    lines += [f"{what} is loaded, its new rows start fresh" for what in sorted(rows)]
    others = [name for name in report.fresh - tables.keys() if not zch_table_of(name)]
    dense = sum(name.startswith("model/") for name in others)
    return lines + ([f"{dense} tensors of the dense part start fresh"] if dense else [])
