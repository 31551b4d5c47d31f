"""Paired errors are those of DeLong and of the bootstrap, by row and by group; Holm's correction; clicks of the highest rows, by hand."""

import math

import numpy as np
import pytest
from scipy.stats import t, ttest_1samp, ttest_rel

from data.reading.columns import NO_GROUP
from mbcnet_rec.scoring.metrics import auc, exact_metrics
from mbcnet_rec.scoring.paired import expected_clicks, holm, mean_difference, paired_differences
from mbcnet_rec.scoring.ranking import group_metrics, ranking_values


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 200, 2000)
    z = rng.normal(size=2000) + rng.normal(size=200)[groups]
    labels = (rng.random(2000) < 1 / (1 + np.exp(2 - z))).astype(np.float32)
    ours, theirs = ((z + noise * rng.normal(size=2000)).round(1) for noise in (1.0, 1.2))  # with ties
    return ours, theirs, labels, groups


def error(difference):
    return (difference.high - difference.low) / 2 / 1.959964


def test_values_are_those_of_evaluate(rows):
    ours, theirs, labels, groups = rows
    exact = exact_metrics(np.stack([ours, theirs], 1), labels, ("x",))
    found = paired_differences(ours, theirs, labels, groups)
    for name in ("auc", "log_loss", "calibration"):
        assert found[name].value == pytest.approx(exact[name].value - exact[f"{name}/x"].value, abs=1e-12)
    own, other = (group_metrics(z, labels, groups, ())["gauc"].value for z in (ours, theirs))
    assert found["gauc"].value == pytest.approx(own - other, abs=1e-12)


def test_the_error_of_auc_is_delongs(rows):
    ours, theirs, labels, _ = rows
    positive = labels > 0

    def placements(scores):
        wins = (scores[positive][:, None] > scores[~positive]) + 0.5 * (scores[positive][:, None] == scores[~positive])
        return wins.mean(1), wins.mean(0)

    (v10, v01), (w10, w01) = placements(ours), placements(theirs)
    delong = math.sqrt(np.var(v10 - w10, ddof=1) / positive.sum() + np.var(v01 - w01, ddof=1) / (~positive).sum())
    assert error(paired_differences(ours, theirs, labels)["auc"]) == pytest.approx(delong, rel=1e-6)


def test_errors_are_those_of_a_bootstrap_of_rows_and_of_groups(rows):
    ours, theirs, labels, groups = rows
    rng = np.random.default_rng(1)
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    for clusters, given in (([np.array([row]) for row in range(len(labels))], None), (members, groups)):
        drawn = []
        for _ in range(300):
            chosen = np.concatenate([clusters[place] for place in rng.integers(0, len(clusters), len(clusters))])
            ours_losses, theirs_losses = (
                exact_metrics(z[chosen, None], labels[chosen], (), errors=False) for z in (ours, theirs)
            )
            drawn.append(
                [ours_losses[name].value - theirs_losses[name].value for name in ("auc", "log_loss", "calibration")]
            )
        found = paired_differences(ours, theirs, labels, given)
        errors = [error(found[name]) for name in ("auc", "log_loss", "calibration")]
        np.testing.assert_allclose(errors, np.std(drawn, axis=0), rtol=0.15)


def test_what_is_not_defined_is_nan(rows):
    ours, theirs, labels, groups = rows
    found = paired_differences(ours, theirs, np.zeros_like(labels), groups)
    assert all(math.isnan(found[name].p) for name in ("auc", "calibration", "gauc"))
    assert not math.isnan(found["log_loss"].p)
    same = paired_differences(ours, ours, labels, groups)
    assert all((each.value, each.p) == (0, 1) for each in same.values())
    broken = np.where(np.arange(len(ours)) == 7, np.nan, ours)
    assert all(
        math.isnan(each.p) for name, each in paired_differences(broken, theirs, labels).items() if name != "gauc"
    )
    assert math.isnan(auc(broken, labels))


def test_a_row_without_a_group_is_a_draw_of_its_own_and_in_no_metric_of_groups(rows):
    ours, theirs, labels, groups = rows
    alone = groups % 3 == 0
    marked = np.where(alone, NO_GROUP, groups)
    found = paired_differences(ours, theirs, labels, marked, (3,))
    apart = paired_differences(ours, theirs, labels, np.where(alone, 1000 + np.arange(len(groups)), groups))
    known = paired_differences(*(each[~alone] for each in rows), (3,))
    for name, each in found.items():
        assert each == pytest.approx((apart if name in ("auc", "log_loss", "calibration") else known)[name]), name
    assert found.keys() == known.keys() >= {"gauc", "ndcg@3", "mrr"}
    clicks = expected_clicks(ours, theirs, labels, marked, 2)
    assert clicks == expected_clicks(*(each[~alone] for each in rows), 2)
    values = ours - theirs
    assert mean_difference(values, marked).p == pytest.approx(
        mean_difference(values, np.where(alone, -1 - np.arange(len(groups)), groups)).p
    )
    none = np.full_like(groups, NO_GROUP)
    found = paired_differences(ours, theirs, labels, none, (3,))
    assert found["log_loss"] == pytest.approx(paired_differences(ours, theirs, labels)["log_loss"])
    assert all(math.isnan(found[name].p) for name in ("gauc", "mrr"))
    assert math.isnan(expected_clicks(ours, theirs, labels, none, 2).value)


