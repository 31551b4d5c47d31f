"""How much one column alone says about the label: a guard against columns written after the click; and whether whole numbers are names.

AUC here is P(score of a positive > score of a negative) + P(equal scores) / 2.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data.profile.scan import ColumnProfile
from data.reading.column_types import is_number
from data.reading.ids import is_key
from data.reading.keys import hash_values

SMOOTHING = 10.0  # rows of the base rate added to each value's own
MIN_SUPPORT = 20  # rows of a value before it may count as proof
MAX_CHANCE = 1e-9  # that a value's labels are all 1 by luck
BUCKETS = 16  # of equal rows: as an amount, a column explains what neighbouring values have in common
FEWEST_ROWS, ROWS_OF_A_VALUE = 2_000, 20  # of which half are held out; fewer are too few to learn names from
CLEAR = 3.0  # standard errors of a difference


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """AUC of scores (n,) for labels (n,) of 0 and 1, ties counting half; 0.5 where one class is missing."""
    positives = int(labels.sum())
    negatives = len(labels) - positives
    if not positives or not negatives:
        return 0.5
    _, value, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2  # the mean rank of equal scores, from 1
    above = ranks[value][labels == 1].sum() - positives * (positives + 1) / 2
    return float(above / (positives * negatives))


def column_auc(profile: ColumnProfile, column: pa.Array, labels: np.ndarray) -> float:
    """The best AUC that the column alone gives, at least 0.5: its number's order, its values' own click rates, its lists' lengths.

    Rates are learned on even rows and scored on odd ones, so an id that is unique per row gives 0.5 and not 1.
    """
    scores = np.zeros(len(column))
    if profile.is_list:
        scores = pc.fill_null(pc.list_value_length(column), -1).to_numpy(zero_copy_only=False)
        first = pc.list_element(column.filter(pa.array(scores > 0)), 0)
        keys = np.zeros(len(column), np.uint64)
        if len(first) and is_key(profile.item):
            keys[scores > 0] = hash_values(first)
    elif is_number(profile.item):
        numbers = pc.fill_null(column.cast(pa.float64(), safe=False), float("nan"))
        numbers = numbers.to_numpy(zero_copy_only=False)
        scores = np.where(np.isfinite(numbers), numbers, -np.inf)
        keys = np.where(np.isnan(numbers), np.nan, numbers + 0.0).view(np.uint64)
    elif is_key(profile.item):
        keys = hash_values(column)
    else:
        keys = column.is_valid().to_numpy(zero_copy_only=False).astype(np.uint64)
    rates = _held_out_rates(np.unique(keys, return_inverse=True)[1], labels)
    found = (auc(scores, labels), auc(rates, labels[1::2]))
    return max(max(value, 1 - value) for value in found)


def _held_out_rates(place: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The click rate of each odd row's value, as even rows have it; `place`: the values' numbers, (n,)."""
    size, learn = int(place.max()) + 1, slice(None, None, 2)
    base = labels[learn].mean()
    rows = np.bincount(place[learn], minlength=size)
    clicks = np.bincount(place[learn], labels[learn], minlength=size)
    return ((clicks + SMOOTHING * base) / (rows + SMOOTHING))[place[1::2]]


def are_names(column: pa.ChunkedArray, labels: np.ndarray) -> tuple[bool | None, str]:
    """Whether whole numbers are names (None: the label does not tell), and what was seen, in words. `labels`: (n,) of 0 and 1.

    By the share of the label's entropy on held-out rows that the values explain, as categories and as an amount.
    """
    labels = labels[column.is_valid().to_numpy()]
    numbers = column.drop_null().cast(pa.float64()).to_numpy()
    base = float(labels[::2].mean()) if len(labels) else 0.0
    if len(labels) < FEWEST_ROWS or not 0 < base < 1:
        return None, ""
    edges = np.unique(np.quantile(numbers[::2], np.linspace(0, 1, BUCKETS + 1)[1:-1]))
    values, place = np.unique(numbers, return_inverse=True)
    held_out = labels[1::2]
    entropy = _losses(np.full(len(held_out), base), held_out)
    places = place, np.searchsorted(edges, numbers, side="right")
    names, amounts = (entropy - _losses(_held_out_rates(each, labels), held_out) for each in places)
    error = CLEAR * float((names - amounts).std()) / len(held_out) ** 0.5
    as_names, as_amounts = float(names.mean()), float(amounts.mean())
    is_seldom = len(values) * ROWS_OF_A_VALUE > len(labels)
    if (
        abs(as_names - as_amounts) <= error
        or max(as_names, as_amounts) <= error
        or (as_amounts > as_names and is_seldom)
    ):
        return None, ""
    shares = as_names / entropy.mean(), as_amounts / entropy.mean()
    return (
        as_names > as_amounts,
        "explains {:.2%} of the label as categories, {:.2%} as a number (held-out rows)".format(*shares),
    )


def _losses(rates: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return -np.log(np.where(labels == 1, rates, 1 - rates))


def always_positive(column: pa.Array, labels: np.ndarray) -> tuple[str, int] | None:
    """A value of label 1 beyond luck, base_rate ** rows, such as a purchase, and its rows; lists are not looked into."""
    base = float(labels.mean())
    if not 0 < base < 1:
        return None
    encoded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    codes = pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False)
    known = codes >= 0
    rows = np.bincount(codes[known], minlength=len(encoded.dictionary))
    clicks = np.bincount(codes[known], labels[known], minlength=len(encoded.dictionary))
    proven = (rows >= MIN_SUPPORT) & (clicks == rows) & (rows * np.log(base) < np.log(MAX_CHANCE))
    if not proven.any():
        return None
    value = int(np.argmax(np.where(proven, rows, 0)))
    return str(encoded.dictionary[value].as_py()), int(rows[value])
