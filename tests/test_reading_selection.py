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
    "yyyymmdd": (pa.int32(), lambda s: int(day_of(s).replace("-", ""))),
    "text": (pa.string(), lambda s: datetime.datetime.fromtimestamp(s, datetime.UTC).strftime("%Y-%m-%dT%H:%M")),
    "text of days": (pa.string(), lambda s: day_of(s).replace("-0", "-")),
}
HOURS = {  # of 30 April 23:00, 1 May 7:00 and 13:00, 2 May 0:00: the rows that meet each
    ">= '2024-05-01'": [1, 2, 3],
    "<= 2024-05-01": [0, 1, 2],
    "> 20240501": [3],
    "< 2024-05-01": [0],
    "= 2024-5-1": [1, 2],
    "!= 2024-05-01": [0, 3],
    "<= 2024-05-01-07": [0, 1],
    "> 2024050107": [2, 3],
    "= '2024-05-01 13:00'": [2],
    ">= 2024-05-01T13": [2, 3],
    "is not null": [0, 1, 2, 3],
    "IS NULL": [],
}
HAS_NO_HOURS = ("date", "yyyymmdd", "text of days")


def day_of(seconds: int) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d")


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
        at = at.cast(pa.int32()).cast(dtype) if kind == "date" else at.cast(dtype)
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
        (["at >= 2024-5-5 and ds < 2024-5-7"], (4, 6)),
        (["ds >= '2024-05-05', at < 20240507"], (4, 6)),
        (['ds == 20240504 AND at <= "2024-05-04"'], (3, 4)),
        (["`ds` <> 2024-05-01", "at < LAST 8"], (1, 2)),
        (["ds >= last 1"], (9, 10)),
        (["at > last 1", "at = last 1"], None),
        (["at != 2024-05-01", "at <> 2024-05-10", "at < 2024-05-03"], (1, 2)),
    ],
    ids=str,
)
def test_whole_days(log, where, days):
    kind, files = log
    if days is None:
        with pytest.raises(InputError, match="hold no rows that where"):
            kept(files, *where)
        return
    assert kept(files, *where) == rows_of_days(*days)
    if kind == "seconds":  # who reads which rows does not depend on the type of a column
        assert kept(files, *where, world_size=4, order="shuffled", workers=1) == rows_of_days(*days)


def test_an_hour_within_a_row_group(log):
    kind, files = log
    if kind in HAS_NO_HOURS:
        return
    assert kept(files, "at >= 2024-05-01T07:00", "at < 2024-05-02T03:00:00") == list(range(7, 27))
    first = kept(files, "at > 2024-05-01T07:00", "at <= 2024-05-02T03:00")[0]
    assert first == (7 if kind == "timestamp[ns]" else 8)


@settings(max_examples=40)
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


def test_without_statistics_the_column_itself_is_read(tmp_path):
    files = write_log(tmp_path, statistics=False)
    assert kept(files, f"at >= {FIRST + 8 * DAY}") == rows_of_days(8, 10)
    assert kept(files, "at >= last 2") == kept(files, "at >= 2024-05-09") == rows_of_days(8, 10)


def test_int96_and_types_that_change_from_day_to_day(tmp_path):
    kinds = ["timestamp[us]", "timestamp[ns]", "date", "text", "timestamp[ms, UTC]"] * 2
    files = []
    for day, kind in enumerate(kinds):
        files.append(write_log(tmp_path / str(day), kind)[day])
    table = pq.ParquetFile(files[6]).read()
    pq.write_table(table, files[6], use_deprecated_int96_timestamps=True, write_page_checksum=True)
    assert kept(files, "at < 2024-05-04") == rows_of_days(0, 3)
    assert kept(files, "at >= last 4") == rows_of_days(6, 10)


