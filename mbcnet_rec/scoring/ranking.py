"""Metrics inside groups (a user's or a query's rows), by the fused output: GAUC, NDCG@k, recall@k, hit rate@k and MRR.

GAUC is the mean over groups of both classes of their AUC, weighted by rows. The others are means over groups that have a positive row, all
alike. Rows of one score in one group stand in any order with equal probability, and a metric is its expected value over these orders: it
depends neither on the order of the rows nor on the ranks. Groups are independent draws. A row without a group (a null) is in none.

Shapes: B rows, G groups, T ties: rows of one group and one score, by rising group and falling score.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from data.errors import InputError
from data.reading.columns import NO_GROUP
from data.schema import Schema
from mbcnet_rec.scoring.metrics import NOT_KNOWN, Estimate, can_be_scored

TITLES = {"ndcg": "NDCG", "recall": "recall", "hit_rate": "hit rate", "mrr": "MRR"}


class Ties(NamedTuple):
    """What stands on each place of the groups' rankings, as far as the scores tell."""

    rows: np.ndarray  # (T,)
    positives: np.ndarray  # (T,)
    first: np.ndarray  # (G,) of each group, its first tie

    @classmethod
    def of(cls, logits: np.ndarray, labels: np.ndarray, group_ids: np.ndarray) -> "Ties":
        """Count the rows of each group and score; all are (B,)."""
        order = np.lexsort((-logits, group_ids))
        groups, scores = group_ids[order], logits[order]
        new_group = np.concatenate([[True], groups[1:] != groups[:-1]])
        starts = np.flatnonzero(new_group | np.concatenate([[True], scores[1:] != scores[:-1]]))
        positives = np.add.reduceat((labels[order] > 0).astype(np.int64), starts)
        return cls(np.diff(np.append(starts, len(order))), positives, np.flatnonzero(new_group[starts]))

    def total(self, counts: np.ndarray) -> np.ndarray:
        """The sum of each group's counts (T,), (G,)."""
        return np.add.reduceat(counts, self.first)

    def above(self, counts: np.ndarray) -> np.ndarray:
        """The sum of the counts of the same group's earlier ties, (T,)."""
        before = np.cumsum(counts) - counts
        return before - np.repeat(before[self.first], np.diff(np.append(self.first, len(counts))))

    def among_first(self, k: int) -> np.ndarray:
        """How many of a tie's rows are among the first k of its group, (T,)."""
        above = self.above(self.rows)
        return np.minimum(above + self.rows, k) - np.minimum(above, k)


def names_of(ks: Sequence[int]) -> list[str]:
    """The ranking metrics' names: ndcg@5, recall@5, hit_rate@5, ..., mrr. Without a k there are none."""
    return [*(f"{name}@{k}" for k in ks for name in ("ndcg", "recall", "hit_rate")), "mrr"] if ks else []


def require_groups(schema: Schema, ks: Sequence[int]) -> None:
    """Refuse places of a ranking without groups, and the same one twice."""
    if ks and not schema.group_column:
        raise InputError(
            f"ranking_k = {list(ks)}: the schema has no group_column, whose rows are ranked; name one, or set []"
        )
    if len(set(ks)) < len(ks):
        raise InputError(f"ranking_k = {list(ks)}: a place stands there twice; remove the repeat")


def title_of(name: str) -> str:
    """A metric for people, such as NDCG@5, or NDCG@5 of buy for ndcg@5/buy; empty if it is none of these."""
    own, _, task = name.partition("/")
    metric, at, k = own.partition("@")
    return TITLES[metric] + at + k + (f" of {task}" if task else "") if metric in TITLES else ""


def grouped(*rows: np.ndarray) -> list[np.ndarray]:
    """Arrays (B,), the last one of group ids, without the rows that have no group."""
    known = rows[-1] != NO_GROUP
    return [each[known] for each in rows]


def group_metrics(
    logits: np.ndarray, labels: np.ndarray, group_ids: np.ndarray, ks: Sequence[int]
) -> dict[str, Estimate]:
    """Gauc and each metric of `names_of` of rows in memory (B,); NaN if no group counts, or rows cannot be scored."""
    return group_estimates(group_sums(logits, labels, group_ids, ks))


def group_sums(
    logits: np.ndarray, labels: np.ndarray, group_ids: np.ndarray, ks: Sequence[int]
) -> dict[str, np.ndarray]:
    """Of rows (B,), the sums (6,) of gauc and each of `names_of`, which add up over sets of whole groups; NaN if rows cannot be scored."""
    logits, labels, group_ids = grouped(logits, labels, group_ids)
    if len(labels) and not can_be_scored(logits, labels):
        return {name: np.full(6, math.nan) for name in ("gauc", *names_of(ks))}
    found = {"gauc": _sums(*group_areas(logits, labels, group_ids))}
    values = ranking_values(logits, labels, group_ids, ks)
    return found | {name: _sums(each, np.ones(len(each))) for name, each in values.items()}


