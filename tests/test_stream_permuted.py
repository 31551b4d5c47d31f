"""Proves that compiled loops read windows as the encoder reads them, permuted: good values, missing ones and those that it repairs."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from data.errors import InputError
from data.reading.columns import Columns, Place
from data.reading.encode import Encoder
from data.schema import parse_schema
from data.stream.loops import copy_checked, count_boundaries, permute_lists
from data.stream.permuted import Permuted

ID = {"num_embeddings": 50, "embedding_dim": 4}
TYPES = [pa.int8(), pa.uint16(), pa.int32(), pa.int64(), pa.uint64()]
SCHEMA = parse_schema(
    {
        "name": "t",
        "label": "click",
        "group_column": "id0",
        "fields": {
            **{f"id{i}": {"kind": "categorical", **ID} for i in range(len(TYPES))},
            "missing": {"kind": "categorical", **ID},
            "wrapped": {"kind": "categorical", "on_invalid": "modulo", **ID},
            "hashed": {"kind": "categorical", "encoding": "hash", **ID},
            "bags": {"kind": "multi_valued", **ID},
            "holes": {"kind": "multi_valued", "on_invalid": "null", **ID},
            "weighted": {"kind": "weighted_multi_valued", "weights": "by", **ID},
            "logs": {"kind": "numeric", "transform": "log1p"},
            "scaled": {"kind": "numeric", "transform": "standardise", "mean": 2.0, "std": 0.3},
            "image": {"kind": "vector", "width": 3},
            "gone": {"kind": "numeric", "transform": "log1p", "on_invalid": "null"},
            "price": {
                "kind": "numeric",
                "transform": "bucketise",
                "boundaries": [-1.0, 0.1, 5.0],
                **ID,
                "num_embeddings": 5,
            },
        },
    },
    "test",
    Path(),
)


def rows_of(count: int, seed: int) -> pa.RecordBatch:
    draw = np.random.default_rng(seed)

    def lists(low, high, kind, missing=0.0):
        own = [draw.integers(low, high, length).tolist() for length in draw.integers(0, 9, count)]
        return pa.array([None if draw.random() < missing else each for each in own], pa.list_(kind))

    def some(values, kind):
        return pa.array(values.tolist(), kind, mask=draw.random(count) < 0.2, from_pandas=False)

    bags = lists(0, 50, pa.int64())
    numbers = draw.normal(size=count).astype(np.float32)
    columns = {f"id{i}": pa.array(draw.integers(0, 50, count), kind) for i, kind in enumerate(TYPES)}
    columns |= {
        "click": pa.array(draw.integers(0, 2, count), pa.int8()),
        "missing": some(draw.integers(0, 50, count), pa.int32()),
        "wrapped": pa.array(draw.integers(-9, 60, count)),
        "hashed": some(draw.integers(0, 10**12, count), pa.int64()),
        "bags": lists(0, 50, pa.int32()),
        "holes": lists(-9, 60, pa.int32(), 0.2),
        "weighted": bags,
        "by": pa.array([draw.random(len(each)).tolist() for each in bags.to_pylist()], pa.list_(pa.float32())),
        "logs": pa.array(draw.integers(0, 10**6, count), pa.int32()),
        "scaled": some(numbers, pa.float32()),
        "image": pa.FixedSizeListArray.from_arrays(pa.array(draw.normal(size=3 * count).astype(np.float32)), 3),
        "gone": pa.array(np.where(numbers > 1, np.nan, numbers)),
        "price": pa.array(np.where(numbers > 1, np.float32(0.1), numbers)),
    }
    return pa.RecordBatch.from_pydict(columns)


def rows_in_order(columns: Columns, order: np.ndarray) -> list[object]:
    """Whatever a row holds, row by row."""
    found = []
    for row in order:
        lists = [
            values[offsets[row] : offsets[row + 1]].tolist()
            for each in (columns.lists, columns.weighted_lists)
            for kind in (each.values, each.weights)
            for values, offsets in zip(kind, each.offsets, strict=False)
        ]
        ids, numbers = columns.single_ids[:, row].tolist(), columns.dense[row].tobytes()
        found.append((ids, lists, numbers, columns.labels[row], columns.group_ids[row]))
    return found


@pytest.mark.parametrize("shuffled", [True, False])
def test_a_window_is_what_the_encoder_reads_in_another_order(shuffled):
    batches = [rows_of(count, seed) for seed, count in enumerate((40, 7, 1, 33))]
    parts = [(rows.slice(1), Place("log.parquet", at)) for at, rows in enumerate(batches)]
    total = sum(rows.num_rows for rows, _ in parts)
    order = np.random.default_rng(9).permutation(total)
    plain = Encoder(SCHEMA).encode_all(parts)
    found = Encoder(SCHEMA, Permuted).encode_all(parts, order if shuffled else None)
    assert rows_in_order(found, np.arange(total)) == rows_in_order(plain, order if shuffled else np.arange(total))
    assert (found.repaired, found.nulls, found.absent.tolist()) == (plain.repaired, plain.nulls, plain.absent.tolist())
    assert found.single_ids.dtype == plain.single_ids.dtype and found.lists.offsets.dtype == plain.lists.offsets.dtype


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("id3", 50, "'id3' = 50: wanted an id in"),
        ("logs", None, ""),
        ("price", np.inf, "'price' = inf: wanted a finite"),
        ("image", [1.0, np.nan, 2.0], "'image' = nan: wanted a finite"),
        ("bags", [49, 50], "'bags' = 50: wanted an id in"),
        ("bags", None, ""),
        ("by", [0.5] * 20, "'weighted': . values but 20 weights"),
    ],
)
def test_a_bad_value_is_named_as_the_encoder_names_it(field, value, said):
    rows = rows_of(20, 0)
    at = rows.schema.get_field_index(field)
    values = rows.column(at).to_pylist()
    values[13] = value
    faulty = rows.set_column(at, field, pa.array(values, rows.column(at).type))
    parts = [(rows, Place("log.parquet", 0)), (faulty, Place("log.parquet", 4, 100))]
    encoder, order = Encoder(SCHEMA, Permuted), np.random.default_rng(0).permutation(40)
    if not said:
        assert encoder.encode_all(parts, order).nulls[field] == 1
        return
    with pytest.raises(InputError, match=f"row group 4, row 113, field {said}"):
        encoder.encode_all(parts, order)


@pytest.mark.parametrize("lengths", [[4, 3, 0, 2, 1], [1, 1, 0, 1], [2], [0, 9, 5]])
def test_every_value_of_a_list_is_copied_also_where_four_at_once_would_read_behind_the_last(lengths):
    ends = np.cumsum(lengths)
    values = np.arange(ends[-1], dtype=np.int32)
    for order in (np.arange(len(lengths), dtype=np.uint32), np.arange(len(lengths), dtype=np.uint32)[::-1].copy()):
        out, starts, offsets = np.full(len(values) + 4, -1, np.int32), *np.empty((2, len(lengths) + 1), np.int32)
        permute_lists(values, np.asarray(lengths), order, starts, offsets, out)
        wanted = [values[ends[at] - lengths[at] : ends[at]].tolist() for at in order]
        assert [out[low:high].tolist() for low, high in pairwise(offsets)] == wanted


def test_no_number_outside_of_the_range_is_copied_as_good():
    out = np.empty(3, np.float32)
    for values in ([1, np.nan, 2], [1, 2, 5.5], [0.5, 1, 2]):
        assert not copy_checked(np.asarray(values), 1, 5, out)
    assert copy_checked(np.asarray([1, 5, 2], np.int64), 1, 5, out) and out.tolist() == [1, 5, 2]


def test_numbers_of_float32_fall_into_the_buckets_of_boundaries_that_only_float64_holds():
    boundaries = np.asarray([-1e300, -16777217.0, -0.1, 0.0, 1e-46, 0.1, 16777217.0, 1e300])
    near = boundaries[1:-1].astype(np.float32)
    numbers = np.concatenate([np.nextafter(near, np.float32(side)) for side in (-np.inf, np.inf)] + [near])
    numbers = np.resize(numbers.astype(np.float64), 1200)
    found = np.empty(len(numbers), np.int32)
    count_boundaries(numbers, boundaries, found)
    assert np.array_equal(found, np.searchsorted(boundaries, numbers, side="right") + 1)
