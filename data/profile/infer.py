"""Profile of files -> a commented schema that loads: what `mbcnet schema infer` writes.

Every choice is a rule of thumb and says in its comment what it saw, so that a person can overrule it. Columns that look like the
label's outcome, like a constant or like a row number are written as comments: a first model should not see them.
"""

import datetime
import tomllib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types as pt

from data.errors import InputError
from data.profile.leaks import always_positive, column_auc
from data.profile.propose import BUCKETS, HASH_HEADROOM, NAMES, Proposal, holds_names, propose, two_digits
from data.profile.scan import ColumnProfile, Profile, profile_files
from data.profile.units import ALONE, Work
from data.reading.column_types import check_columns, column_faults, is_number
from data.reading.ids import is_key
from data.reading.storage import DataFile
from data.schema import Schema, parse_schema
from data.schema.names import RESERVED_GROUPS, is_writable, name_problem, own_table
from data.schema.schema import inline_table, toml_key, toml_text

LEAK_AUC = 0.95
MAX_FLAG_VALUES = 3  # a column of so few values may be a flag of an outcome
MAX_NAME = 100  # letters of a field's name; a longer one gets `column`
UNIQUE_SHARE = 0.95
MIN_ROWS_FOR_UNIQUE = 200
MAX_CROSS_ROWS = 1_000_000  # of a cross that is proposed
EARLIEST, LATEST = 631_152_000, 4_102_444_800  # 1990 and 2100, in Unix seconds


@dataclass(frozen=True)
class Roles:
    """The columns with a role of their own; the grouping column may be a field as well."""

    label: str
    time: str = ""
    group: str = ""


def infer_schema(
    files: Sequence[DataFile], *, name: str = "inferred", label: str = "", rows: int = 0, work: Work = ALONE
) -> tuple[str, list[str]]:
    """Profile Parquet files as `profile_files` does, and write a schema.

    Without a `label`, the column of 0 and 1 is guessed from names and values. Returns the schema file's text, which loads, and one line for
    each suspicious column; nothing by torchrun's ranks but the first. InputError if no label is found, it holds other values than 0 and 1,
    a file is faulty, or no column can be a field.
    """
    profile = profile_files(files, rows, work)
    if not work.engine.is_first:
        return "", []
    roles = find_roles(profile, label)
    labels = profile.sample[roles.label].combine_chunks().cast(pa.float64()).to_numpy(zero_copy_only=False)
    for file, arrow_schema in profile.footers:
        check_columns(arrow_schema, Schema(name, roles.label, (), (), {}, roles.group), str(file))
    weights = _weight_columns(profile)
    names = field_names(profile.columns)
    proposals = []
    for column in profile.columns.values():
        if column.name and column.name in (roles.label, roles.time, *weights.values()):
            continue
        proposal = propose(column, names[column.name], profile, weights.get(column.name, ""), labels)
        _suspect(proposal, column, profile, labels)
        _try(proposal, roles, profile)
        proposals.append(proposal)
    used = [proposal for proposal in proposals if proposal.is_used]
    if not used:
        raise InputError(
            f"{files[0]}: no column can be a field of a model ({len(profile.columns)} columns seen); check the files and the label"
        )
    _give_a_table(used)
    text = _write(name, roles, profile, proposals)
    parse_schema(tomllib.loads(text), "the inferred schema", Path())  # what we write must load
    left_out = [(each.column, reason) for each in proposals for reason in each.suspicions]
    return text, [_one_line(f"{name}: {reason}") for name, reason in (*left_out, *profile.unfit.items())]


def field_names(columns: Collection[str]) -> dict[str, str]:
    """A field's name for each column: the column's own, or where no field may be called so, or its table as another's, one like it."""
    taken = set(columns)
    tables: set[str] = set()
    names = {}
    for column in columns:
        name, number = column, 1
        if not is_writable(column) or len(column) > MAX_NAME or own_table(column) in tables:
            plain = "".join(each if is_writable(f"x{each}") else "_" for each in column)[:MAX_NAME].lstrip(".")
            name = plain = plain.strip() or "column"
            while name in taken or own_table(name) in tables:
                number += 1
                name = f"{plain}_{number}"
            taken.add(name)
        tables.add(own_table(name))
        names[column] = name
    return names


def _try(proposal: Proposal, roles: Roles, profile: Profile) -> None:
    """Leave a field out that a schema or a file's column refuses, for the reason that training would give."""
    if not proposal.column:
        proposal.suspicions.append("a schema cannot name a column without a name: rename it")
    if not proposal.is_used:
        return
    top = {"name": "inferred", "label": roles.label, "fields": {proposal.name: proposal.entry}}
    try:
        schema = parse_schema(top, "infer", Path())
    except InputError as error:
        proposal.suspicions.append(str(error).partition(f"fields.{proposal.name}.")[2] or str(error))
        return
    for file, arrow_schema in profile.footers:
        for _, fault in column_faults(arrow_schema, schema, has_label=False):
            proposal.suspicions.append(f"{file}: {fault}")
            return


