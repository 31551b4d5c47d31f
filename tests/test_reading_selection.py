"""Proves that conditions keep the rows that a plain comparison keeps, without rewriting files, and that faulty ones are explained."""

import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import InputError
from data.reading.config import StreamOptions
from data.schema import parse_schema
from data.stream import ParquetStream

DAY = 86_400
FIRST = 1_714_521_600  # 2024-05-01T00:00Z
DAYS, ROWS_A_DAY = 10, 24
FIELDS = {"row": {"kind": "categorical", "num_embeddings": 1000, "embedding_dim": 4}}
TABLE = {"name": "t", "label": "click", "time_column": "at", "fields": FIELDS}
SCHEMA = parse_schema(TABLE, "schema.toml", Path())
KINDS = {
    "seconds": (pa.int64(), lambda s: s),
    "milliseconds": (pa.int64(), lambda s: s * 1000),
    "timestamp[us]": (pa.timestamp("us"), lambda s: s * 10**6),
    "timestamp[ns]": (pa.timestamp("ns"), lambda s: s * 10**9 + 1),
    "timestamp[ms, UTC]": (pa.timestamp("ms", "UTC"), lambda s: s * 1000),
    "date": (pa.date32(), lambda s: s // DAY),
}


def write_rows(path: Path, rows, at: pa.Array, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"click": [row % 2 for row in rows], "row": list(rows), "at": at})
    pq.write_table(table, path, **{"write_page_checksum": True} | options)
    return path


def write_log(folder: Path, kind: str = "seconds", statistics=True) -> list[Path]:
    """One file a day, one row an hour; row i is at hour i."""
    dtype, convert = KINDS[kind]
    files = []
    for day in range(DAYS):
        rows = range(day * ROWS_A_DAY, (day + 1) * ROWS_A_DAY)
        at = pa.array([convert(FIRST + row * 3600) for row in rows])
        at = at.cast(pa.int32() if kind == "date" else pa.int64()).cast(dtype)
        path = folder / f"ds=2024-05-{day + 1:02d}" / "part-0.parquet"
        files.append(write_rows(path, rows, at, row_group_size=5, write_statistics=statistics))
    return files


@pytest.fixture(scope="module", params=list(KINDS))
def log(request, tmp_path_factory):
    return request.param, write_log(tmp_path_factory.mktemp("log"), request.param)


def kept(files, *where, world_size=1, **options):
    rows = []
    for rank in range(world_size):
        options = {"order": "chronological", "prefetch": 0} | options
        stream = ParquetStream(files, SCHEMA, StreamOptions(16, 4, where=where, **options), rank, world_size)
        for batch in stream:
            real = int((batch.weights > 0).sum())
            own = batch.sparse_features.values().tolist()
            assert batch.labels[:real].tolist() == [row % 2 for row in own]
            rows += own
        assert stream.num_rows * world_size >= len(rows)
    return sorted(rows)


def rows_of_days(first, last):
    return list(range(first * ROWS_A_DAY, last * ROWS_A_DAY))


@pytest.mark.parametrize(
    ("where", "days"),
    [
        (["ds >= last 7"], (3, 10)),
        (["ds > 2024-05-04", "ds<=2024-05-06"], (4, 6)),
        (["at < last 7"], (0, 3)),
        (["at >= last 7"], (3, 10)),
        (["at = 2024-05-04"], (3, 4)),
        (["at > 2024-05-04", "at <= 2024-05-06"], (4, 6)),
        (["at >= 2024-05-05", "ds < 2024-05-07"], (4, 6)),
    ],
    ids=str,
)
def test_whole_days(log, where, days):
    _, files = log
    assert kept(files, *where) == rows_of_days(*days)
    assert kept(files, *where, world_size=4, order="shuffled", workers=1) == rows_of_days(*days)


