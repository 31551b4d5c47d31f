"""Metrics of predictions and their errors, in float64: exact from rows, or from histograms with a bound.

AUC is computed from counts of positives and negatives at each distinct score, in ascending order. Those counts may come from the rows
themselves (exact) or from bins of the logit (`Histogram`): then scores of one bin are ties, and the AUC of the rows lies
within the bound that `auc_of_counts` returns, whatever the data.

Shapes: B rows, O outputs (the fused one first, then the branches), S distinct scores.
"""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

Z_95 = 1.959963984540054  # of a two-sided 95 % interval of the normal distribution
BIN_LIMIT = 16.0  # logits are binned evenly in [-BIN_LIMIT, BIN_LIMIT]; others join the outermost bins
RELIABILITY_BINS = 15


class Estimate(NamedTuple):
    """A metric and its standard error. `bound`: by how much binning may have moved it; 0: exact."""

    value: float
    error: float
    bound: float = 0.0

    def interval(self) -> tuple[float, float]:
        """95 % confidence interval: value -+ 1.96 standard errors, widened by the bound."""
        half = Z_95 * self.error + self.bound
        return self.value - half, self.value + half


NOT_KNOWN = Estimate(float("nan"), float("nan"))


def why_no_auc(metrics: Mapping[str, float | None]) -> str:
    """Why the fused output has no AUC, in words, given the metrics of `exact_metrics`; empty if it has one. None stands for NaN, as in JSON."""

    def known(name: str) -> bool:
        value = metrics.get(name)
        return value is not None and not math.isnan(value)

    if known("auc"):
        return ""
    if not known("log_loss"):
        return "some logits are not finite numbers"
    return f"the rows are all of one class, label {int(known('calibration'))}"


def can_be_scored(logits: np.ndarray, labels: np.ndarray) -> bool:
    """Whether there are rows, every logit is finite and every label 0 or 1. Where not, metrics are NaN."""
    return len(labels) > 0 and bool(np.isfinite(logits).all() and ((labels == 0) | (labels == 1)).all())


