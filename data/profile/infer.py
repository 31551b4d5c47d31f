"""Profile of files -> a commented schema that loads: what `mbcnet schema infer` writes.

Every choice is a rule of thumb and says in its comment what it saw, so that a person can overrule it. Columns that look like the
label's outcome, like a constant or like a row number are written as comments: a first model should not see them.
"""

import datetime
import re
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types as pt

from data.errors import InputError
from data.profile.fit import finite
from data.profile.leaks import always_positive, column_auc
from data.profile.scan import ColumnProfile, Profile, profile_files
from data.reading.column_types import is_key, is_number
from data.reading.storage import DataFile
from data.schema import parse_schema
from data.schema.feature import FIT, MAX_NUM_EMBEDDINGS
from data.schema.schema import inline_table, toml_key, toml_text

LABEL_NAMES = ("label", "click", "clicked", "is_click", "clk", "target", "y", "conversion", "is_clicked")
OUTCOME_NAMES = {
    *LABEL_NAMES, "purchase", "purchased", "buy", "is_buy", "order", "converted", "is_like", "is_follow", "is_comment",
    "is_forward", "is_hate", "is_profile_enter", "long_view",
}  # fmt: skip
TIME_NAMES = ("timestamp", "time", "event_time", "ts", "time_stamp", "datetime", "time_ms", "date")
GROUP_NAMES = ("user_id", "userid", "uid", "user", "session_id", "query_id")
WINDOW = re.compile(r"_\d+[smhdwy]$")  # clicks_7d: a statistic over a window
ID_WORDS = {
    "id", "ids", "uid", "code", "type", "category", "cate", "brand", "city", "shop", "level", "gender", "cluster", "slot",
    "pos", "position", "series", "status", "class", "os",
}  # fmt: skip
AMOUNT_WORDS = {
    "count", "cnt", "num", "number", "price", "rate", "ratio", "ctr", "score", "sum", "avg", "mean", "duration", "amount",
    "stock", "percent", "area", "size", "length", "width", "height",
}  # fmt: skip
WEIGHT_ENDINGS = ("_weights", "_weight", "_scores", "_score", "_w")
MAX_VOCABULARY = 200_000  # above it a hash: a vocabulary is held in memory by every reader
HEAVY_TAIL = 5  # a 99th percentile so many times the median wants a logarithm
LARGEST_AMOUNT = 2.0**53  # integers beyond it, which a double cannot tell apart, are names
MAX_SMALL_INTEGERS = 50  # integers of fewer values are taken for ids
DENSE_SPAN = 4  # integers up to so many times their number are taken as rows without a vocabulary
HASH_HEADROOM = 1.5
DIMS = (4, 8, 16, 32, 64)  # few distinct widths, so that FBGEMM fuses many tables into one kernel
NULL_SHARE_WITH_ROW = 0.05  # numbers missing more often get a row of their own for "missing", by buckets
LEAK_AUC = 0.95
MAX_FLAG_VALUES = 3  # a column of so few values may be a flag of an outcome
UNIQUE_SHARE = 0.95
MIN_ROWS_FOR_UNIQUE = 200
EARLIEST, LATEST = 631_152_000, 4_102_444_800  # 1990 and 2100, in Unix seconds


@dataclass
class Proposal:
    """What becomes of a column."""

    name: str
    entry: dict[str, Any] = field(default_factory=dict)  # empty: no kind of field fits
    notes: list[str] = field(default_factory=list)  # what was seen
    suspicions: list[str] = field(default_factory=list)  # why it is written as a comment

    @property
    def is_used(self) -> bool:
        """Whether the field is written to be trained on."""
        return bool(self.entry) and not self.suspicions

    @property
    def kind(self) -> str:
        """The kind of field, or empty."""
        return self.entry.get("kind", "")

    def line(self, width: int) -> str:
        """The field's line in the schema, with a key so wide."""
        line = (
            f"{toml_key(self.name):<{width}} = {inline_table(self.entry)}"
            if self.entry
            else toml_key(self.name)
        )
        reasons = [f"LEFT OUT: {reason}" for reason in self.suspicions]
        reasons += [] if self.entry or reasons else ["LEFT OUT"]
        comment = "; ".join([*reasons, *self.notes])
        return ("" if self.is_used else "# ") + line + (f"  # {comment}" if comment else "")