@settings(max_examples=20)
@given(
    st.sampled_from(["<", "<=", ">", ">=", "=", "!="]),
    st.integers(-2, 12),
    st.sampled_from(["%Y-%m-%d", "%Y%m%d", "'%Y-%m-%d'", "%Y-%-m-%-d"]),
    st.sampled_from(["at", "ds"]),
)
def test_a_day_compares_as_a_day_in_every_type(log, sign, day, form, name):
    _, files = log
    meets = {"<": int.__lt__, "<=": int.__le__, ">": int.__gt__, ">=": int.__ge__, "=": int.__eq__, "!=": int.__ne__}[
        sign
    ]
    bound = datetime.datetime.fromtimestamp(FIRST + day * DAY, datetime.UTC).strftime(form)
    wanted = [row for row in range(DAYS * ROWS_A_DAY) if meets(row // ROWS_A_DAY, day)]
    if wanted:
        assert kept(files, f"{name} {sign} {bound}") == wanted
    else:
        with pytest.raises(InputError, match=r"none of 10 files is left|hold no rows that where"):
            kept(files, f"{name} {sign} {bound}")


def test_rows_without_a_time_and_hives_null_partition_meet_no_condition(files, tmp_path):
    null = write_rows(tmp_path / "ds=__HIVE_DEFAULT_PARTITION__" / "a.parquet", [7, 8], pa.array([FIRST] * 2))
    some = write_rows(tmp_path / "ds=2024-05-11" / "a.parquet", [240, 241], pa.array([FIRST + 10 * DAY, None]))
    nothing = write_rows(tmp_path / "ds=2024-05-12" / "a.parquet", [242], pa.array([None], pa.int64()))
    assert kept([*files, null], "ds >= last 1") == rows_of_days(9, 10)
    assert kept([*files, null], "ds != 2024-05-01") == rows_of_days(1, 10)
    assert kept([null], "at >= 2024-05-01") == [7, 8]
    assert kept([*files, some, nothing], "at >= last 1") == [240]
    assert kept([*files, some, nothing], "at >= 2024-04-01") == [*rows_of_days(0, 10), 240]
    assert kept([*files, some, nothing], "at is not null and ds > 2024-05-09") == [*rows_of_days(9, 10), 240]
    assert kept([*files, some, nothing], "at IS NULL") == [241, 242]
    with pytest.raises(InputError, match="hold no rows that where"):
        kept([*files, some, nothing], "at IS NULL, at > 2024-05-01")


def test_what_hive_escapes_in_a_folder_is_read(tmp_path):
    path = tmp_path / "city=new%20york" / "hour=2024-05-01%2007%3A00" / "a.parquet"
    files = [write_rows(path, [1], pa.array([FIRST]))]
    assert kept(files, "city = 'new york' and hour = '2024-05-01 07:00'") == [1]


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
        ("ds < 2024-05-02 or ds > 2024-05-04", "for OR, IN or LIKE name files by globs"),
        ("ds < 2024-05-02 and", "wanted NAME OP BOUND"),
        ("not ds = 2024-05-02", "wanted NAME OP BOUND"),
        ("ds in (2024-05-02)", "wanted NAME OP BOUND"),
        ("2024-05-01 <= ds < 2024-05-04", "wanted NAME OP BOUND"),
        ("dt < 3", r"where = 'dt < 3': .*part-0.parquet lies in no folder dt=..., .* known here: ds, at"),
        ("ds < last 11", "the files have 10 values of ds; lower the number"),
        ("ds < last 0", "the bound 'last 0' says nothing; write a value"),
        ("at < last x", "the bound 'last x' says nothing"),
        ("ds < last", "the bound 'last' says nothing"),
        ("ds < ''", "the bound '' says nothing"),
        ("ds = 2023-01-01", "none of 10 files is left"),
        (
            "ds < 2024-02-30",
            "folders such as ds=2024-05-01, ds=2024-05-02 want a day such as 2024-05-25; got '2024-02-30'",
        ),
        ("ds < today", "want a day such as 2024-05-25; got 'today'"),
        ("at >= tomorrow", "'tomorrow' is nothing to compare them with; write a day such as 2024-05-25"),
        ("at < 2024-13-01", "'2024-13-01' is nothing to compare them with"),
        (
            "at < 1714521600000",
            "holds integers up to 17.* .seconds., and '1714521600000' is nothing to compare .* a day such as 2024-05-25",
        ),
        ("at > 2030-01-01", "hold no rows that where = .'at > 2030-01-01'. and sampling keep"),
    ],
)
def test_faulty_conditions_are_explained(files, where, message):
    with pytest.raises(InputError, match=message) as error:
        kept(files, where)
    assert "\n" not in str(error.value)


