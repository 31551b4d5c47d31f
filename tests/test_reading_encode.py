"""Proves that every kind of field is encoded as its definition says, and that every faulty value is named, or repaired as asked."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import InputError
from data.reading.column_types import check_columns
from data.reading.columns import ABSENT, NO_GROUP, Place
from data.reading.encode import Encoder
from data.reading.keys import Vocabulary, hash_values, remainder, splitmix64
from data.schema import FIRST_VOCABULARY_ROW, MISSING_ROW, OUT_OF_VOCABULARY_ROW, load_schema, parse_schema

PLACE = Place("log.parquet", 3, 100)


def encoder_of(folder=Path(), group_column="", **fields):
    top = {"name": "t", "label": "y", "group_column": group_column}
    return Encoder(parse_schema(top | {"fields": fields}, "s", folder))


def encode(field, values, place=PLACE, folder=Path(), **columns):
    batch = pa.RecordBatch.from_pydict({"y": pa.array([0] * len(values)), "f": values, **columns})
    return encoder_of(folder, f=field).encode(batch, place)


def refused(message, *arguments, **columns):
    """`encode` raises an InputError that a pattern describes."""
    with pytest.raises(InputError, match=message):
        encode(*arguments, **columns)


def only(lists) -> SimpleNamespace:
    """The one list field."""
    (values,), (offsets,), weights = lists
    return SimpleNamespace(values=values, offsets=offsets, weights=weights[0] if weights else None)


def ids(num_embeddings=10, **keys):
    return {"kind": "categorical", "num_embeddings": num_embeddings, "embedding_dim": 4} | keys


def bag(num_embeddings=10, **keys):
    return ids(num_embeddings) | {"kind": "multi_valued"} | keys


@pytest.mark.parametrize(
    "kind", [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()], ids=str
)
@pytest.mark.parametrize("policy", ["error", "null", "modulo"])
def test_ids_of_every_integer_type_and_policy(kind, policy):
    """Against a loop over Python's own integers, with the type's least and largest value among them."""
    info = np.iinfo(kind.to_pandas_dtype())
    for num_embeddings in (10, 300, 2**33):
        values = [3, None, 0, min(num_embeddings - 1, info.max), info.max, info.min, 9]
        bad = [value is not None and not 0 <= value < num_embeddings for value in values]
        column = pa.array(values, kind)
        if policy == "error" and any(bad):
            row = bad.index(True)
            with pytest.raises(InputError) as error:
                encode(ids(num_embeddings), column)
            assert str(error.value) == (
                f"log.parquet: row group 3, row {100 + row}, field 'f' = {values[row]}: wanted an id in [0, {num_embeddings}); "
                "fix the file, raise num_embeddings, or set on_invalid = 'null' or 'modulo' for this field"
            )
            continue
        wanted = [
            ABSENT if value is None or (is_bad and policy == "null") else value % num_embeddings
            for value, is_bad in zip(values, bad, strict=True)
        ]
        got = encode(ids(num_embeddings, on_invalid=policy), column)
        assert got.single_ids.tolist() == [wanted]
        assert got.single_ids.dtype == (np.int64 if num_embeddings > 2**31 else np.int32)
        assert got.repaired == Counter({"f": sum(bad)} if any(bad) else {})


@pytest.mark.parametrize("policy", ["error", "null", "modulo"])
def test_lists_of_ids_drop_nulls_and_follow_the_policy(policy):
    lists = [[1, 2], None, [], [None, 3], [12, 4, -1], [5]]
    column = pa.array([[9], *lists], pa.list_(pa.int64())).slice(1)  # offsets that do not start at 0
    if policy == "error":
        refused(r"row group 3, row 104, field 'f' = 12: wanted an id in \[0, 10\)", bag(), column)
        return
    columns = encode(bag(on_invalid=policy), column)
    got = only(columns.lists)
    wanted = [[1, 2], [], [], [3], [2, 4, 9] if policy == "modulo" else [4], [5]]
    assert [got.values[a:b].tolist() for a, b in zip(got.offsets, got.offsets[1:], strict=False)] == wanted
    assert columns.repaired == {"f": 2}


@pytest.mark.parametrize("kind", [pa.list_(pa.int64()), pa.large_list(pa.int64()), pa.list_(pa.int64(), 2)], ids=str)
def test_every_list_type(kind):
    got = only(encode(bag(), pa.array([[1, 2], [3, 4]], kind)).lists)
    assert got.values.tolist() == [1, 2, 3, 4] and got.offsets.tolist() == [0, 2, 4]


def test_weights_follow_their_ids():
    field = bag(kind="weighted_multi_valued", weights="w", on_invalid="null")
    values = pa.array([[1, None, 3], None, [-5, 4]])
    got = only(encode(field, values, w=pa.array([[0.5, 9.0, None], [], [9.0, 2.0]])).weighted_lists)
    assert got.values.tolist() == [1, 3, 4] and got.weights.tolist() == [0.5, 0.0, 2.0]
    assert got.offsets.tolist() == [0, 2, 2, 3]
    longer, no_number = pa.array([[1.0], [1.0, 2.0]]), pa.array([[1.0], [1.0, float("nan")]])
    said = "row 101, field 'f': 1 values but 2 weights in column 'w'; the lists must be equally long"
    refused(said, field, pa.array([[1], [2]]), w=longer)
    strict = field | {"on_invalid": "error"}
    refused("row 101, field 'f' = nan: wanted a finite number", strict, pa.array([[1], [2, 3]]), w=no_number)


@pytest.mark.parametrize("transform", ["identity", "log1p", "standardise"])
@pytest.mark.parametrize(
    "kind", [pa.int8(), pa.int64(), pa.float32(), pa.float64(), pa.float16(), pa.decimal128(9, 2), pa.bool_()], ids=str
)
def test_numbers(transform, kind):
    raw = [True, None, False] if pa.types.is_boolean(kind) else [-3, None, 5]
    column = pa.array(raw, pa.float64() if -3 in raw else kind).cast(kind)
    definition = {
        "identity": float,
        "log1p": lambda x: np.sign(float(x)) * np.log1p(abs(float(x))),
        "standardise": lambda x: (float(x) - 2.0) / 4.0,
    }[transform]
    statistics = {"mean": 2.0, "std": 4.0} if transform == "standardise" else {}
    got = encode({"kind": "numeric", "transform": transform, **statistics}, column)
    wanted = [0.0 if value is None else definition(value) for value in raw]
    assert got.dense[:, 0].tolist() == pytest.approx(wanted, rel=1e-6)
    assert got.dense.dtype == np.float32


def test_large_integers_keep_their_digits_until_after_the_transform():
    """2^53 + small differences vanish in float32, and must not before the mean is taken off."""
    field = {"kind": "numeric", "transform": "standardise", "mean": 1e9, "std": 1.0}
    assert encode(field, pa.array([10**9 + 1, 10**9 + 7])).dense[:, 0].tolist() == [1.0, 7.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite(bad):
    said = rf"row 101, field 'f' = {bad}: wanted a finite number or null"
    refused(said, {"kind": "numeric"}, pa.array([1.0, bad]))
    got = encode({"kind": "numeric", "on_invalid": "null"}, pa.array([1.0, bad, None]))
    assert got.dense[:, 0].tolist() == [1.0, 0.0, 0.0] and got.repaired == {"f": 1}


@pytest.mark.parametrize("count", [1, 32, 33, 200])
@pytest.mark.parametrize("kind", [pa.float64(), pa.float32(), pa.int32()], ids=str)
def test_buckets_count_the_boundaries_not_above(count, kind):
    """Few boundaries are compared one by one, many are searched."""
    draw = np.random.default_rng(count)
    boundaries = sorted(set(draw.integers(-100, 100, 5 * count).astype(float)))[:count]
    values = [*boundaries, *draw.integers(-120, 120, 500).tolist()]
    rows = {"num_embeddings": len(boundaries) + 2, "embedding_dim": 4}
    field = {"kind": "numeric", "transform": "bucketise", "boundaries": boundaries} | rows
    wanted = [1 + sum(boundary <= value for boundary in boundaries) for value in values]
    column = pa.array([*values, None], pa.float64()).cast(kind)
    assert encode(field, column).single_ids.tolist() == [[*wanted, MISSING_ROW]]


def test_vectors():
    field = {"kind": "vector", "width": 2}
    for kind in (pa.list_(pa.float32()), pa.list_(pa.float32(), 2)):
        got = encode(field, pa.array([[1, 2], None, [3, 4]], kind))
        assert got.dense.tolist() == [[1, 2], [0, 0], [3, 4]]
    wide, no_number = [1.0, 2.0, 3.0], [float("nan"), 3.0]
    refused("row 101, field 'f': a vector of length 3: wanted width = 2", field, pa.array([[1.0, 2.0], wide]))
    refused("row 102, field 'f' = nan", field, pa.array([[1.0, 2.0], None, no_number]))


def test_vector_rows_beside_other_dense_fields_keep_their_columns():
    number = {"kind": "numeric"}
    encoder = encoder_of(a=number, v={"kind": "vector", "width": 2}, b=number)
    rows = {"y": [0, 1], "a": [1.0, 2.0], "v": [[3.0, 4.0], [5.0, 6.0]], "b": [7.0, 8.0]}
    got = encoder.encode(pa.RecordBatch.from_pydict(rows), PLACE)
    assert got.dense.tolist() == [[1, 3, 4, 7], [2, 5, 6, 8]] and got.labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("labels", "found"),
    [([0, 2], "= 2"), ([0.0, float("nan")], "= nan"), ([0, None], "is null"), ([0.0, 0.5], "= 0.5")],
)
def test_labels_are_0_or_1(labels, found):
    values = pa.array([1.0, 2.0])
    said = f"log.parquet: row group 3, row 101, label 'y' {found}: wanted 0 or 1"
    refused(said, {"kind": "numeric"}, values, y=pa.array(labels))
    assert encode({"kind": "numeric"}, values, y=pa.array([True, False])).labels.tolist() == [1.0, 0.0]


def vocabulary(tmp_path, values):
    pq.write_table(pa.table({"value": values}), tmp_path / "v.parquet", write_page_checksum=True)
    return ids(len(values) + 2, encoding="vocabulary", vocabulary="v.parquet")


@pytest.mark.parametrize("dictionary", [False, True])
@pytest.mark.parametrize(
    ("values", "column"),
    [
        (["b", "a", ""], ["a", None, "", "c", "b"]),
        ([7, -2, 10**15], [-2, None, 10**15, 8, 7]),
        ([7, -2, 3], [-2, None, 3, 2**62, 7]),
    ],
    ids=["strings", "far apart", "near"],
)
def test_vocabulary_rows(tmp_path, values, column, dictionary):
    rows = {None: MISSING_ROW} | {value: FIRST_VOCABULARY_ROW + row for row, value in enumerate(values)}
    array = pa.array(column).dictionary_encode() if dictionary else pa.array(column)
    got = encode(vocabulary(tmp_path, values), array, folder=tmp_path)
    assert got.single_ids.tolist() == [[rows.get(value, OUT_OF_VOCABULARY_ROW) for value in column]]


@settings(max_examples=100)
@given(
    values=st.lists(st.integers(-(2**63), 2**63 - 1), unique=True, max_size=20),
    column=st.lists(st.integers(0, 2**64 - 1), max_size=20),
    signed=st.booleans(),
)
def test_integer_vocabularies_hold_at_both_ends_of_both_types(values, column, signed):
    column = [value - 2**63 for value in column] if signed else column
    known = Vocabulary(pa.array(values, pa.int64()))
    asked = [*column, *(value for value in values if signed or value >= 0)]
    rows = known.rows_of(pa.array(asked, pa.int64() if signed else pa.uint64()))
    place = {value: row for row, value in enumerate(values, start=FIRST_VOCABULARY_ROW)}
    assert rows.tolist() == [place.get(value, OUT_OF_VOCABULARY_ROW) for value in asked]


@pytest.mark.parametrize("kind", [pa.int8(), pa.int16(), pa.int32(), pa.uint8()], ids=str)
def test_values_of_narrow_types_have_rows_of_their_own(kind):
    """The difference of -100 and 100 overflows in eight bits."""
    info = np.iinfo(kind.to_pandas_dtype())
    values = np.unique(np.linspace(info.min, info.max, 50_000).astype(np.int64))
    rows = Vocabulary(pa.array(values, kind)).rows_of(pa.array(values))
    assert rows.tolist() == list(range(FIRST_VOCABULARY_ROW, FIRST_VOCABULARY_ROW + len(values)))


def test_vocabulary_faults_are_named(tmp_path):
    field = vocabulary(tmp_path, [1, 2, 3])
    said = "log.parquet: row group 3, row 100, field 'f' = 'x': wanted an integer of 64 bits in plain digits"
    refused(said, field, pa.array(["x"]), folder=tmp_path)
    said = "3 values need 5 rows, but the table of field 'f' has num_embeddings = 4; set it to 5"
    refused(said, field | {"num_embeddings": 4}, pa.array([1]), folder=tmp_path)
    (tmp_path / "v.parquet").unlink()
    said = r"v.parquet: no such file: it is the vocabulary of field 'f' of the schema in .*; copy the folder of vocabularies along .*schema fit"
    refused(said, field, pa.array([1]), folder=tmp_path)
    for values, kind in (([True], "bool"), ([1.5], "double"), ([b"a"], "binary")):
        said = f"the vocabulary of field 'f' holds {kind}: wanted integers or text"
        refused(said, vocabulary(tmp_path, values), pa.array([1]), folder=tmp_path)
    for values in ([7, None], [7, 8, 7], ["a", "a"], [float("nan")]):
        said = "vocabulary of field 'f' holds a null, or one value twice: wanted each value once"
        refused(said, vocabulary(tmp_path, values), pa.array([1]), folder=tmp_path)
    refused(
        "says type = 'text', but its vocabulary holds int64",
        vocabulary(tmp_path, [1]) | {"type": "text"},
        pa.array([1]),
        folder=tmp_path,
    )


@pytest.mark.parametrize(
    "kind", [pa.float64(), pa.decimal128(20, 0), pa.string_view(), pa.dictionary(pa.int8(), pa.int64())], ids=str
)
def test_a_vocabulary_of_another_type_holds_the_same_ids(tmp_path, kind):
    """As fits of earlier versions may have written it."""
    values = pa.array([7, 5]).cast(pa.string()) if kind == pa.string_view() else pa.array([7, 5])
    values = values.dictionary_encode().cast(kind) if pa.types.is_dictionary(kind) else values.cast(kind)
    got = encode(vocabulary(tmp_path, values), pa.array([5, 7, None, 6]), folder=tmp_path)
    assert got.single_ids.tolist() == [[3, 2, MISSING_ROW, OUT_OF_VOCABULARY_ROW]]
    nothing = vocabulary(tmp_path, pa.nulls(0))
    assert encode(nothing, pa.array(["a", None]), folder=tmp_path).single_ids.tolist() == [[1, 0]]


def reference_string_hash(text: str) -> int:
    """The definition, one value at a time in Python's own integers."""

    def mix(x):
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    data = text.encode()
    hashed = mix(len(data))
    for start in range(0, len(data), 8):
        hashed = mix(hashed ^ int.from_bytes(data[start : start + 8], "little"))
    return hashed


