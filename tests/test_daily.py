"""Which ids are new to a model, which collide and which have a row of their own is the same at 1, 2 and 4 ranks and over a resumed day: shares of
hash and zch tables beside a count of the days' values, and admission after so many sightings, counted exactly from day to day. A run's days hold
the rows of the plain run."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from forked_ranks import run_script
from tasks_data import table_of
from tiny_run import lines_of, make_run, train

from data.errors import InputError
from data.reading.files import resolve_files
from data.reading.keys import hash_values
from data.schema import load_schema
from data.stream import ParquetStream
from mbcnet_rec.config import RunConfig, load_config
from mbcnet_rec.daily import alarms, days_in


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    folder = tmp_path_factory.mktemp("days")
    run_script("day_ranks.py", str(folder))
    return folder, json.loads((folder / "results.json").read_text())


def values_of(folder, day, column):
    values = pq.read_table(folder / f"on-1/log/ds={day}")[column].combine_chunks()
    return values.flatten() if pa.types.is_list(values.type) else values


@pytest.mark.long
def test_the_share_of_ids_that_are_new_to_a_table_is_exact(played):
    """Of a hash table the values whose row none of the days before has used; of a zch table those without a row. Neither makes an alarm by itself."""
    folder, found = played
    for name, rows in (("item", 100), ("tags", 60)):
        seen = set()
        for day in range(3):
            used = hash_values(values_of(folder, day, name)) % rows
            share = sum(row not in seen for row in used.tolist()) / len(used)
            for world in found:
                profile = found[world]["days"][day]["profile"]
                assert f"unseen/{name}" not in profile if not day else profile[f"unseen/{name}"] == pytest.approx(share)
            assert not day or 0.05 < share < 0.95
            seen |= set(used.tolist())
            for world in found:
                line = [each for each in found[world]["ids"] if each["split"] == "ids"][day]
                assert line[f"hash_used/{name}"] == pytest.approx(len(seen) / rows)
    for day in range(3):
        share = np.mean(values_of(folder, day, "places").to_numpy() >= 20)
        assert [each["days"][day]["profile"]["new/places"] for each in found.values()] == pytest.approx([share] * 3)
    shares = [[each["profile"].get("unseen/shop") for each in found[world]["days"]] for world in found]
    assert shares[0][0] is None and min(shares[0][1:]) > 0.1 and shares == [shares[0]] * 3
    logged = [[each for each in found[world]["ids"] if each["split"] == "progressive"] for world in found]
    assert [[each["unseen/shop"] for each in lines] for lines in logged] == [shares[0][1:]] * 3


@pytest.mark.long
def test_ids_that_share_a_row_are_told_also_of_a_plain_run(played):
    folder, found = played
    values = {value for day in range(3) for value in values_of(folder, day, "tags").to_pylist()}
    true = 1 - len(set((hash_values(pa.array(sorted(values))) % 60).tolist())) / len(values)
    for each in found.values():
        last = [line for line in each["ids"] if line["split"] == "ids"][-1]
        assert abs(last["collision/tags"] - true) < 0.1
        told = f"tags {last['collision/tags']:.1%} ({last['hash_used/tags']:.1%} of its rows used)"
        assert "ids that share a row of a hash table" in each["shown"][-1] and told in each["shown"][-1]
        assert f"{last['collision/tags']:.2%}" in each["page"]


@pytest.mark.long
def test_an_id_has_a_row_of_its_own_after_so_many_sightings(played):
    """Below, at and above `min_count` on one day, and once on each of three days: counts go on exactly, also where the fitted folder and the
    run's copy were lost and grew again from the checkpoint; before that an id scores as one that nobody has seen."""
    _, found = played
    one = found["1"]
    for day, (rows, scores) in enumerate(zip(one["rows"], one["scores"], strict=True)):
        own = [name for name in ("below", "at", "above", "daily") if rows["rows"][name] > 1]
        assert own == (["at", "above"] if day < 2 else ["at", "above", "daily"])
        for name in scores:
            assert (scores[name] == scores["nobody"]) == (name not in own), (day, name)
    assert [each["waiting"].get("daily") for each in one["rows"]] == [1, 2, None]
    assert [each["waiting"]["below"] for each in one["rows"]] == [2, 2, 2]
    for other in ("2", "4"):
        assert found[other]["rows"] == one["rows"]
        for ours, theirs in zip(one["scores"], found[other]["scores"], strict=True):
            assert theirs == pytest.approx(ours, rel=1e-5)


def test_fewer_new_ids_are_no_alarm_and_more_are():
    """A model knows ever more of its ids; of a fitted vocabulary a fall is one, since it may be a day that was there before."""
    earlier = [{"profile": {"unseen/item": 0.4, "new/user": 0.4}}, {"profile": {"unseen/item": 0.2, "new/user": 0.3}}]
    assert alarms({"unseen/item": 0.01, "new/user": 0.35}, earlier, 10_000) == []
    (found,) = alarms({"unseen/item": 0.6, "new/user": 0.35}, earlier, 10_000)
    assert found == "new-id share of item is 0.6, on the days before it was 0.2 to 0.4"
    (found,) = alarms({"unseen/item": 0.2, "new/user": 0.01}, earlier, 10_000)
    assert found.startswith("new-id share of user is 0.01")
    (found,) = alarms({"new/user": 0.9}, earlier[:1], 10_000)
    assert found == "new-id share of user is 0.9, on the days before it was 0.4"


