"""Proves the statistics of studies: paired differences as SciPy's t test has them, whom a row is compared with, verdicts on claims."""

import math

import numpy as np
import pytest
from scipy import stats

from mbcnet_rec.scoring.compare import p_text
from mbcnet_rec.scoring.metrics import auc
from mbcnet_rec.scoring.paired import mean_difference
from mbcnet_rec.study.runs import RowScores
from mbcnet_rec.study.studies import Claim, Study, Variant
from mbcnet_rec.study.summary import (
    Results,
    best_reference,
    compare,
    format_difference,
    judge_all,
    mean_and_sd,
    row_differences,
    summarise,
)

CLAIM = Claim("ours beats theirs", "ours", "theirs")


def seeds_of(aucs, losses=None):
    losses = losses or [0.5] * len(aucs)
    return {seed: {"auc": auc, "log_loss": loss} for seed, (auc, loss) in enumerate(zip(aucs, losses, strict=True))}


def test_difference_is_the_paired_t_test():
    rng = np.random.default_rng(0)
    shared = rng.normal(0.8, 0.01, 5)  # what a seed does to both
    ours, theirs = shared + rng.normal(0.002, 0.001, 5), shared
    found, wanted = mean_difference(ours - theirs), stats.ttest_rel(ours, theirs)
    low, high = wanted.confidence_interval(0.95)
    assert (found.value, found.p) == pytest.approx(((ours - theirs).mean(), wanted.pvalue))
    assert (found.low, found.high) == pytest.approx((low, high))
    unpaired = stats.ttest_ind(ours, theirs).pvalue
    assert found.p < unpaired, "pairing takes out what the seeds do to both"


def test_one_seed_tells_nothing_of_spread_and_only_shared_seeds_are_compared():
    found = compare(results({"ours": [0.8, 0.9, 0.7], "theirs": [0.7]}), "ours", "theirs", "auc")
    assert found.seeds.value == pytest.approx(0.1)
    assert math.isnan(found.seeds.low) and math.isnan(found.p)
    assert math.isnan(mean_and_sd([0.8])[1]) and math.isnan(mean_and_sd([])[0])
    assert compare(Results({"ours": seeds_of([0.8]), "theirs": {7: {"auc": 0.1}}}, {}), "ours", "theirs", "auc") is None


def test_differences_without_spread():
    assert mean_difference(np.zeros(2)).p == 1.0
    assert math.isnan(mean_difference(np.full(2, 0.1)).p), "no error is known of a difference that all seeds share"


def results(aucs, gap=0.0, num_rows=0):
    """Made-up results: variant -> AUC of each seed; with `num_rows`, row scores of which ours are better by `gap`, if it is positive."""
    rng = np.random.default_rng(0)
    labels = (rng.random(num_rows) < 0.3).astype(np.float32)
    noise, own = rng.normal(size=(2, num_rows))
    means = {"ours": noise + gap * labels + 0.5 * own, "theirs": noise}
    rows = {
        name: {seed: RowScores(("",), means[name][:, None] + 0.01 * seed, labels, None) for seed in range(len(each))}
        for name, each in aucs.items()
    }
    return Results({name: seeds_of(each) for name, each in aucs.items()}, rows if num_rows else {})


@pytest.mark.parametrize(
    ("ours", "gap", "num_rows", "said"),
    [
        ([0.81, 0.82, 0.83], 0.5, 3000, "reproduced"),
        ([0.81, 0.82, 0.83], 0.5, 16, "same direction"),  # seeds are sure, 16 rows are not
        ([0.60, 0.90, 0.70], 0.5, 3000, "same direction"),  # rows are sure, seeds are not
        ([0.81, 0.82, 0.83], -0.5, 3000, "same direction"),  # the two point to different sides
        ([0.69, 0.685, 0.68], -0.5, 3000, "contradicted"),
        ([0.60, 0.50, 0.95], -0.5, 3000, "not reproduced"),
        ([0.8], 0.5, 3000, "no verdict"),  # one seed
        ([0.81, 0.82, 0.83], 0.5, 0, "no verdict"),  # no row scores
    ],
)
def test_a_verdict_needs_seeds_and_rows(ours, gap, num_rows, said):
    found = results({"ours": ours, "theirs": [0.70, 0.70, 0.70][: len(ours)]}, gap, num_rows)
    ((claim, verdict, _, _),) = judge_all([CLAIM], found, {})
    assert (claim, verdict) == (CLAIM, said)


