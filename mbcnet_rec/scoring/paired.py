"""Two models on the same rows: differences of their metrics with errors that know that the rows are the same.

A metric's error follows from the influence of each row on it, the metric's derivative by that row's weight. The influence on a difference is the
difference of the influences, and rows of one group (a user's, say), which are not independent draws, are summed first:

    error^2 = m / (m - 1) sum_c (sum_{i in c} (influence_a(i) - influence_b(i)))^2,    m groups c; a row without a group is one of its own

Interval and p are those of Student's t with m - 1 degrees of freedom, since a slice may hold few groups. For AUC without groups they are
those of the paired test of DeLong et al. (1988): n / (n - 1) for each class of n rows, and the normal distribution. With groups they are
those of Obuchowski (1997) up to terms of 1 / m.

Shapes: B rows, G groups.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special, stats

from data.reading.columns import NO_GROUP
from mbcnet_rec.scoring.metrics import score_counts, shares_outranked, softplus
from mbcnet_rec.scoring.ranking import Ties, gauc_influence, grouped, ranking_values

ROUNDING = 1e-12  # of a difference: an error below it is one of rounding
Influence = tuple[float, np.ndarray]  # the metric's value, and the influence on it of each row (B,) or group (G,)


class Difference(NamedTuple):
    """A metric's difference over the same rows, its 95 % interval, two-sided p, and both values; NaN: not defined. `corrected`: p of several."""

    value: float
    low: float
    high: float
    p: float
    ours: float = math.nan
    theirs: float = math.nan
    corrected: float = math.nan


def paired_differences(
    ours: np.ndarray,
    theirs: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray | None = None,
    ranking_k: Sequence[int] = (),
) -> dict[str, Difference]:
    """auc, log_loss, calibration, and where there are groups gauc and the ranking metrics at `ranking_k`: ours less theirs.

    Logits (B,) and labels (B,) are of the same rows. `groups` are (B,) ids of what makes rows depend on each other; None: nothing does.
    """
    metrics: dict[str, Callable[[np.ndarray], Influence]] = {
        "auc": lambda z: auc_influence(z, labels),
        "log_loss": lambda z: loss_influence(z, labels),
        "calibration": lambda z: calibration_influence(z, labels),
    }
    clusters = clusters_of(groups, len(labels))
    classes = labels > 0, labels <= 0
    rows = np.where(classes[0], *(of_class.sum() for of_class in classes))
    found = {}
    for name, influence in metrics.items():
        (value, own), (other_value, other) = influence(ours), influence(theirs)
        delong = name == "auc" and groups is None
        gaps = (own - other) * (np.sqrt(rows / np.maximum(1, rows - 1)) if delong else 1.0)
        found[name] = difference_of(value, other_value, np.bincount(clusters, gaps), delong=delong)
    # of one draw of a class it is not known how it varies
    if min(np.count_nonzero(np.bincount(clusters[of_class])) for of_class in classes) < 2:
        found["auc"] = found["auc"]._replace(low=math.nan, high=math.nan, p=math.nan, corrected=math.nan)
    if groups is not None:
        *scores, known_labels, known_groups = grouped(ours, theirs, labels, groups)
        (value, own), (other_value, other) = (gauc_influence(z, known_labels, known_groups) for z in scores)
        found["gauc"] = difference_of(value, other_value, own - other)
        both = [ranking_values(z, known_labels, known_groups, ranking_k) for z in scores]
        for name in both[0]:
            mine, others = (each[name] if len(each[name]) else np.full(1, math.nan) for each in both)
            value, other_value = float(mine.mean()), float(others.mean())
            found[name] = difference_of(value, other_value, (mine - value - others + other_value) / len(mine))
    return found


def clusters_of(groups: np.ndarray | None, rows: int) -> np.ndarray:
    """The draw of each row, (B,), counted from 0: its group, or the row alone where it has none."""
    if groups is None:
        return np.arange(rows)
    draws = np.unique(groups, return_inverse=True)[1]
    alone = np.flatnonzero(groups == NO_GROUP)[1:]  # the first one has a draw already
    draws[alone] = draws.max(initial=-1) + 1 + np.arange(len(alone))
    return draws


def difference_of(ours: float, theirs: float, influences: np.ndarray, *, delong: bool = False) -> Difference:
    """The difference whose m independent parts have these influences, (m,). No error is known of one part, nor of a difference that all share."""
    value, m = ours - theirs, len(influences)
    factor, freedom = (1.0, math.inf) if delong else (m / max(1, m - 1), max(1, m - 1))
    error = math.sqrt(factor * float(influences @ influences)) if m > 1 else math.nan
    if error <= ROUNDING * abs(value):
        error = 0.0 if value == 0 else math.nan
    half = float(stats.t.ppf(0.975, freedom)) * error
    p = 2 * float(stats.t.sf(abs(value) / error, freedom)) if error else 1.0
    return Difference(value, value - half, value + half, p, ours, theirs, p)


def mean_difference(values: np.ndarray, groups: np.ndarray | None = None) -> Difference:
    """Compare the mean of values (B,) with 0, as a paired t test does; values of one group are taken together."""
    clusters = clusters_of(groups, len(values))
    mean = float(values.mean())
    return difference_of(mean, 0.0, np.bincount(clusters, (values - mean) / len(values)))


def auc_influence(logits: np.ndarray, labels: np.ndarray) -> Influence:
    """AUC = mean over positives of the share of negatives that they outrank; a row's influence is (its share - AUC) / rows of its class."""
    positives, negatives, place = score_counts(logits, labels)
    if not positives.any() or not negatives.any() or not np.isfinite(logits).all():
        return math.nan, np.full(len(labels), math.nan)
    below, above = shares_outranked(positives, negatives)
    value = float((positives * below).sum() / positives.sum())
    of_positive, of_negative = (below - value) / positives.sum(), (above - value) / negatives.sum()
    return value, np.where(labels > 0, of_positive[place], of_negative[place])


def loss_influence(logits: np.ndarray, labels: np.ndarray) -> Influence:
    """Log-loss."""
    z = logits.astype(np.float64)
    loss = softplus(z) - labels * z
    mean = float(loss.mean())
    return mean, (loss - mean) / len(loss)


def calibration_influence(logits: np.ndarray, labels: np.ndarray) -> Influence:
    """Mean prediction over the labels' rate."""
    y, p = labels.astype(np.float64), special.expit(logits.astype(np.float64))
    rate, mean, n = float(y.mean()), float(p.mean()), len(y)
    if rate == 0:
        return math.nan, np.full(n, math.nan)
    return mean / rate, ((p - mean) / rate - mean / rate**2 * (y - rate)) / n


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
) -> Difference:
    """Clicks on the `top` highest rows of a group under either ranking, a group's mean: an offline stand-in for an A/B test (Table 4, Figure 3).

    A group of fewer rows shows all of them under both. Equal scores are in random order, so theirs count by their mean.
    """
    ours, theirs, labels, groups = grouped(ours, theirs, labels, groups)
    if not len(groups):
        return difference_of(math.nan, math.nan, np.full(1, math.nan))
    own, other = (_clicks_on_top(scores, labels, groups, top) for scores in (ours, theirs))
    gaps = own - other
    return difference_of(float(own.mean()), float(other.mean()), (gaps - gaps.mean()) / len(gaps))


def _clicks_on_top(scores: np.ndarray, labels: np.ndarray, groups: np.ndarray, top: int) -> np.ndarray:
    """Expected clicks on the highest rows of each group, by rising id, (G,)."""
    ties = Ties.of(scores, labels, groups)
    return ties.total(ties.positives / ties.rows * ties.among_first(top))
