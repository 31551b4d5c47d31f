"""`mbcnet export --calibrate`: fits what the loader makes of the fused logit, on validation rows, by scikit-learn; loader.py applies it.

platt       p = sigmoid(a z + b)
isotonic    p = a non-decreasing function of z, linear between its knots, within [1 / (n + 2), 1 - 1 / (n + 2)] of n rows
"""

from typing import Any

import numpy as np
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from data.errors import InputError
from mbcnet_rec.scoring.metrics import evaluate_predictions

KINDS = ("isotonic", "platt")


def fit_calibration(kind: str, logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """What model.json keeps of a fit to fused logits (n,) and labels (n,); InputError if the rows have one class, or rank the wrong way round."""
    if len(np.unique(labels)) < 2:
        raise InputError(
            "--calibrate: the validation rows are of one class; name others in data.valid, or leave it out"
        )
    z = logits.astype(np.float64)
    if kind == "platt":
        model = LogisticRegression(C=np.inf).fit(z[:, None], labels)
        a, b = float(model.coef_[0, 0]), float(model.intercept_[0])
        if a <= 0:
            raise InputError(
                "--calibrate platt: validation rows rank the wrong way round; train longer, or leave it out"
            )
        return {"kind": kind, "a": a, "b": b}
    least = 1 / (len(z) + 2)
    model = IsotonicRegression(y_min=least, y_max=1 - least).fit(z, labels)
    return {"kind": kind, "x": model.X_thresholds_.tolist(), "y": model.y_thresholds_.tolist()}


def entropy_of(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Normalised entropy of probabilities (n,)."""
    p = probabilities.astype(np.float64).clip(1e-7, 1 - 1e-7)  # beyond, float32 has 0 and 1
    return evaluate_predictions((np.log(p) - np.log1p(-p))[:, None], labels, ())["ne"]