def test_claims_are_corrected_for_their_number():
    found = results({"ours": [0.71, 0.715, 0.703], "theirs": [0.70, 0.70, 0.70]}, 0.5, 3000)
    ((_, _, alone, _),) = judge_all([CLAIM], found, {})
    assert alone.p == max(alone.seeds.p, alone.rows.p) < 0.12
    (_, among, one_of_ten, _), *_ = judge_all([CLAIM] * 10, found, {})
    assert one_of_ten.p == pytest.approx(min(1, 10 * alone.p)) and among == "same direction"


def test_a_claim_without_its_runs_is_not_tested():
    assert judge_all([CLAIM], results({"ours": [0.8]}), {}) == [(CLAIM, "not tested", None, None)]


def test_rows_are_compared_by_delong_of_the_mean_score_and_by_the_mean_loss():
    """AUC against a direct O(n^2) DeLong and, by groups, a bootstrap of groups; log-loss against the t test of mean row losses."""
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 60, 600)
    truth = rng.normal(size=600) + rng.normal(size=60)[groups]
    labels = (rng.random(600) < 1 / (1 + np.exp(1 - truth))).astype(np.float32)
    logits = {name: truth + noise * rng.normal(size=(3, 600)) for name, noise in (("ours", 0.8), ("theirs", 1.2))}

    def found(by):
        rows = {name: {s: RowScores(("",), z[s][:, None], labels, by) for s in range(3)} for name, z in logits.items()}
        return row_differences(rows["ours"], rows["theirs"])

    positive = labels > 0

    def placements(z):
        wins = (z[positive][:, None] > z[~positive]) + 0.5 * (z[positive][:, None] == z[~positive])
        return wins.mean(1), wins.mean(0)

    ours, theirs = (placements(logits[name].mean(0)) for name in ("ours", "theirs"))
    error = math.sqrt(sum(np.var(a - b, ddof=1) / len(a) for a, b in zip(ours, theirs, strict=True)))
    value = ours[0].mean() - theirs[0].mean()
    alone = found(None)
    assert alone["auc"].value == pytest.approx(value)
    assert alone["auc"].p == pytest.approx(2 * stats.norm.sf(abs(value) / error))

    losses = {name: (np.logaddexp(0, z) - labels * z).mean(0) for name, z in logits.items()}
    wanted = stats.ttest_rel(losses["ours"], losses["theirs"])
    assert alone["log_loss"].value == pytest.approx(losses["ours"].mean() - losses["theirs"].mean())
    assert alone["log_loss"].p == pytest.approx(wanted.pvalue)

    members = [np.flatnonzero(groups == group) for group in range(60)]
    drawn = []
    for _ in range(400):
        chosen = np.concatenate([members[place] for place in rng.integers(0, 60, 60)])
        areas = [auc(logits[name].mean(0)[chosen], labels[chosen]) for name in ("ours", "theirs")]
        drawn.append([areas[0] - areas[1], (losses["ours"] - losses["theirs"])[chosen].mean()])
    together = found(groups)
    errors = [(together[name].high - together[name].low) / 2 / 1.96 for name in ("auc", "log_loss")]
    np.testing.assert_allclose(errors, np.std(drawn, axis=0, ddof=1), rtol=0.15)


