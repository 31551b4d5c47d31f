"""GAUC and the metrics of ranking.py of more rows than memory holds: on each rank's disk rows wait in shares of whole groups, judged one by one.

Shapes: B rows, G groups.
"""

import tempfile
from collections.abc import Sequence

import numpy as np

from mbcnet_rec.runtime.process import Process, gather_rows
from mbcnet_rec.scoring.metrics import NOT_KNOWN, Estimate, can_be_scored, group_areas
from mbcnet_rec.scoring.ranking import names_of, ranking_values

ROW = np.dtype([("group", np.int64), ("logit", np.float32), ("label", np.float32)])
MOST_SHARES = 512  # files that are open at once


class GroupShares:
    """The fused logits, labels and group ids of this rank's rows, 16 bytes a row in temporary files. `shares`: that they are cut into."""

    def __init__(self, shares: int, ranking_k: Sequence[int]) -> None:
        # closed by `metrics`, and without a name, so that they are gone with the process
        self._files = [tempfile.TemporaryFile() for _ in range(min(shares, MOST_SHARES))]  # noqa: SIM115
        self._ranking_k = ranking_k

    def add(self, logits: np.ndarray, labels: np.ndarray, group_ids: np.ndarray) -> None:
        """Take rows: all (B,)."""
        rows = np.empty(len(labels), ROW)
        rows["group"], rows["logit"], rows["label"] = group_ids, logits, labels
        shares = group_ids % len(self._files)
        for share in np.unique(shares).tolist():
            self._files[share].write(rows[shares == share].tobytes())

    def metrics(self, process: Process) -> dict[str, Estimate]:
        """Exact metrics of all ranks' rows, whatever rank has them, on rank 0; nothing elsewhere. Every rank calls it, once."""
        sums = {name: np.zeros(6) for name in ("gauc", *names_of(self._ranking_k))}
        is_scored = True
        for file in self._files:
            with file:
                file.seek(0)
                rows = gather_rows(np.frombuffer(file.read(), ROW), process)
            if rows is None or not len(rows):
                continue
            columns = rows["logit"], rows["label"], rows["group"]
            is_scored &= can_be_scored(*columns[:2])
            areas, sizes = group_areas(*columns)
            sums["gauc"] += _sums(areas, sizes)
            for name, values in ranking_values(*columns, self._ranking_k).items():
                sums[name] += _sums(values, np.ones(len(values)))
        if not process.is_first:
            return {}
        return {name: _estimate(name, *found.tolist()) if is_scored else NOT_KNOWN for name, found in sums.items()}


def _sums(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """What adds up over shares: groups; weights w, and w v of values v; w^2, w^2 v and w^2 v^2."""
    w2 = weights**2
    return np.array([len(values), weights.sum(), weights @ values, w2.sum(), w2 @ values, w2 @ values**2])


def _estimate(name: str, groups: float, w: float, wv: float, w2: float, w2v: float, w2v2: float) -> Estimate:
    """The weighted mean over groups, and its error: error^2 = sum over groups of (w / sum w)^2 (v - mean)^2, of means of equal weight (G - 1) / G less."""
    if not groups:
        return NOT_KNOWN
    mean = wv / w
    error = (max(0.0, w2v2 - 2 * mean * w2v + mean**2 * w2)) ** 0.5 / w
    if groups < 2:
        return Estimate(mean, float("nan"))
    return Estimate(mean, error if name == "gauc" else error * (groups / (groups - 1)) ** 0.5)
