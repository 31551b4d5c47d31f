"""Plain requests are read as the encoder reads them field by field, bit for bit; whatever is not plain is left to the encoder."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from data.reading.columns import Place
from data.reading.encode import Encoder
from data.reading.plain import PlainRows
from data.schema import parse_schema

ID = {"num_embeddings": 10, "embedding_dim": 4}
SCHEMA = parse_schema(
    {
        "name": "plain",
        "label": "click",
        "fields": {
            "words": {"kind": "categorical", "encoding": "hash", **ID},
            "item": {"kind": "categorical", **ID},
            "price": {"kind": "numeric", "transform": "log1p"},
            "tags": {"kind": "multi_valued", **ID},
            "age": {"kind": "numeric", "transform": "bucketise", "boundaries": [1.0, 2.0], **ID, "num_embeddings": 4},
            "height": {"kind": "numeric", "transform": "bucketise", "boundaries": [0.5], **ID, "num_embeddings": 3},
            "image": {"kind": "vector", "width": 2},
            "score": {"kind": "numeric", "transform": "standardise", "mean": 3.0, "std": 0.7},
            "likes": {"kind": "weighted_multi_valued", "weights": "likes_by", **ID},
            "raw": {"kind": "numeric"},
            "user": {"kind": "categorical", **ID},
            "part": {"kind": "categorical", **ID},
            "both": {"kind": "cross", "of": ["words", "part"], **ID},
        },
    },
    "test",
    Path(),
)
ROWS = {
    "words": ["a", None, "b"],
    "item": [9, None, 0],
    "price": [-2.5, 3, None],
    "tags": [[1, 2], None, []],
    "age": [None, 2, 0.1],
    "height": [0.5, 7, 0],
    "image": [[0.1, 2], (3, 4.5), [5.0, 6]],
    "score": (1, 2.5, None),
    "likes": [[3], [], (1, 9)],
    "likes_by": [[0.3], None, [1, 2.7]],
    "raw": [1e30, -1, 0.25],
    "user": [1, 2, 3],
    "part": [4, 5, None],
}


def test_the_same_as_field_by_field():
    encoder = Encoder(SCHEMA, has_labels=False)
    rows = {
        name: [each and list(each) if isinstance(each, tuple) else each for each in own] for name, own in ROWS.items()
    }
    expected = encoder.encode({name: pa.array(each) for name, each in rows.items()}, Place("request", None))
    plain = PlainRows(SCHEMA, encoder.num_embeddings).read(ROWS)
    assert plain.fields == {each.name for each in SCHEMA.features} - {"words", "part", "both"}
    rest = {name: pa.array(ROWS[name]) for name in ("words", "part")}
    found = encoder.encode(rest, Place("request", None), plain)
    for name in ("single_ids", "absent", "dense"):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name
    for own, wanted in ((found.lists, expected.lists), (found.weighted_lists, expected.weighted_lists)):
        assert np.array_equal(own.offsets, wanted.offsets)
        for ours, theirs in zip(own.values + own.weights, wanted.values + wanted.weights, strict=True):
            assert np.array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("item", [10, 0, 0]), ("item", [-1, 0, 0]), ("item", [True, 0, 0]), ("item", [2**70, 0, 0]), ("item", [1.0, 0, 0]),
        ("item", ["1", 0, 0]), ("item", [1, 2]), ("item", np.zeros(3, np.float32)), ("item", "123"), ("item", [[1], [2], [3]]),
        ("price", [float("nan"), 1, None]), ("raw", [1e39, 0, 0]), ("age", [float("inf"), 0, 0]), ("raw", [10**400, 0, 0]),
        ("score", [False, 0, 0]), ("tags", [[10], [], []]), ("tags", [[None], [], []]), ("tags", [1, [], []]),
        ("likes_by", [[0.1, 2], None, [1, 2]]), ("likes_by", [[float("nan")], None, [1, 2]]),
        ("image", [[1, 2], [3, 4], [5]]), ("image", [[1, 2], [3, 4], None]), ("image", [[1, 2], [3, 4], [5, None]]),
    ],
)  # fmt: skip
def test_what_is_not_plain_is_left_alone(column, values):
    reader = PlainRows(SCHEMA, {name: table.num_embeddings for name, table in SCHEMA.table_of.items()})
    assert reader.read(ROWS) is not None and reader.read(ROWS | {"user": np.arange(3)}) is not None
    assert reader.read(ROWS | {column: values}) is None
    assert reader.read({name: each for name, each in ROWS.items() if name != column}) is None
    assert reader.read({name: [] for name in ROWS}) is None
