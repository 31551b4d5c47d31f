"""What a study's runs say: means over seeds, paired differences over seeds and over rows, verdicts on claims; and the tables of its page.

Two variants are compared seed by seed: both runs of a seed start from the same tables and see the same rows in the same
order, so their difference varies less than each of them. With d_s = AUC_s - AUC'_s over n seeds the 95 % interval is
mean(d) -+ t(0.975, n - 1) sd(d) / sqrt(n), and p is that of the paired t test.

Seeds say nothing of the test rows, which are the same in all runs. So the seeds' mean score is compared row by row too (paired.py), and
the p of a comparison is the larger of the two, or 1 where they point to different sides. The p of a table's comparisons are corrected for their number (Holm).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mbcnet_rec.report.page import Block, Table, Text
from mbcnet_rec.scoring.compare import p_text
from mbcnet_rec.scoring.metrics import softplus
from mbcnet_rec.scoring.paired import Difference, holm, mean_difference, paired_differences
from mbcnet_rec.study.runs import RowScores
from mbcnet_rec.study.studies import MBCNET, Claim, Study

SIGNIFICANT = 0.05
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
    auc: tuple[float, float]  # mean and standard deviation over seeds (n - 1 below); NaN for one seed's deviation
    log_loss: tuple[float, float]
    against: str  # the row it is compared with; "" if there is none
    difference: Compared | None  # of AUC to that row
    loss_difference: Compared | None
    paper: tuple[float, ...]  # the paper's own figures
    best_branch: str  # of the highest mean AUC; "" if the variant has no branches
    fused: Compared | None  # AUC of the fused output less that of its best branch
    # share of the training rows on which a branch teaches another, mean over directed pairs; NaN: not logged
    disagreement: float
    failures: tuple[str, ...] = ()  # why the other seeds did not end
    notes: tuple[str, ...] = ()  # why they have no AUC
    dead: int = 0  # seeds that ended with an output that says the same of every row


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
    seeds = mean_difference(np.array([own[s][metric] - other[s][metric] for s in shared]))
    rows = row_differences(own_rows, other_rows, (output, other_output)).get(metric)
    return in_both(seeds, rows)


def row_differences(
    ours: Mapping[int, RowScores], theirs: Mapping[int, RowScores], outputs: tuple[str, str] = ("", "")
) -> dict[str, Difference]:
    """Compare two variants row by row over the seeds that both have: AUC of their mean logits, and the mean of their log-losses.

    Log-loss is not that of the mean logits, which are better calibrated than any of them. Empty where the rows are not the same.
    """
    shared = sorted(ours.keys() & theirs.keys())
    scores = [each[seed] for each in (ours, theirs) for seed in shared]
    if not scores or not all(np.array_equal(each.labels, scores[0].labels) for each in scores):
        return {}
    labels, groups = scores[0].labels, scores[0].groups
    own, other = (
        np.stack([each[seed].of(output) for seed in shared]).astype(np.float64)
        for each, output in zip((ours, theirs), outputs, strict=True)
    )
    losses = softplus(own) - softplus(other) - labels * (own - other)  # (seeds, B)
    area = paired_differences(own.mean(0), other.mean(0), labels, groups)["auc"]
    return {"auc": area, "log_loss": mean_difference(losses.mean(0), groups)}


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
    return max(candidates, key=lambda name: _mean_auc(scores[name], "auc"), default="")


def _mean_auc(scores: Scores, key: str) -> float:
    """The mean over seeds; one that is not defined ranks last."""
    return float(np.nan_to_num(np.mean([each[key] for each in scores.values()]), nan=-math.inf))


def best_branch(scores: Scores) -> str:
    """Name the branch with the highest mean AUC over seeds; "" if there are none."""
    keys = {key for each in scores.values() for key in each if key.startswith("auc/")}
    return max(sorted(keys), key=lambda key: _mean_auc(scores, key), default="").removeprefix("auc/")


def judge_all(claims: Sequence[Claim], results: Results, measured: Mapping[str, Compared]) -> list[Judged]:
    """Say what the runs make of claims: each with a verdict, and its differences of AUC and log-loss, corrected for their number.

    A claim that is not about AUC is judged by what was `measured` for it, of which more is in its favour. reproduced: the difference of AUC
    is above 0 and its corrected p below 0.05. contradicted: below 0, likewise. same direction: above 0 only. not reproduced: the rest. With
    one seed, or without row scores, there is no verdict; without runs of both the claim is not tested.
    """
    areas = [compare(results, one.better, one.worse, "auc") for one in claims]
    areas = [measured.get(one.measure) if one.measure else area for one, area in zip(claims, areas, strict=True)]
    losses = [None if one.measure else compare(results, one.better, one.worse, "log_loss") for one in claims]
    areas, losses = corrected(areas), corrected(losses)
    return [(claim, _verdict(area), area, loss) for claim, area, loss in zip(claims, areas, losses, strict=True)]


def _verdict(area: Compared | None) -> str:
    if area is None:
        return "not tested"
    level = "same direction" if area.seeds.value > 0 else "not reproduced"
    return {"ahead": "reproduced", "level": level, "behind": "contradicted"}.get(verdict_of(area), NO_VERDICT)


PLACES = ("ahead", "level", "behind")


def score_table(rows: Sequence[Row], *, watched: bool = False) -> Table:
    """Mean, sd, paired differences, and the paper's figures. Columns that all rows leave empty are left out."""
    against = {row.against for row in rows if row.against}
    one = f" to {min(against)}" if len(against) == 1 else ""

    def to(row: Row) -> str:
        return "" if one else f"to {row.against}\n"

    columns = {
        "": [row.name for row in rows],
        "seeds": [str(row.seeds) for row in rows],
        "dead": [f"{row.dead} of {row.seeds}" if row.dead else "no" if watched else "" for row in rows],
        "AUC": [_mean_sd(row.auc) if row.seeds else "" for row in rows],
        "log-loss": [_mean_sd(row.log_loss) if row.seeds else "" for row in rows],
        f"difference of AUC{one}": [format_difference(row.difference, to(row)) for row in rows],
        f"of log-loss{one}": [format_difference(row.loss_difference, to(row), better=-1) for row in rows],
        "fused less its best branch, AUC": [format_difference(row.fused, f"to {row.best_branch}\n") for row in rows],
        "disagreement": [f"{row.disagreement:.2%}" if watched else "" for row in rows],
        "paper, 12 months": [_pair(row.paper[:2]) for row in rows],
        "paper, 24 months": [_pair(row.paper[2:4]) for row in rows],
    }
    kept = {header: cells for header, cells in columns.items() if any(cells)}
    ended = [index for index, row in enumerate(rows) if row.auc[0] == row.auc[0]]
    best = max(ended, key=lambda index: rows[index].auc[0], default=-1)
    return Table(tuple(kept), tuple(zip(*kept.values(), strict=True)), best)