def test_outputs_of_a_variant_are_compared_too():
    scores = {"ours": {s: {"auc": 0.8, "log_loss": 0.4, "auc/deep": 0.7, "log_loss/deep": 0.5} for s in (0, 1)}}
    rng = np.random.default_rng(0)
    labels = (rng.random(500) < 0.3).astype(np.float32)
    logits = np.stack([labels + rng.normal(size=500), rng.normal(size=500)], 1)
    rows = {"ours": {seed: RowScores(("", "deep"), logits, labels, None) for seed in (0, 1)}}
    found = compare(Results(scores, rows), "ours", "ours/deep", "auc")
    assert found.seeds.value == pytest.approx(0.1) and found.rows.value > 0.1 and found.rows.p < 1e-6


def test_fused_is_compared_with_its_best_branch_and_both_p_are_shown():
    """The best branch is the one of the highest mean over seeds; p of seeds, of rows and the corrected one stand in the cell."""
    areas = {0: (0.80, 0.70, 0.78), 1: (0.81, 0.83, 0.77), 2: (0.82, 0.70, 0.795)}  # fused, deep, cross
    scores = {
        seed: {
            "auc": fused,
            "auc/deep": deep,
            "auc/cross": cross,
            "log_loss": 0.4,
            "log_loss/deep": 0.5,
            "log_loss/cross": 0.5,
        }
        for seed, (fused, deep, cross) in areas.items()
    }
    rng = np.random.default_rng(0)
    labels = (rng.random(900) < 0.3).astype(np.float32)
    logits = np.stack([labels + rng.normal(size=900), rng.normal(size=900), 0.8 * labels + rng.normal(size=900)], 1)
    rows = {seed: RowScores(("", "deep", "cross"), logits, labels, None) for seed in scores}
    study = Study("s", "", "", (Variant("ours"),))
    (row,) = summarise(study, Results({"ours": scores}, {"ours": rows}), {})
    p = stats.ttest_rel([0.80, 0.81, 0.82], [0.78, 0.77, 0.795]).pvalue
    assert row.best_branch == "cross" and row.fused.seeds.p == pytest.approx(p)
    assert row.fused.p == max(row.fused.seeds.p, row.fused.rows.p)
    told = format_difference(row.fused)
    assert told.startswith("+0.0283 [") and f"p {p:.3f} seeds, {p_text(row.fused.rows.p)} rows" in told
    assert told.endswith(f"{'ahead' if row.fused.p < 0.05 else 'level'}, p {p_text(row.fused.p)} corrected")
    (alone,) = summarise(study, Results({"ours": {0: scores[0]}}, {"ours": rows}), {})
    assert format_difference(alone.fused).endswith("no verdict"), "one seed"


def test_rows_are_compared_with_the_best_reference_but_themselves():
    variants = tuple(Variant(name, (), (0.7, 0.2)) for name in ("weak", "strong", "ours", "dead", "never"))
    study = Study("s", "", "", variants, ("weak", "strong"))
    scores = {"weak": seeds_of([0.70]), "strong": seeds_of([0.75]), "ours": seeds_of([0.80, 0.82], [0.4, 0.2])}
    rows = {
        row.name: row for row in summarise(study, Results(scores, {}), {"dead": ["seed 0: the loss is not finite"]})
    }
    assert list(rows) == ["weak", "strong", "ours", "dead"], "the study's order; what was not run has no row"
    assert [rows[name].against for name in rows] == ["strong", "weak", "strong", ""]
    assert rows["ours"].auc == pytest.approx((0.81, np.std([0.80, 0.82], ddof=1)))
    assert rows["ours"].difference.seeds.value == pytest.approx(0.05) and math.isnan(rows["ours"].difference.p)
    assert rows["ours"].loss_difference.seeds.value == pytest.approx(-0.1)
    assert rows["dead"].seeds == 0 and rows["dead"].failures == ("seed 0: the loss is not finite",)
    assert best_reference(study, {"ours": seeds_of([0.8])}) == ""
