"""Does a checkpoint fit this run? A report before anything is loaded: tables added, removed, resized, of other dims, other optimizer.

What fits is compared by logical tensors, so world size and plan do not matter, with one exception: rowwise Adagrad keeps one
number a row and column shard, so its state cannot move between cuts into columns.
"""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from data.errors import InputError
from mbcnet_rec.build import Built
from mbcnet_rec.config import RunConfig
from mbcnet_rec.training.checkpoint import Piece, Saved, load_pieces, pieces_of
from mbcnet_rec.training.process import Process
from sharding.plan import Plan, plan_text

_TABLE = re.compile(r"embedding_bags\.([^/]+)\.weight")
SHOWN = 8


def describe_run(built: Built, config: RunConfig) -> dict[str, Any]:
    """What a checkpoint notes of its run besides tensors, as JSON values."""
    return {
        "schema": built.plan.schema,
        "plan": hashlib.sha256(plan_text(built.plan).encode()).hexdigest()[:12],
        "optimizer": config.optim.embedding.name,
        "column_shards": column_shards(built.plan),
        "seed": config.train.seed,
    }


def column_shards(plan: Plan) -> dict[str, int]:
    """Tables that are cut into columns, with the number of shards."""
    return {
        name: len(table.ranks)
        for name, table in plan.tables.items()
        if table.sharding_type == "column_wise" and len(table.ranks) > 1
    }


def init_states(built: Built) -> None:
    """Make the state of optimizers that torch makes at the first step only: what does not exist is not loaded."""
    for name, optimizer in built.optimizer.optimizers:
        if name != "fused":
            optimizer.init_state()


@dataclass
class Report:
    """How a checkpoint and a run differ.

    Attributes:
        lines: one phrase a difference.
        fresh: names of logical tensors that keep their initial values in a partial load.
        grown: those whose first rows are loaded.
        refusals: differences that no partial load bridges, with the cure.
    """

    lines: list[str] = field(default_factory=list)
    fresh: set[str] = field(default_factory=set)
    grown: set[str] = field(default_factory=set)
    refusals: list[str] = field(default_factory=list)


def compare(saved: Saved, wanted: dict[str, tuple[int, ...]], run: dict[str, Any]) -> Report:
    """Compare a checkpoint with what a run wants.

    Args:
        saved: the checkpoint.
        wanted: logical tensor -> shape, over all ranks.
        run: describe_run of this run.
    """
    report = Report()
    old = saved.manifest.extra.get("run", {})
    _compare_columns(report, old, run, wanted)
    for key, what in (("optimizer", "optimizer of the tables"), ("schema", "schema")):
        if old.get(key) != run[key]:
            report.lines.append(f"{what}: {old.get(key)} -> {run[key]}")
    other_optimizer = old.get("optimizer") != run["optimizer"]
    parameters = {name for name in wanted if name.startswith("model/")}
    saved_parameters = {name for name in saved.shapes if name.startswith("model/")}
    for name in sorted(saved_parameters - parameters):
        report.lines.append(f"{_what(name)}: removed")
    for name in sorted(parameters):
        before, now = saved.shapes.get(name), wanted[name]
        if before == now:
            continue
        if before is None:
            report.lines.append(f"{_what(name)}: added")
        elif _TABLE.search(name) and before[1:] == now[1:] and before[0] < now[0]:
            report.lines.append(f"{_what(name)}: {before[0]:,} -> {now[0]:,} rows")
            report.grown.add(name)
            continue
        else:
            report.lines.append(f"{_what(name)}: shape {_shape(before)} -> {_shape(now)}")
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
            report.lines.append(f"{_what(name)}: optimizer state {_shape(before)} -> {_shape(now)}")
            report.fresh.add(name)
    return report


def _compare_columns(
    report: Report, old: dict[str, Any], run: dict[str, Any], wanted: dict[str, tuple[int, ...]]
) -> None:
    if run["optimizer"] != "rowwise_adagrad" or old.get("optimizer") != "rowwise_adagrad":
        return
    before, now = old.get("column_shards", {}), run["column_shards"]
    for table in sorted(set(before) | set(now)):
        if before.get(table, 1) == now.get(table, 1):
            continue
        if any(_table_of(name) == table for name in wanted):
            report.refusals.append(
                f"table {table}: {before.get(table, 1)} -> {now.get(table, 1)} column shards: rowwise Adagrad keeps one number "
                "a row and shard, which cannot be cut or joined; keep the table's columns as they were in the plan, use a "
                "plan without column_wise from the start, or train with optim.embedding.name = 'adagrad'"
            )


def _table_of(name: str) -> str:
    found = _TABLE.search(name)
    return found[1] if found else ""


def _what(name: str) -> str:
    table = _table_of(name)
    return f"table {table}" if table else f"tensor {name.split('/', 1)[1]}"


def _shape(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else "x".join(f"{size}" for size in shape) or "scalar"


def all_shapes(pieces: Iterable[Piece], process: Process) -> dict[str, tuple[int, ...]]:
    """Logical tensor -> shape over all ranks; a collective."""
    own = {piece.name: piece.global_shape for piece in pieces}
    if process.world_size == 1:
        return own
    gathered: list[Any] = [None] * process.world_size
    dist.all_gather_object(gathered, own)
    return {name: tuple(shape) for part in gathered for name, shape in part.items()}


def load_checked(
    saved: Saved, built: Built, config: RunConfig, process: Process, *, allow_partial: bool = False
) -> list[str]:
    """Load a checkpoint after a comparison; every rank calls it.

    Returns:
        What a partial load did, a line each; empty where everything fits.

    Raises:
        InputError: they differ and `allow_partial` is not set, or no partial load bridges the difference.
    """
    init_states(built)
    pieces = pieces_of(built.model, built.optimizer)
    report = compare(saved, all_shapes(pieces, process), describe_run(built, config))
    if report.refusals:
        raise InputError(f"{saved.folder}: {report.refusals[0]}")
    if report.lines and not allow_partial:
        more = f"; and {len(report.lines) - SHOWN} more" if len(report.lines) > SHOWN else ""
        raise InputError(
            f"{saved.folder}: belongs to another model: {'; '.join(report.lines[:SHOWN])}{more}; use that run's config and "
            "schema, or load what fits with --allow-partial"
        )
    special = report.fresh | report.grown
    load_pieces(
        saved, [piece for piece in pieces if piece.name not in special], process.rank, process.world_size
    )
    for piece in pieces:
        if piece.name in report.grown:
            saved.fill_rows(piece)
    if not report.lines:
        return []
    fresh = sorted({_what(name) for name in report.fresh if name.startswith("model/")})
    states = sorted({_what(name) for name in report.fresh if name.startswith("optim/")} - set(fresh))
    rows = sorted({_what(name) for name in report.grown})
    lines = [f"partial load: {line}" for line in report.lines]
    lines += [f"partial load: {what} starts fresh" for what in fresh]
    lines += [f"partial load: {what} is loaded, its optimizer state starts fresh" for what in states]
    return lines + [f"partial load: {what} is loaded, its new rows start fresh" for what in rows]
