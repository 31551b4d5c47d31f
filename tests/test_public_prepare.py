"""Proves that public data become Parquet splits and a schema fitted on training alone, or nothing."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.errors import InputError
from data.public.prepare import SCHEMA_FOLDER, prepare
from data.schema import load_schema

SHARED = Path(__file__).parents[1].parent / "shared" / "datasets"
# data set -> folder of its real files; rows of train, valid, test
REAL = {
    "adult": ("adult", (29_305, 3_256, 16_281)),
    "ali_ccp": ("ali_ccp_sample", (100, 50, 50)),
    "aliexpress": ("aliexpress_sample", (68, 32, 20)),
    "criteo": ("criteo_sample", (7_200, 409, 391)),
    "movielens": ("movielens_latest_small", (80_668, 10_084, 10_084)),
    "slots": ("slots_demo", (6, 2, 2)),
    "taobao_ad": ("taobao_ad_sample", (173, 66, 65)),
}
SPLITS = ("train", "valid", "test")


def rows_of(out: Path, split: str) -> pa.Table:
    return pq.read_table(out / split / "part-00000.parquet", page_checksum_verification=True)


@pytest.fixture
def movielens(tmp_path) -> Path:
    """Four ratings of two users in each split, and tags before, at and after them."""
    src = tmp_path / "src"
    src.mkdir()
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
    for split in SPLITS:
        pq.write_table(pa.table(ratings), src / f"{split}.parquet")
    tags = {
        "user_id": [1, 1, 2, 3, 3],
        "movie_id": [1, 1, 1, 1, 1],
        "tag": ["Dark ", "twist", "dark", "at that moment", "later"],
        "timestamp": [100, 200, 300, 1537794000, 1537794001],
    }
    pq.write_table(pa.table(tags), src / "tags.parquet")
    return src


@pytest.mark.parametrize("name", REAL)
def test_real_files(name, tmp_path):
    folder, sizes = REAL[name]
    src = SHARED / folder
    if not src.is_dir():
        pytest.skip(f"the real files are not here ({src.name})")
    out = prepare(name, src, tmp_path / "out")
    schema = load_schema(out / "schema.toml")
    schema.require_fitted()
    summary = json.loads((out / "prepared.json").read_text())
    for split, rows in zip(SPLITS, sizes, strict=True):
        table = rows_of(out, split)
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


def test_movielens_derives_without_looking_ahead(movielens, tmp_path):
    seen: list[int] = []
    out = prepare("movielens", movielens, tmp_path / "out", progress=seen.append)
    assert seen == [4, 8, 12]
    table = rows_of(out, "train")
    assert "rating" not in table.column_names
    assert table["rated_hour"].to_pylist() == [13, 13, 13, 13]
    assert table["rated_weekday"].to_pylist() == [0, 0, 0, 1]
    film = ["se7en", "the", "2nd", "film"]
    assert table["title_words"].to_pylist() == [film, ["amélie"], film, []]
    # a tag of the same second is not before; equal tags count once
    tags = ["dark", "twist"]
    assert table["tags_before"].to_pylist() == [tags, [], [*tags, "at that moment"], []]
    assert table["timestamp"].to_pylist()[0] == 1537794000
    # the vocabulary of the training split, by count, then by value
    genres = pq.read_table(out / "vocabulary/genres.parquet")["value"].to_pylist()
    assert genres == ["Crime", "Drama", "Comedy"]


def test_prepared_again_is_left_alone(movielens, tmp_path):
    out = prepare("movielens", movielens, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert prepare("movielens", movielens, out) == out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    tags = movielens / "tags.parquet"
    pq.write_table(pq.read_table(tags).slice(1), tags)
    with pytest.raises(InputError, match="other files"):
        prepare("movielens", movielens, out)


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("netflix", "", None, "'netflix' is not known; use one of: adult, ali_ccp"),
        ("movielens", "src/valid.parquet", b"not parquet", r"valid\.parquet: cannot be read as Parquet"),
        ("movielens", "src/test.parquet", "genres", "column 'genres' is missing"),
        ("movielens", "out/thesis.tex", b"years of work", "holds no prepared data set"),
    ],
    ids=["name", "damage", "column", "folder of something else"],
)
def test_a_mistake_is_named_and_nothing_is_touched(movielens, name, file, content, message, tmp_path):
    path = tmp_path / file
    if isinstance(content, bytes):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    elif content:
        pq.write_table(pq.read_table(path).drop_columns([content]), path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=message):
        prepare(name, movielens, tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


def test_aliexpress_validates_on_whole_searches(tmp_path):
    schema = load_schema(SCHEMA_FOLDER / "aliexpress.toml")
    columns: dict[str, list] = {feature.source_column: [0] * 20 for feature in schema.features}
    columns |= {
        "search_id": [row // 2 for row in range(20)],
        "click": [1] * 10 + [0] * 10,
        "conversion": [0] * 20,
    }
    (tmp_path / "src").mkdir()
    for split in ("train", "test"):
        pq.write_table(pa.table(columns), tmp_path / "src" / f"{split}.parquet")
    out = prepare("aliexpress", tmp_path / "src", tmp_path / "out")
    train, valid = rows_of(out, "train"), rows_of(out, "valid")
    assert valid["search_id"].to_pylist() == [4, 4, 9, 9]
    assert valid["click"].to_pylist() == [1, 1, 0, 0]
    assert not set(train["search_id"].to_pylist()) & {4, 9}
    assert "conversion" not in train.column_names