@dataclass(frozen=True)
class Roles:
    """The columns with a role of their own; the grouping column may be a field as well."""

    label: str
    time: str = ""
    group: str = ""


def infer_schema(
    files: Sequence[DataFile],
    *,
    name: str = "inferred",
    label: str = "",
    rows: int = 0,
    progress: Callable[[int], object] = lambda done: None,
) -> tuple[str, list[str]]:
    """Profile Parquet files as `profile_files` does, and write a schema.

    Without a `label`, the column of 0 and 1 is guessed from names and values. Returns the schema file's text, which loads, and one
    line for each suspicious column.

    Raises:
        InputError: no label is found, it holds other values than 0 and 1, a file is faulty, or no column can be a field.
    """
    profile = profile_files(files, rows=rows, progress=progress)
    roles = find_roles(profile, label)
    labels = profile.sample[roles.label].combine_chunks().cast(pa.float64()).to_numpy(zero_copy_only=False)
    weights = _weight_columns(profile)
    proposals = []
    for column in profile.columns.values():
        if column.name in (roles.label, roles.time) or column.name in weights.values():
            continue
        proposal = propose(column, profile, weights.get(column.name, ""))
        _suspect(proposal, column, profile, labels)
        proposals.append(proposal)
    used = [proposal for proposal in proposals if proposal.is_used]
    if not used:
        raise InputError(
            f"{files[0]}: no column can be a field of a model ({len(profile.columns)} columns seen); check the files and the label"
        )
    text = _write(name, roles, profile, proposals)
    parse_schema(tomllib.loads(text), "the inferred schema", Path())  # what we write must load
    return text, [f"{each.name}: {reason}" for each in proposals for reason in each.suspicions]


def find_roles(profile: Profile, label: str = "") -> Roles:
    """Find the label, time and grouping columns by name and check them by value.

    Raises:
        InputError: no label, or it has other values than 0 and 1.
    """
    columns = profile.columns
    if label and label not in columns:
        names = ", ".join(sorted(columns)[:20])
        raise InputError(f"label {label!r} is not a column of these files; choose one of: {names}")
    binary = [name for name, column in columns.items() if _is_binary(column)]
    if label and label not in binary:
        column = columns[label]
        found = f"{column.kind} with values from {column.low} to {column.high} and {column.nulls} nulls"
        raise InputError(
            f"label {label!r} is {found}: wanted 0 and 1 and no null; choose another with --label"
        )
    guesses = [name for name in LABEL_NAMES if name in binary]
    if not label and not guesses:
        listed = ", ".join(binary[:8]) or "none"
        raise InputError(
            f"no column is named like a label ({', '.join(LABEL_NAMES)}) and holds 0 and 1; name it with --label "
            f"(columns of 0 and 1: {listed})"
        )
    times = (name for name in (*TIME_NAMES, *columns) if name in columns and _time_span(profile, name))
    groups = (name for name in GROUP_NAMES if name in columns and is_key(columns[name].kind))
    return Roles(label or guesses[0], next(times, ""), next(groups, ""))


def _is_binary(column: ColumnProfile) -> bool:
    is_whole = is_number(column.kind) and not column.nulls and not column.bad and column.is_integral
    return is_whole and (column.low, column.high) in ((0.0, 1.0), (0.0, 0.0), (1.0, 1.0))


def _time_span(profile: Profile, name: str) -> str:
    """First and last moment of a time column: of Arrow's timestamps, or so named and Unix seconds or milliseconds. Else empty."""
    column = profile.columns[name]
    if pt.is_timestamp(column.kind):
        both = pc.min_max(profile.sample[name]).as_py()
        return f"{both['min']} to {both['max']} (in the row sample)"
    if name not in TIME_NAMES or not is_number(column.kind) or column.low is None or column.high is None:
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
        others = [profile.columns.get(name + ending) for ending in WEIGHT_ENDINGS]
        weights = next((each.name for each in others if each and each.is_list and is_number(each.item)), "")
        if weights and column.is_list and is_key(column.item):
            lengths, wanted = (pc.list_value_length(profile.sample[each]) for each in (weights, name))
            if lengths.equals(wanted):
                found[name] = weights
    return found


