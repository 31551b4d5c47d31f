"""Proves that ranking metrics are the mean over all orders of tied rows, whatever the order of the rows, and that ranks and samples keep them."""

import math
from itertools import pairwise, permutations

import numpy as np
import pytest
import torch

from data.reading.columns import NO_GROUP
from mbcnet_rec.runtime.process import Process
from mbcnet_rec.scoring.ranking import group_metrics, names_of, ranking_values, title_of
from mbcnet_rec.scoring.tally import Tally

KS = (1, 2, 3, 10)


def ranking_metrics(logits, labels, groups, ks):
    found = group_metrics(logits, labels, groups, ks)
    return {name: found[name] for name in names_of(ks)}


def of_order(labels, k):
    """NDCG, recall and hit rate at k, and MRR, of labels from the top down."""
    top = labels[:k]
    best = sorted(labels, reverse=True)[:k]
    gain = [sum(y / math.log2(place + 2) for place, y in enumerate(each)) for each in (top, best)]
    first = labels.index(1)
    return {
        f"ndcg@{k}": gain[0] / gain[1], f"recall@{k}": sum(top) / sum(labels), f"hit_rate@{k}": float(any(top)), "mrr": 1 / (first + 1),
    }  # fmt: skip


def naive(logits, labels, groups):
    """Every order of a group's rows that the scores allow, one after the other."""
    found = {}
    for group in sorted(set(groups.tolist())):
        own = [(z, int(y)) for z, y, g in zip(logits.tolist(), labels, groups, strict=True) if g == group]
        if not any(y for _, y in own):
            continue
        orders = [[y for _, y in order] for order in permutations(own) if all(a[0] >= b[0] for a, b in pairwise(order))]
        for k in KS:
            values = [of_order(order, k) for order in orders]
            for name in values[0]:
                if name != "mrr" or k == KS[0]:
                    found.setdefault(name, []).append(float(np.mean([each[name] for each in values])))
    return found


@pytest.mark.parametrize("levels", [1, 2, 3, 100])
def test_every_metric_is_the_mean_over_the_orders_of_ties(levels):
    rng = np.random.default_rng(levels)
    groups = np.repeat(rng.integers(-(2**62), 2**62, 12), rng.integers(1, 7, 12))
    logits = rng.integers(0, levels, len(groups)).astype(np.float32) / 7
    labels = (rng.random(len(groups)) < 0.35).astype(np.float32)
    shuffle = rng.permutation(len(groups))
    logits, labels, groups = logits[shuffle], labels[shuffle], groups[shuffle]
    wanted, found = naive(logits, labels, groups), ranking_values(logits, labels, groups, KS)
    assert list(found) == names_of(KS) and set(wanted) == set(found)
    for name, values in found.items():
        assert values == pytest.approx(wanted[name], abs=1e-12), name
        estimate = ranking_metrics(logits, labels, groups, KS)[name]
        assert estimate.value == pytest.approx(np.mean(wanted[name]))
        assert estimate.error == pytest.approx(np.std(wanted[name], ddof=1) / len(values) ** 0.5)


def test_titles():
    names = (*names_of((5,)), "ndcg@5/buy", "mrr/buy", "auc", "auc/buy")
    assert [title_of(name) for name in names] == [
        "NDCG@5", "recall@5", "hit rate@5", "MRR", "NDCG@5 of buy", "MRR of buy", "", "",
    ]  # fmt: skip


def some_rows(rows=4_000, seed=0):
    rng = np.random.default_rng(seed)
    logits = np.round(rng.normal(size=(rows, 2)), 1).astype(np.float32)
    groups = rng.integers(0, 2**62, 400)[rng.integers(0, 400, rows)]
    return logits, (rng.random(rows) < 0.2).astype(np.float32), groups


