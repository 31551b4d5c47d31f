"""Proves that `mbcnet importance` scores rows with just the chosen fields of other rows, and that its figures are those of such rows."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from sequence_data import seen_table, write_seen
from serving_data import printed_by
from tiny_run import train

from data.reading.columns import Place
from data.reading.encode import Encoder
from data.schema import load_schema
from mbcnet_rec.scoring.importance import chosen, mixed


def test_only_the_chosen_fields_change(runs):
    schema = load_schema(runs / "schema.toml")
    # a cross is a field of its own, which no column alone changes
    schema = replace(schema, features=tuple(each for each in schema.features if not each.is_cross))
    rows = pq.read_table(runs / "test.parquet").slice(0, 50).combine_chunks().to_batches()[0]
    order = np.random.default_rng(0).permutation(50)
    encoder, place = Encoder(schema), Place("here", None, 0)
    own, other = encoder.encode(rows, place), encoder.encode(rows.take(order), place)
    for feature in schema.features:
        names = {feature.source_column, feature.weights} - {""}
        swapped = rows
        for name in names:
            swapped = swapped.set_column(rows.schema.get_field_index(name), name, rows[name].take(order))
        expected, found = encoder.encode(swapped, place), mixed(own, other, chosen(schema, (feature.name,)))
        for part in ("single_ids", "dense", "labels"):
            np.testing.assert_array_equal(getattr(found, part), getattr(expected, part), feature.name)
        for part in ("lists", "weighted_lists"):
            a, b = getattr(found, part), getattr(expected, part)
            np.testing.assert_array_equal(a.offsets, b.offsets, feature.name)
            assert all(map(np.array_equal, [*a.values, *a.weights], [*b.values, *b.weights])), feature.name


def test_a_sequence_and_the_fields_beside_it_change_together(tmp_path):
    """Whichever of them is named, alone or in a group: rows stay such as the encoder takes; the command has one entry for all."""
    config = write_seen(tmp_path, 192, 96)
    schema, rows = load_schema(tmp_path / "schema.toml"), seen_table(50, 0).combine_chunks().to_batches()[0]
    order = np.random.default_rng(0).permutation(50)
    swapped = rows
    for name in ("seen", "kinds", "ages"):
        swapped = swapped.set_column(rows.schema.get_field_index(name), name, rows[name].take(order))
    encoder, place = Encoder(schema), Place("here", None, 0)
    own, other, expected = (encoder.encode(each, place) for each in (rows, rows.take(order), swapped))
    for fields in (("seen",), ("kinds",), ("ages",), ("kinds", "ages")):
        found = mixed(own, other, chosen(schema, fields))
        np.testing.assert_array_equal(found.single_ids, expected.single_ids)
        np.testing.assert_array_equal(found.lists.offsets, expected.lists.offsets, str(fields))
        assert all(map(np.array_equal, found.lists.values, expected.lists.values)), fields
    assert train(config, "train.max_steps=1") == 0
    assert printed_by("importance", tmp_path / "run", "--rows", "96", "--repeats", "2")[0] == 0
    told = json.loads((tmp_path / "run/importance.json").read_text())
    assert list(told["fields"]) == ["user", "item", "kind", "price", "tags", "seen"]
    assert list(told["groups"]) == ["taste", "content"]


def test_command(runs, tmp_path):
    run = shutil.copytree(runs / "row_wise", tmp_path / "run")
    code, out, err = printed_by("importance", run, "--rows", "400", "--repeats", "2", "--split", "test")
    assert code == 0 and "AUC lost by EFGC" in out and "400 rows" in out, err
    found = json.loads((run / "importance.json").read_text())
    schema = load_schema(runs / "schema.toml")
    assert (
        found["fields"].keys() == {each.name for each in schema.features}
        and found["groups"].keys() == schema.groups.keys()
    )
    pq.write_table(pq.read_table(runs / "test.parquet").slice(0, 400), tmp_path / "rows.parquet")
    code, evaluated, _ = printed_by("evaluate", runs / "row_wise", "--data", tmp_path / "rows.parquet", "--json")
    assert found["before"]["auc"] == pytest.approx(json.loads(evaluated)["auc"], abs=1e-6)
    lost = {name: each["auc"] for name, each in found["fields"].items()}
    best = max(lost, key=lambda name: lost[name][0])
    assert lost[best][1] > 0.005 and all(low <= value <= high for value, low, high in lost.values())
    page = (run / "report.html").read_text()
    assert "AUC lost by groups" in page and "AUC lost by fields" in page
    code, _, err = printed_by("importance", run, "--repeats", "1")
    assert code == 2 and "--repeats 1: wanted 2 or more" in err
