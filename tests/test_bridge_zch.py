"""Proves that unbounded ids get rows of their own: no two share one while rows are free, where a hash of the same size makes them
collide; that rows go to others only when all are taken, and never in evaluation; that the row of an id is the same on one and two
ranks, after a resume bit for bit, and in an artifact; and that what does not fit is refused in one line.
"""

import itertools
import json
import re

import numpy as np
import pyarrow as pa
import pytest
import torch
from forked_ranks import run_script
from torch.utils._python_dispatch import TorchDispatchMode
from torchrec.sparse.jagged_tensor import JaggedTensor

from data.reading.keys import hash_values, remainder, unbounded_ids
from data.schema import Table, Zch
from sharding.bridge.zch import ID_RANGE, BucketedCollisions

CPU = torch.device("cpu")
ROWS = 1024


def table(eviction="distance_lfu", interval=1, buckets=8, rows=ROWS):
    return Table("ids", rows, 4, "sum", ("id",), False, Zch(eviction, interval, buckets))


def module(**options):
    whole = table(**options)
    return BucketedCollisions(whole, 0, whole.num_embeddings, CPU)


def hashed(numbers) -> torch.Tensor:
    return torch.from_numpy(unbounded_ids(pa.array(numbers)).copy())


def rows_of(collisions, ids):
    lengths = torch.ones(len(ids), dtype=torch.int64)
    return collisions({"ids": JaggedTensor(ids, lengths=lengths)})["ids"].values()


def in_last_row(rows, collisions):
    return (rows + 1) % collisions.bucket_rows == 0


def changed_rows(collisions):
    rows = collisions.evict()
    return [] if rows is None else sorted(rows.tolist())


def test_no_two_ids_share_a_row_while_rows_are_free():
    numbers = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, ROWS // 2)
    rows = rows_of(module(), hashed(numbers))
    assert len(rows.unique()) == len(numbers)
    shared = len(numbers) - len(np.unique(remainder(hash_values(pa.array(numbers)), ROWS - 1)))
    assert shared > len(numbers) // 6, "a hash of as many rows makes every sixth id share one"