def test_holm():
    # by hand: .01 * 4, then .02 * 3, .03 * 2 (not below the one before), .6 * 1
    np.testing.assert_allclose(holm([0.03, 0.01, math.nan, 0.02, 0.6]), [0.06, 0.04, math.nan, 0.06, 0.6])


def test_clicks_of_the_highest_rows():
    groups = np.array([1, 1, 1, 2, 2, 2, 3, 3])
    labels = np.array([1, 0, 0, 0, 1, 1, 1, 0])
    ours = np.array([0.9, 0.1, 0.1, 0.3, 0.8, 0.7, 0.5, 0.6])
    theirs = np.array([0.1, 0.9, 0.1, 0.5, 0.5, 0.5, 0.5, 0.6])
    difference = expected_clicks(ours, theirs, labels, groups, 2)
    # group 1: ours 1, theirs 0 + the mean of two tied rows 1/2; group 2: ours 2, theirs 2/3 * 2; group 3 shows its one click under both
    assert (difference.ours, difference.theirs) == (pytest.approx(4 / 3), pytest.approx((0.5 + 4 / 3 + 1) / 3))
    gaps = [0.5, 2 / 3, 0]
    assert difference.value == pytest.approx(np.mean(gaps)) and difference.p == pytest.approx(
        ttest_1samp(gaps, 0).pvalue
    )
    assert difference.high - difference.value == pytest.approx(t.ppf(0.975, 2) * np.std(gaps, ddof=1) / math.sqrt(3))
    assert expected_clicks(ours, ours, labels, groups, 2)[:4] == (0, 0, 0, 1), "the same ranking twice"
    assert math.isnan(expected_clicks(ours[:3], theirs[:3], labels[:3], groups[:3], 1).p), "one group"


def test_intervals_hold_the_true_difference_as_often_as_they_say():
    """300 logs of 12 users, whose own taste makes their rows alike: 95 % by group; taken as independent, rows would say less than they know."""
    rng = np.random.default_rng(2)
    groups, inside = (
        np.repeat(np.arange(12), 40),
        dict.fromkeys([(name, by) for name in ("auc", "log_loss") for by in ("group", "row")], 0),
    )
    for _ in range(300):
        taste, labels = 1.5 * rng.normal(size=12)[groups], (rng.random(480) < 0.5).astype(np.float32)
        # each model misjudges some users: equally on the whole
        noise = rng.normal(size=(2, 12))[:, groups] * (2 * labels - 1)
        ours, theirs = (labels + taste + each + rng.normal(size=480) for each in noise)
        for by, given in (("group", groups), ("row", None)):
            found = paired_differences(ours, theirs, labels, given)
            for name in ("auc", "log_loss"):
                inside[name, by] += found[name].low < 0 < found[name].high
    shares = {key: count / 300 for key, count in inside.items()}
    assert all((0.91 < share < 0.985) if by == "group" else share < 0.8 for (_, by), share in shares.items()), shares


def test_one_draw_of_a_class_or_one_group_knows_no_error():
    z, labels = np.array([0.1, 0.4, 0.2, 0.3, 0.5]), np.array([0, 1, 0, 0, 0])
    found = paired_differences(z, -z, labels)
    assert found["auc"].value == pytest.approx(0.5) and math.isnan(found["auc"].p) and math.isnan(found["auc"].low)
    found = paired_differences(z, -z, labels, np.array([1, 1, 1, 1, 2]))
    assert all(math.isnan(found[name].p) for name in ("auc", "gauc")), "one group has both classes"


def test_ranking_metrics_are_compared_group_by_group():
    """As a paired t test over the groups does."""
    rng = np.random.default_rng(4)
    groups, labels = rng.integers(0, 60, 900), (rng.random(900) < 0.2).astype(np.float32)
    a, b = (np.round(rng.normal(size=900) + strength * labels, 1).astype(np.float32) for strength in (1.0, 0.6))
    found = paired_differences(a, b, labels, groups, (3,))
    for name in ("ndcg@3", "recall@3", "hit_rate@3", "mrr"):
        own, other = (ranking_values(z, labels, groups, (3,))[name] for z in (a, b))
        assert found[name].value == pytest.approx(own.mean() - other.mean())
        assert found[name].p == pytest.approx(ttest_rel(own, other).pvalue)
    assert np.isnan(paired_differences(a, b, labels * 0, groups, (3,))["mrr"].value)
