"""Proves that the synthetic log is reproducible, in range, made of interactions, and as good as it says."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import InputError
from data.reading.columns import Place
from data.reading.encode import Encoder
from data.schema import load_schema, parse_schema, schema_to_toml
from data.synthetic.planted import (
    CLICK_RATE,
    SHARES,
    draw_facts,
    draw_labels,
    make_world,
    pailitao_schema,
    raw_terms,
    taste_of_day,
    true_probability,
)
from data.synthetic.write import METADATA_KEY, Tally, make_block, write_synthetic

ROWS, DAYS = 3_000, 6


@pytest.fixture(scope="module")
def schema():
    return pailitao_schema("demo")


@pytest.fixture(scope="module")
def world(schema):
    return make_world(schema, 0, DAYS)


@pytest.fixture(scope="module")
def log(schema, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("synthetic") / "log"
    write_synthetic(schema, out, rows=ROWS, days=DAYS, rows_per_file=350)
    return out


def pairwise_auc(scores, labels) -> float:
    """The share of (click, no click) pairs in the right order, ties counting half: the definition itself."""
    positive, negative = scores[labels == 1], scores[labels == 0]
    gaps = positive[:, None] - negative[None, :]
    return float(((gaps > 0) + 0.5 * (gaps == 0)).mean())


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("ds=*/*.parquet"))


def rows_of(folder: Path) -> pa.Table:
    return pa.concat_tables([pq.ParquetFile(file).read() for file in files_of(folder)])


def test_same_seed_same_bytes_whatever_the_threads(schema, log, tmp_path):
    write_synthetic(schema, tmp_path, rows=ROWS, days=DAYS, rows_per_file=350, threads=1)
    one, two = ({file.relative_to(out): file.read_bytes() for file in files_of(out)} for out in (log, tmp_path))
    assert one == two and len(one) == 2 * DAYS


def test_layout_and_summary(schema, log):
    days = [f"ds=2024-05-0{day}" for day in range(1, DAYS + 1)]
    assert [folder.name for folder in sorted(log.glob("ds=*"))] == days
    assert load_schema(log / "schema.toml").fingerprint() == schema.fingerprint()
    summary = json.loads((log / "synthetic.json").read_text())
    rows = {split: part["rows"] for split, part in summary["splits"].items()}
    assert rows == {"train": 2000, "valid": 500, "test": 500, "all": 3000}
    assert summary["logit_variance_shares"] == SHARES
    assert sum(SHARES.values()) == pytest.approx(1.0)


def test_recorded_best_scores_are_those_of_the_true_probability(world, log):
    """The oracle is recomputed from the generator, the labels are read from the files."""
    rows, tally = ROWS // DAYS, Tally()
    facts = draw_facts(world, np.full(rows, DAYS - 1), np.arange(rows))
    tally.add(true_probability(world, facts), rows_of(log)["click"].to_numpy()[-rows:])
    assert json.loads((log / "synthetic.json").read_text())["splits"]["test"] == tally.summary()


@pytest.fixture(scope="module")
def many(world):
    """Facts, true probabilities in steps and labels of 40,000 rows."""
    index = np.arange(40_000)
    facts = draw_facts(world, index % DAYS, index)
    probability = true_probability(world, facts)
    return facts, probability, draw_labels(world, facts, probability)


def test_click_rate_and_best_scores_are_plausible_and_the_best_is_calibrated(many):
    _, steps, labels = many
    tally = Tally()
    tally.add(steps, labels)
    summary = tally.summary()
    assert abs(summary["label_rate"] - CLICK_RATE) < 0.02
    assert 0.80 < summary["best_auc"] < 0.87
    assert summary["best_log_loss"] < summary["prior_log_loss"] - 0.05
    probability = steps / 65_536
    for warp in (0.8, 1.25):  # bolder or shyer than the truth: no other score of the same rows is better
        other = 1 / (1 + (1 / probability - 1) ** warp)
        assert summary["best_log_loss"] < -np.mean(np.where(labels == 1, np.log(other), np.log1p(-other)))
    assert abs(probability.mean() - labels.mean()) < 0.005


@pytest.mark.parametrize("group", [name for name in SHARES if name != "main_effects"])
def test_each_group_matters_through_its_interaction(world, many, group):
    """Pair a group's query side with other rows' items: each side alone stays, the oracle gets worse."""
    facts, _, labels = many
    terms = {name: world.scales[name] * term for name, term in raw_terms(world, facts).items()}
    order = np.random.default_rng(0).permutation(len(labels))
    item_side = ("item", "doc", "category_latent", "brand_latent", "style_latent")
    torn = {name: value[order] if name.startswith(item_side) else value for name, value in facts.items()}
    without = terms | {group: world.scales[group] * raw_terms(world, torn)[group]}
    best, worse = (pairwise_auc(sum(parts.values())[:4000], labels[:4000]) for parts in (terms, without))
    assert worse < best - 0.01


def test_taste_drifts(world):
    user = np.arange(2000)
    days = [taste_of_day(world, user, np.full(len(user), day)) for day in (0, 1, 13)]
    near, far = (np.corrcoef(days[0].ravel(), other.ravel())[0, 1] for other in days[1:])
    assert near > 0.98
    assert 0.6 < far < 0.9


@pytest.mark.parametrize("scale", ["demo", "paper"])
def test_a_log_is_encoded_by_its_schema(scale):
    """The encoder refuses an id out of range, a number that is not finite, a vector of another width and uneven weights."""
    schema = pailitao_schema(scale)
    rows, _ = make_block(make_world(schema, 0, DAYS), 1, 0, 400)
    assert set(rows.schema.names) == {*schema.columns, "timestamp"}
    encoded = Encoder(schema).encode(rows, Place("synthetic", 0))
    assert encoded.num_rows == 400 and not encoded.repaired


def test_nulls_and_empty_lists_occur(log):
    table = rows_of(log)
    assert 0.02 < table["user_job"].null_count / ROWS < 0.1
    assert pc.min(pc.list_value_length(table["user_clicked_categories"])).as_py() == 0
    whole = table.select(["user_id", "item_id", "click", "timestamp", "query_image"])
    assert len(whole.drop_null()) == ROWS


def test_files_carry_checksums_and_their_own_scores(log):
    file = files_of(log)[0]
    metadata = pq.read_metadata(file)
    said = json.loads(metadata.metadata[METADATA_KEY.encode()])
    assert said["rows"] == metadata.num_rows == 350
    assert 0.7 < said["best_auc"] <= 1.0
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 4] ^= 1
    with pytest.raises(OSError):
        pq.read_table(pa.BufferReader(bytes(damaged)), page_checksum_verification=True)


def test_another_log_is_replaced_only_with_force(schema, tmp_path):
    out, seen = tmp_path / "log", []
    write_synthetic(schema, out, rows=30, days=3)
    before = {file: file.stat().st_mtime_ns for file in files_of(out)}
    assert write_synthetic(schema, out, rows=30, days=3)["already_there"]
    assert before == {file: file.stat().st_mtime_ns for file in files_of(out)}
    with pytest.raises(InputError, match=r"rows = 30 there, 60 wanted.*--force"):
        write_synthetic(schema, out, rows=60, days=3)
    write_synthetic(schema, out, rows=60, days=3, force=True, progress=seen.append)
    assert rows_of(out).num_rows == 60 and seen == [20, 40, 60]
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 2}, "rows = 2: wanted 3"),
        ({"days": 2}, "days = 2: wanted 3"),
        ({"force": True}, "holds no synthetic log"),
        ({"field": "query_hour"}, "query_hour.*is missing"),
    ],
)
def test_mistakes_are_refused_and_nothing_is_touched(schema, tmp_path, options, message):
    top = schema_to_toml(schema)
    top["fields"].pop(options.pop("field", None), None)
    out = tmp_path / "log"
    if "force" in options:
        out.mkdir()
        (out / "thesis.tex").write_text("years of work")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=message):
        write_synthetic(parse_schema(top, "test", tmp_path), out, **{"rows": 30, "days": 3} | options)
    assert sorted(tmp_path.rglob("*")) == before


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 65_535), st.integers(0, 1)), min_size=2, max_size=60))
def test_tally_agrees_with_the_definition(rows):
    steps, labels = (np.asarray(column) for column in zip(*rows, strict=True))
    tally, half, rate = Tally(), len(rows) // 2, labels.mean()
    tally.add(steps[:half], labels[:half])
    tally.add(steps[half:], labels[half:])
    summary = tally.summary()
    assert (summary["rows"], summary["label_rate"]) == (len(rows), pytest.approx(rate))
    if not 0 < rate < 1:
        assert summary["best_auc"] is None
        return
    chance = steps / 65_536
    loss = -np.where(labels == 1, np.log(chance), np.log1p(-chance)).mean()
    prior = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
    found = (summary["best_auc"], summary["best_log_loss"], summary["prior_log_loss"])
    assert found == pytest.approx((pairwise_auc(steps, labels), loss, prior), rel=1e-12)
