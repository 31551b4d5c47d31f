"""Proves that `mbcnet compare --log` finds an effect that was planted, with intervals that hold it about 95 times in 100 although rows of one
user are alike; that it cuts by slice; and that it names what is wrong with a log."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from serving_data import printed_by

from mbcnet_rec.scoring.compare import CTR, LIFT, compare_arms


def drawn(seed, users=400, effect=0.0):
    """Users of other rates each, 1 to 30 rows: in_b, labels, users."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(1, 31, users)
    in_b, rate = rng.random(users) < 0.3, rng.beta(1, 5, users)
    user = np.repeat(np.arange(users), rows)
    rate = rate[user] * (1 + effect * in_b[user])
    return in_b[user], (rng.random(len(user)) < rate).astype(float), user


def test_intervals_hold_the_truth():
    """Of 300 draws without an effect about 5 % are found significant by users, and far more by rows as if independent."""
    found = {"users": 0, "rows": 0}
    for seed in range(300):
        in_b, labels, user = drawn(seed)
        for name, clusters in (("users", user), ("rows", np.arange(len(user)))):
            each = compare_arms(in_b, labels, clusters).metrics[CTR]
            found[name] += not each.low <= 0 <= each.high
    assert 5 <= found["users"] <= 27 and found["rows"] > 40, found


def test_values_by_hand():
    in_b, labels = np.arange(10) >= 5, np.array([1, 0, 0, 0, 0, 1, 1, 0, 0, 0.0])
    found = compare_arms(in_b, labels, np.arange(10)).metrics
    assert np.isclose(found[CTR].value, 0.2) and (found[CTR].ours, found[CTR].theirs) == (0.4, 0.2)
    assert np.isclose(found[LIFT].value, 1.0) and found[LIFT].low < 0 < found[LIFT].high
    variance = (0.4 * 0.6 + 0.2 * 0.8) / 5 * 10 / 9
    assert np.isclose(found[CTR].high - found[CTR].low, 2 * 2.2621571627 * variance**0.5)
    assert np.isnan(compare_arms(np.ones(3, bool), labels[:3], np.arange(3)).metrics[CTR].value)
    assert np.isnan(compare_arms(in_b, labels * in_b, np.arange(10)).metrics[LIFT].value)


def test_command(tmp_path):
    in_b, labels, user = drawn(1, 4000, effect=0.4)
    table = pa.table({"arm": np.where(in_b, "b", "a"), "click": labels.astype(int), "user": user, "city": user % 3})
    (tmp_path / "scores").mkdir()
    for part in range(2):  # of other types
        half = table.slice(part * 30_000, None if part else 30_000)
        half = half.set_column(0, "arm", half["arm"].dictionary_encode()) if part else half
        pq.write_table(half, tmp_path / "scores" / f"{part}.parquet")
    argv = ("compare", "--log", tmp_path / "scores", "--key", "user", "--by", "city")
    code, out, err = printed_by(*argv, "-o", tmp_path / "page.html")
    assert code == 0 and "rows of one user are taken together" in out and "by city" in out, err
    assert "relative change by city" in (tmp_path / "page.html").read_text()
    found = json.loads(printed_by(*argv, "--json")[1])
    assert found["relative_ctr"]["significant"] and 0.2 < found["relative_ctr"]["difference"] < 0.6
    assert np.isclose(found["ctr"]["ours"], labels[in_b].mean()) and found["rows"] == len(labels)
    own = user % 3 == 1
    assert np.isclose(found["slices"]["city"]["1"]["ctr"]["theirs"], labels[own & ~in_b].mean())
    bad = table.set_column(1, "click", pa.array([2] * len(table)))
    pq.write_table(bad, tmp_path / "bad.parquet")
    pq.write_table(table.set_column(0, "arm", pa.array(["c"] * len(table))), tmp_path / "arms.parquet")
    for more, words in (
        (("--log", tmp_path / "bad.parquet"), "bad.parquet: row 0, label 'click' = 2: wanted 0 or 1"),
        (("--log", tmp_path / "arms.parquet"), "column 'arm' = 'c': wanted a or b"),
        (("--log", tmp_path / "scores", "--key", "who"), "wanted one column 'who'"),
        (("--log", tmp_path / "scores", "--data", "x"), "wanted RUN_A and RUN_B, or --log"),
        ((tmp_path,), "wanted RUN_A and RUN_B, or --log"),
        ((tmp_path, tmp_path, "--key", "user"), "--key and --label name columns of --log"),
    ):
        code, _, err = printed_by("compare", *more)
        assert code == 2 and words in err and len(err.splitlines()) == 1, (more, err)


def test_rows_without_a_key_are_taken_one_by_one(tmp_path):
    in_b, labels, user = drawn(1)
    alone, row = user % 3 == 0, np.arange(len(user))
    intervals = []
    for name, users in (
        ("apart", np.where(alone, -1.0 - row, user)),
        ("null", user),
        ("nan", np.where(alone, np.nan, user)),
    ):
        column = pa.array(users, mask=alone if name == "null" else None)
        pq.write_table(
            pa.table({"arm": np.where(in_b, "b", "a"), "click": labels.astype(int), "user": column}),
            tmp_path / f"{name}.parquet",
        )
        argv = ("compare", "--log", tmp_path / f"{name}.parquet", "--key", "user", "--json")
        found = json.loads(printed_by(*argv)[1])
        intervals.append(found["ctr"]["interval"])
        assert not any("in both arms" in note for note in found["notes"])
    assert intervals[1] == intervals[2] == pytest.approx(intervals[0], rel=1e-12)
