"""Proves that an inferred schema says what the files hold, hides what leaks, loads, and can be fitted and encoded."""

import re
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import InputError
from data.profile import scan as profile
from data.profile.fit import write_fitted
from data.profile.infer import infer_schema
from data.profile.leaks import always_positive, column_auc
from data.profile.scan import ColumnProfile, Distinct, profile_files
from data.profile.units import RowSample, Work, row_hashes
from data.reading.columns import Place
from data.reading.encode import Encoder
from data.reading.keys import splitmix64
from data.schema import load_schema
from data.synthetic.planted import pailitao_schema
from data.synthetic.write import write_synthetic

ROWS = 6_000
SHARED = Path(__file__).parents[2] / "shared" / "datasets"


@pytest.mark.parametrize("true", [0, 1, 500, 4_095, 4_096, 30_000, 1_000_000])
def test_sketch_counts_distinct_values(true):
    sketch = Distinct()
    hashes = splitmix64(np.arange(true, dtype=np.uint64))
    for part in np.array_split(np.concatenate([hashes, hashes[: true // 3]]), 7):
        sketch.add(part)
    assert sketch.is_exact == (true < 4_096)
    # four standard errors of 1 / sqrt(4094)
    assert abs(sketch.estimate() - true) <= (0 if sketch.is_exact else 0.0625 * true)
    assert len(sketch.smallest) <= 4_096


@settings(max_examples=50)
@given(st.lists(st.integers(0, 400), max_size=300), st.integers(1, 9))
def test_sketch_does_not_depend_on_pieces(values, pieces):
    hashes = splitmix64(np.asarray(values, np.uint64))
    whole, parts = Distinct(64), Distinct(64)
    whole.add(hashes)
    for part in np.array_split(hashes, pieces):
        parts.add(part)
    assert np.array_equal(whole.smallest, parts.smallest)
    assert np.array_equal(whole.smallest, np.unique(hashes)[:64])


def profiled(column: pa.Array) -> ColumnProfile:
    found = ColumnProfile("x", column.type)
    found.add(column)
    return found


def test_leaks_are_seen_and_row_numbers_are_not_taken_for_one():
    generator = np.random.default_rng(0)
    labels = (generator.random(4_000) < 0.1).astype(float)
    noise, unique = pa.array(generator.random(4_000)), pa.array(np.arange(4_000))
    shuffled = pa.array([f"row {number}" for number in generator.permutation(4_000)])
    words = [("bought" if label else "left") if generator.random() < 0.99 else None for label in labels]
    lists = pa.array([[7] if label else [] for label in labels], pa.list_(pa.int64()))
    dwell = pa.array(np.where(labels == 1, generator.random(4_000), np.nan))
    columns = {True: (pa.array(words), lists, dwell), False: (noise, unique, shuffled)}
    for leaks, column in ((leaks, column) for leaks in columns for column in columns[leaks]):
        found = column_auc(profiled(column), column, labels)
        assert (found > 0.95) == leaks and (leaks or found < 0.57), (column.type, found)
    bought = pa.array(((labels == 1) & (generator.random(4_000) < 0.3)).astype(int))
    found = column_auc(profiled(bought), bought, labels)
    assert found < 0.95, "an AUC does not see a rare consequence of a click"
    assert always_positive(bought, labels) == ("1", int(np.sum(bought.to_numpy())))
    assert always_positive(pa.array(generator.integers(0, 2, 4_000)), labels) is None


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    """Every kind of column, in three files of several row groups."""
    folder = tmp_path_factory.mktemp("log")
    generator = np.random.default_rng(1)
    click = (generator.random(ROWS) < 0.2).astype(np.int8)
    lengths = generator.integers(0, 6, ROWS)
    tags = [generator.integers(0, 90, length).tolist() for length in lengths]
    table = pa.table(
        {
            "user_id": generator.integers(0, 500, ROWS),
            "item_id": generator.integers(0, 3_000, ROWS) * 1_000_003,
            "city": pa.array([None if n == 0 else f"c{n}" for n in generator.integers(0, 40, ROWS)]),
            "tags": tags,
            "tags_weights": [np.linspace(0.1, 1, length).tolist() for length in lengths],
            "words": [[f"w{n}" for n in each] for each in tags],
            "image": pa.FixedSizeListArray.from_arrays(pa.array(generator.random(ROWS * 8), pa.float32()), 8),
            "clicks_7d": generator.geometric(0.02, ROWS),
            "price": np.exp(generator.normal(4, 0.3, ROWS)),
            "stock": pa.array([None if n < 30 else n for n in generator.integers(0, 300, ROWS)], pa.int32()),
            "ratio": [float("nan") if n == 0 else n / 50 for n in generator.integers(0, 51, ROWS)],
            "is_new": generator.random(ROWS) < 0.5,
            "constant": np.full(ROWS, 7),
            "empty": pa.nulls(ROWS, pa.int64()),
            "request_id": [f"r{n}" for n in range(ROWS)],
            "dwell": np.where(click == 1, generator.random(ROWS) * 60, 0.0),
            "purchase": (click & (generator.random(ROWS) < 0.1)).astype(np.int8),
            "when": pa.array(np.full(ROWS, 19_000, np.int32)).cast(pa.date32()),
            "timestamp": 1_714_521_600 + np.arange(ROWS) * 10,
            "click": click,
        }
    )  # fmt: skip
    for number in range(3):
        pq.write_table(table.slice(number * 2_000, 2_000), folder / f"{number}.parquet", row_group_size=500)
    return sorted(folder.iterdir())


def saved(folder: Path, name: str, **columns) -> Path:
    pq.write_table(pa.table(columns), folder / name)
    return folder / name


def inferred(files, tmp_path: Path, **options):
    text, suspicious = infer_schema(files, **options)
    (tmp_path / "schema.toml").write_text(text)
    return load_schema(tmp_path / "schema.toml"), text, suspicious


def test_every_kind_is_recognised(files, tmp_path):
    schema, text, suspicious = inferred(files, tmp_path)
    fields = {feature.name: feature for feature in schema.features}
    kinds = {
        "categorical": "user_id item_id city",
        "weighted_multi_valued": "tags",
        "multi_valued": "words",
        "vector": "image",
        "numeric": "clicks_7d price stock ratio is_new",
    }
    wanted = {name: kind for kind, names in kinds.items() for name in names.split()}
    assert {name: feature.kind for name, feature in fields.items()} == wanted
    assert (schema.label, schema.group_column, schema.time_column) == ("click", "user_id", "timestamp")
    assert fields["user_id"].encoding == "ids" and fields["user_id"].num_embeddings == 500
    assert fields["item_id"].encoding == fields["city"].encoding == "vocabulary"
    assert fields["user_id"].cardinality == 500 and fields["city"].cardinality == 39
    assert fields["tags"].weights == "tags_weights" and 2.4 < fields["tags"].pooling_factor < 2.6
    assert fields["image"].width == 8
    assert fields["clicks_7d"].transform == "log1p" and fields["price"].transform == "standardise"
    assert fields["stock"].transform == "bucketise", "many nulls get a row of their own"
    assert fields["ratio"].on_invalid == "null"
    assert all(table.embedding_dim % 4 == 0 for table in schema.tables)
    assert "# Label click: 2" in text and "% ones" in text
    assert "2024-05-01 00:00:00 to 2024-05-01 16:39:50 UTC" in text
    named, _, _ = inferred(files, tmp_path, label="purchase")
    assert named.label == "purchase" and "click" not in {feature.name for feature in named.features}
    sampled = infer_schema(files, rows=1_200)[0]
    assert "1,200 of 6,000 rows" in sampled and "other rows may hold more" in sampled
    assert re.search(r"^stock .*null (9|10|11)\.\d%", text, re.M)
    reasons = dict(line.split(": ", 1) for line in suspicious)
    assert reasons.keys() == {"constant", "empty", "request_id", "dwell", "purchase"}
    assert "constant" in reasons["constant"] and "unique per row" in reasons["request_id"]
    assert "leaks the label: AUC 1.000" in reasons["dwell"] and "outcome" in reasons["purchase"]
    assert re.search(r"^# dwell .*LEFT OUT", text, re.M) and re.search(r"^# when .*date32", text, re.M)


def test_integers_of_64_bits_are_ids(tmp_path):
    """Hashed ids, negative ones among them: no double holds them, and no amount is as large."""
    generator = np.random.default_rng(3)
    ids = generator.integers(-(2**63), 2**63 - 1, 500)[generator.integers(0, 500, 5_000)]
    file = saved(tmp_path, "1.parquet", who=ids, what=np.abs(ids), click=generator.integers(0, 2, 5_000))
    schema, _, _ = inferred([file], tmp_path)
    assert [feature.kind for feature in schema.features] == ["categorical", "categorical"]
    assert {feature.cardinality for feature in schema.features} == {500}


def test_inferred_schema_is_fitted_and_encodes_its_files(files, tmp_path):
    schema, _, _ = inferred(files, tmp_path)
    with pytest.raises(InputError, match="mbcnet schema fit"):
        schema.require_fitted()
    fitted = write_fitted(schema, files[:2], tmp_path / "fit")
    encoder = Encoder(fitted)
    for file in files:
        rows = pq.read_table(file, columns=list(fitted.columns)).combine_chunks().to_batches()[0]
        assert encoder.encode(rows, Place(str(file), 0)).num_rows == 2_000
    assert fitted.table_of["words"].num_embeddings == 90 + 2


@pytest.mark.parametrize(
    ("spread", "rows", "row_groups"), [(64, 1_200, range(12)), (4, 400, (0, 3, 6, 9))], ids=["all", "four of twelve"]
)  # fmt: skip
def test_a_sample_is_spread_over_all_files(spread, rows, row_groups, files, monkeypatch):
    monkeypatch.setattr(profile, "SPREAD", spread)
    seen: list[int] = []
    found = profile_files(files, rows=rows, work=Work(progress=seen.append))
    assert (found.rows, found.total_rows, seen[-1]) == (rows, ROWS, rows)
    moments = (found.sample["timestamp"].to_numpy() - 1_714_521_600) // 10
    assert {int(moment) // 500 for moment in moments} == set(row_groups)


def test_groups_are_guessed_from_names(tmp_path):
    sizes = {"user_id": 30, "user_city": 5, "item_id": 20, "item_brand": 4, "other": 3, "click": 2}
    columns = {name: [n % size for n in range(60)] for name, size in sizes.items()}
    schema, _, _ = inferred([saved(tmp_path, "x.parquet", **columns)], tmp_path)
    pairs = {name: {*members} for name, members in schema.groups.items()}
    users, items = {"user_id", "user_city"}, {"item_id", "item_brand"}
    assert pairs == {"user": users, "item": items, "user_item": {"user_id", "item_id"}}


def test_a_sample_is_bounded_and_the_same_however_rows_come():
    table, hashes = pa.table({"x": np.arange(70_000)}), row_hashes(0, 70_000)
    found = []
    for size in (777, 70_000):
        sample = RowSample(1_000)
        for start in range(0, 70_000, size):
            sample.add(hashes[start : start + size], table.slice(start, size))
        found.append(sample.rows()["x"].to_pylist())
    assert found[0] == found[1] == sorted(found[0]) and len(found[0]) == 1_000
    assert abs(np.mean(found[0]) - 35_000) < 2_500, "from all over the rows"


def test_files_that_differ(tmp_path):
    first = saved(tmp_path, "0.parquet", a=pa.array([1, 2], pa.int32()), click=[0, 1])
    second = saved(tmp_path, "1.parquet", a=pa.array([3, 9], pa.int64()), b=["x", "y"], click=[0, 1])
    _, text, _ = inferred([first, second], tmp_path)
    left_out = r"^# b .*LEFT OUT: .*0\.parquet: column 'b' is missing.*; null 50.0%; missing in 1 of 2 files"
    assert re.search(left_out, text, re.M), "training would refuse the file without it"
    assert re.search(r"^a .*4 values; ids 0 to 9", text, re.M)


@pytest.mark.parametrize(
    ("columns", "label", "message"),
    [
        ({"click": ["1"]}, "click", "label .click. is string: wanted 0 and 1"),
        (None, "", r"x\.parquet: cannot be read as Parquet"),
        ({"a": [1, 2], "seen": [0, 1]}, "", r"name it with --label \(columns of 0 and 1: seen\)"),
        ({"a": [1, 2]}, "buy", "label 'buy' is not a column"),
        ({"label": ["0", "1"]}, "", "label 'label' is (string): wanted 0 and 1 in every row"),
        ({"price": [0.5, 2.0]}, "price", r"label 'price' is double with values from 0.5 to 2 that .*: wanted 0 and 1"),
        ({"y": [1.0, None, float("nan")]}, "y", r"label 'y' is double with values from 1 to 1, 1 row\(s\) NaN, 1 row\(s\) null: wanted"),
        ({"a": pa.array([], pa.int64())}, "", "hold no rows"),
    ],
    ids=["types", "damage", "no label", "unknown label", "text label", "bad label", "nan", "no rows"],
)  # fmt: skip
def test_mistakes_are_named(columns, label, message, tmp_path):
    if columns is None:
        (tmp_path / "x.parquet").write_bytes(b"no parquet")
    else:
        saved(tmp_path, "x.parquet", **columns)
    if "is string" in message:
        saved(tmp_path, "0.parquet", a=[1], click=[1])
    with pytest.raises(InputError, match=message):
        infer_schema(sorted(tmp_path.iterdir()), label=label)


def test_odd_names_survive(tmp_path):
    columns = {name: ["u", "v", "w", "u"] for name in ("a.b", 'quo"te', "é", "1", "#x")}
    schema, _, _ = inferred([saved(tmp_path, "x.parquet", **columns, click=[0, 1, 0, 1])], tmp_path)
    assert {feature.name for feature in schema.features} == columns.keys()
    twins = dict.fromkeys(("a%2Eb", "type", "a.b", "%type"), columns["é"])  # whose own tables would be called alike
    schema, _, _ = inferred([saved(tmp_path, "x.parquet", **twins, click=[0, 1, 0, 1])], tmp_path)
    assert [each.source_column for each in schema.features] == [*twins]
    assert [each.name for each in schema.features] == ["a%2Eb", "type", "a.b_2", "%type_2"]


def test_synthetic_log_is_inferred_as_it_was_made(tmp_path):
    made = pailitao_schema("demo")
    write_synthetic(made, tmp_path / "log", rows=3_000, days=3)
    schema, _, suspicious = inferred(sorted(tmp_path.glob("log/*/*.parquet")), tmp_path)
    assert suspicious == []
    kinds, found = ({each.name: (each.kind, each.weights) for each in of.features} for of in (made, schema))
    assert found.keys() == kinds.keys()
    wrong = {name: found[name] for name in kinds if found[name] != kinds[name]}
    assert len(wrong) <= 8 and {kind for kind, _ in wrong.values()} <= {"categorical", "numeric"}, wrong


@pytest.mark.parametrize(
    ("name", "left_out"), [("movielens_latest_small", {"rating"}), ("adult", set()), ("criteo_sample", set())]
)
def test_real_files(name, left_out, tmp_path):
    file = SHARED / name / "train.parquet"
    if not file.is_file():
        pytest.skip(f"the real files are not here ({name})")
    _, _, suspicious = inferred([file], tmp_path)
    assert {line.split(":")[0] for line in suspicious} == left_out


def test_columns_of_any_name_get_a_field(tmp_path):
    names = (
        "ctx/hour",
        ".hidden",
        "tab\tid",
        "all_clicks_id",
        "all_views_id",
        "",
        "\ufeffid",
        "ctx_hour",
        "n" * 2_000,
        "nul\0",
        "\x85",
    )
    table = pa.table({name: ["u", "v", "w", "u"] for name in names} | {"click": [0, 1, 0, 1]})
    arrays = [*table.columns, pa.array([1, 2, 3, 4]), pa.array([5, 6, 7, 8])]
    pq.write_table(pa.Table.from_arrays(arrays, [*table.column_names, "twice", "twice"]), tmp_path / "x.parquet")
    schema, text, left_out = inferred([tmp_path / "x.parquet"], tmp_path)
    assert {feature.source_column for feature in schema.features} == {*names} - {"nul\0", ""}
    fields = {feature.source_column: feature.name for feature in schema.features}
    assert fields["ctx/hour"] == "ctx_hour_2" and fields["ctx_hour"] == "ctx_hour", "another column has that name"
    assert fields[".hidden"] == "hidden" and len(fields["n" * 2_000]) == 100
    assert schema.groups["all_fields"] == ("all_clicks_id", "all_views_id"), "no group may be called 'all'"
    assert re.search(r"^# twice  # LEFT OUT: .*x\.parquet has 2 columns of this name", text, re.M)
    assert len(left_out) == 3 and "rename it" in left_out[0] and "without NUL characters" in left_out[1]


def test_every_type_is_read_or_left_out_with_the_reason(tmp_path):
    words = ["a", "b", None, "c"]
    columns = {
        "view": pa.array(words, pa.string_view()),
        "codes": pa.DictionaryArray.from_arrays(pa.array([0, 1, 0, 1], pa.uint32()), pa.array(["a", "b"])),
        "lists": pa.array([[1, 2], None, [], [3]], pa.list_view(pa.int64())),
        "nested": pa.array([["a"], ["b", "a"], [], None], pa.list_(pa.dictionary(pa.int32(), pa.string()))),
        "struct": pa.array([{"x": 1}] * 4),
        "map": pa.array([[("k", 1)]] * 4, pa.map_(pa.string(), pa.int64())),
        "raw": pa.array([b"x"] * 4, pa.binary_view()),
        "late": pa.array([2**63 - 1, 0, 1, 2], pa.timestamp("ns")),
        "plain": [1, 1, 2, 2],
        "mixed": [1, 2, 3, 4],
        "odd": [1, 2, 3, 4],
    }
    first = saved(tmp_path, "0.parquet", **columns, click=[0, 1, 0, 1])
    second = columns | {"mixed": pa.array(words), "odd": pa.array([0.5, 1, 2, 3]), "plain": pa.array([{"y": 1}] * 4)}
    files = [first, saved(tmp_path, "1.parquet", **second, click=[True, False, True, False])]
    found = profile_files(files)
    kinds = {name: str(column.kind) for name, column in found.columns.items()}
    assert (kinds["view"], kinds["codes"], kinds["mixed"], kinds["odd"]) == ("string", "string", "string", "double")
    assert (found.columns["lists"].values, found.columns["lists"].distinct.estimate()) == (6, 3)
    assert found.columns["nested"].item == pa.string()
    _, text, _ = inferred(files, tmp_path)
    for name, reason in {
        "struct": "struct<x: int64>: no kind of field takes it",
        "map": "map<string, int64.*: no kind",
        "raw": "binary_view: no kind",
        "plain": r"struct<y: int64>: no kind",
    }.items():
        assert re.search(rf"^# {name} +# LEFT OUT: .*{reason}", text, re.M), text


def test_whole_doubles_that_are_ids_are_no_amounts(tmp_path):
    rng = np.random.default_rng(0)
    ids = [None if n % 7 == 0 else float(n * 1_000_003) for n in rng.integers(0, 300, 900)]
    columns = {
        "user_id": ids,
        "shopId": pa.array(ids).cast(pa.decimal128(20, 0)),
        "thing": ids,
        "price": ids,
        "clicks": [float(n) for n in rng.integers(0, 300, 900)],
    }
    file = saved(tmp_path, "x.parquet", **columns, click=rng.integers(0, 2, 900))
    text, _ = infer_schema([file])
    kinds = dict(re.findall(r'^#? ?(\w+) += \{ kind = "(\w+)"', text, re.M))
    ids_of = {name for name, kind in kinds.items() if kind == "categorical"}
    assert ids_of == {"user_id", "shopId", "thing"} and kinds["price"] == kinds["clicks"] == "numeric", kinds
    assert text.count("whole numbers: read as ids") == 2


def test_unsigned_ids_of_databases_are_told_apart(tmp_path):
    """Decimals of twenty digits, alone, beside int64 and uint64 of other days; one beyond 64 bits is no id."""
    large = [2**64 - 1 - n % 300 for n in range(900)]
    days = {"big": large, "mixed": range(900), "small": large, "beyond": [10**25 * (n % 300) for n in range(900)]}
    kinds = {"mixed": pa.int64(), "small": pa.uint64()}
    files = []
    for number in range(2):
        columns = {
            name: pa.array(values, kinds[name]) if number and name in kinds
            else pa.array([Decimal(7 if name in kinds else value) for value in values], pa.decimal128(38, 0))
            for name, values in days.items()
        }  # fmt: skip
        files.append(saved(tmp_path, f"{number}.parquet", **columns, click=[n * 7 % 10 < 3 for n in range(900)]))
    schema, _, _ = inferred(files, tmp_path)
    found = {each.name: (each.kind, each.cardinality) for each in schema.features}
    assert found["big"] == ("categorical", 300) and found["small"] == ("categorical", 301)
    assert found["mixed"] == ("categorical", 900) and found["beyond"][0] == "numeric"


@pytest.mark.parametrize(("kind", "largest"), [(pa.float16(), 2.0**11), (pa.float32(), 2.0**24)])
def test_ids_that_narrow_floats_of_one_file_cannot_tell_apart_are_amounts(kind, largest, tmp_path):
    kinds = {}
    for top in (largest - 1, largest):
        ids = np.array([1.0, 2.0, 3.0, top])
        files = [
            saved(
                tmp_path, f"{n}.parquet", user_id=pa.array(ids.astype(each), each_type), w=["a"] * 4, click=[0, 1, 0, 1]
            )
            for n, (each, each_type) in enumerate([(np.float64, pa.float64()), (kind.to_pandas_dtype(), kind)])
        ]
        found, _, _ = inferred(files, tmp_path)
        kinds[top] = found.features[0].kind
        write_fitted(found, files, tmp_path / f"fit{top}")
    assert kinds == {largest - 1: "categorical", largest: "numeric"}


def test_whole_numbers_are_names_or_amounts_as_the_label_tells(tmp_path):
    """Codes without a telling name and spread like numbers, one with -1 among them, are categories; an amount stays a number; both say why.
    An id above those of the files has no row and is counted, instead of ending tomorrow's run."""
    rng = np.random.default_rng(0)
    rows = 20_000
    country, c20 = (
        rng.integers(5069, 5149, rows),
        np.where(rng.random(rows) < 0.4, -1, 100_000 + rng.integers(0, 170, rows)),
    )
    depth, seat = rng.integers(1, 800, rows), rng.integers(0, 90, rows)
    effect = rng.normal(0, 0.8, 100_200)
    logit = effect[country] + effect[c20] + depth / 200 - 3
    click = rng.random(rows) < 1 / (1 + np.exp(-logit))
    columns = {"click": click.astype(int), "country": country, "C20": c20, "depth": depth, "seat": seat}
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.table(columns), file)
    text, _ = infer_schema([file])
    (tmp_path / "schema.toml").write_text(text)
    fields = {feature.name: feature for feature in load_schema(tmp_path / "schema.toml").features}
    assert {name: each.kind for name, each in fields.items()} == {
        "country": "categorical", "C20": "categorical", "depth": "numeric", "seat": "categorical",
    }  # fmt: skip
    for name in ("country", "C20", "depth"):
        assert re.search(rf"(?m)^{name} .*# .*explains \d+\.\d+% of the label as categories", text), name
    assert (fields["seat"].num_embeddings, fields["seat"].on_invalid) == (90, "null")
    fitted = write_fitted(load_schema(tmp_path / "schema.toml"), [file], tmp_path / "fit")
    later = Encoder(fitted).encode(
        pa.RecordBatch.from_pydict({name: values[:2].tolist() for name, values in columns.items()} | {"seat": [5, 97]}),
        Place("later", 0),
    )
    assert later.repaired["seat"] == 1


def test_proposed_crosses_load_once_the_comment_goes(tmp_path):
    """Of a user's and an item's fields, as comments that change nothing until a person takes the # away."""
    generator = np.random.default_rng(5)
    draw = {"user_city": 30, "user_age": 5, "item_brand": 40, "item_category": 9, "item_shop": 200}
    table = {
        name: pa.array([f"{name} {value}" for value in generator.integers(0, size, 3_000)])
        for name, size in draw.items()
    }
    pq.write_table(pa.table(table | {"click": generator.integers(0, 2, 3_000)}), tmp_path / "log.parquet")
    text, _ = infer_schema([tmp_path / "log.parquet"])
    crosses = re.findall(r"^# (?=\w+ = \{ \"?kind\"? = \"cross\")", text, re.M)
    assert len(crosses) == 4 and "item_category_x_user_age" in text
    told = re.sub(r"^# (?=\w+ = \{ kind = \"cross\")", "", text, flags=re.M)
    (tmp_path / "schema.toml").write_text(told)
    fitted = write_fitted(load_schema(tmp_path / "schema.toml"), [tmp_path / "log.parquet"], tmp_path / "fit")
    rows = pq.read_table(tmp_path / "log.parquet").combine_chunks().to_batches()[0]
    found = Encoder(fitted).encode(rows, Place("log.parquet", 0))
    sizes = {each.name: fitted.table_of[each.name].num_embeddings for each in fitted.sparse if each.is_cross}
    assert len(sizes) == 4 and max(sizes.values()) < 3_000
    for place, each in enumerate(fitted.sparse):
        if each.is_cross:
            assert found.single_ids[place].min() > 0 and found.single_ids[place].max() < sizes[each.name]