@settings(max_examples=40)
@given(texts=st.lists(st.none() | st.text(max_size=30), max_size=20), skip=st.integers(0, 3), large=st.booleans())
def test_string_hashes_are_their_definition(texts, skip, large):
    array = pa.array(texts, pa.large_string() if large else pa.string()).slice(min(skip, len(texts)))
    wanted = [0 if text is None else reference_string_hash(text) for text in array.to_pylist()]
    assert hash_values(array).tolist() == wanted
    assert hash_values(array.dictionary_encode()).tolist() == wanted
    assert hash_values(array.cast(pa.large_binary() if large else pa.binary_view())).tolist() == wanted


def test_hashes_are_fixed_for_ever_and_spread():
    """Known values: a trained table is worthless once the hash of its ids changes."""
    assert hash_values(pa.array([0, 1], pa.int32())).tolist() == [0xE220A8397B1DCDAF, 0x910A2DEC89025CC1]
    numbers = hash_values(pa.array([f"item_{i}" for i in range(100_000)]))
    assert len(set(numbers.tolist())) == 100_000
    counts = np.bincount(remainder(numbers, 100).astype(np.int64), minlength=100)
    chi_square = ((counts - 1000) ** 2 / 1000).sum()  # of 99 degrees of freedom
    assert chi_square < 160  # above it once in 10,000
    bits = np.unpackbits((numbers[1::2] ^ numbers[::2]).view(np.uint8)).mean()
    assert abs(bits - 0.5) < 0.002


