"""Proves that a cross is the hash of every combination of raw values, whatever the columns' types, the vocabularies and the batches are."""

import tomllib
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import InputError
from data.profile.check import check_files
from data.profile.fit import fit_schema
from data.reading.columns import Place
from data.reading.encode import Encoder
from data.reading.keys import hash_values
from data.schema import format_schema, parse_schema
from data.schema.show import print_schema

PLACE, ROWS, MASK = Place("log.parquet", 0), 1000, 2**64 - 1
KEY = {"kind": "categorical", "encoding": "hash", "num_embeddings": 50, "embedding_dim": 4}
LIST = KEY | {"kind": "multi_valued"}


def cross_of(*names, **keys):
    return {"kind": "cross", "of": list(names), "num_embeddings": ROWS, "embedding_dim": 4} | keys


def schema_of(folder=Path(), **fields):
    return parse_schema({"name": "t", "label": "y", "fields": fields}, "s", folder)


def encode(fields, columns, folder=Path()):
    rows = pa.RecordBatch.from_pydict(columns)
    found = Encoder(schema_of(folder, **fields), has_labels=False).encode(rows, PLACE)
    if not fields["x"].get("max_length"):
        singles = [each.name for each in schema_of(folder, **fields).sparse if each.is_single]
        return [[row] for row in found.single_ids[singles.index("x")].tolist()], found
    offsets, values = (
        found.lists.offsets[-1],
        found.lists.values[-1],
    )  # the cross is the last field of the schemas below
    return [values[a:b].tolist() for a, b in pairwise(offsets)], found


def mix(number):
    """splitmix64 in Python's own integers."""
    number = (number + 0x9E3779B97F4A7C15) & MASK
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & MASK
    return number ^ (number >> 31)


def naive(rows, max_length=1):
    """Of rows, each a list of values for each part."""
    found = []
    for parts in rows:
        ids = []
        for values in product(*([value for value in part if value is not None] for part in parts)):
            first, *others = (int(hash_values(pa.array([value]))[0]) for value in values)
            state = mix(first)
            for each in others:
                state = mix(state ^ each)
            ids.append(1 + state % (ROWS - 1))
        found.append(ids[:max_length] or [0])
    return found


number = st.none() | st.integers(-3, 3)
text = st.none() | st.sampled_from(["", "a", "b", "a longer one"])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(number, text, number), min_size=1, max_size=6))
def test_two_and_three_single_fields(rows):
    a, b, c = zip(*rows, strict=True)
    columns = {"a": pa.array(a, pa.int64()), "b": pa.array(b, pa.string()), "c": pa.array(c, pa.int32())}
    fields = {"a": KEY, "b": KEY, "c": KEY}
    for of in (("a", "b"), ("b", "a"), ("c", "a", "b")):
        wanted = naive([[[row["abc".index(name)]] for name in of] for row in rows])
        assert encode(fields | {"x": cross_of(*of)}, columns)[0] == wanted


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.none() | st.lists(number, max_size=3), text, st.none() | st.lists(text, max_size=3)),
        min_size=1,
        max_size=6,
    )
)
def test_lists_with_values_and_lists_and_what_a_row_keeps(rows):
    """Every combination, the last part's values first; a row without a value of some part has row 0; the first max_length are kept."""
    a, b, c = zip(*rows, strict=True)
    columns = {
        "a": pa.array([[9], *a], pa.list_(pa.int64())).slice(1), "b": pa.array(b, pa.string()), "c": pa.array(c, pa.list_(pa.string())),
    }  # fmt: skip
    for of, limit in ((("a", "b"), 3), (("b", "c", "a"), 4), (("a", "c"), 2)):
        fields = {"a": LIST, "b": KEY, "c": LIST, "x": cross_of(*of, max_length=limit)}
        parts = [[(row["abc".index(name)] or []) if name != "b" else [row[1]] for name in of] for row in rows]
        found, columns_found = encode(fields, columns)
        assert found == naive(parts, limit)
        whole = [np.prod([sum(v is not None for v in part) for part in each]) for each in parts]
        assert columns_found.repaired["x"] == sum(size > limit for size in whole)


def test_a_row_of_two_huge_lists_needs_no_memory_for_what_it_does_not_keep():
    huge = pa.array([list(range(200_000))], pa.list_(pa.int64()))
    fields = {"a": LIST, "b": LIST, "c": LIST, "x": cross_of("a", "b", "c", max_length=5)}
    found, _ = encode(fields, {"a": huge, "b": huge, "c": huge})
    assert found == naive([[[0], [0], list(range(5))]], 5)