def _give_a_table(used: list[Proposal]) -> None:
    """Training wants a field with a table: where there is none, the first number becomes one."""
    if all(each.kind in ("numeric", "vector") and "embedding_dim" not in each.entry for each in used):
        for first in (each for each in used if each.kind == "numeric"):
            kept = {key: first.entry[key] for key in ("column", "on_invalid") if key in first.entry}
            first.entry = {"kind": "numeric", **kept, **BUCKETS}
            first.notes.append("in buckets, since a model needs one field with a table")
            return


def find_roles(profile: Profile, label: str = "") -> Roles:
    """Find the label, time and grouping columns by name; InputError if there is no label, or it has other values than 0 and 1."""
    columns = profile.columns
    binary = [name for name, column in columns.items() if _is_binary(column) and name not in profile.missing]
    if not label:
        named = [name for name in NAMES["labels"] if name in columns or name in profile.unfit]
        label = next((name for name in named if name in binary), next(iter(named), ""))
    if not label:
        listed = ", ".join(binary[:8]) or "none"
        raise InputError(
            f"no column is named like a label ({', '.join(NAMES['labels'])}); name it with --label (columns of 0 and 1: {listed})"
        )
    if label in profile.unfit:
        raise InputError(f"label {label!r}: {profile.unfit[label]}; fix the files, or choose another with --label")
    if label not in columns:
        names = ", ".join(sorted(columns)[:20])
        raise InputError(f"label {label!r} is not a column of these files; choose one of: {names}")
    if label not in binary:
        found = _label_fault(columns[label], profile)
        raise InputError(
            f"label {label!r} is {found}: wanted 0 and 1 in every row; drop those rows or fix the files, or choose another with --label"
        )
    times = (name for name in (*NAMES["times"], *columns) if name in columns and _time_span(profile, name))
    groups = (
        name for name in NAMES["groups"]
        if name in columns and name not in profile.missing and holds_names(columns[name])
    )  # fmt: skip
    return Roles(label, next(times, ""), next(groups, ""))


def _label_fault(column: ColumnProfile, profile: Profile) -> str:
    """What a label holds beside 0 and 1, in words."""
    if column.name in profile.missing:
        return f"missing in {profile.missing[column.name]} of {profile.num_files} files"
    if not is_number(column.kind):
        return f"{column.kind}"
    span = "without numbers" if column.low is None else f"with values from {column.low:g} to {column.high:g}"
    whole = "" if column.is_integral else " that are not all whole numbers"
    faults = ((column.nan, "NaN"), (column.bad - column.nan, "infinite or huge"), (column.nulls, "null"))
    counts = "".join(f", {count:,} row(s) {what}" for count, what in faults if count)
    return f"{column.kind} {span}{whole}{counts}"


def _is_binary(column: ColumnProfile) -> bool:
    is_whole = is_number(column.kind) and not column.nulls and not column.bad and column.is_integral
    return is_whole and (column.low, column.high) in ((0.0, 1.0), (0.0, 0.0), (1.0, 1.0))


def _time_span(profile: Profile, name: str) -> str:
    """First and last moment of a time column: of Arrow's timestamps, or so named and Unix seconds or milliseconds. Else empty."""
    column = profile.columns[name]
    if name in profile.missing:
        return ""
    if pt.is_timestamp(column.kind):
        both = pc.min_max(profile.sample[name].cast(pa.timestamp(column.kind.unit)))
        first, last = (both[end].cast(pa.string()).as_py() for end in ("min", "max"))  # Python has no years beyond 9999
        return f"{first} to {last} (in the row sample)"
    if name not in NAMES["times"] or not is_number(column.kind) or column.low is None or column.high is None:
        return ""
    for unit in (1, 1_000):
        low, high = column.low / unit, column.high / unit
        if EARLIEST <= low <= high <= LATEST:
            first, last = (datetime.datetime.fromtimestamp(second, datetime.UTC) for second in (low, high))
            return f"{first:%Y-%m-%d %H:%M:%S} to {last:%Y-%m-%d %H:%M:%S} UTC"
    return ""


def _weight_columns(profile: Profile) -> dict[str, str]:
    """List of ids -> the list of numbers of equal lengths that is named for it."""
    found = {}
    for name, column in profile.columns.items():
        others = [profile.columns.get(name + ending) for ending in NAMES["weight_endings"]]
        weights = next((each.name for each in others if each and each.is_list and is_number(each.item)), "")
        if weights and column.is_list and is_key(column.item):
            lengths, wanted = (pc.list_value_length(profile.sample[each]) for each in (weights, name))
            if lengths.equals(wanted):
                found[name] = weights
    return found


