"""Whether whole numbers are names or amounts, by the label: how much of it they explain as categories, and how much as numbers."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data.profile.leaks import SMOOTHING

BUCKETS = 16  # of equal rows: as a number, a column explains what neighbouring values have in common
MIN_ROWS = 2_000  # of which half are held out
ROWS_OF_A_VALUE = 20
CLEAR = 3.0  # standard errors of the difference


def explained(column: pa.ChunkedArray, labels: np.ndarray) -> tuple[float, float, float]:
    """The share of the label's entropy that a column explains on held-out rows, as categories and as a number, and the difference's standard error.

    Click rates of values, and of buckets of neighbouring values, are learned on even rows and scored on odd ones. `labels`: (n,) of 0 and 1.
    """
    known = column.is_valid().to_numpy()
    numbers, labels = pc.drop_null(column).cast(pa.float64()).to_numpy(), labels[known]
    learn = np.arange(len(labels)) % 2 == 0
    base = float(labels[learn].mean()) if len(labels) else 0.0
    if len(labels) < MIN_ROWS or not 0 < base < 1:
        return 0.0, 0.0, float("inf")
    edges = np.unique(np.quantile(numbers[learn], np.linspace(0, 1, BUCKETS + 1)[1:-1]))
    codes = np.unique(numbers, return_inverse=True)[1], np.searchsorted(edges, numbers, side="right")
    entropy = _loss(np.full(len(labels), base), labels)[~learn]
    gains = [entropy - _loss(_rates(code, labels, learn), labels)[~learn] for code in codes]
    difference, whole = gains[0] - gains[1], float(entropy.mean())
    error = float(difference.std()) / len(difference) ** 0.5
    return float(gains[0].mean()) / whole, float(gains[1].mean()) / whole, error / whole


def are_names(column: pa.ChunkedArray, labels: np.ndarray) -> tuple[bool | None, str]:
    """Whether the values are names (None: the label does not tell), and what was seen, in words."""
    names, amounts, error = explained(column, labels)
    is_seldom = pc.count_distinct(column).as_py() * ROWS_OF_A_VALUE > len(labels)  # too few rows to learn names from
    if abs(names - amounts) <= CLEAR * error or max(names, amounts) <= CLEAR * error or (amounts > names and is_seldom):
        return None, ""
    words = f"explains {names:.2%} of the label as categories, {amounts:.2%} as a number (held-out rows)"
    return names > amounts, words


def _rates(codes: np.ndarray, labels: np.ndarray, learn: np.ndarray) -> np.ndarray:
    base, size = labels[learn].mean(), int(codes.max()) + 1
    rows, clicks = np.bincount(codes[learn], minlength=size), np.bincount(codes[learn], labels[learn], minlength=size)
    return ((clicks + SMOOTHING * base) / (rows + SMOOTHING))[codes]


def _loss(rates: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return -np.log(np.where(labels == 1, rates, 1 - rates))