def test_an_hour_within_a_row_group(log):
    kind, files = log
    if kind == "date":
        return  # has no hours
    assert kept(files, "at >= 2024-05-01T07:00", "at < 2024-05-02T03:00:00") == list(range(7, 27))
    first = kept(files, "at > 2024-05-01T07:00", "at <= 2024-05-02T03:00")[0]
    assert first == (7 if kind == "timestamp[ns]" else 8)


@settings(max_examples=40, deadline=None)
@given(st.integers(-5, 245), st.integers(0, 250), st.sampled_from(["shuffled", "chronological"]))
def test_any_interval_is_a_plain_comparison(files, low, span, order):
    wanted = [row for row in range(DAYS * ROWS_A_DAY) if low <= row < low + span]
    where = (f"at >= {FIRST + low * 3600}", f"at < {FIRST + (low + span) * 3600}")
    if wanted:
        assert kept(files, *where, order=order, workers=1) == wanted
    else:
        with pytest.raises(InputError, match="hold no rows that where"):
            kept(files, *where, order=order)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_log(tmp_path_factory.mktemp("log"))


def test_without_statistics_plain_bounds_work_and_relative_ones_are_refused(tmp_path):
    files = write_log(tmp_path, statistics=False)
    assert kept(files, f"at >= {FIRST + 8 * DAY}") == rows_of_days(8, 10)
    said = r"part-0.parquet: row group 0 has no statistics of the time column 'at'"
    with pytest.raises(InputError, match=said):
        kept(files, "at >= last 2")


def test_conditions_and_sampling_together(files):
    where = ("at >= 2024-05-03T05:00", "at < 2024-05-09T20:00")
    everything = kept(files, *where)
    sampled = kept(files, *where, keep_negatives=0.5)
    assert set(sampled) < set(everything)
    assert [row for row in sampled if row % 2] == [row for row in everything if row % 2]
    assert kept(files, *where, keep_negatives=0.5, order="shuffled", world_size=2, workers=2) == sampled


def test_numbers_in_partitions_compare_as_numbers(tmp_path):
    paths = {hour: tmp_path / f"hour={hour}" / "a.parquet" for hour in (2, 10, 9)}
    files = [write_rows(path, [hour], pa.array([FIRST])) for hour, path in paths.items()]
    assert kept(files, "hour >= 9") == [9, 10] and kept(files, "hour < last 1") == [2, 9]
    assert kept(files, "hour != 9") == [2, 10]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("ds", "where = 'ds': wanted NAME OP BOUND, for example 'ds < last 7'"),
        ("dt < 3", r"where = 'dt < 3': .*part-0.parquet lies in no folder dt=..., .* known here: ds, at"),
        ("ds < last 11", "the files have 10 values of ds; lower the number"),
        ("ds = 2023-01-01", "none of 10 files is left"),
        (
            "at >= tomorrow",
            "'tomorrow' is not an instant of a column of int64; write a day such as 2024-05-25",
        ),
        ("at != 2024-05-05", "!= is for partitions only; use < and >"),
        ("at > 2030-01-01", "hold no rows that where = .'at > 2030-01-01'. and sampling keep"),
    ],
)
def test_faulty_conditions_are_explained(files, where, message):
    with pytest.raises(InputError, match=message) as error:
        kept(files, where)
    assert "\n" not in str(error.value)


def test_a_null_instant_and_a_missing_time_column_are_named(files, tmp_path):
    bad = tmp_path / "ds=2024-05-11" / "part-0.parquet"

    def refused(message):
        with pytest.raises(InputError, match=message):
            kept([*files, bad], "at >= last 3")

    write_rows(bad, [1, 2], pa.array([FIRST + 99 * DAY, None]))
    refused(r"ds=2024-05-11/part-0.parquet: row group 0, row 1, time column 'at' is null")
    pq.write_table(pa.table({"click": [0], "row": [1]}), bad, write_page_checksum=True)
    refused(r"ds=2024-05-11/part-0.parquet: column 'at' is missing")
    write_rows(bad, [1], pa.array([datetime.date(2024, 5, 11)]))
    refused(r"time column 'at' is date32\[day\], but int64 in .*ds=2024-05-01")
