"""Exact metrics of a set of predictions, in float64.

Shapes: B rows, O outputs (the fused one first, then the branches).
"""

import numpy as np


def auc(logits: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve by ranks: P(a positive outranks a negative), ties count one half. NaN if one class is missing."""
    positives = float(labels.sum())
    negatives = len(labels) - positives
    if positives == 0 or negatives == 0:
        return float("nan")
    _, inverse, counts = np.unique(logits, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mid_ranks = last - (counts - 1) / 2.0
    return float(
        (mid_ranks[inverse][labels > 0].sum() - positives * (positives + 1) / 2) / (positives * negatives)
    )


def log_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean of softplus(z) - y z, the binary cross-entropy of probabilities sigmoid(z), in nats."""
    z = logits.astype(np.float64)
    return float(np.mean(np.logaddexp(0.0, z) - labels * z))


def prior_log_loss(labels: np.ndarray, rate: float) -> float:
    """Log-loss of predicting the constant probability `rate`."""
    rate = min(max(rate, 1e-12), 1 - 1e-12)
    return float(-np.mean(labels * np.log(rate) + (1 - labels) * np.log1p(-rate)))


def grouped_auc(logits: np.ndarray, labels: np.ndarray, group_ids: np.ndarray) -> float:
    """Mean of the AUC within each group, weighted by its rows; groups of one class are left out. NaN if none is left."""
    order = np.argsort(group_ids, kind="stable")
    bounds = np.flatnonzero(np.diff(group_ids[order])) + 1
    total = weight = 0.0
    for rows in np.split(order, bounds):
        value = auc(logits[rows], labels[rows])
        if not np.isnan(value):
            total, weight = total + value * len(rows), weight + len(rows)
    return total / weight if weight else float("nan")


def evaluate_predictions(
    logits: np.ndarray, labels: np.ndarray, names: tuple[str, ...], group_ids: np.ndarray | None = None
) -> dict[str, float]:
    """Compute every metric of the fused output and of each branch.

    Args:
        logits: (B, O), fused first.
        labels: (B,) of 0 and 1.
        names: of the branches, O - 1 of them.
        group_ids: (B,) for GAUC, or None.

    Returns:
        auc, log_loss, ne (log-loss over that of these labels' own rate), calibration (mean prediction over label rate), gauc, and
        auc/BRANCH, log_loss/BRANCH.
    """
    labels = labels.astype(np.float64)
    fused = logits[:, 0]
    rate = float(labels.mean())
    own = prior_log_loss(labels, rate)
    result = {"auc": auc(fused, labels), "log_loss": log_loss(fused, labels)}
    result["ne"] = result["log_loss"] / own if own > 0 else float("nan")
    mean_probability = float(np.mean(1.0 / (1.0 + np.exp(-fused.astype(np.float64)))))
    result["calibration"] = mean_probability / rate if rate > 0 else float("nan")
    if group_ids is not None:
        result["gauc"] = grouped_auc(fused, labels, group_ids)
    for index, name in enumerate(names, start=1):
        result[f"auc/{name}"] = auc(logits[:, index], labels)
        result[f"log_loss/{name}"] = log_loss(logits[:, index], labels)
    return result