def test_a_cross_does_not_depend_on_the_columns_type_or_on_its_fields_encoding(tmp_path):
    """Integers, doubles with missing values, text and dictionaries of one id are one id; a vocabulary, rare values and growth change nothing."""
    wanted = naive([[[7], ["u"]], [[None], ["v"]], [[12], ["w"]]])
    ids = (
        pa.array([7, None, 12], pa.int16()), pa.array([7.0, float("nan"), 12.0]), pa.array(["7", None, "12"]),
        pa.array(["7", None, "12"]).dictionary_encode(), pa.array([7, None, 12], pa.uint64()),
    )  # fmt: skip
    words = pa.array(["u", "v", "w"])
    for column in ids:
        for a in (KEY | {"type": "integer"}, KEY | {"encoding": "zch", "num_embeddings": 800, "type": "integer"}):
            assert encode({"a": a, "b": KEY, "x": cross_of("a", "b")}, {"a": column, "b": words})[0] == wanted
    for values in ([7], [12, 7, 5]):
        pq.write_table(pa.table({"value": pa.array(values)}), tmp_path / "a.parquet")
        a = KEY | {"encoding": "vocabulary", "vocabulary": "a.parquet", "min_count": 9}
        for column in ids:
            fields = {"a": a, "b": KEY, "x": cross_of("a", "b")}
            assert encode(fields, {"a": column, "b": words}, tmp_path)[0] == wanted


def test_ids_out_of_range_and_numbers_in_buckets():
    a = {"kind": "categorical", "num_embeddings": 10, "embedding_dim": 4, "on_invalid": "null"}
    b = {"kind": "numeric", "transform": "bucketise", "boundaries": [0.0, 5.0], "num_embeddings": 4, "embedding_dim": 4}
    columns = {"a": pa.array([3, -1, 10, None, 9]), "b": pa.array([-1.0, 0.0, 1.0, 2.0, None])}
    found, whole = encode({"a": a, "b": b, "x": cross_of("a", "b")}, columns)
    assert found == naive([[[3], [1]], [[None], [2]], [[None], [2]], [[None], [2]], [[9], [None]]])
    assert whole.repaired == {"a": 2}
    modulo = a | {"on_invalid": "modulo"}
    assert encode({"a": modulo, "b": b, "x": cross_of("a", "b")}, columns)[0][1] == naive([[[-1], [2]]])[0]


def test_fit_check_and_show_take_a_cross(tmp_path, capsys):
    columns = {"y": [0, 1, 1], "a": ["p", "q", "q"], "b": [[1, 2], [], [3]]}
    pq.write_table(pa.table(columns), tmp_path / "log.parquet")
    files = [tmp_path / "log.parquet"]
    a = {"kind": "categorical", "encoding": "vocabulary", "vocabulary": "fit", "min_count": 2, "embedding_dim": 4}
    fields = {"a": a, "b": LIST, "x": cross_of("a", "b", max_length=8)}
    fitted = fit_schema(schema_of(**fields), files, tmp_path / "fit")
    assert check_files(files, fitted, full=True).num_faults == 0
    again = parse_schema(tomllib.loads(format_schema(fitted)), "again", tmp_path / "fit")
    assert again.features == fitted.features and again.columns == ("y", "a", "b")
    print_schema(fitted)
    assert "hash of a x b, 8 at most" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("cross", "message"),
    [
        ({"of": ["a"]}, r"fields.x.of = \['a'\]: wanted the names of two or three other fields"),
        ({"of": ["a", "a"]}, "two or three"),
        ({"of": ["a", "no"]}, "'no' is no field: wanted fields that are categorical"),
        ({"of": ["a", "x"]}, "'x' is of kind cross"),
        ({"of": ["a", "n"]}, "'n' is of kind numeric"),
        ({"of": ["a", "l"]}, "max_length = 0: a list is among its fields: wanted how many combinations"),
        ({"max_length": 4}, "max_length = 4: no list is among its fields; remove it"),
        ({"encoding": "hash"}, "encoding = 'hash': only fields of ids reads it"),
        ({"column": "c"}, "column = 'c': only fields with a column reads it"),
        ({"transform": "log1p"}, "transform = 'log1p': only kind = \"numeric\" reads it"),
        ({"num_embeddings": 1}, "needs at least 2 rows"),
    ],
)
def test_a_wrong_cross_is_refused(cross, message):
    fields = {"a": KEY, "b": KEY, "l": LIST, "n": {"kind": "numeric"}, "x": cross_of("a", "b") | cross}
    with pytest.raises(InputError, match=message):
        schema_of(**fields)
    with pytest.raises(InputError, match='only kind = "cross" reads it'):
        schema_of(a=KEY | {"of": ["b", "c"]})
