"""What the paper says of the branches' latents and losses (Figures 4 d, 6 and 7) as numbers, each with a p over seeds and one over test rows.

Shapes: S seeds, n rows, K branches, d latent width.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from scipy import stats
from scipy.special import softmax

from data.errors import InputError
from mbcnet_rec.scoring.paired import Difference, mean_difference
from mbcnet_rec.study.pictures import Material
from mbcnet_rec.study.probe import MISSING, Probe
from mbcnet_rec.study.studies import WORDS, Measure
from mbcnet_rec.study.summary import Compared, in_both

LEAST_EXPECTED = 5.0  # samples of a cell, from which on a chi-square test holds (Cochran)
Measured = tuple[Compared, str]  # the difference that a claim is about, and what it is in words


def separation(latents: np.ndarray) -> np.ndarray:
    """Share of a row's latents that lie nearest to the centroid of their own branch, (K, n, d) -> (n,); 1 / K: branches cannot be told apart.

    Centroids are of every second row, and judge the others.
    """
    hits = np.empty(latents.shape[1])
    for half in (0, 1):
        centroids = latents[:, 1 - half :: 2].mean(1)
        distances = ((latents[:, half::2, None] - centroids) ** 2).sum(-1)  # (K, n / 2, K)
        hits[half::2] = (distances.argmin(-1) == np.arange(len(latents))[:, None]).mean(0)
    return hits


def nearer_to_cross(probe: Probe) -> np.ndarray:
    """By how much EFGC's neurons are nearer to the cross branch's than to the deep branch's, (n,): softmax outputs by total variation."""
    if missing := {"efgc", "cross", "deep"} - {*probe.names}:
        raise InputError(f"the model has no branch {min(missing)}")
    efgc, cross, deep = (softmax(probe.latents[probe.names.index(name)], axis=1) for name in ("efgc", "cross", "deep"))
    return 0.5 * (np.abs(efgc - deep) - np.abs(efgc - cross)).sum(1)


def dependence(losses: np.ndarray, categories: np.ndarray) -> tuple[float, float]:
    """Whether the branch of a row's lowest loss (n, K) depends on its category (n,): chi-square above chance by row, and its p.

    Categories with too few rows for the test are taken together.
    """
    known = categories != MISSING
    table = np.asarray(stats.contingency.crosstab(categories[known], losses[known].argmin(1))[1])
    rows = table.sum()
    rare = table.sum(1) * table.sum(0).min(initial=rows) < LEAST_EXPECTED * rows
    table = np.vstack([table[~rare], table[rare].sum(0)])
    table = table[table.sum(1) * table.sum(0).min(initial=rows) >= LEAST_EXPECTED * rows]
    if min(table.shape) < 2:
        raise InputError("one branch is best on all rows, or there are too few rows of each category")
    found = stats.chi2_contingency(table, correction=False)
    return float((found.statistic - found.dof) / rows), float(found.pvalue)


def over_seeds_and_rows(values: np.ndarray, groups: np.ndarray | None) -> Compared:
    """Compare with 0 what each seed says of each row, (S, n)."""
    return in_both(mean_difference(values.mean(1)), mean_difference(values.mean(0), groups))


def measure_separation(material: Material) -> Measured:
    """Figure 4 d: branches are more tangled early in training than at its end."""
    shares: dict[str, list[np.ndarray]] = {"early": [], "late": []}
    groups = None
    for run in material.first:
        steps = material.ages(run)
        if "early" not in steps:
            raise InputError(
                f"{run.folder} has no checkpoint of step {run.config.train.keep_step}, the first line of the log, beside a later one; "
                "set train.log_every lower, or train longer"
            )
        for age, step in steps.items():
            probe = material.probe(run, step=step)
            shares[age].append(separation(probe.latents))
            groups = probe.groups
    told = ", ".join(f"{age} {_with_interval(np.mean(each, axis=1))}" for age, each in shares.items())
    words = WORDS["measures"]["separation"].format(told=told)
    return over_seeds_and_rows(np.subtract(shares["late"], shares["early"]), groups), words


def measure_consistency(material: Material) -> Measured:
    """Figure 6: EFGC agrees more with the cross branch than with the deep branch."""
    probes = [material.probe(run) for run in material.first]
    values = np.stack([nearer_to_cross(each) for each in probes])
    return over_seeds_and_rows(values, probes[0].groups), WORDS["measures"]["consistency"]


def measure_dependence(material: Material) -> Measured:
    """Figure 7: which branch is best depends on the category. The p over seeds is that of the seed that says least."""
    _, field = material.category_field()
    probes = [material.probe(run, category=field.name) for run in material.first]
    found = [dependence(each.log_loss()[:, 1:], each.categories) for each in probes]
    least = max(p for _, p in found) if len(found) > 1 else math.nan
    seeds = Difference(float(np.mean([value for value, _ in found])), math.nan, math.nan, least)
    joint = replace(probes[0], logits=np.mean([each.logits for each in probes], axis=0))
    value, p = dependence(joint.log_loss()[:, 1:], joint.categories)
    words = WORDS["measures"]["dependence"].format(field=field.name)
    return in_both(seeds, Difference(value, math.nan, math.nan, p)), words


def measure_all(material: Material) -> tuple[dict[str, Compared], list[str]]:
    """What the study's claims are about beside AUC, where there are runs; and words on each: what it is, or why it is not there."""
    found, told = {}, []
    for claim in material.study.claims:
        if claim.measure and material.runs:
            try:
                found[claim.measure], words = MEASURES[claim.measure](material)
            except InputError as error:
                words = f"Not tested: {claim.text}. {error}"
            told.append(words)
    return found, told


MEASURES: dict[Measure, Callable[[Material], Measured]] = {
    "separation": measure_separation,
    "consistency": measure_consistency,
    "dependence": measure_dependence,
}


def _with_interval(values: np.ndarray) -> str:
    found = mean_difference(values)
    return f"{found.value:.3f}" + (f" [{found.low:.3f}, {found.high:.3f}]" if found.low == found.low else "")