def propose(column: ColumnProfile, profile: Profile, weights: str = "") -> Proposal:
    """Choose a kind and sizes for one column."""
    proposal = Proposal(column.name)
    if column.null_share:
        proposal.notes.append(f"null {column.null_share:.1%}")
    if column.name in profile.missing:
        proposal.notes.append(f"missing in {profile.missing[column.name]} of {profile.num_files} files")
    if column.is_list:
        _propose_list(proposal, column, weights)
    elif is_key(column.item) and (not pt.is_integer(column.item) or _is_id(column)):
        proposal.entry = {"kind": "categorical", **_keys(proposal, column)}
    elif is_number(column.item):
        _propose_number(proposal, column, profile.sample[column.name])
    else:
        proposal.notes.append(f"{column.kind}: no kind of field takes it")
    return proposal


def _propose_list(proposal: Proposal, column: ColumnProfile, weights: str) -> None:
    if column.min_length != column.max_length:
        proposal.notes.append(f"{column.mean_length:.2f} values a row, at most {column.max_length}")
    pooled = {"pooling_factor": round(column.mean_length, 2)}
    if weights:
        keys = _keys(proposal, column)
        proposal.entry = {"kind": "weighted_multi_valued", "weights": weights, **keys, **pooled}
    elif is_key(column.item):
        proposal.entry = {"kind": "multi_valued", "pooling": "mean", **_keys(proposal, column), **pooled}
    elif is_number(column.item) and column.max_length and column.min_length == column.max_length:
        proposal.entry = {"kind": "vector", "width": column.max_length}
    else:
        proposal.notes.append(f"{column.kind} of varying length: no kind of field takes it")


def _is_id(column: ColumnProfile) -> bool:
    """Whether integers are names and not amounts: by the name's last word, else by how they are spread."""
    low, high, name = column.low or 0.0, column.high or 0.0, column.name.lower()
    if max(-low, high) > LARGEST_AMOUNT:
        return True
    if low < 0 or WINDOW.search(name):
        return False
    last = re.sub(r"\d+$", "", name).rstrip("_").split("_")[-1]
    if "_x_" in name or last in ID_WORDS:
        return True
    if last in AMOUNT_WORDS or (len(last) > 3 and last.endswith("s")):  # clicks, followers, days
        return False
    values = column.distinct.estimate()
    is_dense = high < DENSE_SPAN * values
    return values <= MAX_SMALL_INTEGERS or is_dense or (high > 1e6 and high > 100 * values)


def _keys(proposal: Proposal, column: ColumnProfile) -> dict[str, Any]:
    """Encoding and sizes of a column of ids."""
    values = column.distinct.estimate()
    about = "" if column.distinct.is_exact else "about "
    proposal.notes.insert(0, f"{about}{values:,} values")
    dim = min(DIMS, key=lambda width: abs(np.log(width / (2.0 * max(values, 1) ** 0.25))))
    sizes: dict[str, Any] = {"embedding_dim": dim, "cardinality": values}
    high = int(column.high or 0)
    if pt.is_integer(column.item) and (column.low or 0) >= 0 and high < max(DENSE_SPAN * values, 64):
        proposal.notes.append(f"ids 0 to {high:,}")
        return {"num_embeddings": high + 1, **sizes}
    if values <= MAX_VOCABULARY:
        return {"encoding": "vocabulary", "vocabulary": FIT, "min_count": 2, **sizes}
    proposal.notes.append('new ids keep coming? encoding = "zch"')
    rows = min(MAX_NUM_EMBEDDINGS, _two_digits(HASH_HEADROOM * values))
    return {"encoding": "hash", "num_embeddings": rows, **sizes}


