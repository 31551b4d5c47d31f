"""What a study's runs say: means over seeds, paired differences over seeds and over rows, verdicts on claims.

Two variants are compared seed by seed: both runs of a seed start from the same tables and see the same rows in the same
order, so their difference varies less than each of them. With d_s = AUC_s - AUC'_s over n seeds the 95 % interval is
mean(d) -+ t(0.975, n - 1) sd(d) / sqrt(n), and p is that of the paired t test.

Seeds say nothing of the test rows, which are the same in all runs. So the seeds' mean score is compared row by row too (paired.py), and
the p of a comparison is the larger of the two, or 1 where they point to different sides. The p of a table's comparisons are corrected for their number (Holm).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
from scipy import stats

from mbcnet_rec.scoring.paired import Difference, holm
from mbcnet_rec.study.row_scores import RowScores, row_differences
from mbcnet_rec.study.studies import Claim, Study

CONFIDENCE, SIGNIFICANT = 0.95, 0.05
NO_VERDICT = "no verdict"
TESTED = ("reproduced", "same direction", "not reproduced", "contradicted", NO_VERDICT)
Scores = Mapping[int, Mapping[str, Any]]  # seed -> metrics of the run


@dataclass(frozen=True)
class Compared:
    """Two variants, or outputs of variants, by one metric."""

    seeds: Difference  # paired by seed; its interval and p are NaN where one seed tells nothing
    rows: Difference | None  # of the seeds' mean scores; None: not kept
    p: float  # corrected where it is one of several; NaN where either side tells nothing


Judged = tuple[Claim, str, Compared | None, Compared | None]  # verdict, differences of AUC or measure, and log-loss


@dataclass(frozen=True)
class Results:
    """What a study's runs came to."""

    scores: Mapping[str, Scores]  # variant -> seed -> metrics
    rows: Mapping[str, Mapping[int, RowScores]]  # the same, row by row, where that was kept

    def of(self, name: str) -> tuple[Scores, Mapping[int, RowScores], str]:
        """The metrics and row scores of a variant, or of one of its outputs, VARIANT/BRANCH; and that output, "" for the fused one."""
        variant, _, output = name.partition("/") if name not in self.scores else (name, "", "")
        own = self.scores.get(variant, {})
        if output:
            own = {
                seed: {metric: each[f"{metric}/{output}"] for metric in ("auc", "log_loss")}
                for seed, each in own.items()
                if f"auc/{output}" in each
            }
        return own, self.rows.get(variant, {}), output


@dataclass(frozen=True)
class Row:
    """A variant's line of the table."""

    name: str
    seeds: int  # that ended
    # mean and standard deviation over seeds (n - 1 below); NaN for one seed's deviation
    auc: tuple[float, float]
    log_loss: tuple[float, float]
    against: str  # the row it is compared with; "" if there is none
    difference: Compared | None  # of AUC to that row
    loss_difference: Compared | None
    paper: tuple[float, ...]  # the paper's own figures
    best_branch: str  # of the highest mean AUC; "" if the variant has no branches
    fused: Compared | None  # AUC of the fused output less that of its best branch
    disagreement: (
        float  # share of the training rows on which a branch teaches another, mean over directed pairs; NaN: not logged
    )
    failures: tuple[str, ...] = ()  # why the other seeds did not end
    notes: tuple[str, ...] = ()  # why they have no AUC
    dead: int = 0  # seeds that ended with an output that says the same of every row


def paired_difference(
    ours: Sequence[float] | np.ndarray, theirs: Sequence[float] | np.ndarray | float = 0.0
) -> Difference:
    """Compare values seed by seed."""
    d = np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)
    mean = float(d.mean()) if len(d) else math.nan
    if len(d) < 2:
        return Difference(mean, math.nan, math.nan, math.nan)
    error = float(d.std(ddof=1)) / math.sqrt(len(d))
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, len(d) - 1)) * error
    ratio = abs(mean) / error if error > 0 else (0.0 if mean == 0 else math.inf)
    p = float(2 * stats.t.sf(ratio, len(d) - 1))
    return Difference(mean, mean - half, mean + half, p)