def test_hashed_rows_leave_row_0_to_missing_values():
    values = [f"w{i}" for i in range(500)]
    got = encode(ids(7, encoding="hash"), pa.array([*values, None])).single_ids[0].tolist()
    assert got == [reference_string_hash(value) % 6 + 1 for value in values] + [MISSING_ROW]
    assert set(got[:-1]) == set(range(1, 7))
    for numbers, kind in (([5, -5], pa.int64()), ([5, 2**64 - 5], pa.uint64())):
        got = encode(ids(7, encoding="hash"), pa.array([*numbers, None], kind)).single_ids[0].tolist()
        hashes = splitmix64(np.asarray([number % 2**64 for number in numbers], np.uint64)).tolist()
        assert got == [value % 6 + 1 for value in hashes] + [MISSING_ROW]


def test_rows_are_grouped_by_bytes_that_are_no_text_and_by_no_list(tmp_path):
    encoder = encoder_of(group_column="g", f=ids(9))
    values = pa.array([b"\xff\xfe", b"ab", b"\xff\xfe", None])
    kinds = (pa.binary(2), pa.binary(), pa.large_binary(), pa.binary_view())
    for column in (*map(values.cast, kinds), values.dictionary_encode()):
        rows = pa.record_batch({"y": [0] * 4, "f": [1] * 4, "g": column})
        found = encoder.encode(rows, PLACE).group_ids
        assert found[0] == found[2] != found[1] and found[3] == NO_GROUP, column.type
    schema = encoder_of(group_column="f", f=ids(9, kind="multi_valued")).schema
    with pytest.raises(InputError, match="column 'f' is list<item: int64>: the group column wants values, not lists"):
        check_columns(pa.schema([("y", pa.int8()), ("f", pa.list_(pa.int64()))]), schema, "log")


