"""What a study's runs say: means over seeds, paired differences with confidence intervals, verdicts on claims.

Two variants are compared seed by seed: both runs of a seed start from the same tables and see the same rows in the same
order, so their difference varies less than each of them. With d_s = AUC_s - AUC'_s over n seeds the 95 % interval is
mean(d) -+ t(0.975, n - 1) sd(d) / sqrt(n), and p is that of the paired t test. No correction for the number of rows.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from mbcnet_rec.study.studies import Claim, Study

CONFIDENCE = 0.95
TESTED = ("reproduced", "same direction", "not reproduced", "contradicted")
Scores = Mapping[int, Mapping[str, float]]  # seed -> metrics of the run


@dataclass(frozen=True)
class Difference:
    """A paired difference over `seeds` seeds: its mean, 95 % interval and p. NaN where one seed tells nothing."""

    mean: float
    low: float
    high: float
    p: float
    seeds: int


@dataclass(frozen=True)
class Row:
    """A variant's line of the table."""

    name: str
    seeds: int  # that ended
    # mean and standard deviation over seeds (n - 1 below); NaN for one seed's deviation
    auc: tuple[float, float]
    log_loss: tuple[float, float]
    against: str  # the row it is compared with; "" if there is none
    difference: Difference | None  # of AUC to that row
    loss_difference: Difference | None
    paper: tuple[float, ...]  # the paper's own figures
    failures: tuple[str, ...] = ()  # why the other seeds did not end


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Compare values seed by seed."""
    d = np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)
    mean = float(d.mean()) if len(d) else math.nan
    if len(d) < 2:
        return Difference(mean, math.nan, math.nan, math.nan, len(d))
    error = float(d.std(ddof=1)) / math.sqrt(len(d))
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, len(d) - 1)) * error
    ratio = abs(mean) / error if error > 0 else (0.0 if mean == 0 else math.inf)
    p = float(2 * stats.t.sf(ratio, len(d) - 1))
    return Difference(mean, mean - half, mean + half, p, len(d))


def mean_and_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; NaN where there are too few values."""
    mean = float(np.mean(values)) if values else math.nan
    return mean, float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def compare(ours: Scores, theirs: Scores, metric: str) -> Difference | None:
    """Paired difference over the seeds that both have; None if there is none."""
    shared = sorted(ours.keys() & theirs.keys())
    if not shared:
        return None
    return paired_difference([ours[s][metric] for s in shared], [theirs[s][metric] for s in shared])


def summarise(study: Study, scores: Mapping[str, Scores], failures: Mapping[str, Sequence[str]]) -> list[Row]:
    """Make the rows of a study's table, in the study's order: of each variant that has runs, or `failures` of runs."""
    rows = []
    for variant in study.variants:
        if variant.name not in scores and variant.name not in failures:
            continue
        own = scores.get(variant.name, {})
        against = best_reference(study, scores, but=variant.name) if own else ""
        rows.append(
            Row(
                variant.name,
                len(own),
                mean_and_sd([each["auc"] for each in own.values()]),
                mean_and_sd([each["log_loss"] for each in own.values()]),
                against,
                compare(own, scores[against], "auc") if against else None,
                compare(own, scores[against], "log_loss") if against else None,
                variant.paper,
                tuple(failures.get(variant.name, ())),
            )
        )
    return rows


def best_reference(study: Study, scores: Mapping[str, Scores], but: str = "") -> str:
    """Name the reference row with the highest mean AUC, other than `but`; "" if there is none."""
    candidates = [name for name in study.reference_rows if name != but and scores.get(name)]
    return max(candidates, key=lambda name: np.mean([s["auc"] for s in scores[name].values()]), default="")


def judge(claim: Claim, scores: Mapping[str, Scores]) -> tuple[str, Difference | None]:
    """Say what the runs make of a claim: one of TESTED, or "not tested" where no seed has both runs; and the difference of AUC.

    reproduced: the interval of the difference lies above 0. same direction: the mean does, the interval does not.
    contradicted: the interval lies below 0. not reproduced: the rest.
    """
    difference = compare(scores.get(claim.better, {}), scores.get(claim.worse, {}), "auc")
    if difference is None:
        return "not tested", None
    if difference.low > 0:
        return "reproduced", difference
    if difference.high < 0:
        return "contradicted", difference
    return "same direction" if difference.mean > 0 else "not reproduced", difference