def test_a_time_column_that_is_missing_or_holds_no_times_is_named(files, tmp_path):
    bad = tmp_path / "ds=2024-05-11" / "part-0.parquet"

    def refused(message, where="at >= last 3", before=files):
        with pytest.raises(InputError, match=message):
            kept([*before, bad], where)

    write_rows(bad, [1], pa.array([1])).unlink()
    pq.write_table(pa.table({"click": [0], "row": [1]}), bad, write_page_checksum=True)
    refused(r"ds=2024-05-11/part-0.parquet: column 'at' is missing, .* add the column to the file")
    hours = write_rows(tmp_path / "at=3" / "a.parquet", [1], pa.array([1]))
    pq.write_table(pa.table({"click": [0], "row": [1]}), hours)
    with pytest.raises(InputError, match="it is a partition folder: remove time_column from the schema, and cond"):
        kept([hours], "at >= 3")
    write_rows(bad, [1], pa.array([datetime.date(2024, 5, 11)]))
    refused(r"time column 'at' is date32\[day\], but int64 in .*ds=2024-05-01")
    write_rows(bad, [1], pa.array([1.5]))
    refused("time column 'at' is double: conditions on it want integers, timestamps, dates or texts")
    write_rows(bad, [1, 2], pa.array(["2024-05-11", "2024-02-30"]))
    refused("row group 0, row 1, time column 'at': '2024-02-30' is no day or time", before=[])
    write_rows(bad, [1, 2], pa.array([7, 900]))
    refused("holds integers up to 900, which are no times: `last N` cannot be told", before=[])
    refused("'2024-05-11' is nothing to compare them with; write an integer", "at < 2024-05-11", [])
    assert kept([bad], "at < 8") == [1]
    write_rows(bad, [0, 1, 2, 3], pa.array([2024043023, 2024050107, 2024050113, 2024050200]))
    for where, rows in HOURS.items():
        if rows:
            assert kept([bad], f"at {where}") == rows
    refused(r"2024050200 .hours written yyyymmddhh.*, and '2024-05-01T07:30' is nothing", "at < 2024-05-01T07:30", [])


@pytest.mark.parametrize("form", ["%Y-%m-%d-%H", "%Y%m%d%H", "%Y-%m-%d_%H", "%Y-%m-%d%%20%H%%3A00%%3A00", "%Y%m%dT%H"])
def test_a_day_as_bound_beside_folders_of_hours_is_the_whole_day(tmp_path, form):
    hours = [datetime.datetime(2024, *each) for each in ((4, 30, 23), (5, 1, 7), (5, 1, 13), (5, 2, 0))]
    files = [
        write_rows(tmp_path / f"dt={hour.strftime(form)}" / "a.parquet", [row], pa.array([1]))
        for row, hour in enumerate(hours)
    ]
    for where, rows in HOURS.items():
        if rows:
            assert kept(files, f"dt {where}") == rows
        else:
            with pytest.raises(InputError, match="none of 4 files is left"):
                kept(files, f"dt {where}")
    assert kept(files, "dt >= last 2") == [2, 3]
    if "00" not in form:  # the folder of an hour holds rows before and after half past
        with pytest.raises(InputError, match="rows of one folder lie on both sides of the bound"):
            kept(files, "dt < 2024-05-01T07:30")


def test_numbers_as_folders_want_numbers(tmp_path):
    numbers = [write_rows(tmp_path / f"hour={hour}" / "a.parquet", [hour], pa.array([1])) for hour in (7, 9)]
    with pytest.raises(InputError, match="hour=7, hour=9 want a number; got '2024-05-01'"):
        kept(numbers, "hour < 2024-05-01")