def test_no_id_has_the_hash_that_marks_rows_without_a_group():
    """Null, NaN and a dictionary's null are no id; the one integer whose hash would be the mark has its neighbour."""

    def groups_of(column):
        encoder = encoder_of(group_column="g", f=ids(9))
        rows = pa.record_batch({"y": [0] * len(column), "f": [1] * len(column), "g": column})
        return encoder.encode(rows, PLACE).group_ids.tolist()

    number = NO_GROUP % 2**64  # splitmix64 backwards
    for shift, factor in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9), (30, 1)):
        number ^= number >> shift ^ (number >> 2 * shift)
        number = number * pow(factor, -1, 2**64) % 2**64
    number = (number - 0x9E3779B97F4A7C15) % 2**64
    unlucky = pa.array([number, None], pa.uint64())
    assert hash_values(unlucky).view(np.int64).tolist() == [NO_GROUP, 0]
    assert groups_of(unlucky) == [NO_GROUP + 1, NO_GROUP]
    assert groups_of(pa.array([float("nan"), None])) == [NO_GROUP] * 2
    for values in (["u", None], [b"u", None]):
        array = pa.DictionaryArray.from_arrays(pa.array([0, 1, None]), pa.array(values))
        first, *nulls = groups_of(array)
        assert first == hash_values(pa.array(values)).view(np.int64)[0] and nulls == [NO_GROUP] * 2


def test_damaged_dictionary_codes_are_refused():
    """Arrow hands on codes that point behind the dictionary; NumPy would raise, or wrap around, without naming the file."""
    codes = pa.Array.from_buffers(pa.int32(), 2, [None, pa.array([0, 9], pa.int32()).buffers()[1]])
    column = pa.DictionaryArray.from_arrays(codes, pa.array(["a", "b"]), safe=False)
    said = r"log.parquet: row group 3 cannot be encoded \(a dictionary code without a value\)"
    refused(said, ids(encoding="hash"), column)


def test_a_schema_that_still_waits_for_its_fit_is_refused():
    schema = load_schema(Path(__file__).parents[1] / "data" / "schemas" / "adult.toml")
    with pytest.raises(InputError, match="field 'age' still says 'fit'; run `mbcnet"):
        Encoder(schema)
