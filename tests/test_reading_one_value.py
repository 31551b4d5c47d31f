"""Proves that one value has one meaning: training's encoder and an artifact's loader give the same row for it, or refuse it in the same words,
whatever the Arrow type of its column, and whether it comes as Arrow, lists, NumPy or JSON.
"""

import json
import re
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from data.errors import InputError
from data.reading.column_types import check_columns, pinned
from data.reading.columns import Place
from data.reading.encode import Encoder
from data.reading.keys import hash_values, remainder
from data.schema import parse_schema
from mbcnet_rec.serving.preprocess import Preprocessor

INTEGERS = (pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64())
TEXTS = (pa.string(), pa.large_string(), pa.string_view())
WHOLE = (pa.float16(), pa.float32(), pa.float64(), pa.decimal64(12, 0), pa.decimal128(38, 0), pa.decimal256(60, 0))
TAKEN = (*INTEGERS, *TEXTS, *WHOLE)
REFUSED = (pa.bool_(), pa.binary(), pa.timestamp("us"), pa.date32(), pa.decimal128(20, 2), pa.struct({"a": pa.int64()}))
EXTREMES = (0, 1, 127, -128, 2**24 - 1, 2**31, 2**53 + 1, 2**63 - 1, -(2**63), 2**63, 2**64 - 1)
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2, 3))]
LARGEST = float(np.finfo(np.float32).max)


def schema_of(field, **top):
    return parse_schema({"name": "t", "label": "y", "fields": {"f": field}, **top}, "s", Path())


def hashed(**keys):
    return {"kind": "categorical", "encoding": "hash", "num_embeddings": 100_000, "embedding_dim": 4} | keys


def ids(**keys):
    return {"kind": "categorical", "num_embeddings": 200, "embedding_dim": 4} | keys


def numeric(**keys):
    return {"kind": "numeric"} | keys


def vocabulary_of(kind):
    values = [0, 7, 127, 2**53 + 1, 2**63 - 1]
    return pa.array(values if pa.types.is_integer(kind) else [str(value) for value in values], kind)


def without_type(error):
    """The words of a refusal, without the Arrow type that it names."""
    return re.sub(r"(column 'f' is ).*?(: \w+ field)", r"\1it\2", str(error))


class Both:
    """One schema's encoder as training has it, and an artifact's preprocessing."""

    def __init__(self, field, vocabulary=None):
        self.schema = schema_of(field)
        known = {} if vocabulary is None else {field["vocabulary"]: vocabulary}
        self.encoder = Encoder(self.schema, vocabularies=known, has_labels=False)
        table = self.schema.table_of.get("f")
        lookups = {"all": [("f", 0)]} if table else {}
        self.serving = Preprocessor(self.schema, lookups, known, {})

    def trained(self, column):
        """What training makes of an Arrow column, or the words in which it refuses it."""
        try:
            check_columns(pa.schema([("f", column.type)]), self.schema, "request", has_label=False)
            found = self.encoder.encode({"f": column}, Place("request", None))
        except InputError as error:
            return without_type(error)
        return self.as_lists(self.serving.inputs(found))

    def served(self, column):
        try:
            return self.as_lists(self.serving({"f": column}))
        except InputError as error:
            return without_type(error)

    def as_lists(self, inputs):
        bags = {pooling: (rows.tolist(), offsets.tolist()) for pooling, (rows, offsets, _) in inputs.bags.items()}
        return bags, inputs.dense.tolist()


def drawn(rng, kind, nulls=0.2):
    """A column of a type, with its extremes, and whether it holds integers or their decimal text."""
    fits = []
    is_signed = rng.random() < 0.5  # no column of 64 bits holds both ends
    for value in (*EXTREMES, *rng.integers(-200, 200, 6).tolist()):
        try:
            fits.append(as_type([value], kind)[0].as_py())
        except (pa.ArrowException, OverflowError, ValueError):
            continue
    fits = [value for value in fits if (int(value) < 2**63 if is_signed else int(value) >= 0)]
    values = [fits[at] for at in rng.integers(0, len(fits), 8)]
    values = [None if missing else value for value, missing in zip(values, rng.random(8) < nulls, strict=True)]
    return pa.array(values, kind)