def score_counts(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count positives and negatives at each distinct score, ascending: two (S,) float64 arrays; and which score each row has, (B,)."""
    _, place = np.unique(logits, return_inverse=True)
    positives = np.bincount(place, labels > 0)
    return positives, np.bincount(place) - positives, place


def shares_outranked(positives: np.ndarray, negatives: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What a positive of each score outranks of the negatives, and by how much of the positives a negative is outranked, ties one half: (S,) both.

    V10(s) = (negatives below s + 1/2 negatives at s) / N      for a positive of score s; V01 likewise
    """
    num_positives, num_negatives = positives.sum(), negatives.sum()
    below = (np.cumsum(negatives) - negatives / 2) / num_negatives
    return below, (num_positives - np.cumsum(positives) + positives / 2) / num_positives


def auc_of_counts(positives: np.ndarray, negatives: np.ndarray, *, binned: bool = False) -> Estimate:
    """Area under the ROC curve, P(a positive outranks a negative), ties one half, and its error by DeLong (1988).

        AUC = mean V10,   error^2 = var(V10) / P + var(V01) / N      (V: see shares_outranked)

    If the counts are of bins, pairs of one bin count one half instead of 0 or 1, so the AUC of the rows is at most
    sum_s p_s n_s / (2 P N) away: the bound.

    Counts are (S,), by ascending score. NaN if a class is missing; the error is NaN if a class has a single row.
    """
    num_positives, num_negatives = positives.sum(), negatives.sum()
    if num_positives == 0 or num_negatives == 0:
        return NOT_KNOWN
    below, above = shares_outranked(positives, negatives)
    value = float((positives * below).sum() / num_positives)
    bound = float((positives * negatives).sum() / (2 * num_positives * num_negatives)) if binned else 0.0
    if min(num_positives, num_negatives) < 2:
        return Estimate(value, float("nan"), bound)
    of_positives = (positives * (below - value) ** 2).sum() / (num_positives - 1)
    of_negatives = (negatives * (above - value) ** 2).sum() / (num_negatives - 1)
    error = float(np.sqrt(of_positives / num_positives + of_negatives / num_negatives))
    return Estimate(value, error, bound)


def auc(logits: np.ndarray, labels: np.ndarray) -> float:
    """Exact area under the ROC curve, P(a positive outranks a negative), ties one half; NaN if one class is missing or rows cannot be scored.

    Two sorts and two merges: a third of the time of `auc_of_counts`, which knows the error too.
    """
    positive = labels > 0
    above, below = np.sort(logits[positive]), np.sort(logits[~positive])
    if not len(above) or not len(below) or not can_be_scored(logits, labels):
        return float("nan")
    wins = np.searchsorted(below, above, "left").sum() + np.searchsorted(below, above, "right").sum()
    return float(wins / 2 / (len(above) * len(below)))


def softplus(z: np.ndarray) -> np.ndarray:
    """log(1 + e^z) for any z, at a third of the time of np.logaddexp(0, z)."""
    return np.log1p(np.exp(-np.abs(z))) + np.maximum(z, 0.0)


def moments(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Sums from which log-loss, NE and calibration and their errors follow: (8,) float64, additive over rows.

    n, y, p, p^2, y p, l, l^2, y l, with y the label, p the probability and l the row's log-loss. NaN if rows cannot be scored.
    """
    if len(labels) and not can_be_scored(logits, labels):
        return np.full(8, np.nan)
    z, y = logits.astype(np.float64), labels.astype(np.float64)
    p, loss = 1.0 / (1.0 + np.exp(-z)), softplus(z) - y * z
    terms = (np.ones_like(z), y, p, p * p, y * p, loss, loss * loss, y * loss)
    return np.asarray([term.sum() for term in terms])


def metrics_of_moments(sums: np.ndarray) -> dict[str, Estimate]:
    """Log-loss, normalised entropy and calibration with normal errors of the first order (delta method).

    log_loss = mean l; NE = mean l / H(mean y), H the entropy of the labels' own rate (He et al., 2014);
    calibration = mean p / mean y. The error of f is sd(f_1 a + f_2 y) / sqrt(n), with f's derivatives f_1, f_2 by
    the means of a (l or p) and y.
    """
    n, *totals = sums.tolist()  # plain floats: NumPy's scalars are ten times slower
    if n == 0:
        return dict.fromkeys(("log_loss", "ne", "calibration"), NOT_KNOWN)
    y, p, pp, yp, loss, ll, yl = (total / n for total in totals)
    n = n if n > 1 else math.nan  # of one row no error is known
    var_y, var_p, var_l = y - y * y, max(0.0, pp - p * p), max(0.0, ll - loss * loss)
    cov_py, cov_ly = yp - y * p, yl - y * loss
    result = {"log_loss": Estimate(loss, math.sqrt(var_l / n))}
    if not 0 < y < 1:
        return result | {"ne": NOT_KNOWN, "calibration": Estimate(p, math.sqrt(var_p / n)) if y else NOT_KNOWN}
    entropy = -(y * math.log(y) + (1 - y) * math.log1p(-y))
    by_loss, by_rate = 1 / entropy, loss / entropy**2 * math.log(y / (1 - y))
    result["ne"] = Estimate(loss / entropy, _delta_error(by_loss, by_rate, var_l, var_y, cov_ly, n))
    result["calibration"] = Estimate(p / y, _delta_error(1 / y, -p / y**2, var_p, var_y, cov_py, n))
    return result


def _delta_error(a: float, b: float, var_a: float, var_b: float, cov: float, n: float) -> float:
    return math.sqrt(max(0.0, a * a * var_a + b * b * var_b + 2 * a * b * cov) / n)


class Histogram:
    """Counts and moments of rows too many to keep, in bins of the logit 2 * BIN_LIMIT / num_bins wide: additive over batches and ranks."""

    def __init__(self, num_outputs: int, num_bins: int) -> None:
        self.num_bins = num_bins
        self.counts = np.zeros((2, num_outputs, num_bins), np.int64)  # negatives, positives
        self.sums = np.zeros((num_outputs, 8))  # float64

    def add(self, logits: np.ndarray, labels: np.ndarray) -> None:
        """Count rows: logits (B, O), labels (B,)."""
        scaled = np.floor((np.nan_to_num(logits).astype(np.float64) + BIN_LIMIT) * (self.num_bins / (2 * BIN_LIMIT)))
        bins = np.clip(scaled, 0, self.num_bins - 1).astype(np.int64)
        for output in range(len(self.sums)):
            for label in (0, 1):
                chosen = bins[labels == label, output]
                np.add.at(self.counts[label, output], chosen, 1)
            self.sums[output] += moments(logits[:, output], labels)

    def reliability(self, bins: int = RELIABILITY_BINS) -> list[list[float]]:
        """`reliability` of the fused output, with a row's probability taken from the middle of its bin of the logit."""
        if np.isnan(self.sums[0]).any():
            return []
        totals = self.counts[:, 0].sum(axis=0)
        used = np.flatnonzero(totals)
        middles = (used + 0.5) * (2 * BIN_LIMIT / self.num_bins) - BIN_LIMIT
        probability, rows = 1.0 / (1.0 + np.exp(-middles)), totals[used]
        part = (np.cumsum(rows) - 1) * bins // max(1, rows.sum())
        starts = np.flatnonzero(np.diff(part, prepend=-1))
        sums = [np.add.reduceat(each, starts) for each in (probability * rows, self.counts[1, 0, used], rows)]
        return [[float(p / n), float(y / n), float(n)] for p, y, n in zip(*sums, strict=True)]

    def metrics(self, names: tuple[str, ...]) -> dict[str, Estimate]:
        """Metrics of every output; `names`: of the branches."""
        negatives, positives = self.counts.astype(np.float64)
        aucs = [auc_of_counts(p, n, binned=True) for p, n in zip(positives, negatives, strict=True)]
        # a row whose logit is not finite is in a bin, but makes the sums NaN
        aucs = [NOT_KNOWN if np.isnan(sums).any() else area for area, sums in zip(aucs, self.sums, strict=True)]
        return _of_outputs(names, aucs, self.sums)


def exact_metrics(
    logits: np.ndarray, labels: np.ndarray, names: tuple[str, ...], *, errors: bool = True
) -> dict[str, Estimate]:
    """Compute every metric of every output: auc, log_loss, ne, calibration of the fused one; auc/BRANCH, ... of the branches in `names`.

    Logits are (B, O), fused first, labels (B,) of 0 and 1. With `errors` an AUC has its error, at three times its time.
    """
    columns = [np.ascontiguousarray(column) for column in logits.T]
    if errors:
        aucs = [
            auc_of_counts(*score_counts(column, labels)[:2]) if can_be_scored(column, labels) else NOT_KNOWN
            for column in columns
        ]
    else:
        aucs = [Estimate(auc(column, labels), float("nan")) for column in columns]
    return _of_outputs(names, aucs, [moments(column, labels) for column in columns])


def _of_outputs(names: tuple[str, ...], aucs: Iterable[Estimate], sums: Iterable[np.ndarray]) -> dict[str, Estimate]:
    """Name the metrics of every output, given its AUC and its moments."""
    found = {}
    for suffix, area, each in zip(("", *(f"/{name}" for name in names)), aucs, sums, strict=True):
        metrics = {"auc": area} | metrics_of_moments(each)
        found |= {name + suffix: estimate for name, estimate in metrics.items()}
    return found


def evaluate_predictions(logits: np.ndarray, labels: np.ndarray, names: tuple[str, ...]) -> dict[str, float]:
    """Values of `exact_metrics` without their errors."""
    found = exact_metrics(logits, labels, names, errors=False)
    return {name: estimate.value for name, estimate in found.items()}


def reliability(logits: np.ndarray, labels: np.ndarray, bins: int = RELIABILITY_BINS) -> list[list[float]]:
    """Logits (B,), labels (B,) -> of at most `bins` bins of equal size by rising prediction: mean probability, observed rate, rows."""
    if not can_be_scored(logits, labels):
        return []
    order = np.argsort(logits, kind="stable")
    probability = 1.0 / (1.0 + np.exp(-logits[order].astype(np.float64)))
    parts = np.array_split(np.arange(len(order)), min(bins, len(order)))
    return [[float(probability[part].mean()), float(labels[order][part].mean()), float(len(part))] for part in parts]
