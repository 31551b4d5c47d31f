"""Proves that public data become Parquet splits and a schema fitted on training alone, or nothing."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.errors import InputError
from data.public import movielens
from data.public.prepare import SCHEMA_FOLDER, prepare
from data.schema import load_schema

SHARED = Path(__file__).parents[1].parent / "shared" / "datasets"
# data set -> folder of its real files; rows of train, valid, test
REAL = {
    "adult": ("adult", (29_305, 3_256, 16_281)),
    "ali_ccp": ("ali_ccp_sample", (100, 50, 50)),
    "ali_ccp_tasks": ("ali_ccp_sample", (100, 50, 50)),
    "aliexpress": ("aliexpress_sample", (68, 32, 20)),
    "criteo": ("criteo_sample", (7_200, 409, 391)),
    "movielens": ("movielens_latest_small", (80_668, 10_084, 10_084)),
    "movielens_history": ("movielens_latest_small", (80_668, 10_084, 10_084)),
    "slots": ("slots_demo", (6, 2, 2)),
    "taobao_ad": ("taobao_ad_sample", (173, 66, 65)),
}
SPLITS = ("train", "valid", "test")


def rows_of(out: Path, split: str) -> pa.Table:
    return pq.read_table(out / split / "part-00000.parquet", page_checksum_verification=True)


@pytest.fixture
def src(tmp_path) -> Path:
    """AliExpress' sample in small: ten searches of two rows each to train, and as many to test."""
    schema = load_schema(SCHEMA_FOLDER / "aliexpress.toml")
    columns: dict[str, list] = {feature.source_column: [0] * 20 for feature in schema.features}
    columns |= {"search_id": [row // 2 for row in range(20)], "click": [1] * 10 + [0] * 10, "conversion": [0] * 20}
    (tmp_path / "src").mkdir()
    for split in ("train", "test"):
        pq.write_table(pa.table(columns), tmp_path / "src" / f"{split}.parquet")
    return tmp_path / "src"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name == "movielens_history" else name for name in REAL]
)
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
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_aliexpress_validates_on_whole_searches(src, tmp_path):
    seen: list[int] = []
    out = prepare("aliexpress", src, tmp_path / "out", progress=seen.append)
    assert seen == [16, 20, 40]
    train, valid = rows_of(out, "train"), rows_of(out, "valid")
    assert valid["search_id"].to_pylist() == [4, 4, 9, 9]
    assert valid["click"].to_pylist() == [1, 1, 0, 0]
    assert not set(train["search_id"].to_pylist()) & {4, 9}
    assert "conversion" not in train.column_names


def test_prepared_again_is_left_alone(src, tmp_path):
    out = prepare("aliexpress", src, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert prepare("aliexpress", src, out) == out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    pq.write_table(pq.read_table(src / "test.parquet").slice(1), src / "test.parquet")
    with pytest.raises(InputError, match="other files"):
        prepare("aliexpress", src, out)


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("netflix", "", None, "'netflix' is not known; use one of: adult, ali_ccp"),
        ("aliexpress", "src/test.parquet", b"not parquet", r"test\.parquet: cannot be read as Parquet"),
        ("aliexpress", "src/test.parquet", "search_id", "column 'search_id' is missing"),
        ("aliexpress", "out/thesis.tex", b"years of work", "holds no prepared data set"),
    ],
    ids=["name", "damage", "column", "folder of something else"],
)
def test_a_mistake_is_named_and_nothing_is_touched(src, name, file, content, message, tmp_path):
    path = tmp_path / file
    if isinstance(content, bytes):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    elif content:
        pq.write_table(pq.read_table(path).drop_columns([content]), path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=message):
        prepare(name, src, tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_history_is_what_the_user_had_rated_before():
    table = pa.table(
        {
            "timestamp": [1, 5, 5, 9, 9], "user_id": [7, 7, 7, 8, 7], "movie_id": [10, 11, 12, 10, 13], "label": [1, 0, 1, 1, 1],
        }
    )  # fmt: skip
    rated: movielens.Rated = {}
    first, later = (movielens.with_history(part, rated) for part in (table.slice(0, 2), table.slice(2)))
    assert first["history"].to_pylist() == [[], [10]]
    # ratings of the same second do not know each other, in another part either
    assert later["history"].to_pylist() == [[10], [], [10, 11, 12]]
    assert later["history_liked"].to_pylist() == [[1], [], [1, 0, 1]]
    assert later["history_age"].to_pylist() == [[4], [], [8, 4, 4]]
    many = {1: [(moment, moment, 1) for moment in range(99)]}
    late = pa.table({"timestamp": [200], "user_id": [1], "movie_id": [3], "label": [0]})
    assert movielens.with_history(late, many)["history"].to_pylist() == [list(range(69, 99))]