def as_type(values, kind):
    """Python's integers as an Arrow type, exactly or not at all."""
    if kind in TEXTS:
        return pa.array([None if value is None else str(value) for value in values], kind)
    if pa.types.is_decimal(kind):
        return pa.array([None if value is None else Decimal(value) for value in values], kind)
    if pa.types.is_floating(kind):
        limit = 2 ** {16: 11, 32: 24, 64: 53}[kind.bit_width]
        if any(value is not None and abs(value) >= limit for value in values):
            raise ValueError("a float that does not hold it")
        return pa.array([None if value is None else np.float64(value) for value in values], pa.float64()).cast(kind)
    return pa.array(values, kind)


def arrow_forms(rng, column):
    """The same values in other Arrow containers."""
    yield column
    kind = column.type
    if not pa.types.is_nested(kind):
        yield pa.concat_arrays([column[:2], column]).slice(2)
        yield (
            pc.run_end_encode(column.cast(pa.string()) if kind == pa.string_view() else column)
            if kind not in (pa.float16(), pa.decimal64(12, 0))
            else column
        )
        if kind not in (pa.float16(), pa.string_view(), pa.decimal64(12, 0)):
            index = [pa.int8(), pa.uint16(), pa.int64()][rng.integers(3)]
            yield column.dictionary_encode().cast(pa.dictionary(index, kind))
            codes, values = pa.array(range(len(column))), column  # nulls and repeats inside the dictionary
            yield pa.DictionaryArray.from_arrays(codes, values)


def python_forms(column):
    """The same values as Python has them."""
    values = column.to_pylist()
    yield values
    yield tuple(values)
    yield np.asarray([*values, None], object)[:-1]
    if not any(isinstance(value, (Decimal, bytes)) for value in values) and not pa.types.is_temporal(column.type):
        yield json.loads(json.dumps(values))
    if not column.null_count and column.type in INTEGERS:
        yield column.to_numpy()


@pytest.mark.parametrize("field", ["ids", "hash", "integer", "text", "integers known", "texts known"])
@pytest.mark.parametrize("seed", SEEDS)
def test_ids_have_one_row(field, seed):
    """Every type and container against the definition, in single fields and in lists."""
    rng = np.random.default_rng(seed)
    vocabulary = None
    keys = {
        "ids": ids(on_invalid="modulo"), "hash": hashed(), "integer": hashed(type="integer"), "text": hashed(type="text"),
    }.get(field)  # fmt: skip
    if keys is None:
        vocabulary = vocabulary_of(pa.int64() if field == "integers known" else pa.string())
        keys = ids(encoding="vocabulary", vocabulary="v")
    single, many = Both(keys, vocabulary), Both(keys | {"kind": "multi_valued"}, vocabulary)
    for kind in TAKEN:
        column = drawn(rng, kind)
        wanted = single.trained(column)
        offsets = pa.array([0, 3, 3, len(column)], pa.int32())
        of_lists = many.trained(pa.ListArray.from_arrays(offsets, column))
        for form in arrow_forms(rng, column):
            assert single.served(form) == wanted, (kind, form.type)
            assert single.served(pa.chunked_array([form[:3], form[3:]])) == wanted
            if pa.types.is_run_end_encoded(form.type):
                continue
            assert single.trained(form) == wanted
            lists = pa.ListArray.from_arrays(offsets, form)
            for container in (lists, lists.cast(pa.large_list(form.type)), pa.concat_arrays([lists, lists]).slice(3)):
                assert many.served(container) == many.trained(container) == of_lists, (kind, container.type)
            views = pa.ListViewArray.from_arrays(offsets[:-1], pa.array([3, 0, len(column) - 3], pa.int32()), form)
            assert many.served(views) == many.trained(views) == of_lists
        if field != "ids" or kind not in TEXTS:
            assert isinstance(wanted, tuple), wanted
        for form in python_forms(column):
            if all(value is None for value in form):
                continue
            found = single.served(form)
            if isinstance(wanted, str):
                assert isinstance(found, str) and "field 'f'" in found
                continue
            assert found == wanted, (kind, form)
            values = list(form)
            assert many.served([values[:3], (), values[3:]]) == of_lists, (kind, form)


@pytest.mark.parametrize("wanted", ["integer", "text"])
def test_an_id_is_the_same_in_every_type(wanted):
    """Against the hash itself: 7 and "7" are one id."""
    both = Both(hashed(type=wanted))
    for value in (*EXTREMES, 7, -7):
        own = hash_values(
            pa.array([value if wanted == "integer" else str(value)])
            if value < 2**63 or wanted == "text"
            else pa.array([value], pa.uint64())
        )
        row = (remainder(own, 99_999).astype(np.int64) + 1).tolist()
        for kind in TAKEN:
            try:
                column = as_type([value], kind)
            except (pa.ArrowException, OverflowError, ValueError):
                continue
            assert both.trained(column)[0]["all"][0] == row, (value, kind)


