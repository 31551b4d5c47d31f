"""Which kind of field a column becomes, of which sizes, and what was seen: rules of thumb, by its values and its name."""

import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import types as pt

from data.profile.fit import finite
from data.profile.leaks import are_names
from data.profile.scan import ColumnProfile, Profile
from data.reading.column_types import is_number
from data.reading.ids import is_key, is_text
from data.schema.feature import FIT, MAX_NUM_EMBEDDINGS
from data.schema.schema import inline_table, toml_key

NAMES = tomllib.loads(Path(__file__).with_name("names.toml").read_text(encoding="utf-8"))
HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")  # userId
WINDOW = re.compile(r"_\d+[smhdwy]$")  # clicks_7d: a statistic over a window
MAX_VOCABULARY = 200_000  # above it a hash: a vocabulary is held in memory by every reader
HEAVY_TAIL = 5  # a 99th percentile so many times the median wants a logarithm
LARGEST_AMOUNT = 2.0**53  # integers beyond it, which a double cannot tell apart, are names
MAX_SMALL_INTEGERS = 50  # integers of fewer values are taken for ids
DENSE_SPAN = 4  # integers up to so many times their number are taken as rows without a vocabulary
HASH_HEADROOM = 1.5
DIMS = (4, 8, 16, 32, 64)  # few distinct widths, so that FBGEMM fuses many tables into one kernel
NULL_SHARE_WITH_ROW = 0.05  # numbers missing more often get a row of their own for "missing", by buckets
BUCKETS: dict[str, Any] = {"transform": "bucketise", "boundaries": FIT, "num_buckets": 32, "embedding_dim": 8}


@dataclass
class Proposal:
    """What becomes of a column."""

    column: str
    name: str  # of the field
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
        key = toml_key(self.name)
        line = f"{key:<{width}} = {inline_table(self.entry)}" if self.entry else key
        reasons = [f"LEFT OUT: {reason}" for reason in self.suspicions]
        reasons += [] if self.entry or reasons else ["LEFT OUT: it holds no value that can be used"]
        comment = "; ".join([*reasons, *self.notes])
        return ("" if self.is_used else "# ") + line + (f"  # {comment}" if comment else "")


def propose(
    column: ColumnProfile, name: str, profile: Profile, weights: str = "", labels: np.ndarray | None = None
) -> Proposal:
    """Choose a kind and sizes for one column, whose field has this name. `labels`: of the profile's sample, (n,)."""
    proposal = Proposal(column.name, name)
    if column.null_share:
        proposal.notes.append(f"null {column.null_share:.1%}")
    if column.name in profile.missing:
        proposal.notes.append(f"missing in {profile.missing[column.name]} of {profile.num_files} files")
    if column.is_list:
        _propose_list(proposal, column, weights)
    elif is_text(column.item) or (is_number(column.item) and _is_id(proposal, column, profile, labels)):
        proposal.entry = {"kind": "categorical", **_keys(proposal, column)}
        if pt.is_floating(column.item):
            proposal.notes.append("whole numbers: read as ids")
    elif is_number(column.item):
        _propose_number(proposal, column, profile.sample[column.name])
    else:
        proposal.notes.append(f"{column.kind}: no kind of field takes it")
    if proposal.entry and name != column.name:
        kind, *others = proposal.entry.items()
        proposal.entry = dict([kind, ("column", column.name), *others])
    return proposal


def _propose_list(proposal: Proposal, column: ColumnProfile, weights: str) -> None:
    if column.min_length != column.max_length:
        proposal.notes.append(f"{column.mean_length:.2f} values a row, at most {column.max_length}")
    pooled = {"pooling_factor": round(column.mean_length, 2)}
    if weights:
        keys = _keys(proposal, column)
        proposal.entry = {"kind": "weighted_multi_valued", "weights": weights, **keys, **pooled}
    elif is_key(column.item) or (column.min_length != column.max_length and is_id(column)):
        proposal.entry = {"kind": "multi_valued", "pooling": "mean", **_keys(proposal, column), **pooled}
    elif is_number(column.item) and column.max_length and column.min_length == column.max_length:
        proposal.entry = {"kind": "vector", "width": column.max_length}
        proposal.entry |= {"on_invalid": "null"} if column.bad else {}
    else:
        proposal.notes.append(f"{column.kind} of varying length: no kind of field takes it")


