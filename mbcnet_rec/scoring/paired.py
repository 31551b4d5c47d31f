"""Two models on the same rows: differences of their metrics with errors that know that the rows are the same.

A metric's error follows from the influence of each row on it, the metric's derivative by that row's weight. The influence on a difference is the
difference of the influences, and rows of one group (a user's, say), which are not independent draws, are summed first:

    error^2 = m / (m - 1) sum_c (sum_{i in c} (influence_a(i) - influence_b(i)))^2,    m groups c, or rows where there are no groups

For AUC without groups that is the paired test of DeLong et al. (1988), with groups that of Obuchowski (1997) up to terms of 1 / m.

Shapes: B rows.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from mbcnet_rec.scoring.metrics import Z_95, softplus

Influence = tuple[float, np.ndarray]  # the metric's value, and each row's influence on it (B,)


class Difference(NamedTuple):
    """A difference of a metric over the same rows, its 95 % interval, and the p of the two-sided normal test. NaN: not defined."""

    value: float
    low: float
    high: float
    p: float


def paired_differences(
    ours: np.ndarray, theirs: np.ndarray, labels: np.ndarray, groups: np.ndarray | None = None
) -> dict[str, Difference]:
    """auc, log_loss, ne, calibration, and gauc where there are groups: ours less theirs.

    Args:
        ours: logits (B,).
        theirs: logits (B,) of the same rows.
        labels: (B,) of 0 and 1.
        groups: (B,) ids of groups, within which rows depend on each other; None: rows are independent.
    """
    metrics: dict[str, Callable[[np.ndarray], Influence]] = {
        "auc": lambda z: auc_influence(z, labels),
        "log_loss": lambda z: loss_influence(z, labels),
        "ne": lambda z: loss_influence(z, labels, normalised=True),
        "calibration": lambda z: calibration_influence(z, labels),
    }
    if groups is not None:
        metrics["gauc"] = lambda z: gauc_influence(z, labels, groups)
    clusters = np.arange(len(labels)) if groups is None else np.unique(groups, return_inverse=True)[1]
    found = {}
    for name, influence in metrics.items():
        (value, own), (other_value, other) = influence(ours), influence(theirs)
        found[name] = difference_of(value - other_value, np.bincount(clusters, own - other))
    return found


def difference_of(value: float, influences: np.ndarray) -> Difference:
    """The difference whose independent parts have these influences, (m,)."""
    m = len(influences)
    error = math.sqrt(m / (m - 1) * float(influences @ influences)) if m > 1 else math.nan
    ratio = abs(value) / error if error > 0 else (0.0 if value == 0 else math.inf)
    p = float(2 * stats.norm.sf(ratio)) if error == error and value == value else math.nan
    return Difference(value, value - Z_95 * error, value + Z_95 * error, p)


def auc_influence(logits: np.ndarray, labels: np.ndarray) -> Influence:
    """AUC = mean over positives of V, the share of negatives below (ties one half); a row's influence is (V - AUC) / rows of its class."""
    positive = labels > 0
    ours, theirs = logits[positive], logits[~positive]
    nothing = np.full(len(labels), math.nan)
    if not len(ours) or not len(theirs) or np.isnan(logits).any():
        return math.nan, nothing
    influence = np.empty(len(labels))
    below, above = _share_below(theirs, ours), 1.0 - _share_below(ours, theirs)
    value = float(below.mean())
    influence[positive] = (below - value) / len(ours)
    influence[~positive] = (above - value) / len(theirs)
    return value, influence


def _share_below(values: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The share of `values` below each of `at`, equal ones counted one half."""
    ordered = np.sort(values)
    return (np.searchsorted(ordered, at, "left") + np.searchsorted(ordered, at, "right")) / (2 * len(values))


def loss_influence(logits: np.ndarray, labels: np.ndarray, *, normalised: bool = False) -> Influence:
    """Log-loss, or normalised entropy: log-loss over H(r), the entropy of the labels' own rate r."""
    z, y = logits.astype(np.float64), labels.astype(np.float64)
    loss, rate = softplus(z) - y * z, float(y.mean())
    mean, n = float(loss.mean()), len(y)
    if not normalised:
        return mean, (loss - mean) / n
    if not 0 < rate < 1:
        return math.nan, np.full(n, math.nan)
    entropy = -(rate * math.log(rate) + (1 - rate) * math.log1p(-rate))
    slope = mean / entropy**2 * math.log(rate / (1 - rate))
    return mean / entropy, ((loss - mean) / entropy + slope * (y - rate)) / n


def calibration_influence(logits: np.ndarray, labels: np.ndarray) -> Influence:
    """Mean prediction over the labels' rate."""
    y, p = labels.astype(np.float64), 1.0 / (1.0 + np.exp(-logits.astype(np.float64)))
    rate, mean, n = float(y.mean()), float(p.mean()), len(y)
    if rate == 0:
        return math.nan, np.full(n, math.nan)
    return mean / rate, ((p - mean) / rate - mean / rate**2 * (y - rate)) / n


def gauc_influence(logits: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> Influence:
    """GAUC, the mean over groups of both classes of their AUC, weighted by rows; the whole influence of a group stands at its first row."""
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], np.diff(groups[order]) != 0])) if len(order) else order
    sizes, values, firsts = [], [], []
    for rows in np.split(order, starts[1:]):
        area, _ = auc_influence(logits[rows], labels[rows])
        if area == area:
            sizes.append(len(rows))
            values.append(area)
            firsts.append(rows[0])
    influence = np.zeros(len(labels))
    if not values:
        return math.nan, influence
    weights = np.asarray(sizes) / sum(sizes)
    value = float(weights @ values)
    influence[firsts] = weights * (np.asarray(values) - value)
    return value, influence


def holm(p_values: Sequence[float]) -> list[float]:
    """P values corrected for their number (Holm, 1979): the k-th smallest of n is multiplied by n + 1 - k, and never falls. NaN stays."""
    known = sorted((p, place) for place, p in enumerate(p_values) if p == p)
    corrected, largest = list(p_values), 0.0
    for rank, (p, place) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        corrected[place] = largest
    return corrected


def expected_clicks(
    ours: np.ndarray, theirs: np.ndarray, labels: np.ndarray, groups: np.ndarray, top: int
) -> tuple[Mapping[str, float], Difference]:
    """Clicks of the `top` rows of each group under either ranking, a group's mean: an offline stand-in for an A/B test (Table 4, Figure 3).

    Groups of `top` rows or fewer say nothing, since both rankings show all of them, and are left out. Ties count by their mean.

    Returns:
        ours, theirs, groups; and the difference.
    """
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], np.diff(groups[order]) != 0])) if len(order) else order
    clicks = []
    for rows in np.split(order, starts[1:]):
        if len(rows) > top:
            clicks.append([_clicks_on_top(scores[rows], labels[rows], top) for scores in (ours, theirs)])
    if not clicks:
        return {"ours": math.nan, "theirs": math.nan, "groups": 0}, Difference(*[math.nan] * 4)
    each = np.asarray(clicks)
    own, other = each.mean(0).tolist()
    gaps = each[:, 0] - each[:, 1]
    return {"ours": own, "theirs": other, "groups": len(each)}, difference_of(
        own - other, (gaps - gaps.mean()) / len(gaps)
    )


def _clicks_on_top(scores: np.ndarray, labels: np.ndarray, top: int) -> float:
    bound = np.partition(scores, len(scores) - top)[len(scores) - top]
    above, tied = scores > bound, scores == bound
    return float(labels[above].sum() + labels[tied].mean() * (top - above.sum()))