@pytest.mark.parametrize(
    ("values", "kind", "found"),
    [
        (["7", "07"], pa.string(), "row 1, field 'f' = '07'"),
        (["+7"], pa.string(), "'+7'"), ([" 7"], pa.string(), "' 7'"), (["7.0"], pa.string(), "'7.0'"), (["-0"], pa.string(), "'-0'"),
        (["7\n"], pa.string(), "wanted an integer of 64 bits in plain digits"), ([str(2**64)], pa.string(), str(2**64)),
        (["1", str(2**64), "x"], pa.string(), "row 1"), (["-1", str(2**63)], pa.string(), f"row 1, field 'f' = '{2**63}'"),
        ([1.0, 7.5], pa.float64(), "row 1, field 'f' = 7.5"), ([2.0**53], pa.float64(), "row 0"), ([2.0**24], pa.float32(), "row 0"),
        ([float("inf")], pa.float64(), "= inf"), ([Decimal(2**64)], pa.decimal256(60, 0), str(2**64)),
        *(([None], kind, "column 'f' is it: categorical field 'f' wants integers or strings") for kind in REFUSED),
    ],
)  # fmt: skip
def test_what_is_no_id_is_refused_by_all(values, kind, found):
    both = Both(hashed(type="integer"))
    column = pa.array(values, kind)
    said = both.trained(column)
    assert found in said and both.served(column) == said
    lists = Both(hashed(type="integer", kind="multi_valued"))
    nested = pa.array([[], values], pa.list_(kind))
    said = lists.trained(nested)
    assert "field 'f'" in said and lists.served(nested) == said
    assert "row 1, field 'f' = " in said or kind in REFUSED


