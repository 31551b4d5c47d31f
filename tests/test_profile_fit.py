"""Proves that a fitted schema is written whole or not at all, stands alone, and that counting values stays cheap."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import InputError
from data.profile.fit import boundaries_of, write_fitted
from data.profile.units import Work
from data.reading.columns import Place
from data.reading.encode import Encoder
from data.schema import Schema, load_schema, parse_schema

WORD = {"kind": "categorical", "encoding": "vocabulary", "vocabulary": "fit", "embedding_dim": 4}
NUMBER = {"kind": "numeric", "transform": "standardise", "mean": "fit", "std": "fit"}
BUCKETS = {"kind": "numeric", "transform": "bucketise", "boundaries": "fit", "embedding_dim": 4}


def schema_of(folder: Path, tables: dict | None = None, **fields) -> Schema:
    top = {"name": "s", "label": "y", "fields": fields, "groups": {}} | ({"tables": tables} if tables else {})
    return parse_schema(top, "s.toml", folder)


def written(columns: dict, folder: Path) -> Path:
    pq.write_table(pa.table(columns), folder / "train.parquet")
    return folder / "train.parquet"


@pytest.fixture
def train(tmp_path) -> Path:
    return written({"w": ["b", "a", "b"], "x": [1.0, 2.0, 6.0], "y": [0, 1, 0]}, tmp_path)


def fitted(fields: dict, columns: dict, folder: Path, tables: dict | None = None) -> Schema:
    schema = schema_of(folder, tables, **fields)
    return write_fitted(schema, [written(columns, folder)], folder / "out")


def vocabulary(schema: Schema, name: str) -> list:
    return pq.read_table(schema.folder / "vocabulary" / f"{name}.parquet")["value"].to_pylist()


def test_what_is_written_is_what_is_returned(train, tmp_path):
    seen: list[int] = []
    fitted = write_fitted(
        schema_of(tmp_path, w=WORD, x=NUMBER), [train], tmp_path / "out", work=Work(progress=seen.append)
    )
    assert load_schema(tmp_path / "out" / "schema.toml") == fitted
    assert fitted.features[1].mean == 3.0 and fitted.features[1].std == pytest.approx(np.std([1, 2, 6]))
    assert vocabulary(fitted, "w") == ["b", "a"]
    assert seen == [3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "train.parquet"]


def test_fitting_a_fitted_schema_elsewhere_takes_its_vocabularies_along(train, tmp_path):
    first = write_fitted(schema_of(tmp_path, w=WORD), [train], tmp_path / "one")
    second = write_fitted(first, [train], tmp_path / "two")
    (tmp_path / "one" / "vocabulary" / "w.parquet").unlink()
    assert vocabulary(second, "w") == ["b", "a"]
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
    with pytest.raises(InputError, match="column 'z' is missing, which is the schema's field 'z'"):
        write_fitted(schema_of(tmp_path, w=WORD, z=WORD), [train], tmp_path / "out")
    bad = tmp_path / "bad.parquet"
    pq.write_table(pq.read_table(train), bad, use_dictionary=False, write_page_checksum=True)
    damaged, chunk = bytearray(bad.read_bytes()), pq.read_metadata(bad).row_group(0).column(0)
    damaged[chunk.data_page_offset + chunk.total_compressed_size - 3] ^= 16
    for content in (b"PAR1", damaged):
        bad.write_bytes(content)
        with pytest.raises(
            InputError, match=r"bad\.parquet: (not a readable Parquet file|row group 0, column 'w' cannot be decoded)"
        ):
            write_fitted(schema_of(tmp_path, w=WORD), [bad], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.parquet", "train.parquet"]


def test_files_without_rows_are_refused(tmp_path):
    with pytest.raises(InputError, match="hold no rows: nothing to fit 'w' on; name the training files"):
        fitted({"w": WORD, "n": {"kind": "numeric"}}, {"w": pa.array([], pa.string()), "n": [1.0][:0]}, tmp_path)
    assert not (tmp_path / "out").exists()


def test_vocabulary_drops_rare_values_and_nulls(tmp_path):
    cities = ["b", "a", None, "b", "a", "c", None, None, "d", "d", "d"]
    schema = fitted({"city": WORD | {"min_count": 2}}, {"city": cities}, tmp_path)
    assert vocabulary(schema, "city") == ["d", "a", "b"]
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
    assert vocabulary(schema, "brand") == [3, 2, 1, 9]
    assert [table.num_embeddings for table in schema.tables] == [6]


def test_standardise_ignores_nulls_and_nan_and_names_a_constant(tmp_path):
    columns = {"x": [1.0, None, 3.0, float("nan"), 5.0], "same": [0.1] * 5}
    notes: list[str] = []
    schema = schema_of(tmp_path, x=NUMBER, same=NUMBER)
    x, same = write_fitted(schema, [written(columns, tmp_path)], tmp_path / "out", report=notes.append).features
    assert (x.mean, x.std) == (3.0, pytest.approx(np.std([1, 3, 5])))
    assert (same.mean, same.std) == (pytest.approx(0.1), 1.0)
    assert len(notes) == 1 and "'same': constant in training" in notes[0]


@settings(max_examples=30)
@given(st.lists(st.integers(-50, 50), min_size=1, max_size=200), st.integers(2, 40))
def test_boundaries_are_few_ascending_and_leave_no_bucket_empty(numbers, num_buckets):
    boundaries = boundaries_of(np.asarray(numbers, np.float64), num_buckets)
    assert 1 <= len(boundaries) <= num_buckets - 1
    assert boundaries == sorted(set(boundaries))
    assert set(boundaries) <= set(map(float, numbers))
    if len(set(numbers)) > 1 and boundaries != [min(numbers)]:
        used = np.searchsorted(boundaries, numbers, side="right")
        assert set(used) == set(range(len(boundaries) + 1))


@pytest.mark.parametrize(
    ("column", "boundaries"),
    [
        (list(range(100)), (24.0, 49.0, 74.0)),
        ([row / 10 for row in range(100)], (2.4, 4.9, 7.4)),
        (pa.nulls(100, pa.int64()), (0.0,)),
        (pa.nulls(100, pa.float32()), (0.0,)),
        (pa.array([-3.4028234663852886e38] * 9, pa.float32()), (-3.4028234663852886e38,)),
    ],
    ids=["integers", "doubles", "nulls", "floats", "least"],
)  # fmt: skip
def test_bucketise_writes_sizes_that_the_schema_accepts(column, boundaries, tmp_path):
    schema = fitted({"x": BUCKETS | {"num_buckets": 4}}, {"x": column}, tmp_path)
    assert schema.features[0].boundaries == boundaries
    assert schema.table_of["x"].num_embeddings == len(boundaries) + 2


TENTHS = np.arange(-25, 26) / 10


@pytest.mark.parametrize(
    ("narrow", "other_day"),
    [
        (np.float32, None),
        (np.float16, None),
        (np.float16, pa.nulls(51)),
        (np.float32, pa.array(TENTHS)),
        (np.float32, pa.array(TENTHS.round().astype(int))),
    ],
    ids=["float32", "float16", "nulls", "doubles", "integers"],
)
def test_a_decimal_falls_into_the_bucket_of_the_narrow_float_that_it_is_rounded_to(narrow, other_day, tmp_path):
    """As JSON and CSV tell the numbers of a log, below 0 and above, and a constant. Rows of training keep their buckets."""
    rounded = TENTHS.astype(narrow)
    days = [pa.table({"x": rounded, "same": rounded[:1].repeat(51)})]
    days += [] if other_day is None else [pa.table({"x": other_day, "same": other_day})]
    for number, day in enumerate(days):
        pq.write_table(day, tmp_path / f"{number}.parquet")
    schema = schema_of(tmp_path, x=BUCKETS | {"num_buckets": 40}, same=BUCKETS)
    write_fitted(schema, sorted(tmp_path.glob("*.parquet")), tmp_path / "out")
    encoder = Encoder(load_schema(tmp_path / "out" / "schema.toml"), has_labels=False)

    def buckets(numbers: np.ndarray) -> list[list[int]]:
        rows = pa.record_batch({"x": numbers, "same": numbers})
        return encoder.encode(rows, Place("x", None)).single_ids.tolist()

    assert buckets(TENTHS) == buckets(rounded)
    if len(days) == 1:
        numbers = rounded.astype(np.float64)
        of_values = np.searchsorted(boundaries_of(numbers, 40), numbers, side="right")
        assert buckets(rounded) == [(of_values + 1).tolist(), [2] * 51]


ROWS = 8
DAY = {
    "city": ["a", "b"] * 4, "price": [float(row) for row in range(ROWS)], "tags": [[row % 3] for row in range(ROWS)], "y": [0, 1] * 4,
}  # fmt: skip
LISTS = WORD | {"kind": "multi_valued"}


@pytest.mark.parametrize(
    ("column", "values", "words"),
    [
        ("price", pa.array(["N/A"] * ROWS), "1.parquet: column 'price' is string: numeric field 'price' wants numbers"),
        ("price", pa.array([1] * ROWS, pa.timestamp("us")), "column 'price' is timestamp.*wants numbers"),
        ("price", pa.array([[1.0]] * ROWS), "column 'price' is list.*wants numbers"),
        ("city", pa.array([1.5] * ROWS), r"1.parquet: row group 0, row 0, field 'city' = 1\.5: wanted an id"),
        ("city", pa.array([["a"]] * ROWS), "column 'city' is list.*wants integers or strings"),
        ("tags", pa.array(list(range(ROWS))), "column 'tags' is int64: multi_valued field 'tags' wants lists"),
        ("tags", pa.array(["1,2"] * ROWS), "column 'tags' is string: multi_valued field 'tags' wants lists"),
    ],
)  # fmt: skip
def test_another_type_on_the_second_day_is_named(column, values, words, tmp_path):
    schema = schema_of(tmp_path, city=WORD, price=NUMBER, tags=LISTS)
    for number, day in enumerate((DAY, DAY | {column: values})):
        pq.write_table(pa.table(day), tmp_path / f"{number}.parquet")
    with pytest.raises(InputError, match=words):
        write_fitted(schema, sorted(tmp_path.glob("*.parquet")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("column", "values", "wanted"),
    [
        ("city", pa.array([7] * ROWS), ["7", "a", "b"]),
        ("city", pa.nulls(ROWS), ["a", "b"]),
        ("tags", pa.nulls(ROWS), [0, 1, 2]),
        ("tags", pa.array([["1"]] * ROWS), ["1", "0", "2"]),
        ("tags", pa.array([[1.0, float("nan")]] * ROWS), [1, 0, 2]),
        ("tags", pa.array([[2**63 + 1]] * ROWS, pa.list_(pa.uint64())), [2**63 + 1, 0, 1, 2]),
    ],
)
def test_a_vocabulary_holds_ids_of_one_type(column, values, wanted, tmp_path):
    schema = schema_of(tmp_path, city=WORD, price=NUMBER, tags=LISTS)
    for number, day in enumerate((DAY, DAY | {column: values})):
        pq.write_table(pa.table(day), tmp_path / f"{number}.parquet")
    fit = write_fitted(schema, sorted(tmp_path.glob("*.parquet")), tmp_path / "out")
    assert vocabulary(fit, column) == wanted


def test_integers_that_no_type_holds_together_are_refused_and_fit_as_text(tmp_path):
    for number, ids in enumerate(([-1, 5], [2**64 - 1])):
        pq.write_table(
            pa.table({"w": pa.array(ids, pa.int64() if ids[0] < 0 else pa.uint64())}), tmp_path / f"{number}.parquet"
        )
    files = sorted(tmp_path.glob("*.parquet"))
    with pytest.raises(InputError, match=r"field 'w': some ids are below 0 .* set type = \"text\" for the field"):
        write_fitted(schema_of(tmp_path, w=WORD), files, tmp_path / "out")
    fit = write_fitted(schema_of(tmp_path, w=WORD | {"type": "text"}), files, tmp_path / "out")
    assert set(vocabulary(fit, "w")) == {"-1", "5", str(2**64 - 1)}


@pytest.mark.parametrize("values", [["a", "b"], [1, 2], [1.0, 2.0]])
def test_after_a_fit_on_nulls_alone_another_days_ids_of_any_type_are_out_of_vocabulary(values, tmp_path):
    fit = fitted({"w": WORD}, {"w": pa.nulls(3), "y": [0, 1, 0]}, tmp_path)
    rows = pa.record_batch({"w": [*values, None]})
    columns = Encoder(fit, has_labels=False).encode(rows, Place("x", None))
    assert columns.single_ids[0].tolist() == [1, 1, 0]


def test_a_damaged_page_is_named_by_file_row_group_and_column(tmp_path):
    path = tmp_path / "train.parquet"
    many = {name: values * 400 for name, values in DAY.items()}
    pq.write_table(pa.table(many), path, write_page_checksum=True, compression="none", use_dictionary=False)
    group = pq.ParquetFile(path).metadata.row_group(0)
    offset = next(
        chunk.data_page_offset
        for chunk in map(group.column, range(group.num_columns))
        if chunk.path_in_schema == "price"
    )
    data = bytearray(path.read_bytes())
    data[offset + 100] ^= 255
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"train\.parquet: row group 0, column 'price' cannot be decoded"):
        write_fitted(schema_of(tmp_path, city=WORD, price=NUMBER), [path], tmp_path / "out")


def test_no_number_beyond_float32_makes_a_schema_of_infinities(tmp_path):
    columns = {"x": [1.0, 3.0, 1.7e308, -1.7e308, float("inf")], "none": [1.7e308] * 5}
    notes: list[str] = []
    schema = schema_of(tmp_path, x=NUMBER, none=NUMBER)
    fit = write_fitted(schema, [written(columns, tmp_path)], tmp_path / "out", report=notes.append)
    assert [(each.mean, each.std) for each in fit.features] == [(2.0, 1.0), (0.0, 1.0)]
    assert notes == ["field 'none': no number in training, so mean is set to 0 and std to 1: remove it"]


def test_a_fit_does_not_replace_the_schema_that_it_reads(train, tmp_path):
    write_fitted(schema_of(tmp_path, w=WORD), [train], tmp_path / "out")
    with pytest.raises(InputError, match="holds the schema that is fitted"):
        write_fitted(schema_of(tmp_path / "out", w=WORD), [train], tmp_path / "out", force=True)
