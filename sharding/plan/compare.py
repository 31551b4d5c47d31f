"""How a plan differs from another plan, from a schema and from what a run asks for."""

import json
from dataclasses import asdict, fields
from typing import Any

from data.errors import InputError, some_of
from data.schema import Schema
from sharding.plan.constraints import CARRIED, ShardingConfig
from sharding.plan.placement import REPLAN, Plan, TablePlan, check_shape

HEAD = [each.name for each in fields(Plan) if each.name not in ("tables", "versions", "dense", "format")]
DIFFERENCES_SHOWN = 5


def compare_plans(old: Plan, new: Plan) -> dict[str, Any]:
    """Differences as values: {"head": {key: [old, new]}, "tables": {name: {key: [old, new]}}}. An absent table is None."""
    head = {key: [getattr(old, key), getattr(new, key)] for key in HEAD}
    tables: dict[str, Any] = {}
    for name in dict.fromkeys((*old.tables, *new.tables)):
        before, after = old.tables.get(name), new.tables.get(name)
        if before is None or after is None:
            tables[name] = {"place": [before and placement_text(before), after and placement_text(after)]}
        elif before != after:
            left, right = asdict(before), asdict(after)
            tables[name] = {key: [left[key], right[key]] for key in left if left[key] != right[key]}
    return {"head": {key: pair for key, pair in head.items() if pair[0] != pair[1]}, "tables": tables}


def placement_text(table: TablePlan) -> str:
    """A table's placement in a few words."""
    where = f"on {ranks_text(table.ranks)}" if table.ranks else "on all ranks"
    return f"{table.sharding_type} {table.compute_kernel} {where}"


def ranks_text(ranks: tuple[int, ...]) -> str:
    """Ranks for people: 8-15, 3, 9."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in spans) or "all"


def diff_lines(found: dict[str, Any]) -> list[str]:
    """What `compare_plans` found, as lines for people."""
    lines = [f"{key}: {_value(before)} -> {_value(after)}" for key, (before, after) in found["head"].items()]
    for name, changes in found["tables"].items():
        if "place" in changes:
            before, after = changes["place"]
            lines.append(f"- {name}: {before}" if after is None else f"+ {name}: {after}")
        else:
            changed = (f"{key} {_value(old)} -> {_value(new)}" for key, (old, new) in changes.items())
            lines.append(f"~ {name}: {', '.join(changed)}")
    return lines


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        return ranks_text(value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value) or "none"


def check_plan(
    plan: Plan,
    schema: Schema,
    *,
    world_size: int,
    device: str,
    source: str,
    local_world_size: int = 0,
    optimizer: str = "",
) -> None:
    """Refuse a plan that was made for another world size, schema, optimizer or device, or that the platform computes wrongly.

    A `local_world_size` of 0 and an empty `optimizer` are not compared; `source` names the plan in messages.
    """
    shape = f"use -j {plan.hosts}x{plan.local_world_size}, or "
    problem = ""
    if plan.world_size != world_size:
        problem = f"world_size = {plan.world_size}, but this run has {world_size} ranks; {shape}"
    elif local_world_size and plan.local_world_size != local_world_size:
        problem = (
            f"local_world_size = {plan.local_world_size}, but this run has {local_world_size} ranks a host; {shape}"
        )
    elif plan.device != device:
        problem = f"device = {plan.device!r}, but this run computes on {device!r}; "
    elif optimizer and plan.optimizer != optimizer:
        problem = f"optimizer = {plan.optimizer!r}, but this run's tables use {optimizer!r}; "
    elif differences := schema_differences(plan, schema):
        problem = f"made for another schema: {some_of(differences, DIFFERENCES_SHOWN)}; "
    if problem:
        raise InputError(f"{source}: {problem}{REPLAN}, or leave sharding.plan empty")
    check_shape(plan, f"{source}: ")


def constraint_differences(plan: Plan, config: ShardingConfig) -> list[str]:
    """How a plan differs from what a run's [sharding] asks for by name, which a default value does not; empty if it keeps to all of it."""
    usual = ShardingConfig()
    pairs = [
        (key, getattr(plan, key), getattr(config, key))
        for key in CARRIED
        if getattr(config, key) not in (getattr(usual, key), getattr(plan, key))
    ]
    for name, asked in config.tables.items():
        where, table = f"tables.{name}", plan.tables.get(name)
        if table is None:
            pairs.append((where, None, None))
            continue
        asks = (
            ("sharding_types", table.sharding_type, asked.sharding_types, table.sharding_type in asked.sharding_types),
            ("compute_kernels", table.compute_kernel, asked.compute_kernels, table.compute_kernel in asked.compute_kernels),
            ("ranks", table.ranks, asked.ranks, set(table.ranks) <= set(asked.ranks)),
            ("cache_ratio", table.cache_ratio, asked.cache_ratio, table.cache_ratio in (0, asked.cache_ratio)),
        )  # fmt: skip
        pairs += [(f"{where}.{key}", planned, wanted) for key, planned, wanted, kept in asks if wanted and not kept]
    return [
        f"{key}: plan {json.dumps(planned)}, run {json.dumps(wanted)}" if planned is not None else f"{key}: not in the plan"
        for key, planned, wanted in pairs
    ]  # fmt: skip


def schema_differences(plan: Plan, schema: Schema) -> list[str]:
    """How the tables of a plan and of a schema differ, one phrase a table; empty if the plan is of this schema."""
    tables = {table.name: table for table in schema.tables}
    lines = [f"table {name} is not planned" for name in tables if name not in plan.tables]
    lines += [f"table {name} is not in the schema" for name in plan.tables if name not in tables]
    for name, planned in plan.tables.items():
        if name not in tables:
            continue
        table = tables[name]
        pairs = (
            ("num_embeddings", planned.num_embeddings, table.num_embeddings),
            ("embedding_dim", planned.embedding_dim, table.embedding_dim),
            ("fields", planned.bags, len(table.feature_names)),
            ("zch_buckets", planned.zch_buckets, table.zch.buckets if table.zch else 0),
            ("positions", planned.positions, table.positions),
        )
        changed = [f"{key} {old:,} -> {new:,}" for key, old, new in pairs if old != new]
        if changed:
            lines.append(f"table {name}: {', '.join(changed)}")
    now = schema.fingerprint()
    if not lines and plan.schema != now:
        lines.append(f"fingerprint {plan.schema} -> {now} (tables are equal; fields or groups differ)")
    return lines
