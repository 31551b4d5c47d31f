"""Proves what Figures 4 d, 6 and 7 are measured by: values by hand, p of an independent test, and no effect where none was planted."""

import numpy as np
import pytest
from scipy import stats

from data.errors import InputError
from mbcnet_rec.study.probe import MISSING, Probe, dependence, nearer_to_cross, over_seeds_and_rows, separation
from mbcnet_rec.study.studies import Claim
from mbcnet_rec.study.summary import Results, judge_all


def test_separation_is_1_of_clusters_apart_and_chance_of_one_cloud():
    rng = np.random.default_rng(0)
    cloud = rng.normal(size=(3, 4000, 8))
    assert separation(cloud).mean() == pytest.approx(1 / 3, abs=0.02)
    apart = cloud + 20 * np.arange(3)[:, None, None]
    assert (separation(apart) == 1).all() and separation(apart).shape == (4000,)
    two = apart[[0, 1, 1]] + [[[0]], [[0]], [[1e-9]]]  # two branches in one place, the third apart from them
    assert separation(two).mean() == pytest.approx((1 + 2 * 0.5) / 3, abs=0.02)
    assert separation(np.zeros((4, 10, 3))).mean() == 0.25, "dead latents"


def test_efgc_is_nearer_to_the_branch_whose_neurons_it_shares():
    latents = np.log(np.array([[[0.7, 0.3]], [[0.5, 0.5]], [[0.1, 0.9]]]))  # softmax gives these back
    probe = Probe(("efgc", "cross", "deep"), latents, latents[0], np.zeros((1, 4)), np.zeros(1), np.zeros(1))
    assert nearer_to_cross(probe) == pytest.approx([0.6 - 0.2])
    with pytest.raises(InputError, match="no branch deep"):
        nearer_to_cross(Probe(("efgc", "cross"), latents[:2], latents[0], np.zeros((1, 3)), np.zeros(1), np.zeros(1)))


def test_best_branch_by_category_is_the_chi_square_test():
    best = np.repeat([0, 1, 0, 1, 0], [30, 10, 15, 25, 2])
    categories = np.repeat([4, 4, 7, 7, 9], [30, 10, 15, 25, 2])  # 9 is too rare for the test
    losses = np.where(np.arange(2) == best[:, None], 0.1, 0.2)
    wanted = stats.chi2_contingency([[30, 10], [15, 25]], correction=False)
    value, p = dependence(losses, categories)
    assert p == pytest.approx(wanted.pvalue, rel=0.1) and value == pytest.approx((wanted.statistic - 1) / 82, rel=0.1)
    unknown = np.append(categories, [MISSING] * 50)
    assert dependence(np.vstack([losses, losses[:50]]), unknown) == (value, p), "rows without a category do not count"
    with pytest.raises(InputError, match="one branch is best on all rows"):
        dependence(losses[:, :1], categories)


def test_dependence_is_seldom_found_where_there_is_none():
    """With 200 data sets without any, p is below .05 in about 10."""
    rng = np.random.default_rng(0)
    p = [dependence(rng.random((300, 3)), rng.integers(0, 6, 300))[1] for _ in range(200)]
    assert 2 <= sum(each < 0.05 for each in p) <= 20


def test_measured_rows_of_a_group_are_taken_together():
    """p over seeds is the t test of the seeds' means, p over rows that of the groups' sums."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(50), 20)
    values = 0.02 + 0.3 * rng.normal(size=50)[groups] + 0.01 * rng.normal(size=(4, 1000)) + np.zeros((4, 1000))
    found = over_seeds_and_rows(values, groups)
    assert found.seeds.p == pytest.approx(stats.ttest_1samp(values.mean(1), 0).pvalue)
    of_groups = values.mean(0).reshape(50, 20).mean(1)
    assert found.rows.p == pytest.approx(stats.ttest_1samp(of_groups, 0).pvalue)
    assert found.rows.p > 100 * over_seeds_and_rows(values, None).rows.p, "and is far from that of 1,000 rows"


def test_a_measured_claim_is_one_of_the_claims_that_are_corrected():
    found = over_seeds_and_rows(1 + np.random.default_rng(0).normal(size=(5, 400)), None)
    claim = Claim("x", "MBCnet/late", "MBCnet/early", "separation")
    ((_, verdict, area, loss),) = judge_all([claim], Results({}, {}), {"separation": found})
    assert (verdict, area, loss) == ("reproduced", found, None)
    assert judge_all([claim], Results({}, {}), {})[0][1] == "not tested"