def test_the_line_of_the_test_rows_stays_beside_the_collisions(tmp_path, monkeypatch):
    """In a plain run of one day, whose table of tags has 30 rows for 40 ids."""
    monkeypatch.chdir(make_run(tmp_path))
    schema = tmp_path / "rows/schema.toml"
    hashed = 'tags = { kind = "multi_valued", encoding = "hash", num_embeddings = 31, embedding_dim = 16 }'
    schema.write_text(re.sub("(?m)^tags .*$", hashed, schema.read_text()))
    assert train("tiny.toml", "train.out=run") == 0
    assert [line["step"] for line in lines_of(tmp_path / "run", "ids", "test")] == [20, 20]
    (line,) = lines_of(tmp_path / "run", "ids")
    used = len(set((hash_values(pa.array(range(40))) % 30).tolist())) / 30
    assert line["hash_used/tags"] == pytest.approx(used)
    assert line["collision/tags"] == pytest.approx(1 - used / np.log(1 / (1 - used)), rel=1e-5)


def rows_of(config: RunConfig) -> list[int]:
    stream = ParquetStream(resolve_files(config.data.train), load_schema(config.schema), config.data.train_options(0))
    return sorted(value for batch in stream for value in batch.sparse_features["item"].values().tolist())


@pytest.mark.parametrize("kind", [pa.timestamp("us"), pa.int64()], ids=str)
@pytest.mark.parametrize(
    ("where", "rows"),
    [
        ("t < 2024-05-03", (20, 0, 0)),
        ("t<2024-05-03", (20, 0, 0)),
        ("\"t\" < '2024-05-03'", (20, 0, 0)),
        ("ds >= 2024-05-02 and t < 2024-05-03", (20, 0, 0)),
        ("ds >= last 2, t < last 1", (0, 20, 0)),
        ("t < last 1 and t >= last 2", (0, 20, 0)),
        ("t != last 1", (20, 20, 0)),
        ("t IS NOT NULL and ds < last 1", (20, 20, 0)),
        ("t IS NULL", (4, 4, 4)),
    ],
)
def test_days_hold_the_rows_of_a_plain_run(tmp_path, monkeypatch, kind, where, rows):
    """However a condition on time is written. Days without a row are passed over: without a time each of these has 4 rows more."""
    monkeypatch.chdir(tmp_path)
    for day in (2, 3, 4):
        path = tmp_path / f"log/ds=2024-05-0{day}/part.parquet"
        path.parent.mkdir(parents=True)
        t = pa.array([np.datetime64(f"2024-05-0{day}T{hour:02}", "us") for hour in range(20)] + [None] * 4).cast(kind)
        pq.write_table(pa.table({"click": [0, 1] * 12, "item": [day * 24 + row for row in range(24)], "t": t}), path)
    (tmp_path / "s.toml").write_text(
        'name = "s"\nlabel = "click"\ntime_column = "t"\n[fields]\n'
        'item = { kind = "categorical", num_embeddings = 120, embedding_dim = 4 }'
    )
    (tmp_path / "run.toml").write_text('name = "r"\nschema = "s.toml"\n[data]\ntrain = ["log"]\nbatch_size = 8\n')
    config = load_config(Path("run.toml"), [f"data.train_where={json.dumps([where])}"])
    days = days_in(config)
    assert [len(rows_of(day)) for day in days] == [count for count in rows if count]
    assert sorted(row for day in days for row in rows_of(day)) == rows_of(config)
    with pytest.raises(InputError, match=r"hold no rows that where = .* keep"):
        days_in(load_config(Path("run.toml"), ['data.train_where=["t < 2024-05-01"]']))


def test_the_share_of_new_ids_is_of_the_values(tmp_path, monkeypatch):
    """Of lists and of single ids, whether `on_invalid` leaves those outside of the table out or not; a null is no value."""
    monkeypatch.chdir(make_run(tmp_path))
    schema = Path("rows/schema.toml")
    sizes, text = {"item": 30, "history": 30, "tags": 20, "likes": 10, "user": 120}, schema.read_text()
    for name, size in {"thing": 30, "tags": 20, "likes": 10}.items():
        text = re.sub(f"(?m)^({name} .*num_embeddings = )\\d+", rf"\g<1>{size}", text)
    for name, action in {"item": "null", "history": "null", "tags": "null", "likes": "modulo"}.items():
        text = re.sub(f"(?m)^({name} .*) }}$", rf'\1, on_invalid = "{action}" }}', text)
    schema.write_text(text)
    rows = pq.read_table("rows/train.parquet")
    assert train(Path("tiny.toml"), "train.out=run", progressive=True) == 0
    profile = json.loads(Path("run/lineage.jsonl").read_text())["profile"]
    for name, size in sizes.items():
        values = rows[name].combine_chunks()
        values = (values.flatten() if pa.types.is_list(values.type) else values).drop_null().to_numpy()
        assert profile[f"new/{name}"] == pytest.approx((values >= size).mean()), name
        assert name == "user" or 0.3 < profile[f"new/{name}"] < 0.8


def test_the_label_rate_is_of_the_rows_that_have_the_first_label(tmp_path, monkeypatch):
    """Before the day is trained and after."""
    monkeypatch.chdir(make_run(tmp_path))
    schema, rows = Path("rows/schema.toml"), table_of(960, 1)
    schema.write_text(schema.read_text().replace('label = "click"', 'labels = ["buy", "click"]'))
    pq.write_table(rows, "rows/train.parquet")
    settings = ("data.test=[]", "model.kind=shared_bottom", "train.out=run")
    assert train(Path("tiny.toml"), *settings, progressive=True) == 0
    day = json.loads(Path("run/lineage.jsonl").read_text())
    bought = rows["buy"].drop_null().to_numpy()
    assert 700 < len(bought) < 850 and bought.mean() > 0.1
    assert day["profile"]["label_rate"] == pytest.approx(bought.mean())
    assert day["label_rate"] == pytest.approx(bought.mean())