@pytest.mark.parametrize(
    "given",
    [
        7, "ab", b"ab", {7: 1}, {7, 8}, None, [{7}, {8}], [[1], 2], [1, "a"], [1, True], [True, 1], ["a", float("nan")],
        [1, float("nan")], [2**63, -1], [2**64], [1, 2.0], np.zeros((1, 1, 1)), np.asarray(1), [b"a"], ["a", b"b"], [object()],
        (value for value in [1, 2]), ["\ud800"], [[[1]]], np.zeros(2, "M8[s]"), [1j], [Decimal("1.5")], [Decimal(1), 2.5],
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["categorical", "multi_valued"])
def test_what_is_no_column_of_ids_is_refused_in_our_words(given, kind):
    said = Both(hashed(kind=kind)).served(given)
    assert isinstance(said, str) and said.startswith("request: ") and "field 'f'" in said


@pytest.mark.parametrize("rows", [5, None, "rows", [{"f": 1}], [[1]], object()])
def test_what_is_no_request_is_refused(rows):
    with pytest.raises(
        InputError, match=r"request: a .* cannot be read .*wanted a dict that has the column of each field"
    ):
        Both(hashed()).serving(rows)


def test_a_column_that_is_there_twice_is_refused():
    twice = pa.table([pa.array([1]), pa.array([2])], names=["f", "f"])
    with pytest.raises(InputError, match="column 'f' is there 2 times"):
        Both(hashed()).serving(twice)
    with pytest.raises(InputError, match="log: column 'f' is there 2 times"):
        check_columns(twice.schema, schema_of(hashed()), "log", has_label=False)


def test_missing_values_in_every_container():
    both, lists = Both(hashed(type="integer")), Both(hashed(kind="multi_valued", type="text"))
    nothing = both.trained(pa.nulls(2, pa.int64()))
    assert nothing[0]["all"][0] == [0, 0]
    for column in (
        [None, None],
        [float("nan")] * 2,
        np.full(2, np.nan),
        pa.nulls(2),
        pa.array([np.nan, None]),
        pa.array(["", None], pa.string()).dictionary_encode().take([1, 1]),
    ):
        assert both.served(column) == nothing
    nothing = lists.trained(pa.nulls(2, pa.list_(pa.string())))
    for column in (
        [None, []],
        [[None], [None, None]],
        pa.nulls(2),
        pa.array([[None], None]),
        [np.zeros(0), [float("nan")]],
        np.zeros((2, 0)),
    ):
        assert lists.served(column) == nothing
    masked = np.ma.MaskedArray([5, 7], mask=[True, False])
    assert both.served(masked) == both.trained(pa.array([None, 7]))
    assert both.served([]) == both.served(pa.nulls(0)) == both.served(np.zeros(0, np.int64))


@pytest.mark.parametrize("seed", SEEDS)
def test_numbers_have_one_value(seed):
    rng = np.random.default_rng(seed)
    for keys in (numeric(), numeric(transform="log1p"), numeric(transform="standardise", mean=3.0, std=2.0)):
        both, vector = Both(keys), Both({"kind": "vector", "width": 4})
        for kind in (*INTEGERS, *WHOLE, pa.bool_(), pa.decimal128(38, 2)):
            column = drawn(rng, kind) if kind != pa.bool_() else pa.array([True, None, False] * 2 + [True] * 2)
            wanted = both.trained(column)
            assert isinstance(wanted, tuple)
            lists = pa.ListArray.from_arrays(pa.array([0, 4, 8], pa.int32()), column)
            for form in arrow_forms(rng, column):
                assert both.served(form) == wanted
                if not pa.types.is_run_end_encoded(form.type):
                    nested = pa.ListArray.from_arrays(lists.offsets, form)
                    assert vector.served(nested) == vector.trained(lists)
            for form in python_forms(column):
                np.testing.assert_allclose(both.served(form)[1], wanted[1], rtol=1e-6)
                values = list(form)
                assert vector.served([values[:4], values[4:]]) == vector.trained(lists)


@pytest.mark.parametrize(
    "value", [1.7e308, -1e300, 2 * LARGEST, float("inf"), float("-inf"), float("nan"), 10**60, 10**400]
)
def test_numbers_beyond_float32_are_refused_or_missing(value):
    is_finite = value != value or abs(value) != float("inf")
    kind = numeric(), numeric(transform="standardise", mean=0.0, std=1.0)
    column = pa.array([1.0, value]) if isinstance(value, float) else None
    for keys in kind:
        strict, mild = Both(keys), Both(keys | {"on_invalid": "null"})
        said = strict.served([1.0, value])
        assert "row 1, field 'f' = " in said and (
            "wanted a number up to 3.4e+38" in said or "finite number or null" in said
        )
        assert is_finite or "finite number" in said
        missing = mild.served([1.0, None])
        assert mild.served([1.0, value]) == missing
        if column is not None:
            assert strict.trained(column) == said and mild.trained(column) == missing
    vector = Both({"kind": "vector", "width": 1})
    assert "row 1, field 'f' = " in vector.served([[1.0], [value]])
    log = Both(numeric(transform="log1p")).served([1.0, value])
    buckets = Both(numeric(transform="bucketise", boundaries=[0.5], num_embeddings=3, embedding_dim=4)).served(
        [1.0, value]
    )
    if isinstance(value, float) and np.isfinite(value):
        assert np.isfinite(log[1]).all() and buckets[0]["all"][0] == [2, 2 if value > 0 else 1]


def test_the_edge_of_float32_and_what_a_transform_makes_of_it():
    edge = [LARGEST, -LARGEST, 3e38]
    assert np.isfinite(Both(numeric()).trained(pa.array(edge))[1]).all()
    for mean, std in ((-3e38, 1.0), (0.0, 1e-320), (0.0, 1e-46), (1e300, 1.0)):
        both = Both(numeric(transform="standardise", mean=mean, std=std))
        for kind in (pa.float32(), pa.float64()):
            said = both.trained(pa.array([3e38, 1.0], kind))
            assert isinstance(said, str) and "row 0" in said and "after (x - mean) / std" in said
    far = Both(numeric(transform="standardise", mean=-3e38, std=1e38))
    assert far.trained(pa.array([3e38], pa.float32()))[1] == [[6.0]]  # the difference alone is beyond float32


def test_types_are_pinned_from_footers_for_each_table():
    """Text wins over all files and over fields of one table; declared ones stay; nothing but nulls is text."""
    fields = {
        "a": hashed(), "b": hashed(), "c": hashed(type="text"), "d": hashed(encoding="zch", num_embeddings=800), "e": ids(), "n": hashed(),
        "item": {"kind": "categorical", "encoding": "hash", "table": "t"},
        "items": {"kind": "multi_valued", "encoding": "hash", "table": "t"},
    }  # fmt: skip
    tables = {"t": {"num_embeddings": 50, "embedding_dim": 4}}
    schema = parse_schema(
        {"name": "t", "label": "y", "group_column": "g", "fields": fields, "tables": tables}, "s", Path()
    )
    one = {
        "a": pa.int64(),
        "b": pa.int64(),
        "c": pa.int8(),
        "d": pa.float64(),
        "e": pa.int64(),
        "n": pa.null(),
        "g": pa.int8(),
    }
    one |= {"item": pa.int32(), "items": pa.large_list(pa.dictionary(pa.int8(), pa.string_view()))}
    found = pinned(schema, [pa.schema(list(one.items())), pa.schema([("b", pa.string()), ("g", pa.large_string())])])
    types = {each.name: each.type for each in found.features}
    assert types == {
        "a": "integer",
        "b": "text",
        "c": "text",
        "d": "integer",
        "e": "",
        "n": "text",
        "item": "text",
        "items": "text",
    }
    assert found.group_type == "text" and pinned(found, []) == found and pinned(schema, []) == schema


def test_every_type_that_parquet_keeps_is_read_from_it(tmp_path):
    """Nulls in every place, against the same rows in plain types, by training's own reader."""
    from data.reading.config import StreamOptions
    from data.stream import ParquetStream

    fields = {
        "i": ids(), "h": hashed(type="text"), "l": hashed(kind="multi_valued", type="integer"),
        "n": numeric(), "v": {"kind": "vector", "width": 2},
    }  # fmt: skip
    schema = parse_schema({"name": "t", "label": "y", "group_column": "h", "fields": fields}, "s", Path())
    plain = {
        "y": pa.array([0, 1, 0, 1]), "i": pa.array([5, None, 7, 0]), "h": pa.array(["5", None, "7", "0"]),
        "l": pa.array([[5, None], None, [], [7]]), "n": pa.array([5.0, None, 7.0, 0.0]), "v": pa.array([[5.0, None], None, [7.0, 1.0], [0.0, 2.0]]),
    }  # fmt: skip
    view, items = pa.list_view, [5, None, 7]
    offsets = pa.array([0, 0, 2, 2], pa.int32()), pa.array([2, 0, 0, 1], pa.int32())
    others = {
        "i": [pa.float64(), pa.decimal256(40, 0), pa.float16()], "n": [pa.decimal128(9, 2), pa.float16()],
        "h": [pa.string_view(), pa.int64(), pa.dictionary(pa.int8(), pa.string()), pa.float32()], "l": [pa.list_(pa.string()), pa.large_list(pa.float64())],
        "v": [pa.list_(pa.float32(), 2), pa.large_list(pa.int8())], "y": [pa.bool_(), pa.float32(), pa.decimal128(9, 0)],
    }  # fmt: skip
    kinds = [{}] + [{name: kind} for name, choices in others.items() for kind in choices]
    views = pa.ListViewArray.from_arrays(*offsets, pa.array(items), mask=pa.array([False, True, False, False]))
    columns = [plain | {name: as_column(plain[name], kind) for name, kind in each.items()} for each in kinds]
    columns += [plain | {"l": views}]
    assert views.type == view(pa.int64())
    batches = []
    for number, each in enumerate(columns):
        path = tmp_path / f"{number}.parquet"
        pq.write_table(pa.table(each), path, write_page_checksum=True)
        [batch] = ParquetStream([path], schema, StreamOptions(batch_size=4))
        batches.append(
            (
                batch.sparse_features.values().tolist(),
                batch.sparse_features.lengths().tolist(),
                batch.dense_features.tolist(),
                batch.labels.tolist(),
            )
        )
    for each, found in zip(columns, batches, strict=True):
        assert found == batches[0], {name: column.type for name, column in each.items()}
    nothing = plain | {name: pa.nulls(4) for name in fields}
    pq.write_table(pa.table(nothing), tmp_path / "nothing.parquet", write_page_checksum=True)
    [batch] = ParquetStream([tmp_path / "nothing.parquet"], schema, StreamOptions(batch_size=4))
    assert batch.sparse_features.lengths().tolist() == [0] * 4 + [1] * 4 + [0] * 4
    assert not batch.dense_features.any() and not batch.sparse_features.values().any()


def as_column(column, kind):
    """The same values as another type, through text where Arrow knows no other way."""
    if pa.types.is_dictionary(kind):
        return column.dictionary_encode().cast(kind)
    if pa.types.is_floating(kind) and pa.types.is_string(column.type):
        return column.cast(pa.int64()).cast(kind)
    if kind == pa.float16():
        return column.cast(pa.float64()).cast(kind)
    if pa.types.is_decimal(kind):
        return column.cast(pa.decimal128(38, 0)).cast(kind)
    return column.cast(kind)
