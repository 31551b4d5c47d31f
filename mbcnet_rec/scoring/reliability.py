"""Predicted against observed rates, in bins of equal size: what a calibration plot draws."""

import numpy as np

NUM_BINS = 15


def reliability(logits: np.ndarray, labels: np.ndarray, bins: int = NUM_BINS) -> list[list[float]]:
    """Cut rows, by rising prediction, into bins of equal size.

    Args:
        logits: (B,) of one output.
        labels: (B,) of 0 and 1.
        bins: at most; fewer where there are fewer rows.

    Returns:
        For each bin: mean predicted probability, observed rate, rows.
    """
    order = np.argsort(logits, kind="stable")
    probability = 1.0 / (1.0 + np.exp(-logits[order].astype(np.float64)))
    parts = np.array_split(np.arange(len(order)), min(bins, len(order)))
    return [
        [float(probability[part].mean()), float(labels[order][part].mean()), float(len(part))]
        for part in parts
        if len(part)
    ]
