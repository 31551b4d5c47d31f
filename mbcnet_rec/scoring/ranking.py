"""Metrics of the ranking inside each group (a user's or a query's rows), by the fused output: NDCG@k, recall@k, hit rate@k and MRR.

Groups without a positive row rank nothing and are left out; the others count alike. Rows of one score in one group stand in any order with
equal probability, and a metric is its expected value over these orders: it depends neither on the order of the rows nor on the ranks.
Groups are independent draws: error = standard deviation over groups / sqrt(groups).

Shapes: B rows, G groups that have a positive row, T ties: rows of one group and one score, by rising group and falling score.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data.errors import InputError
from data.schema import Schema
from mbcnet_rec.scoring.metrics import NOT_KNOWN, Estimate, can_be_scored

TITLES = {"ndcg": "NDCG", "recall": "recall", "hit_rate": "hit rate", "mrr": "MRR"}


class Ties(NamedTuple):
    """What stands on each place of the groups' rankings, as far as the scores tell."""

    above: np.ndarray  # (T,) rows of the group that stand above
    rows: np.ndarray  # (T,)
    positives: np.ndarray  # (T,)
    first: np.ndarray  # (G,) of each group, its first tie


def names_of(ks: Sequence[int]) -> list[str]:
    """The metrics' names: ndcg@5, recall@5, hit_rate@5, ..., mrr. Without a k there are none."""
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


def ranking_metrics(
    logits: np.ndarray, labels: np.ndarray, group_ids: np.ndarray | None, ks: Sequence[int]
) -> dict[str, Estimate]:
    """The mean over groups of each metric of `names_of`, NaN if no group has a positive row; nothing without group ids. All are (B,)."""
    if group_ids is None:
        return {}
    found = ranking_values(logits, labels, group_ids, ks)
    return {name: _mean(values) if len(values) else NOT_KNOWN for name, values in found.items()}


def _mean(values: np.ndarray) -> Estimate:
    error = float(values.std(ddof=1)) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return Estimate(float(values.mean()), error)


def ranking_values(
    logits: np.ndarray, labels: np.ndarray, group_ids: np.ndarray, ks: Sequence[int]
) -> dict[str, np.ndarray]:
    """The metrics of each group, (G,) by rising id.

    With p of m tied rows positive, and s rows above them:

    DCG@k = sum over ties of p / m sum_{s < i <= min(s + m, k)} 1 / log2(i + 1),   NDCG@k = DCG@k / the largest that is possible
    recall@k = sum over ties of p / m (min(s + m, k) - min(s, k)) / the group's positives
    hit rate@k = 1 - product over ties of C(m - p, t) / C(m, t),   t = min(s + m, k) - min(s, k) rows of the tie among the first k
    MRR = sum_j C(m - j, p - 1) / C(m, p) / (s + j) of the first tie with a positive row, j its place in the tie
    """
    if not ks or not can_be_scored(logits, labels) or not (labels > 0).any():
        return {name: np.zeros(0) for name in names_of(ks)}
    above, rows, positives, first = _ties(logits, labels, group_ids)
    all_positives = np.add.reduceat(positives, first)
    longest = int((above + rows).max())
    gains = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(2, longest + 2)))])  # of the first i places
    factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, longest + 1)))])  # its logarithm
    found = {}
    for k in ks:
        start, stop = np.minimum(above, k), np.minimum(above + rows, k)
        gained = np.add.reduceat(positives / rows * (gains[stop] - gains[start]), first)
        found[f"ndcg@{k}"] = gained / gains[np.minimum(all_positives, k)]
        found[f"recall@{k}"] = np.add.reduceat(positives / rows * (stop - start), first) / all_positives
        others, taken = rows - positives, stop - start
        none = (
            factorial[others] - factorial[np.maximum(others - taken, 0)] - (factorial[rows] - factorial[rows - taken])
        )
        found[f"hit_rate@{k}"] = 1 - np.multiply.reduceat(np.where(taken > others, 0.0, np.exp(none)), first)
    leading = np.flatnonzero((positives > 0) & (_before(positives, first) == 0))  # a tie of each group
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


def _ties(logits: np.ndarray, labels: np.ndarray, group_ids: np.ndarray) -> Ties:
    known = np.unique(group_ids[labels > 0])
    kept = known[np.minimum(np.searchsorted(known, group_ids), len(known) - 1)] == group_ids
    logits, labels, group_ids = logits[kept], labels[kept], group_ids[kept]
    order = np.lexsort((-logits, group_ids))
    groups, scores = group_ids[order], logits[order]
    new_group = np.concatenate([[True], groups[1:] != groups[:-1]])
    starts = np.flatnonzero(new_group | np.concatenate([[True], scores[1:] != scores[:-1]]))
    rows = np.diff(np.append(starts, len(order)))
    positives = np.add.reduceat((labels[order] > 0).astype(np.int64), starts)
    first = np.flatnonzero(new_group[starts])
    return Ties(_before(rows, first), rows, positives, first)


def _before(counts: np.ndarray, first: np.ndarray) -> np.ndarray:
    """The sum of the counts of a group's earlier ties, (T,)."""
    before = np.cumsum(counts) - counts
    return before - np.repeat(before[first], np.diff(np.append(first, len(counts))))