def test_the_order_of_rows_and_batches_does_not_matter():
    """Bit for bit; a large group of one score has what a draw has, and no group or a NaN has nothing."""
    logits, labels, groups = some_rows()
    first = ranking_metrics(logits[:, 0], labels, groups, KS)
    shuffle = np.random.default_rng(1).permutation(len(labels))
    assert ranking_metrics(logits[shuffle, 0], labels[shuffle], groups[shuffle], KS) == first
    tied = ranking_values(
        np.zeros(500_000, np.float32), np.arange(500_000) % 50 == 7, np.zeros(500_000, np.int64), (10,)
    )
    assert tied["recall@10"][0] == pytest.approx(10 / 500_000) and tied["hit_rate@10"][0] == pytest.approx(
        1 - 0.98**10, rel=1e-4
    )
    nothing = ranking_metrics(logits[:0, 0], labels[:0], groups[:0], KS)
    assert list(nothing) == names_of(KS) and all(math.isnan(each.value) for each in nothing.values())
    assert math.isnan(ranking_metrics(logits[:, 0] * np.nan, labels, groups, KS)["mrr"].value)
    assert ranking_metrics(logits[:, 0], labels, groups, ()) == {}


def test_rows_without_a_group_count_in_no_metric_of_groups():
    """In memory, in a slice and on the disk; of nothing but such rows nothing is known."""
    logits, labels, groups = some_rows()
    alone = np.random.default_rng(2).random(len(labels)) < 0.3
    marked = np.where(alone, NO_GROUP, groups)
    wanted = group_metrics(logits[~alone, 0], labels[~alone], groups[~alone], KS)
    assert group_metrics(logits[:, 0], labels, marked, KS) == wanted
    places = np.where(alone & (groups % 2 == 0), 1, 0)[:, None]
    tally = Tally(len(labels), ("deep",), has_groups=True, slices={"half": ["most", "alone"]}, ranking_k=KS)
    binned = Tally(len(labels), ("deep",), has_groups=True, exact_rows=len(labels) // 3, ranking_k=KS)
    tally.add(logits, labels, marked, places)
    binned.add(logits, labels, marked)
    one = Process(0, 1, 0, 1, torch.device("cpu"))
    found, counted = tally.answer(one), binned.answer(one)
    assert found is not None and counted is not None
    assert found.everything.rows == counted.everything.rows == len(labels)
    for name, estimate in wanted.items():
        assert found.everything.metrics[name] == found.slices["half"]["most"].metrics[name] == estimate
        assert counted.everything.metrics[name] == pytest.approx(estimate, rel=1e-9), name
        assert math.isnan(found.slices["half"]["alone"].metrics[name].value)


def test_a_tally_keeps_them_by_slice_and_is_exact_where_groups_wait_on_disk():
    logits, labels, groups = some_rows()
    places = (np.arange(len(labels)) % 2)[:, None]
    whole = ranking_metrics(logits[:, 0], labels, groups, KS)
    tally = Tally(len(labels), ("deep",), has_groups=True, slices={"half": ["even", "odd"]}, ranking_k=KS)
    binned = Tally(len(labels), ("deep",), has_groups=True, exact_rows=len(labels) // 3, ranking_k=KS)
    for part in np.array_split(np.arange(len(labels)), 7):
        tally.add(logits[part], labels[part], groups[part], places[part])
        binned.add(logits[part], labels[part], groups[part])
    one = Process(0, 1, 0, 1, torch.device("cpu"))
    found, counted = tally.answer(one), binned.answer(one)
    assert found is not None and counted is not None
    assert {name: found.everything.metrics[name] for name in whole} == whole
    odd = places[:, 0] == 1
    assert (
        found.slices["half"]["odd"].metrics["ndcg@2"]
        == ranking_metrics(logits[odd, 0], labels[odd], groups[odd], KS)["ndcg@2"]
    )
    for name in [*whole, "gauc"]:
        assert counted.everything.metrics[name] == pytest.approx(found.everything.metrics[name], rel=1e-9), name
