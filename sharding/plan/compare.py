"""How two plans differ, table by table. Imports no torch."""

from dataclasses import asdict
from typing import Any

from sharding.plan.plan_file import Plan, TablePlan

HEAD = (
    "world_size", "local_world_size", "device", "schema", "batch_size_per_rank", "optimizer", "data_type", "forward_precision",
    "backward_precision", "prefetch", "replicas", "cluster", "cluster_fingerprint",
)  # fmt: skip


def compare_plans(old: Plan, new: Plan) -> dict[str, Any]:
    """Differences as values: {"head": {key: [old, new]}, "tables": {name: {key: [old, new]}}}. An absent table is None."""
    head = {
        key: [getattr(old, key), getattr(new, key)] for key in HEAD if getattr(old, key) != getattr(new, key)
    }
    tables: dict[str, Any] = {}
    for name in [*old.tables, *(name for name in new.tables if name not in old.tables)]:
        before, after = old.tables.get(name), new.tables.get(name)
        if before == after:
            continue
        if before is None or after is None:
            tables[name] = {"place": [before and place_text(before), after and place_text(after)]}
        else:
            left, right = asdict(before), asdict(after)
            tables[name] = {key: [left[key], right[key]] for key in left if left[key] != right[key]}
    return {"head": head, "tables": tables}


def place_text(table: TablePlan) -> str:
    """A table's place in a few words."""
    return f"{table.sharding_type} {table.compute_kernel}" + (
        f" on {ranks_text(table.ranks)}" if table.ranks else " on all ranks"
    )


def ranks_text(ranks: tuple[int, ...]) -> str:
    """Ranks for people: 8-15, 3, 9."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and rank == parts[-1][1] + 1:
            parts[-1][1] = rank
        else:
            parts.append([rank, rank])
    return ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in parts) or "all"


def diff_lines(old: Plan, new: Plan) -> list[str]:
    """Differences as lines for people; empty if the plans place everything alike."""
    found = compare_plans(old, new)
    lines = [f"{key}: {_value(before)} -> {_value(after)}" for key, (before, after) in found["head"].items()]
    for name, changes in found["tables"].items():
        if "place" in changes:
            before, after = changes["place"]
            lines.append(f"- {name}: {before}" if after is None else f"+ {name}: {after}")
            continue
        parts = []
        for key, (before, after) in changes.items():
            if key == "ranks":
                parts.append(f"ranks {ranks_text(tuple(before))} -> {ranks_text(tuple(after))}")
            else:
                parts.append(f"{key} {_value(before)} -> {_value(after)}")
        lines.append(f"~ {name}: {', '.join(parts)}")
    return lines


def _value(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value) or "none"
