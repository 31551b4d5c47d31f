"""Proves the statistics of studies: paired differences as SciPy's t test has them, whom a row is compared with, verdicts on claims."""

import math

import numpy as np
import pytest
from scipy import stats

from mbcnet_rec.study.studies import Claim, Study, Variant
from mbcnet_rec.study.summary import best_reference, compare, judge, mean_and_sd, paired_difference, summarise

CLAIM = Claim("ours beats theirs", "ours", "theirs")


def seeds_of(aucs, losses=None):
    losses = losses or [0.5] * len(aucs)
    return {seed: {"auc": auc, "log_loss": loss} for seed, (auc, loss) in enumerate(zip(aucs, losses, strict=True))}


def test_difference_is_the_paired_t_test():
    rng = np.random.default_rng(0)
    shared = rng.normal(0.8, 0.01, 5)  # what a seed does to both
    ours, theirs = shared + rng.normal(0.002, 0.001, 5), shared
    found, wanted = paired_difference(ours, theirs), stats.ttest_rel(ours, theirs)
    low, high = wanted.confidence_interval(0.95)
    assert (found.mean, found.p) == pytest.approx(((ours - theirs).mean(), wanted.pvalue))
    assert (found.low, found.high) == pytest.approx((low, high))
    unpaired = stats.ttest_ind(ours, theirs).pvalue
    assert found.p < unpaired, "pairing takes out what the seeds do to both"


def test_one_seed_tells_nothing_of_spread_and_only_shared_seeds_are_compared():
    found = compare(seeds_of([0.8, 0.9, 0.7]), seeds_of([0.7]), "auc")
    assert found.mean == pytest.approx(0.1) and found.seeds == 1
    assert math.isnan(found.low) and math.isnan(found.p)
    assert math.isnan(mean_and_sd([0.8])[1]) and math.isnan(mean_and_sd([])[0])
    assert compare(seeds_of([0.8]), {7: {"auc": 0.1}}, "auc") is None


@pytest.mark.parametrize(("ours", "p"), [([0.7, 0.7], 1.0), ([0.8, 0.8], 0.0)])
def test_differences_without_spread(ours, p):
    assert paired_difference(ours, [0.7, 0.7]).p == p


@pytest.mark.parametrize(
    ("ours", "said"),
    [
        ([0.81, 0.82, 0.83], "reproduced"),
        ([0.69, 0.685, 0.68], "contradicted"),
        ([0.60, 0.90, 0.70], "same direction"),
        ([0.60, 0.50, 0.95], "not reproduced"),
        ([0.8], "same direction"),
        ([0.6], "not reproduced"),
    ],
)
def test_verdicts(ours, said):
    found, _ = judge(CLAIM, {"ours": seeds_of(ours), "theirs": seeds_of([0.70, 0.70, 0.70])})
    assert found == said


def test_a_claim_without_its_runs_is_not_tested():
    assert judge(CLAIM, {"ours": seeds_of([0.8])}) == ("not tested", None)


def test_rows_are_compared_with_the_best_reference_but_themselves():
    variants = tuple(Variant(name, (), (0.7, 0.2)) for name in ("weak", "strong", "ours", "dead", "never"))
    study = Study("s", "", "", variants, ("weak", "strong"))
    scores = {
        "weak": seeds_of([0.70]),
        "strong": seeds_of([0.75]),
        "ours": seeds_of([0.80, 0.82], [0.4, 0.2]),
    }
    rows = {row.name: row for row in summarise(study, scores, {"dead": ["seed 0: the loss is not finite"]})}
    assert list(rows) == ["weak", "strong", "ours", "dead"], "the study's order; what was not run has no row"
    assert [rows[name].against for name in rows] == ["strong", "weak", "strong", ""]
    assert rows["ours"].auc == pytest.approx((0.81, np.std([0.80, 0.82], ddof=1)))
    assert rows["ours"].difference.mean == pytest.approx(0.05) and rows["ours"].difference.seeds == 1
    assert rows["ours"].loss_difference.mean == pytest.approx(-0.1)
    assert rows["dead"].seeds == 0 and rows["dead"].failures == ("seed 0: the loss is not finite",)
    assert best_reference(study, {"ours": seeds_of([0.8])}) == ""