def _is_id(proposal: Proposal, column: ColumnProfile, profile: Profile, labels: np.ndarray | None) -> bool:
    """`is_id`, but that where the column's name tells nothing the label does, if it tells anything."""
    told = _id_by_name(column)
    if told is None and labels is not None:
        told, words = are_names(profile.sample[column.name], labels)
        proposal.notes += [words] if words else []
    return is_id(column) if told is None else told


def is_id(column: ColumnProfile) -> bool:
    """Whether whole numbers are names and not amounts: by the name's last word, else by how they are spread.

    Doubles without a fraction are ids where they are called so, or where some are missing, for which pandas makes doubles of integers.
    """
    told = _id_by_name(column)
    if told is not None:
        return told
    low, high, values = column.low or 0.0, column.high or 0.0, column.distinct.estimate()
    if low < 0 or (pt.is_floating(column.item) and not (values > MAX_SMALL_INTEGERS and column.nulls + column.nan)):
        return False
    return values <= MAX_SMALL_INTEGERS or high < DENSE_SPAN * values or (high > 1e6 and high > 100 * values)


def _id_by_name(column: ColumnProfile) -> bool | None:
    """The same as far as the name, or numbers that cannot be one of the two, say it; else None."""
    low, high, name = column.low or 0.0, column.high or 0.0, HUMP.sub("_", column.name).lower()
    if pt.is_boolean(column.item) or column.low is None:
        return False
    if not column.is_integral or (pt.is_floating(column.item) and max(-low, high) >= column.largest_id):
        return False
    if max(-low, high) > LARGEST_AMOUNT:
        return high <= (2.0**63 if low < 0 else 2.0**64)
    last = re.split(r"[\W_]+", re.sub(r"\d+$", "", name).rstrip("_"))[-1]
    if WINDOW.search(name):
        return False
    if "_x_" in name or last in NAMES["ids"] or name in NAMES["groups"]:
        return True
    if last in NAMES["amounts"] or (len(last) > 3 and last.endswith("s")):  # clicks, followers, days
        return False
    return None


def _keys(proposal: Proposal, column: ColumnProfile) -> dict[str, Any]:
    """Encoding and sizes of a column of ids."""
    values = column.distinct.estimate()
    about = "" if column.distinct.is_exact else "about "
    proposal.notes.insert(0, f"{about}{values:,} values")
    dim = min(DIMS, key=lambda width: abs(np.log(width / (2.0 * max(values, 1) ** 0.25))))
    sizes: dict[str, Any] = {"embedding_dim": dim, "cardinality": values}
    high = int(column.high or 0)
    if not is_text(column.item) and (column.low or 0) >= 0 and high < max(DENSE_SPAN * values, 64):
        proposal.notes.append(f"ids 0 to {high:,}")
        return {"num_embeddings": high + 1, "on_invalid": "null", **sizes}
    if values <= MAX_VOCABULARY:
        return {"encoding": "vocabulary", "vocabulary": FIT, "min_count": 2, **sizes}
    proposal.notes.append('new ids keep coming? encoding = "zch"')
    rows = min(MAX_NUM_EMBEDDINGS, two_digits(HASH_HEADROOM * values))
    return {"encoding": "hash", "num_embeddings": rows, **sizes}


def two_digits(number: float) -> int:
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
        proposal.notes.append(f'NaN or infinite {column.bad / column.rows:.1%}: on_invalid = "null" reads it as null')
    if column.null_share + column.bad / column.rows > NULL_SHARE_WITH_ROW:
        entry = BUCKETS
    elif 0 <= low <= 1 and high <= 1:
        entry = {}
    elif low >= 0 and high > HEAVY_TAIL * max(middle, 1.0):
        entry = {"transform": "log1p"}
    else:
        entry = {"transform": "standardise", "mean": FIT, "std": FIT}
    proposal.entry = {"kind": "numeric", **entry} | ({"on_invalid": "null"} if column.bad else {})


def holds_names(column: ColumnProfile) -> bool:
    """Whether a column's values name things, so that rows can be grouped by them."""
    return is_key(column.kind) or (is_number(column.kind) and is_id(column))