def _pair(figures: Sequence[float]) -> str:
    """AUC and log-loss as the paper prints them."""
    return " / ".join(f"{each:.4f}" for each in figures)


def headline(study: Study, rows: Sequence[Row], judged: Sequence[Judged]) -> list[Block]:
    """The study's answer in a few sentences: who is ahead, by how much, and how many claims hold."""
    said = []
    ended = [row for row in rows if row.auc[0] == row.auc[0]]
    if len(ended) > 1:
        best = max(ended, key=lambda row: row.auc[0])
        said.append(f"The highest mean AUC is that of {best.name}, {best.auc[0]:.4f}.")
    ours = next((row for row in ended if row.name == MBCNET.name), None)
    if ours is not None and ours.difference is not None:
        said.append(_sentence(ours.name, f"{ours.against}, the best of the others", ours.difference))
        named = {claim.worse: area for claim, _, area, _ in judged if claim.better == ours.name and area is not None}
        if "FinalMLP" in named and ours.against != "FinalMLP":
            said.append(_sentence(ours.name, "FinalMLP", named["FinalMLP"]))
    rivals = {each.name for each in study.rivals}
    cells = [(row, row.difference) for row in rows if row.name not in rivals and row.difference is not None]
    if rivals and cells:
        places = ["dead" if row.dead else verdict_of(difference) for row, difference in cells]
        counts = ", ".join(f"{each} in {places.count(each)}" for each in dict.fromkeys((*PLACES, *places)))
        higher = sum(difference.seeds.value > 0 for row, difference in cells if not row.dead)
        said.append(
            f"Of {len(cells)} pairs of alpha and beta MBCnet has a higher AUC than {cells[0][0].against}, the best other model, in {higher}; "
            f"by both tests it is {counts}."
        )
    verdicts = [verdict for _, verdict, _, _ in judged]
    counted = {each: verdicts.count(each) for each in TESTED}
    if tested := sum(counted.values()):
        asked = "claims of the paper" if study.claimed else "hopes"
        said.append(f"Of {tested} {asked}: {', '.join(f'{count} {each}' for each, count in counted.items())}.")
    return [Text(" ".join(said))] if said else []


def _sentence(ours: str, theirs: str, compared: Compared) -> str:
    """Who is ahead by how much, and how sure that is."""
    seeds, rows = compared.seeds, compared.rows
    told = f"p {p_text(seeds.p)} over seeds, {p_text(rows.p) if rows else '-'} over rows, {p_text(compared.p)} corrected: {verdict_of(compared)}"
    return f"{ours} is {'ahead of' if seeds.value > 0 else 'behind'} {theirs}, by {abs(seeds.value):.4f} ({told})."


def verdict_table(judged: Sequence[Judged]) -> Table:
    """What became of each claim."""
    lines = tuple(
        (
            claim.text, said,
            format_difference(area, f"{claim.measure}\n" if claim.measure else ""),
            format_difference(loss, better=-1),
        )
        for claim, said, area, loss in judged
        if area is not None or claim.measure
    )  # fmt: skip
    return Table(("claim", "here", "difference of AUC, or of what is named", "of log-loss"), lines)


def verdict_of(compared: Compared, better: int = 1) -> str:
    """ahead, level, behind or no verdict. `better`: the sign of a difference that speaks for the first of the two."""
    if compared.p != compared.p:
        return NO_VERDICT
    return PLACES[0 if compared.seeds.value * better > 0 else 2] if compared.p < SIGNIFICANT else PLACES[1]


def format_difference(compared: Compared | None, before: str = "", better: int = 1) -> str:
    """A difference with its interval over seeds, that over rows, the p of both, and the verdict with the corrected p, a line each."""
    if compared is None:
        return ""
    seeds, rows = compared.seeds, compared.rows
    over_seeds = f" [{seeds.low:+.4f}, {seeds.high:+.4f}]" if seeds.low == seeds.low else ""
    lines = [f"{before}{seeds.value:+.4f}{over_seeds}"]
    lines += [f"rows [{rows.low:+.4f}, {rows.high:+.4f}]"] if rows and rows.low == rows.low else []
    lines += [f"p {p_text(seeds.p)} seeds, {p_text(rows.p) if rows else '-'} rows"]
    lines += [f"{verdict_of(compared, better)}, p {p_text(compared.p)} corrected".removesuffix(", p - corrected")]
    return "\n".join(lines)


def _mean_sd(value: tuple[float, float]) -> str:
    mean, sd = value
    if mean != mean:
        return "NaN"
    return f"{mean:.4f}" + (f" ± {sd:.4f}" if sd == sd else "")