def _two_digits(number: float) -> int:
    """Round up to two significant digits."""
    step = 10 ** max(0, len(str(int(number))) - 2)
    return int(-(-number // step) * step)


def _propose_number(proposal: Proposal, column: ColumnProfile, sample: pa.ChunkedArray) -> None:
    numbers = finite(sample)
    if not len(numbers):
        return
    low, middle, high = (float(np.quantile(numbers, level)) for level in (0.0, 0.5, 0.99))
    proposal.notes.insert(0, f"{column.low:g} to {column.high:g}, median {middle:g}")
    if column.bad:
        proposal.notes.append(
            f'NaN or infinite {column.bad / column.rows:.1%}: on_invalid = "null" reads it as missing'
        )
    if column.null_share + column.bad / column.rows > NULL_SHARE_WITH_ROW:
        entry = {"transform": "bucketise", "boundaries": FIT, "num_buckets": 32, "embedding_dim": 8}
    elif 0 <= low <= 1 and high <= 1:
        entry = {}
    elif low >= 0 and high > HEAVY_TAIL * max(middle, 1.0):
        entry = {"transform": "log1p"}
    else:
        entry = {"transform": "standardise", "mean": FIT, "std": FIT}
    proposal.entry = {"kind": "numeric", **entry} | ({"on_invalid": "null"} if column.bad else {})


def _suspect(proposal: Proposal, column: ColumnProfile, profile: Profile, labels: np.ndarray) -> None:
    """Note why a model should not see the column."""
    if not column.values:
        proposal.suspicions.append("it is empty")
        return
    values = column.distinct.estimate()
    if values == 1 and not column.nulls and not column.is_list:
        proposal.suspicions.append("it is constant")
    is_id = is_key(column.item) and proposal.kind == "categorical"
    if is_id and column.rows >= MIN_ROWS_FOR_UNIQUE and values > UNIQUE_SHARE * column.rows:
        proposal.suspicions.append("it is unique per row, so it can only be learned by heart")
    sample = profile.sample[column.name].combine_chunks()
    found = column_auc(column, sample, labels)
    if found > LEAK_AUC:
        proposal.suspicions.append(f"it leaks the label: AUC {found:.3f} of this column alone")
    elif column.name.lower() in OUTCOME_NAMES:
        proposal.suspicions.append("it is named like an outcome, which is known only afterwards")
    elif values <= MAX_FLAG_VALUES and not column.is_list and (proven := always_positive(sample, labels)):
        proposal.suspicions.append(
            f"it leaks the label: all {proven[1]} rows of value {proven[0]} in the sample have label 1"
        )


def _groups(used: list[Proposal]) -> dict[str, list[str]]:
    """A first guess: fields whose names begin alike, and the largest ids of the two largest such families (a user and an item)."""
    families: dict[str, list[Proposal]] = {}
    for each in used:
        if "_" in each.name:
            families.setdefault(each.name.split("_")[0], []).append(each)
    groups, ids = {}, []
    for family, members in sorted(families.items(), key=lambda item: -len(item[1]))[:6]:
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
    read = f"{profile.rows:,} of {profile.total_rows:,} rows of {profile.num_files} file(s)"
    one_class = rate in (0.0, 1.0) or label.low == label.high
    lines = [
        f"# Inferred from {read}. Look at every line, then run `mbcnet schema fit` on the training files.",
        f"# Label {roles.label}: {rate:.2%} ones{' (the sample has one class only!)' if one_class else ''}.",
    ]
    if roles.time:
        lines.append(f"# Time {roles.time}: {_time_span(profile, roles.time)}.")
    if profile.rows < profile.total_rows:
        lines.append("# Cardinalities and ranges are those of the rows read: other rows may hold more.")
    if any("num_embeddings" in each.entry for each in used):
        lines.append(
            '# An id outside [0, num_embeddings) stops training and is named; on_invalid = "null" or "modulo" would fix it.'
        )
    columns = {"name": name, "label": roles.label, "group_column": roles.group, "time_column": roles.time}
    lines += [f"{key} = {toml_text(value)}" for key, value in columns.items() if value or key == "name"]
    lines += ["", "[fields]"]
    width = max(len(toml_key(each.name)) for each in proposals)
    lines += [each.line(width) for each in proposals]
    lines += [
        "",
        "[groups]",
        "# a first guess by names: put together what belongs together (a user and an item, an image and its attributes)",
    ]
    lines += [f"{toml_key(group)} = {toml_text(members)}" for group, members in _groups(used).items()]
    return "\n".join(map(_one_line, lines)) + "\n"


def _one_line(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)