def _sums(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Groups; their weights w, and w v of their values v; w^2, w^2 v and w^2 v^2."""
    w2 = weights**2
    return np.array([len(values), weights.sum(), (weights * values).sum(), w2.sum(), w2 @ values, w2 @ values**2])


def group_estimates(sums: Mapping[str, np.ndarray]) -> dict[str, Estimate]:
    """The same of sums: means over groups and their errors.

    error^2 = sum over groups of (w / sum w)^2 (v - mean)^2; for means of equal weight times G / (G - 1), as of a standard deviation
    """
    found = {}
    for name, (groups, w, wv, w2, w2v, w2v2) in ((name, each.tolist()) for name, each in sums.items()):
        if not groups > 0:
            found[name] = NOT_KNOWN
            continue
        mean = wv / w
        variance = max(0.0, w2v2 - 2 * mean * w2v + mean**2 * w2) / w**2
        sample = 1 if name == "gauc" else groups / max(1, groups - 1)
        found[name] = Estimate(mean, math.sqrt(variance * sample) if groups > 1 else math.nan)
    return found


def gauc_influence(logits: np.ndarray, labels: np.ndarray, group_ids: np.ndarray) -> tuple[float, np.ndarray]:
    """GAUC; with the influence of each group that has both classes, (G,)."""
    values, weights = group_areas(logits, labels, group_ids)
    if not len(values):
        return math.nan, np.full(1, math.nan)
    value = float((weights * values).sum() / weights.sum())
    return value, weights * (values - value) / weights.sum()


def group_areas(logits: np.ndarray, labels: np.ndarray, group_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The AUC of each group that has both classes, and its rows, by rising id: two (G,) float64; empty ones of rows that cannot be scored."""
    if not can_be_scored(logits, labels):
        return np.zeros(0), np.zeros(0)
    ties = Ties.of(logits, labels, group_ids)
    negatives = ties.rows - ties.positives
    # pairs of a positive and a negative that stands above it, or beside it, which counts one half
    lost = ties.total(ties.positives * (ties.above(negatives) + negatives / 2))
    positive, negative = ties.total(ties.positives), ties.total(negatives)
    both = (positive > 0) & (negative > 0)
    pairs = (positive * negative)[both]
    return (pairs - lost[both]) / pairs, (positive + negative)[both].astype(np.float64)


def ranking_values(
    logits: np.ndarray, labels: np.ndarray, group_ids: np.ndarray, ks: Sequence[int]
) -> dict[str, np.ndarray]:
    """The ranking metrics of each group that has a positive row, (G,) by rising id.

    With p of m tied rows positive, and s rows above them:

    DCG@k = sum over ties of p / m sum_{s < i <= min(s + m, k)} 1 / log2(i + 1),   NDCG@k = DCG@k / the largest that is possible
    recall@k = sum over ties of p / m (min(s + m, k) - min(s, k)) / the group's positives
    hit rate@k = 1 - product over ties of C(m - p, t) / C(m, t),   t = min(s + m, k) - min(s, k) rows of the tie among the first k
    MRR = sum_j C(m - j, p - 1) / C(m, p) / (s + j) of the first tie with a positive row, j its place in the tie
    """
    if not ks or not can_be_scored(logits, labels) or not (labels > 0).any():
        return {name: np.zeros(0) for name in names_of(ks)}
    known = np.isin(group_ids, np.unique(group_ids[labels > 0]))
    ties = Ties.of(logits[known], labels[known], group_ids[known])
    rows, positives, above, all_positives = ties.rows, ties.positives, ties.above(ties.rows), ties.total(ties.positives)
    longest = int((above + rows).max())
    gains = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(2, longest + 2)))])  # of the first i places
    factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, longest + 1)))])  # its logarithm
    found = {}
    for k in ks:
        start, stop = np.minimum(above, k), np.minimum(above + rows, k)
        gained = ties.total(positives / rows * (gains[stop] - gains[start]))
        found[f"ndcg@{k}"] = gained / gains[np.minimum(all_positives, k)]
        taken, others = ties.among_first(k), rows - positives
        found[f"recall@{k}"] = ties.total(positives / rows * taken) / all_positives
        among_others = factorial[others] - factorial[np.maximum(others - taken, 0)]
        none = among_others - (factorial[rows] - factorial[rows - taken])
        missed = np.where(taken > others, 0.0, np.exp(none))
        found[f"hit_rate@{k}"] = 1 - np.multiply.reduceat(missed, ties.first)
    leading = np.flatnonzero((positives > 0) & (ties.above(positives) == 0))  # a tie of each group
    p, m, s = positives[leading], rows[leading], above[leading]
    reach = m - p + 1  # places at which its first positive row may stand
    starts = np.cumsum(reach) - reach
    p, m, s = (np.repeat(each, reach) for each in (p, m, s))
    j = np.arange(len(m)) - np.repeat(starts, reach) + 1
    chance = (
        factorial[m - j]
        - factorial[m - j - p + 1]
        - factorial[p - 1]
        - (factorial[m] - factorial[m - p] - factorial[p])
    )
    found["mrr"] = np.add.reduceat(np.exp(chance) / (s + j), starts)
    return found