def _suspect(proposal: Proposal, column: ColumnProfile, profile: Profile, labels: np.ndarray) -> None:
    """Note why a model should not see the column."""
    if not column.values:
        proposal.suspicions.append("it is empty")
        return
    values = column.distinct.estimate()
    if values == 1 and not column.nulls and not column.is_list:
        proposal.suspicions.append("it is constant")
    if proposal.kind == "categorical" and column.rows >= MIN_ROWS_FOR_UNIQUE and values > UNIQUE_SHARE * column.rows:
        proposal.suspicions.append("it is unique per row, so it can only be learned by heart")
    sample = profile.sample[column.name].combine_chunks()
    found = column_auc(column, sample, labels)
    if found > LEAK_AUC:
        proposal.suspicions.append(f"it leaks the label: AUC {found:.3f} of this column alone")
    elif column.name.lower() in (*NAMES["labels"], *NAMES["outcomes"]):
        proposal.suspicions.append("it is named like an outcome, which is known only afterwards")
    elif values <= MAX_FLAG_VALUES and not column.is_list and (proven := always_positive(sample, labels)):
        proposal.suspicions.append(f"it leaks the label: all {proven[1]} rows sampled of {proven[0]} have label 1")


def _families(used: list[Proposal]) -> list[tuple[str, list[Proposal]]]:
    """Fields whose names begin alike, the most first."""
    families: dict[str, list[Proposal]] = {}
    for each in used:
        family, mark, _ = each.name.partition("_")
        if family and mark:
            families.setdefault(f"{family}_fields" if family in RESERVED_GROUPS else family, []).append(each)
    return sorted(families.items(), key=lambda item: -len(item[1]))


def _crosses(used: list[Proposal]) -> list[str]:
    """Lines that cross fields of the two largest families of names (a user and an item), those of few values before those of many."""
    sparse = [[each for each in members if each.kind == "categorical"] for _, members in _families(used)]
    sides = [sorted(each, key=lambda each: each.entry["cardinality"]) for each in sparse if each][:2]
    names, lines = {each.name for each in used}, []
    for one, other in product(*(side[:2] for side in sides)) if len(sides) == 2 else ():
        values = one.entry["cardinality"] * other.entry["cardinality"]
        rows = min(MAX_CROSS_ROWS, max(2, two_digits(HASH_HEADROOM * values)))
        entry = {"kind": "cross", "of": [one.name, other.name], "num_embeddings": rows, "embedding_dim": 8}
        if (name := f"{one.name}_x_{other.name}") not in names and not name_problem(name):
            lines.append(f"# {toml_key(name)} = {inline_table(entry)}")
    head = "# Crosses of two fields, which logs need not hold, for what only both together tell. Remove the # before those to try:"
    return [head, *lines] if lines else []


def _groups(used: list[Proposal]) -> dict[str, list[str]]:
    """A first guess: the largest families of names, and the largest ids of the first two (a user and an item)."""
    groups, ids = {}, []
    for family, members in _families(used)[:6]:
        if len(members) > 1:
            groups[family] = [each.name for each in members]
            sparse = [each for each in members if each.kind == "categorical"]
            ids += [(family, max(sparse, key=lambda each: each.entry["cardinality"]).name)] if sparse else []
    if len(ids) > 1:
        (first, one), (second, other) = ids[:2]
        groups[f"{first}_{second}"] = [one, other]
    categorical = [each.name for each in used if each.kind == "categorical"]
    return groups or {"categorical": categorical or [used[0].name]}


def _write(name: str, roles: Roles, profile: Profile, proposals: list[Proposal]) -> str:
    used = [each for each in proposals if each.is_used]
    label = profile.columns[roles.label]
    rate = float(np.mean(profile.sample[roles.label].cast(pa.float64()).to_numpy()))
    columns = {"name": name, "label": roles.label, "group_column": roles.group, "time_column": roles.time}
    width = max(len(toml_key(each.name)) for each in proposals)
    fields = [each.line(width) for each in proposals]
    fields += [f"# {toml_key(column)}  # LEFT OUT: {reason}" for column, reason in profile.unfit.items()]
    loader = jinja2.PackageLoader("data.profile")
    templates = jinja2.Environment(loader=loader, finalize=_one_line, trim_blocks=True, keep_trailing_newline=True)
    return templates.get_template("schema.toml").render(
        profile=profile,
        roles=roles,
        read=f"{profile.rows:,} of {profile.total_rows:,} rows of {profile.num_files} file(s)",
        rate=f"{rate:.2%}",
        one_class=rate in (0.0, 1.0) or label.low == label.high,
        span=_time_span(profile, roles.time) if roles.time else "",
        has_table=any("embedding_dim" in each.entry for each in used),
        has_ids=any("num_embeddings" in each.entry for each in used),
        top=[(key, toml_text(value)) for key, value in columns.items() if value or key == "name"],
        fields=[*fields, *_crosses(used)],
        groups=[(toml_key(group), toml_text(members)) for group, members in _groups(used).items()],
    )


def _one_line(text: object) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in str(text))
