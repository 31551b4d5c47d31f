"""The plan file: which table lives where, as JSON that a person can review."""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from data.errors import InputError
from data.schema.parse import parse_dataclass
from sharding.plan.placement import REPLAN, Plan, TablePlan, check_shape

FORMAT = 2


def plan_text(plan: Plan) -> str:
    """The plan file: JSON, one line a table; what is as by default is left out."""
    head = {"format": FORMAT} | asdict(plan) | {"format": FORMAT}  # the first key
    tables: Any = head.pop("tables")
    usual = {each.name: each.default for each in fields(TablePlan)}
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    entries = []
    for name, table in tables.items():
        entry = {key: value for key, value in table.items() if value != usual[key]}
        entries.append(f"    {json.dumps(name)}: {json.dumps(entry)}")
    return "{\n" + "\n".join(lines) + '\n  "tables": {\n' + ",\n".join(entries) + "\n  }\n}\n"


def read_plan(path: Path) -> Plan:
    """Read a plan file; InputError if it is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); check the path, or {REPLAN}") from None
    return plan_of_text(text, str(path))


def plan_of_text(text: str, source: str) -> Plan:
    """Parse the text of a plan file; InputError if it is none."""
    try:
        table: Any = json.loads(text)
    except ValueError as error:
        raise InputError(f"{source}: not JSON ({error}); {REPLAN}") from None
    if isinstance(table, dict) and isinstance(table.get("format"), int) and table["format"] > FORMAT:
        raise InputError(
            f"{source}: format = {table['format']}, this version reads up to {FORMAT}; update mbcnet, or {REPLAN}"
        )
    plan = parse_dataclass(Plan, table, source)
    check_shape(plan, source)
    return plan