def mean_and_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; NaN where there are too few values."""
    mean = float(np.mean(values)) if values else math.nan
    return mean, float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def compare(results: Results, ours: str, theirs: str, metric: str) -> Compared | None:
    """Compare two variants or outputs over the seeds that both have; None if there is none, as for a name that is empty."""
    own, own_rows, output = results.of(ours)
    other, other_rows, other_output = results.of(theirs)
    shared = sorted(own.keys() & other.keys())
    if not shared:
        return None
    seeds = paired_difference([own[s][metric] for s in shared], [other[s][metric] for s in shared])
    rows = row_differences(own_rows, other_rows, (output, other_output)).get(metric)
    return in_both(seeds, rows)


def in_both(seeds: Difference, rows: Difference | None) -> Compared:
    """Join what seeds and rows say of one difference: p is the larger of the two, 1 where they point to different sides, NaN where one is."""
    if rows is None or math.isnan(seeds.p) or math.isnan(rows.p):
        return Compared(seeds, rows, math.nan)
    return Compared(seeds, rows, max(seeds.p, rows.p) if seeds.value * rows.value > 0 else 1.0)


def corrected(compared: Sequence[Compared | None]) -> list[Compared | None]:
    """Correct the p of comparisons for their number."""
    p_values = iter(holm([each.p for each in compared if each is not None]))
    return [each and replace(each, p=next(p_values)) for each in compared]


def summarise(study: Study, results: Results, failures: Mapping[str, Sequence[str]]) -> list[Row]:
    """Make the rows of a study's table, in the study's order: of each variant that has runs, or `failures` of runs."""
    names = [each.name for each in study.variants if each.name in results.scores or each.name in failures]
    against = [best_reference(study, results.scores, but=name) if results.scores.get(name) else "" for name in names]
    branches = [best_branch(results.scores.get(name, {})) for name in names]
    outputs = [branch and f"{name}/{branch}" for name, branch in zip(names, branches, strict=True)]
    differences = [
        corrected([compare(results, name, other, metric) for name, other in zip(names, others, strict=True)])
        for others, metric in ((against, "auc"), (against, "log_loss"), (outputs, "auc"))
    ]
    papers = {variant.name: variant.paper for variant in study.variants}
    rows = []
    for name, other, branch, area, loss, fused in zip(names, against, branches, *differences, strict=True):
        own = results.scores.get(name, {}).values()
        auc, log_loss = (mean_and_sd([each[metric] for each in own]) for metric in ("auc", "log_loss"))
        dead = sum(bool(each.get("dead")) for each in own)
        rows.append(
            Row(
                name, len(own), auc, log_loss, other, area, loss, papers[name],
                branch, fused, mean_and_sd([each["disagreement"] for each in own if "disagreement" in each])[0],
                tuple(failures.get(name, ())), tuple(sorted({each["note"] for each in own if each.get("note")})), dead,
            )
        )  # fmt: skip
    return rows


def best_reference(study: Study, scores: Mapping[str, Scores], but: str = "") -> str:
    """Name the reference row with the highest mean AUC, other than `but`; "" if there is none."""
    candidates = [name for name in study.reference_rows if name != but and scores.get(name)]
    return max(candidates, key=lambda name: _rank([s["auc"] for s in scores[name].values()]), default="")


def _rank(values: Sequence[float]) -> float:
    mean = float(np.mean(values))
    return -math.inf if math.isnan(mean) else mean


def best_branch(scores: Scores) -> str:
    """Name the branch with the highest mean AUC over seeds; "" if there are none."""
    keys = {key for each in scores.values() for key in each if key.startswith("auc/")}
    best = max(sorted(keys), key=lambda key: _rank([each[key] for each in scores.values()]), default="")
    return best.removeprefix("auc/")


def judge_all(
    claims: Sequence[Claim], results: Results, measured: Mapping[str, Compared] = MappingProxyType({})
) -> list[Judged]:
    """Say what the runs make of claims: each with a verdict, and its differences of AUC and log-loss, corrected for their number.

    A claim that is not about AUC is judged by what was `measured` for it, of which more is in its favour. reproduced: the difference of AUC is above 0 and its corrected p below 0.05. contradicted: below 0, likewise. same direction: above 0
    only. not reproduced: the rest. With one seed, or without row scores, there is no verdict; without runs of both the claim is not tested.
    """
    areas, losses = (
        corrected(
            [
                compare(results, claim.better, claim.worse, metric)
                if not claim.measure
                else measured.get(claim.measure)
                if metric == "auc"
                else None
                for claim in claims
            ]
        )
        for metric in ("auc", "log_loss")
    )
    return [(claim, _verdict(area), area, loss) for claim, area, loss in zip(claims, areas, losses, strict=True)]


def _verdict(area: Compared | None) -> str:
    if area is None:
        return "not tested"
    if math.isnan(area.p):
        return NO_VERDICT
    ahead = area.seeds.value > 0
    if area.p < SIGNIFICANT:
        return "reproduced" if ahead else "contradicted"
    return "same direction" if ahead else "not reproduced"