def test_ids_are_spread_whatever_they_are_and_stay_below_torchrecs_mark():
    for column in (
        pa.array(range(8000)),
        pa.array([f"user {n}" for n in range(8000)]),
        pa.array([2**63 + n for n in range(8000)], pa.uint64()),
    ):
        ids = unbounded_ids(column)
        assert ids.dtype == np.int64 and ids.min() >= 0 and ids.max() < ID_RANGE and len(set(ids)) == 8000
        assert np.bincount(ids // -(-ID_RANGE // 8), minlength=8).min() > 800


@pytest.mark.parametrize("eviction", ["lru", "lfu", "distance_lfu"])
def test_when_rows_run_out_others_lose_theirs(eviction):
    collisions = module(eviction=eviction, buckets=1, rows=9)
    kept, lost, new = hashed([1, 2, 3, 4]), hashed([5, 6, 7, 8]), hashed([11, 12])
    for _ in range(3):
        rows_of(collisions, torch.cat([kept, kept, kept, lost]))
    assert changed_rows(collisions) == [], "free rows keep their first values"
    before = rows_of(collisions, torch.cat([kept, kept, kept]))[:4]
    assert int(collisions.open_slots()) == 0
    rows = rows_of(collisions, torch.cat([new] * 5 + [kept] * 5))
    assert not in_last_row(rows, collisions).any()
    assert changed_rows(collisions) == sorted(rows[:2].tolist())
    assert rows[-4:].tolist() == before.tolist(), "the ids that come up most and latest keep their rows"
    assert sum(bucket.evictions for bucket in collisions.own_buckets) == 2
    collisions.eval()
    assert int(in_last_row(rows_of(collisions, lost), collisions).sum()) == 2


def test_evaluation_changes_nothing_and_unknown_ids_read_their_buckets_last_row():
    collisions = module()
    known, unknown = hashed(np.arange(300)), hashed(np.arange(300, 600))
    rows = rows_of(collisions, known)
    changed_rows(collisions)
    collisions.eval()
    before = {name: value.clone() for name, value in collisions.state_dict().items()}
    assert torch.equal(rows_of(collisions, known), rows)
    assert in_last_row(rows_of(collisions, unknown), collisions).all()
    assert len(rows_of(collisions, unknown).unique()) == 8
    assert not in_last_row(rows, collisions).any(), "no id has it for its own"
    assert all(torch.equal(before[name], value) for name, value in collisions.state_dict().items())
    assert collisions.evict() is None


def test_new_ids_are_admitted_every_few_steps_and_none_is_forgotten():
    """TorchRec's own history is as long as the first batch was; here a small batch comes first, and large ones later."""
    collisions = module(interval=3)
    ids = hashed(np.arange(400))
    assert in_last_row(rows_of(collisions, ids[:2]), collisions).all()
    assert in_last_row(rows_of(collisions, ids[2:]), collisions).all()
    rows_of(collisions, ids[:0])
    collisions.eval()
    assert len(rows_of(collisions, ids).unique()) == 400


class Waits(TorchDispatchMode):
    """Counts calls for whose result the host would wait on a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        names = ("_local_scalar_dense", "nonzero", "_unique2", "index.Tensor", "equal", "masked_select")
        masks = (
            [each for each in args[1] if each is not None and each.dtype == torch.bool]
            if "index.T" in str(func)
            else [1]
        )
        self.count += any(f"aten.{name}" in str(func) for name in names) and bool(masks)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("buckets", [1, 8])
def test_a_step_without_an_admission_makes_no_host_wait(buckets):
    collisions = module(interval=3, buckets=buckets)
    for numbers in (range(100), range(100, 300)):
        rows_of(collisions, hashed(numbers))
    rows_of(collisions, hashed([1]))  # step 3 admits
    with Waits() as waits:
        rows_of(collisions, hashed(range(50)))
        collisions.evict()
    assert waits.count == 0


@pytest.mark.parametrize("part", [(0, ROWS), (ROWS // 2, ROWS)])
def test_all_buckets_are_searched_at_once(part):
    """Ids at the borders of buckets, in full and in empty ones, on a rank that holds all of them or the second half."""
    collisions = BucketedCollisions(table(rows=ROWS), *part, CPU)
    width = -(-ID_RANGE // 8)
    first = part[0] * 8 // ROWS
    ends = [min(number * width, ID_RANGE) for number in range(first, 9)]
    inside = torch.randint(ends[0], ID_RANGE, (3000,), generator=torch.Generator().manual_seed(0))
    inside = inside[(inside < ends[2]) | (inside > ends[3])]  # a bucket stays nearly empty, others overflow
    borders = torch.tensor([value for low, high in itertools.pairwise(ends) for value in (low, high - 1)])
    rows_of(collisions, torch.cat([borders, inside]))
    asked = torch.cat([borders, borders[:-1] + 1, inside])
    asked = asked[asked < ID_RANGE]
    collisions.eval()
    rows = rows_of(collisions, asked).tolist()
    known = dict(zip(collisions.raw_ids.tolist(), collisions.slots.tolist(), strict=True))
    wanted = [known.get(one, (one // width + 1) * (ROWS // 8) - 1) for one in asked.tolist()]
    assert rows == wanted and len(set(rows)) > 300


@pytest.mark.parametrize(
    ("name", "index", "value"),
    [("slots", 3, 10**9), ("slots", 3, 4), ("slots", 5, -1), ("raw_ids", 0, -5), ("raw_ids", -1, 7)],
)
def test_rows_that_training_cannot_have_given_are_noticed(name, index, value):
    """A checkpoint is untrusted input, and FBGEMM does not check where it reads."""
    collisions = module()
    rows_of(collisions, hashed(np.arange(100)))
    assert collisions.is_sound()
    getattr(collisions, name)[index] = value
    assert not collisions.is_sound()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("collisions")
    run_script("zch_ranks.py", str(folder))
    return json.loads((folder / "results.json").read_text())


@pytest.mark.long
def test_one_and_two_ranks_train_the_same_rows(results):
    found = results["one_and_two"]
    assert [done["codes"] for done in found["done"]] == [[0], [0, 0]], found["done"]
    assert found["ids"] == [] and found["largest"] < 1e-5
    (one,), (two,) = found["tested"]
    assert one["auc"] == pytest.approx(two["auc"], abs=1e-4)


@pytest.mark.long
def test_plans_count_what_is_kept_of_ids_and_the_log_says_how_full_the_tables_are(results):
    found = results["one_and_two"]
    for done in found["done"]:
        words = done["words"][0]
        assert re.search(r"optimizer state and ids (\S+ \S+) -> \1 \(\+0\.00 %\)", words), words
    last = found["logged"][-1]
    assert last["zch_used/user"] == last["zch_used/thing"] == 1.0 and last["zch_evictions/user"] > 0
    assert "zch_used/city" not in last


@pytest.mark.long
def test_a_resumed_run_is_the_uninterrupted_one_on_as_many_ranks_bit_for_bit(results):
    """From a step between two admissions, so that ids which wait for one are in the checkpoint."""
    same, fewer = results["again_on_two"], results["again_on_one"]
    assert same["done"]["codes"] == [0, 0] and same["different"] == [], same
    assert fewer["done"]["codes"] == [0] and fewer["ids"] == [] and fewer["largest"] < 1e-5, fewer


@pytest.mark.long
def test_an_artifact_serves_what_predict_says(results):
    found = results["served"]
    assert [done["codes"] for done in found["done"]] == [[0], [0]], found["done"]
    for scores in (found["from_file"], found["from_lists"]):
        np.testing.assert_allclose(scores, found["predicted"], atol=1e-6)


@pytest.mark.long
def test_a_warm_start_takes_ids_and_rows_along(results):
    found = results["warm"]
    assert found["done"]["codes"] == [0] and found["same"] == [True, True], found["done"]["words"]


REFUSALS = {
    "wide": "field 'user' is of encoding 'zch', and this model has a wide part.*use encoding = 'hash'",
    "adam": "optim.embedding.name = 'adam': field 'user' is of encoding 'zch'.*use rowwise_adagrad",
    "warm": "train.warm_start = .*user.*differ.*make the schemas equal there, or leave the table out",
}


@pytest.mark.long
@pytest.mark.parametrize("scenario", REFUSALS)
def test_what_does_not_fit_is_refused(results, scenario):
    done = results["refused"][scenario]
    assert set(done["codes"]) == {2}
    lines = "".join(done["words"]).splitlines()
    assert len(lines) == 1 and re.search(REFUSALS[scenario], lines[0]), lines
    assert results["refused"]["written"] == [], "before anything is written"
