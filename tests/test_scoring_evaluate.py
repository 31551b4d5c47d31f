"""Proves that `mbcnet evaluate` says what training said, the same to 1e-6 on 1, 2 and 4 ranks, from a table-wise and a row-wise run, and
that metrics of streamed rows keep the bound they state.
"""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from serving_data import KINDS, evaluated, printed_by, serving_table
from sklearn.metrics import log_loss, roc_auc_score

from mbcnet_rec.runtime.process import Process
from mbcnet_rec.scoring.metrics import Histogram, auc_of_counts, evaluate_predictions, exact_metrics, score_counts
from mbcnet_rec.scoring.ranking import group_metrics

ALONE = Process(0, 1, 0, 1, torch.device("cpu"))
NAMES, BRANCHES = ("auc", "log_loss", "ne", "calibration"), ("", "/efgc", "/cross", "/deep")
RANKING = ("ndcg@2", "recall@5", "hit_rate@2", "mrr")
METRICS = [f"{name}{branch}" for name in NAMES for branch in BRANCHES]


@pytest.mark.parametrize(
    ("kind", "world"), [("table_wise", 2), ("row_wise", 2), pytest.param("row_wise", 4, marks=pytest.mark.long)]
)
def test_world_size_changes_nothing(runs, kind, world):
    one, more = evaluated(runs, f"{kind}_evaluate_1"), evaluated(runs, f"{kind}_evaluate_{world}")
    assert one["rows"] == more["rows"] == 2_000 and one["exact"] and one["auc"] > 0.75
    for key in (*METRICS, "gauc", *RANKING):
        assert abs(one[key] - more[key]) < 1e-6, key
        assert np.abs(np.subtract(one["intervals"][key], more["intervals"][key])).max() < 1e-5, key
    own, others = one["slices"]["hour"], more["slices"]["hour"]
    assert list(own) == list(others) and list(own)[-1] == "(other)" and len(own) == 11
    for hour, entry in own.items():
        assert entry["rows"] == others[hour]["rows"] and entry["positives"] == others[hour]["positives"]
        for key in METRICS:
            assert abs(entry[key] - others[hour][key]) < 1e-6, (hour, key)
    assert sum(entry["rows"] for entry in own.values()) == 2_000


@pytest.mark.parametrize("kind", KINDS)
def test_training_logged_the_same(runs, kind):
    lines = map(json.loads, (runs / kind / "metrics.jsonl").read_text().splitlines())
    logged = next(line for line in lines if line["split"] == "test")
    answer = evaluated(runs, f"{kind}_evaluate_1")
    assert {*METRICS, "gauc"} <= logged.keys()
    for key in (*METRICS, "gauc", *RANKING):
        assert abs(answer[key] - logged[key]) < 1e-6, key


def test_streamed_metrics_keep_their_bound(runs):
    exact, streamed = evaluated(runs, "row_wise_evaluate_1"), evaluated(runs, "row_wise_stream_2")
    assert not streamed["exact"] and streamed["rows"] == 2_000
    assert list(streamed["slices"]["hour"]) == list(exact["slices"]["hour"])
    entries = [(exact, streamed)]
    entries += [(exact["slices"]["hour"][hour], found) for hour, found in streamed["slices"]["hour"].items()]
    for own, found in entries:
        assert own["rows"] == found["rows"]
        for key in METRICS:
            # no bin with both a positive and a negative row: exact, and without a bound
            bound = found.get("bounds", {}).get(key, 0.0) if key.startswith("auc") else 1e-6
            assert abs(found[key] - own[key]) <= bound + 1e-9, key
    for key in ("gauc", *RANKING):
        assert abs(streamed[key] - exact[key]) < 0.1  # of every fourth group


def test_evaluation_in_training_streams_what_it_need_not_gather(runs):
    """On 2 ranks, above its limit of rows: the same metrics within the bound of 2**20 bins, those of groups exact."""
    exact, streamed = evaluated(runs, "in_training")
    assert exact.keys() == streamed.keys() >= {*METRICS, "gauc", "rows", "reliability"}
    assert exact["rows"] == streamed["rows"] == 2_000
    for key in METRICS:
        assert abs(exact[key] - streamed[key]) < (1e-4 if key.startswith("auc") else 1e-9), key
    for key in ("gauc", "ndcg@2", "mrr"):
        assert exact[key] == pytest.approx(streamed[key], rel=1e-12), key
    for own, found in zip(exact["reliability"], streamed["reliability"], strict=True):
        assert np.abs(np.subtract(own, found)).max() < 1.5 and abs(own[0] - found[0]) < 1e-2


def test_exact_auc_and_gauc_are_scikit_learns():
    """Of all rows and of each group, with many ties; groups of one class are left out. What training logs, without errors, is the same."""
    rng = np.random.default_rng(0)
    logits, labels = rng.integers(-5, 6, 300) / 2, (rng.random(300) < 0.3).astype(np.float64)
    groups = rng.integers(0, 20, 300)
    found = exact_metrics(logits[:, None], labels, ())
    assert found["auc"].value == pytest.approx(roc_auc_score(labels, logits), abs=1e-12)
    assert found["log_loss"].value == pytest.approx(log_loss(labels, 1 / (1 + np.exp(-logits))), rel=1e-12)
    own = [groups == group for group in range(20) if 0 < labels[groups == group].mean() < 1]
    values = [roc_auc_score(labels[chosen], logits[chosen]) for chosen in own]
    sizes = [chosen.sum() for chosen in own]
    gauc = group_metrics(logits, labels, groups, ())["gauc"]
    assert gauc.value == pytest.approx(np.average(values, weights=sizes), abs=1e-12)
    three = np.stack([logits, -logits, logits.round()], axis=1)
    exact = exact_metrics(three, labels, ("efgc", "deep"))
    logged = evaluate_predictions(three, labels, ("efgc", "deep"))
    assert len(logged) == 12
    assert logged == pytest.approx({name: each.value for name, each in exact.items()}, rel=1e-12)
    assert np.isnan(evaluate_predictions(logits[:, None], np.ones(300), ())["auc"])