@pytest.mark.parametrize(
    ("values", "where", "wanted"),
    [
        (["2024-5-9", "2024-05-10", "20240511"], "ds < last 1", [0, 1]),
        (["2024-05-01%2000%3A00%3A00", "2024-05-02%2012%3A00%3A00"], "ds <= 2024-05-01", [0]),
        (["2024-05-01%2000%3A00%3A00", "2024-05-02%2012%3A00%3A00"], "ds = 2024-05-02", [1]),
        (["2024-05-01", "2024-05-02"], "ds < '2024-05-02 00:00:00'", [0]),
        (["2024-05-01", "2024-05-02"], "ds < 2024-05-02T12:00", "lie on both sides of the bound"),
        (["2024-05-01", "", "2024-05-02"], "ds != 2024-05-01", [2]),
        (["2024-05-01", "old"], "ds >= last 1", "want a bound of one form with them"),
        (["v2", "v9", "v10"], "ds >= last 1", "want a bound of one form with them"),
        (["v2", "v9", "v10"], "ds != v9", [0, 2]),
        (["2024-05", "2024-10"], "ds < 2024-06", [0]),
        (["2024-05", "2024-10"], "ds < 2024-6", "want a bound of one form with them"),
        (["2024-05-01", "", "__HIVE_DEFAULT_PARTITION__"], "ds is null", [1, 2]),
        (["2024-05-01", "", "old"], "ds  IS  NOT  NULL", [0, 2]),
        (["2024-05-01", ""], "ds = null", "the bound 'null' says nothing; .* or ds IS NULL"),
        ([""], "ds != x", "none of 1 files is left"),
        (["9" * 60, "5"], f"ds > {'8' * 60}", [0]),
        (["5"], f"ds < {'8' * 5000}", "want a number of the same form"),
        (["1714521600", "1714525200"], "ds >= 20240502", "want a number of the same form"),
        (["1.5", "10.5", "9"], "ds < 9.5", [0, 2]),
    ],
)  # fmt: skip
def test_partitions_compare_as_what_all_their_values_are(tmp_path, values, where, wanted):
    files = [
        write_rows(tmp_path / f"ds={value}" / "a.parquet", [row], pa.array([FIRST])) for row, value in enumerate(values)
    ]
    if isinstance(wanted, list):
        assert kept(files, where) == wanted
    else:
        with pytest.raises(InputError, match=wanted):
            kept(files, where)


def test_integers_of_two_units_and_days_beyond_nanoseconds(tmp_path):
    first = write_rows(tmp_path / "a.parquet", [0, 1], pa.array([FIRST, 0]))
    other = write_rows(tmp_path / "b.parquet", [2], pa.array([FIRST * 1000]))
    assert kept([first], "at < 2024-05-02") == [0, 1] and kept([first], "at != 0") == [0]
    with pytest.raises(
        InputError, match=r"a.parquet: time column 'at' holds 1714521600, which looks like seconds, and"
    ):
        kept([first, other], "at < 2024-05-02")
    with pytest.raises(InputError, match="wanted < or >=; write at >= last 3"):
        kept([first], "at <= last 3")
    days = pa.array([datetime.datetime(9999, 12, 31), datetime.datetime(2024, 5, 1)], pa.timestamp("us"))
    far = write_rows(tmp_path / "c.parquet", [3, 4], days, use_deprecated_int96_timestamps=True)
    assert kept([far], "at > 2024-05-01") == [3] and kept([far], "at <= 9999-12-31") == [3, 4]


def test_texts_stored_as_views_are_filtered(tmp_path):
    texts = pa.array(["2024-05-01", None, "2024-05-02", "2024-05-03"], pa.string_view())
    assert kept([write_rows(tmp_path / "a.parquet", range(4), texts)], "at != 2024-05-02") == [0, 3]
