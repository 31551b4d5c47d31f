"""Proves that public data become Parquet splits and a schema fitted on training alone, or nothing."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import InputError
from data.profile import fit
from data.profile.fit import fit_schema
from data.public.prepare import DATA_SETS, SCHEMA_FOLDER, prepare
from data.schema import load_schema, parse_schema

SHARED = Path(__file__).parents[1].parent / "shared" / "datasets"
FOLDERS = {
    "adult": "adult",
    "ali_ccp": "ali_ccp_sample",
    "aliexpress": "aliexpress_sample",
    "criteo": "criteo_sample",
    "movielens": "movielens_latest_small",
    "slots": "slots_demo",
    "taobao_ad": "taobao_ad_sample",
}
# rows of train, valid, test
ROWS = {
    "adult": (29_305, 3_256, 16_281),
    "ali_ccp": (100, 50, 50),
    "aliexpress": (68, 32, 20),
    "criteo": (7_200, 409, 391),
    "movielens": (80_668, 10_084, 10_084),
    "slots": (6, 2, 2),
    "taobao_ad": (173, 66, 65),
}
SPLITS = ("train", "valid", "test")


def small_table(columns: dict[str, list], files: tuple[str, ...], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        pq.write_table(pa.table(columns), folder / file)


@pytest.fixture
def movielens(tmp_path) -> Path:
    """Four ratings of two users in each split, and tags before, at and after them."""
    src = tmp_path / "src"
    ratings = {
        "user_id": [7, 7, 8, 8],
        "movie_id": [1, 2, 1, 2],
        "rating": [5.0, 1.0, 4.0, 2.0],
        "label": pa.array([1, 0, 1, 0], pa.int8()),
        # 2018-09-24 is a Monday; 13:00:00 UTC
        "timestamp": [1537794000, 1537794000, 1537794001, 1537794000 + 86_400],
        "title": ["Se7en: the (2nd) Film (1995)", "Amélie (2001)", "Se7en: the (2nd) Film (1995)", None],
        "year": pa.array([1995, 2001, 1995, None], pa.int32()),
        "genres": [["Crime", "Drama"], [], ["Crime", "Drama"], ["Comedy"]],
    }
    small_table(ratings, ("train.parquet", "valid.parquet", "test.parquet"), src)
    tags = {
        "user_id": [1, 1, 2, 3, 3],
        "movie_id": [1, 1, 1, 1, 1],
        "tag": ["Dark ", "twist", "dark", "at that moment", "later"],
        "timestamp": [100, 200, 300, 1537794000, 1537794001],
    }
    small_table(tags, ("tags.parquet",), src)
    return src


@pytest.mark.parametrize("name", sorted(FOLDERS))
def test_real_files(name, tmp_path):
    src = SHARED / FOLDERS[name]
    if not src.is_dir():
        pytest.skip(f"the real files are not here ({src.name})")
    out = prepare(name, src, tmp_path / "out")
    schema = load_schema(out / "schema.toml")
    schema.require_fitted()
    summary = json.loads((out / "prepared.json").read_text())
    for split, rows in zip(SPLITS, ROWS[name], strict=True):
        table = pq.read_table(out / split / "part-00000.parquet", page_checksum_verification=True)
        assert table.num_rows == summary["splits"][split]["rows"] == rows
        labels = table[schema.label].to_numpy()
        assert summary["splits"][split]["label_rate"] == pytest.approx(labels.mean())
        assert set(np.unique(labels)) == {0, 1}, "an AUC needs both classes in every split"
        time = {schema.time_column} if schema.time_column else set()
        assert set(table.column_names) == {*schema.columns} | time, "needed columns and no others"
    for file, digest in summary["sources"].items():
        assert hashlib.sha256((src / file).read_bytes()).hexdigest() == digest
    for feature in schema.features:
        if feature.vocabulary:
            values = pq.read_table(out / feature.vocabulary)["value"]
            assert schema.table_of[feature.name].num_embeddings == len(values) + 2
            assert len(values.unique()) == len(values)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", sorted(DATA_SETS))
def test_training_reads_only_columns_that_are_no_targets(name):
    schema = load_schema(SCHEMA_FOLDER / f"{name}.toml")
    assert not {"rating", "conversion", "purchase", "long_view", "play_time_ms", "nonclk"} & set(
        schema.columns
    )


def test_movielens_derives_without_looking_ahead(movielens, tmp_path):
    out = prepare("movielens", movielens, tmp_path / "out")
    table = pq.read_table(out / "train" / "part-00000.parquet")
    assert "rating" not in table.column_names
    assert table["rated_hour"].to_pylist() == [13, 13, 13, 13]
    assert table["rated_weekday"].to_pylist() == [0, 0, 0, 1]
    assert table["title_words"].to_pylist() == [
        ["se7en", "the", "2nd", "film"],
        ["amélie"],
        ["se7en", "the", "2nd", "film"],
        [],
    ]
    # a tag of the same second is not before; equal tags count once
    assert table["tags_before"].to_pylist() == [
        ["dark", "twist"],
        [],
        ["dark", "twist", "at that moment"],
        [],
    ]
    assert table["timestamp"].to_pylist()[0] == 1537794000


def test_vocabulary_is_ordered_by_count_then_value(movielens, tmp_path):
    out = prepare("movielens", movielens, tmp_path / "out")
    assert pq.read_table(out / "vocabulary" / "genres.parquet")["value"].to_pylist() == [
        "Crime",
        "Drama",
        "Comedy",
    ]
    assert pq.read_table(out / "vocabulary" / "user_id.parquet")["value"].to_pylist() == [7, 8]
    schema = load_schema(out / "schema.toml")
    assert schema.table_of["genres"].num_embeddings == 5


def test_prepared_again_is_left_alone(movielens, tmp_path):
    out = prepare("movielens", movielens, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert prepare("movielens", movielens, out) == out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    small_table(
        {"user_id": [1], "movie_id": [1], "tag": ["new"], "timestamp": [1]}, ("tags.parquet",), movielens
    )
    with pytest.raises(InputError, match="other files"):
        prepare("movielens", movielens, out)


def test_a_folder_of_something_else_is_never_touched(movielens, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="holds no prepared data set"):
        prepare("movielens", movielens, out)
    assert (out / "thesis.tex").read_text() == "years of work"


def test_unknown_name_lists_the_known_ones(tmp_path):
    with pytest.raises(InputError, match="'netflix' is not known; use one of: adult, ali_ccp"):
        prepare("netflix", tmp_path, tmp_path / "out")


def test_missing_file_names_what_is_needed(movielens, tmp_path):
    (movielens / "tags.parquet").unlink()
    with pytest.raises(
        InputError, match=r"tags\.parquet: no such file; data set 'movielens' needs train\.parquet"
    ):
        prepare("movielens", movielens, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_file_is_named(movielens, tmp_path):
    (movielens / "valid.parquet").write_bytes(b"not parquet")
    with pytest.raises(InputError, match=r"valid\.parquet: cannot be read as Parquet"):
        prepare("movielens", movielens, tmp_path / "out")


def test_missing_column_is_named(movielens, tmp_path):
    table = pq.read_table(movielens / "test.parquet").drop_columns(["genres"])
    pq.write_table(table, movielens / "test.parquet")
    with pytest.raises(InputError, match="column 'genres' is missing"):
        prepare("movielens", movielens, tmp_path / "out")


def test_failure_leaves_nothing_behind(movielens, tmp_path):
    def stop(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare("movielens", movielens, tmp_path / "out", progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_progress_counts_rows(movielens, tmp_path):
    seen: list[int] = []
    prepare("movielens", movielens, tmp_path / "out", progress=seen.append)
    assert seen == [4, 8, 12]


def test_aliexpress_validates_on_whole_searches(tmp_path):
    schema = load_schema(SCHEMA_FOLDER / "aliexpress.toml")
    columns: dict[str, list] = {feature.source_column: [0] * 20 for feature in schema.features}
    columns |= {
        "search_id": [row // 2 for row in range(20)],
        "click": [1] * 10 + [0] * 10,
        "conversion": [0] * 20,
    }
    small_table(columns, ("train.parquet", "test.parquet"), tmp_path / "src")
    out = prepare("aliexpress", tmp_path / "src", tmp_path / "out")
    valid = pq.read_table(out / "valid" / "part-00000.parquet")
    assert valid["search_id"].to_pylist() == [4, 4, 9, 9]
    assert valid["click"].to_pylist() == [1, 1, 0, 0]
    train = pq.read_table(out / "train" / "part-00000.parquet")
    assert not set(train["search_id"].to_pylist()) & {4, 9}
    assert "conversion" not in train.column_names


def fitted(fields: dict, columns: dict, folder: Path, tables: dict | None = None, **options):
    top = {"name": "t", "label": "y", "fields": fields, "groups": {}} | ({"tables": tables} if tables else {})
    pq.write_table(pa.table(columns), folder / "train.parquet")
    return fit_schema(parse_schema(top, "test", folder), [folder / "train.parquet"], folder, **options)


def test_vocabulary_drops_rare_values_and_nulls(tmp_path):
    field = {
        "kind": "categorical",
        "encoding": "vocabulary",
        "vocabulary": "fit",
        "min_count": 2,
        "embedding_dim": 4,
    }
    schema = fitted(
        {"city": field}, {"city": ["b", "a", None, "b", "a", "c", None, None, "d", "d", "d"]}, tmp_path
    )
    assert pq.read_table(tmp_path / "vocabulary" / "city.parquet")["value"].to_pylist() == ["d", "a", "b"]
    assert schema.table_of["city"].num_embeddings == 5
    assert schema.features[0].is_fitted


def test_fields_of_one_table_share_one_vocabulary(tmp_path):
    shared = {"encoding": "vocabulary", "vocabulary": "fit", "table": "brand"}
    schema = fitted(
        {"shown": {"kind": "categorical", **shared}, "seen": {"kind": "multi_valued", **shared}},
        {"shown": [1, 2, 3], "seen": [[3, 3], [], [2, 9]]},
        tmp_path,
        tables={"brand": {"num_embeddings": 2, "embedding_dim": 4}},
    )
    assert {feature.vocabulary for feature in schema.features} == {"vocabulary/brand.parquet"}
    assert pq.read_table(tmp_path / "vocabulary" / "brand.parquet")["value"].to_pylist() == [3, 2, 1, 9]
    assert [table.num_embeddings for table in schema.tables] == [6]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=200), st.integers(1, 7))
def test_moments_in_pieces_agree_with_numpy(numbers, pieces):
    moments = fit._Moments()
    for part in np.array_split(np.asarray(numbers), pieces):
        moments.add(part)
    assert moments.mean == pytest.approx(np.mean(numbers), rel=1e-9, abs=1e-9)
    assert moments.std() == pytest.approx(np.std(numbers), rel=1e-6, abs=1e-6)


def test_standardise_ignores_nulls_and_nan(tmp_path):
    field = {"kind": "numeric", "transform": "standardise", "mean": "fit", "std": "fit"}
    schema = fitted({"x": field}, {"x": [1.0, None, 3.0, float("nan"), 5.0]}, tmp_path)
    assert schema.features[0].mean == 3.0
    assert schema.features[0].std == pytest.approx(np.std([1, 3, 5]))


def test_constant_column_gets_std_one_and_a_note(tmp_path):
    field = {"kind": "numeric", "transform": "standardise", "mean": "fit", "std": "fit"}
    notes: list[str] = []
    schema = fitted({"x": field}, {"x": [0.1] * 7}, tmp_path, report=notes.append)
    assert (schema.features[0].mean, schema.features[0].std) == (pytest.approx(0.1), 1.0)
    assert len(notes) == 1 and "'x': constant in training" in notes[0]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-50, 50), min_size=1, max_size=200), st.integers(2, 40))
def test_boundaries_are_few_ascending_and_leave_no_bucket_empty(numbers, num_buckets):
    sample = fit._Sample()
    sample.add(np.asarray(numbers, float))
    boundaries = sample.boundaries(num_buckets)
    assert 1 <= len(boundaries) <= num_buckets - 1
    assert boundaries == sorted(set(boundaries))
    assert set(boundaries) <= set(map(float, numbers))
    if len(set(numbers)) > 1 and boundaries != [min(numbers)]:
        used = np.searchsorted(boundaries, numbers, side="right")
        assert set(used) == set(range(len(boundaries) + 1))


def test_bucketise_writes_sizes_that_the_schema_accepts(tmp_path):
    field = {
        "kind": "numeric",
        "transform": "bucketise",
        "boundaries": "fit",
        "num_buckets": 4,
        "embedding_dim": 4,
    }
    schema = fitted(
        {"x": field, "nothing": field},
        {"x": list(range(100)), "nothing": pa.nulls(100, pa.int64())},
        tmp_path,
    )
    assert schema.features[0].boundaries == (24.0, 49.0, 74.0)
    assert schema.table_of["x"].num_embeddings == 5
    assert schema.features[1].boundaries == (0.0,), "a column of nulls still makes a valid schema"


def test_quantile_sample_stays_bounded_and_even(monkeypatch):
    monkeypatch.setattr(fit, "MAX_SAMPLE", 1000)
    sample = fit._Sample()
    for part in np.array_split(np.arange(50_000.0), 37):
        sample.add(part)
    kept = np.concatenate(sample.parts)
    assert len(kept) <= 1000
    assert np.array_equal(kept, np.arange(0, 50_000, sample.stride))


def test_fit_names_a_missing_column(tmp_path):
    field = {"kind": "categorical", "encoding": "vocabulary", "vocabulary": "fit", "embedding_dim": 4}
    with pytest.raises(InputError, match="column 'city' is missing, which field 'city' is fitted on"):
        fitted({"city": field}, {"town": ["a"]}, tmp_path)