def test_intervals_cover():
    """Over 400 samples of one law, 95 % intervals of AUC hold its true value about as often as they say."""
    rng = np.random.default_rng(1)
    scores, truth = rng.normal(size=(400, 200)), 0.760249938906523  # of normals one standard deviation apart
    labels = np.arange(200) % 4 == 0
    inside = 0
    for each in scores:
        low, high = auc_of_counts(*score_counts(each + labels, labels.astype(float))[:2]).interval()
        inside += low <= truth <= high
    assert 0.91 < inside / 400 < 0.98


def test_binned_auc_is_within_its_bound_even_of_ties():
    rng = np.random.default_rng(2)
    for scale, bins in ((1e-4, 64), (3.0, 64), (40.0, 256)):  # one bin, many, beyond the last one
        labels = (rng.random(3_000) < 0.4).astype(np.float64)
        logits = rng.normal(scale * labels, scale, 3_000).astype(np.float32)[:, None]
        histogram = Histogram(1, bins)
        for part in range(0, 3_000, 700):
            histogram.add(logits[part : part + 700], labels[part : part + 700])
        exact, binned = exact_metrics(logits, labels, ()), histogram.metrics(())
        assert abs(binned["auc"].value - exact["auc"].value) <= binned["auc"].bound
        for key in ("log_loss", "ne", "calibration"):
            assert binned[key].value == pytest.approx(exact[key].value, rel=1e-12)


def test_other_rows_and_refusals(runs, tmp_path):
    pq.write_table(serving_table(300, 9), tmp_path / "other.parquet", write_page_checksum=True)
    (tmp_path / "part-0.orc").write_text("ORC")
    run = runs / "row_wise"
    other = tmp_path / "other.parquet"
    code, out, _ = printed_by("evaluate", run, "--data", other, "--by", "city", "--by", "user", "--json")
    answer = json.loads(out)
    assert code == 0 and answer["rows"] == 300 and answer["files"] == 1
    assert answer["slices"]["city"]["(null)"]["rows"] > 0
    users = answer["slices"]["user"]
    assert len(users) == 51 and list(users)[-1] == "(other)"
    assert sum(entry["rows"] for entry in users.values()) == 300
    low, high = answer["intervals"]["auc"]
    assert low < answer["auc"] < high
    _, out, _ = printed_by("evaluate", run, "--data", tmp_path)
    assert f"300 rows of 1 file (no Parquet, by name, and left out: {tmp_path}/part-0.orc)" in out
    code, out, _ = printed_by("evaluate", run, "--by", "hour")
    assert code == 0 and "+-" in out and "test, 2,000 rows of 1 file, weights" in out
    for argv, words in (
        ((run, "--by", "tags"), "wanted one value a row"),
        ((run, "--by", "nothing"), "no such column"),
        ((tmp_path,), "no run folder"),
    ):
        code, _, err = printed_by("evaluate", *argv)
        assert code == 2 and words in err and err.count("\n") == 1


def test_a_value_is_one_slice_whatever_type_its_column_has(runs, tmp_path):
    """Integers one day and doubles, decimals, text or bytes of the next; times in nanoseconds; a column that is there twice is refused."""
    rows = pq.read_table(runs / "test.parquet").slice(0, 90)
    numbers = pa.array([index % 3 for index in range(90)])
    texts = numbers.cast(pa.string())
    columns = [
        numbers,
        numbers.cast(pa.float32()),
        numbers.cast(pa.decimal128(30, 2)),
        texts,
        texts.cast(pa.binary()),
        texts.dictionary_encode(),
    ]
    for index, column in enumerate(columns):
        times = pa.array(range(90), pa.timestamp("ns"))
        no_utf8 = pa.array([b"\xff"] * 90).cast(pa.string(), safe=False)
        tenths = [None if row < 3 else row % 3 / 10 for row in range(90)]
        kind = (pa.float32(), pa.float64(), pa.string())[index % 3]
        table = rows.append_column("part", column).append_column("at", times).append_column("bytes", no_utf8)
        table = table.append_column("tenth", pa.array(tenths).cast(kind))
        pq.write_table(table, tmp_path / f"{index}.parquet", write_page_checksum=True)
    run = runs / "row_wise"
    code, out, err = printed_by(
        "evaluate", run, "--data", tmp_path, *(f"--by={name}" for name in ("part", "at", "bytes", "tenth")), "--json"
    )
    assert code == 0, err
    slices = json.loads(out)["slices"]
    assert {name: each["rows"] for name, each in slices["part"].items()} == {"0": 180, "1": 180, "2": 180}
    assert {name: each["rows"] for name, each in slices["tenth"].items()} == {
        "0": 174, "0.1": 174, "0.2": 174, "(null)": 18,
    }  # fmt: skip
    assert {name: each["rows"] for name, each in slices["bytes"].items()} == {"\\xff": 540}
    assert slices["at"]["1970-01-01 00:00:00.000000007"]["rows"] == 6
    twice = pa.Table.from_arrays([*rows.columns, numbers, numbers], [*rows.column_names, "part", "part"])
    pq.write_table(twice, tmp_path / "twice.parquet", write_page_checksum=True)
    code, _, err = printed_by("evaluate", run, "--data", tmp_path / "twice.parquet", "--by", "part")
    assert code == 2 and "--by part: 2 columns of this name" in err
