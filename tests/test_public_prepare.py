"""Proves that public data become Parquet splits and a schema fitted on training alone, or nothing."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.errors import InputError
from data.public.prepare import DATA_SETS, SCHEMA_FOLDER, prepare
from data.schema import load_schema

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
    targets = {"rating", "conversion", "purchase", "long_view", "play_time_ms", "nonclk"}
    assert not targets & set(schema.columns)


def test_movielens_derives_without_looking_ahead(movielens, tmp_path):
    seen: list[int] = []
    out = prepare("movielens", movielens, tmp_path / "out", progress=seen.append)
    assert seen == [4, 8, 12]
    table = pq.read_table(out / "train" / "part-00000.parquet")
    assert "rating" not in table.column_names
    assert table["rated_hour"].to_pylist() == [13, 13, 13, 13]
    assert table["rated_weekday"].to_pylist() == [0, 0, 0, 1]
    film = ["se7en", "the", "2nd", "film"]
    assert table["title_words"].to_pylist() == [film, ["amélie"], film, []]
    # a tag of the same second is not before; equal tags count once
    tags = ["dark", "twist"]
    assert table["tags_before"].to_pylist() == [tags, [], [*tags, "at that moment"], []]
    assert table["timestamp"].to_pylist()[0] == 1537794000


def test_vocabulary_is_ordered_by_count_then_value(movielens, tmp_path):
    out = prepare("movielens", movielens, tmp_path / "out")
    values = [
        pq.read_table(out / f"vocabulary/{name}.parquet")["value"].to_pylist()
        for name in ("genres", "user_id")
    ]
    assert values == [["Crime", "Drama", "Comedy"], [7, 8]]
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
