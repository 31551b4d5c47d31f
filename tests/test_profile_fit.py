"""Proves that a fitted schema is written whole or not at all, stands alone, and that counting values stays cheap."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.errors import InputError
from data.profile import fit
from data.profile.fit import write_fitted
from data.schema import load_schema, parse_schema

WORD = {"kind": "categorical", "encoding": "vocabulary", "vocabulary": "fit", "embedding_dim": 4}
NUMBER = {"kind": "numeric", "transform": "standardise", "mean": "fit", "std": "fit"}


def schema_of(folder: Path, **fields):
    return parse_schema({"name": "s", "label": "y", "fields": fields, "groups": {}}, "s.toml", folder)


@pytest.fixture
def train(tmp_path) -> Path:
    pq.write_table(
        pa.table({"w": ["b", "a", "b"], "x": [1.0, 2.0, 6.0], "y": [0, 1, 0]}), tmp_path / "train.parquet"
    )
    return tmp_path / "train.parquet"


def test_what_is_written_is_what_is_returned(train, tmp_path):
    seen: list[int] = []
    fitted = write_fitted(
        schema_of(tmp_path, w=WORD, x=NUMBER), [train], tmp_path / "out", progress=seen.append
    )
    assert load_schema(tmp_path / "out" / "schema.toml") == fitted
    assert fitted.features[1].mean == 3.0 and fitted.features[1].std == pytest.approx(np.std([1, 2, 6]))
    assert pq.read_table(tmp_path / "out" / "vocabulary" / "w.parquet")["value"].to_pylist() == ["b", "a"]
    assert seen == [3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "train.parquet"]


def test_fitting_a_fitted_schema_elsewhere_takes_its_vocabularies_along(train, tmp_path):
    first = write_fitted(schema_of(tmp_path, w=WORD), [train], tmp_path / "one")
    second = write_fitted(first, [train], tmp_path / "two")
    (tmp_path / "one" / "vocabulary" / "w.parquet").unlink()
    assert pq.read_table(second.folder / second.features[0].vocabulary)["value"].to_pylist() == ["b", "a"]
    with pytest.raises(InputError, match="the vocabulary of field 'w' cannot be copied"):
        write_fitted(first, [train], tmp_path / "three")
    assert not (tmp_path / "three").exists()


def test_nothing_is_replaced_without_force(train, tmp_path):
    schema = schema_of(tmp_path, w=WORD)
    write_fitted(schema, [train], tmp_path / "out")
    with pytest.raises(InputError, match="exists already; pass --force"):
        write_fitted(schema, [train], tmp_path / "out")
    write_fitted(schema_of(tmp_path, x=NUMBER), [train], tmp_path / "out", force=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["schema.toml"]
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="exists already; choose another folder"):
        write_fitted(schema, [train], tmp_path / "out", force=True)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"


def test_failure_leaves_nothing_behind(train, tmp_path):
    with pytest.raises(InputError, match="column 'z' is missing"):
        write_fitted(schema_of(tmp_path, w=WORD, z=WORD), [train], tmp_path / "out")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"bad\.parquet: cannot be read as Parquet"):
        write_fitted(schema_of(tmp_path, w=WORD), [tmp_path / "bad.parquet"], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.parquet", "train.parquet"]


def test_counts_of_many_values_are_merged_seldom(monkeypatch):
    """Work grows with the values, not with values times merges: each merge at least doubles what is kept."""
    monkeypatch.setattr(fit, "MAX_PENDING", 100)
    counts, merges = fit._Counts(), []
    merge = fit._Counts.merged
    monkeypatch.setattr(fit._Counts, "merged", lambda self: merges.append(1) or merge(self))
    for start in range(0, 20_000, 50):
        counts.add(pa.array(range(start, start + 50)))
    assert len(merges) <= 9
    counts.add(pa.array([7, 7, 9, None]))
    assert counts.vocabulary(2).to_pylist() == [7, 9]
    assert len(counts.vocabulary(1)) == 20_000
