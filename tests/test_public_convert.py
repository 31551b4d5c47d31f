"""Proves that logs in other formats become the same day-partitioned Parquet whoever converts them, and that no row is lost unsaid."""

import bz2
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.engine import HERE, Engine
from data.errors import InputError
from data.profile.units import Work
from data.public import convert as converting
from data.public import text_rows
from data.public.convert import Request, convert
from data.public.text_rows import Form
from data.schema import parse_schema
from mbcnet_rec.cli import main

HEADER = "user_id,ts,city,price,click\n"


def csv_of(first: int, rows: int) -> str:
    lines = (
        f'{2**62 + n},2024-05-0{n % 3 + 1} 10:00:00,"c{n % 7}{", x" * (n % 2)}",{n}.25,{n % 2}\n'
        for n in range(first, first + rows)
    )
    return HEADER + "".join(lines)


@pytest.fixture
def log(tmp_path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.csv").write_text(csv_of(0, 500))
    (folder / "b.csv.gz").write_bytes(gzip.compress(csv_of(500, 400).encode()))
    (folder / "c.csv.bz2").write_bytes(bz2.compress(csv_of(900, 100).encode()))
    (folder / "d.csv.zst").write_bytes(pa.compress(csv_of(1_000, 9).encode(), "zstd", asbytes=True))
    return folder


@pytest.fixture
def small(monkeypatch):
    """Blocks and row groups of a few rows."""
    monkeypatch.setattr(text_rows, "BLOCK_BYTES", 4_000)
    monkeypatch.setattr(converting, "ROW_GROUP_ROWS", 64)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows_of(out: Path) -> list[dict]:
    return [row for path in sorted(out.rglob("*.parquet")) for row in pq.ParquetFile(path).read().to_pylist()]


def rejects_of(out: Path) -> list[tuple]:
    lines = (out / "rejects.jsonl").read_text().splitlines()
    return [(Path(each["file"]).name, each["line"], each["column"], each["value"]) for each in map(json.loads, lines)]


def test_every_row_comes_out_under_its_day_with_checksums(log, small, tmp_path):
    made = convert([str(log)], tmp_path / "out", Request(day="ts"))
    assert (made.rows, made.rejected, made.days) == (1_009, 0, 3)
    found = rows_of(tmp_path / "out")
    assert sorted(row["user_id"] for row in found) == [2**62 + n for n in range(1_009)]
    assert {row["city"] for row in found} >= {"c0", "c1, x"}
    for path in (tmp_path / "out").rglob("*.parquet"):
        day = path.parent.name.removeprefix("ds=")
        assert {str(row["ts"])[:10] for row in pq.ParquetFile(path).read().to_pylist()} == {day}
    part = pq.ParquetFile(tmp_path / "out/ds=2024-05-01/part-00000.parquet")
    assert part.metadata.num_row_groups == 3 and part.metadata.row_group(0).num_rows == 64
    types = dict(zip(part.schema_arrow.names, map(str, part.schema_arrow.types), strict=True))
    assert types == {
        "user_id": "int64", "ts": "timestamp[us]", "city": "string", "price": "double", "click": "int64",
    }  # fmt: skip
    schema = tmp_path / "s.toml"
    assert main(["schema", "infer", str(tmp_path / "out"), "-o", str(schema), "--label", "click"]) == 0
    config = [str(tmp_path / "out" / "ds=2024-05-01"), "--schema", str(tmp_path / "fit" / "schema.toml")]
    assert main(["schema", "fit", str(schema), config[0], "-o", str(tmp_path / "fit")]) == 0
    assert main(["data", "check", *config]) == 0


def test_two_processes_and_torchrun_write_the_same_bytes(log, small, tmp_path):
    convert([str(log)], tmp_path / "one", Request(day="ts"), Work(HERE))
    convert([str(log)], tmp_path / "two", Request(day="ts"), Work(Engine("local", 2)))
    one = bytes_of(tmp_path / "one")
    # the workers of "two" are processes of their own, with blocks and row groups of the usual size
    assert one.keys() == bytes_of(tmp_path / "two").keys()
    command = [sys.executable, "-m", "mbcnet_rec.cli", "data", "convert", str(log), "--day", "ts", "--out"]
    subprocess.run([*command, str(tmp_path / "alone"), "--workers", "1"], check=True, timeout=120)
    ranks = [
        subprocess.Popen(
            [*command, str(tmp_path / "ranks"), "--engine", "torchrun"],
            env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2"},
        )
        for rank in range(2)
    ]
    try:
        assert [each.wait(120) for each in ranks] == [0, 0]
    finally:
        for each in ranks:
            each.kill()
    alone = bytes_of(tmp_path / "alone")
    assert alone == bytes_of(tmp_path / "two") == bytes_of(tmp_path / "ranks")
    assert not list(tmp_path.glob(".*.work"))


FAULTY = b'''\xef\xbb\xbfuser_id,ts,city,price,click\r
1,2024-05-01 10:00:00,Rome,1.5,0\r
2,2024-05-02,"New\r
York, ""NY""",2,1\r
x3,2024-05-02,Rome,2,1\r
\r
4,2024-05-03,Rome,cheap,1\r
5,2024-05-03,Rome,1\r
6,yesterday,Rome,1,0\r
7,2024-05-03,\xff\xfe,1,0\r
8,2024-05-03,,NULL,0\r
9,,5" disk,3,1
10,20240503,x,1,1
11,2024-5-3 7:30,y,1,1'''


@pytest.mark.parametrize("block", [64, 1 << 20])
def test_what_cannot_be_read_is_set_aside_by_file_line_column_and_value(block, tmp_path, monkeypatch):
    monkeypatch.setattr(text_rows, "BLOCK_BYTES", block)
    (tmp_path / "a.csv").write_bytes(FAULTY)
    types = {"user_id": "int64", "price": "double"}
    made = convert([str(tmp_path / "a.csv")], tmp_path / "out", Request("ts", None, types))
    assert rejects_of(tmp_path / "out") == [
        ("a.csv", 5, "user_id", "x3"),
        ("a.csv", 7, "price", "cheap"),
        ("a.csv", 8, "", "5,2024-05-03,Rome,1"),
        ("a.csv", 9, "ts", "yesterday"),
        ("a.csv", 10, "city", "\ufffd\ufffd"),
    ]
    assert made.rejected == 5 and "line 5, column user_id: 'x3'" in made.first
    found = {row["user_id"]: row for row in rows_of(tmp_path / "out")}
    assert found.keys() == {1, 2, 8, 9, 10, 11}
    assert found[2]["city"].replace("\r", "") == 'New\nYork, "NY"'
    assert found[8]["city"] is None and found[8]["price"] is None
    assert found[9]["city"] == '5" disk'
    assert (tmp_path / "out/ds=__HIVE_DEFAULT_PARTITION__/part-00000.parquet").is_file()


def test_a_quote_is_a_letter_between_tabs_and_takes_no_lines_between_commas(tmp_path):
    """A value that begins with a quote would else reach to the next one, and the rows between would be gone."""
    words = {n: f"q{n}" for n in range(2_000)} | {700: '"artsy', 1_500: '"foo" fighters'}
    (tmp_path / "a.tsv").write_text("id\tquery\n" + "".join(f"{n}\t{word}\n" for n, word in words.items()))
    assert convert([str(tmp_path / "a.tsv")], tmp_path / "tabs", Request()).rejected == 0
    assert {row["id"]: row["query"] for row in rows_of(tmp_path / "tabs")} == words
    words[300] = '"two\nlines"'
    (tmp_path / "a.csv").write_text("id,query\n" + "".join(f"{n},{word}\n" for n, word in words.items()))
    made = convert([str(tmp_path / "a.csv")], tmp_path / "commas", Request())
    found = {row["id"]: row["query"] for row in rows_of(tmp_path / "commas")}
    del words[700]
    assert made.rows == 1_999 and found == words | {300: "two\nlines", 1_500: "foo fighters"}
    assert rejects_of(tmp_path / "commas") == [("a.csv", 703, "", '700,"artsy')]


def test_values_of_parquet_stay_what_they_are(tmp_path):
    """What does not fit the type that all files, a schema or the user want ends it, and names file, row group, column and value; NaN is missing."""

    def converted(given, *columns):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for number, column in enumerate(columns):
            pq.write_table(pa.table({"x": column}), folder / f"{number}.parquet")
        convert([str(folder)], tmp_path / f"{folder.name}_out", Request("", None, {"x": given} if given else {}))
        return [row["x"] for row in rows_of(tmp_path / f"{folder.name}_out")]

    assert converted("int64", [7.0, float("nan"), None]) == [7, None, None]
    assert converted("", pa.array([1, 2**63 - 1]), pa.array([2**64 - 1], pa.uint64())) == [1, 2**63 - 1, 2**64 - 1]
    assert converted("", pa.array([1_714_557_600_000_000_001], pa.timestamp("ns")), pa.array([0], pa.timestamp("us")))
    for given, columns, words in (
        ("int64", [[7.0, 7.5]], "double as int64: Float value 7.5"),
        ("", [pa.array([-1]), pa.array([2**64 - 1], pa.uint64())], "int64 as uint64: Integer value -1 not in range"),
        ("int16", [[300, 70_000]], "int64 as int16: Integer value 70000 not in range"),
        ("list<int64>", [[[1.0], [2.5]]], "Float value 2.5"),
    ):
        with pytest.raises(InputError, match=rf"0.parquet, row group 0: column 'x': .*{words}"):
            converted(given, *columns)


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_folders_that_name_a_value_are_columns_of_their_files(kind, tmp_path):
    """As Hive and Spark lay files; a column that the files have themselves is theirs, and the days of --day take the place of `ds`."""
    for country, rows in (("US", [1, 2]), ("__HIVE_DEFAULT_PARTITION__", [3])):
        folder = tmp_path / f"logs/ds=2024-05-01/country={country}/x=none"
        folder.mkdir(parents=True)
        table = pa.table({"x": rows, "t": ["2024-05-02"] * len(rows)})
        if kind == "parquet":
            pq.write_table(table, folder / "a.parquet")
        else:
            lines = [f"{row['x']},{row['t']}" if kind == "csv" else json.dumps(row) for row in table.to_pylist()]
            (folder / f"a.{kind}").write_text("\n".join((["x,t"] if kind == "csv" else []) + lines) + "\n")
    convert([str(tmp_path / "logs")], tmp_path / "out", Request(day="t"))
    found = sorted(rows_of(tmp_path / "out"), key=lambda row: row["x"])
    assert [(row["x"], row["country"]) for row in found] == [(1, "US"), (2, "US"), (3, None)]
    assert "ds" not in found[0] and (tmp_path / "out/ds=2024-05-02").is_dir()
    convert([str(tmp_path / "logs")], tmp_path / "same", Request(day="ds"))
    assert [path.name for path in (tmp_path / "same").glob("ds=*")] == ["ds=2024-05-01"]


def test_days_of_zoned_times_are_those_of_utc_whatever_the_format(tmp_path):
    at = pa.array([1_716_580_800], pa.timestamp("s", "Asia/Shanghai"))  # 2024-05-25 04:00 there
    pq.write_table(pa.table({"t": at}), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("t\n2024-05-25T04:00:00+08:00\n")
    for file in ("a.parquet", "a.csv"):
        convert([str(tmp_path / file)], tmp_path / f"{file}_out", Request(day="t"))
        assert [path.name for path in (tmp_path / f"{file}_out").glob("ds=*")] == ["ds=2024-05-24"]


def test_json_lines_keep_lists_and_large_ids(tmp_path):
    rows = [
        {"id": 2**64 - 1 - n, "tags": ["a", "b"][: n % 3], "signs": [2**62 + n, 2**63 + n][: n % 3], "at": 1_714_557_600_000 + n, "y": n % 2}
        for n in range(50)
    ]  # fmt: skip
    lines = [json.dumps(row) for row in rows]
    lines[7:7] = ["{broken", '{"id": "x", "tags": [], "at": 1714557600000, "y": 0}', ""]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"id": 5, "at": 1714644000000, "new": 1}\n'))
    made = convert([str(tmp_path / "*.jsonl*")], tmp_path / "out", Request(day="at"))
    assert rejects_of(tmp_path / "out") == [("a.jsonl", 8, "", "{broken"), ("a.jsonl", 9, "id", '"x"')]
    found = rows_of(tmp_path / "out")
    assert [row | {"new": None} for row in rows] == found[:50]
    assert found[50] == {"id": 5, "tags": None, "signs": None, "at": 1_714_644_000_000, "y": None, "new": 1}
    assert (made.rows, made.days) == (51, 2)


@pytest.mark.parametrize(
    ("values", "days"),
    [
        (["20240501", "20240502"], ["2024-05-01", "2024-05-02"]),
        (["2024050123", "2024050200"], ["2024-05-01", "2024-05-02"]),
        (["1714607999", "1714608000"], ["2024-05-01", "2024-05-02"]),
        (["1714607999999", "1714608000000"], ["2024-05-01", "2024-05-02"]),
        (["2024-05-01T23:59:59Z", "2024-05-02T00:00:00Z"], ["2024-05-01", "2024-05-02"]),
        (["2024-5-1 night", "2024-5-2"], None),
    ],
)
def test_days_are_told_by_integers_and_texts(values, days, tmp_path):
    (tmp_path / "a.csv").write_text("t,x\n" + "".join(f"{value},1\n" for value in values))
    convert([str(tmp_path / "a.csv")], tmp_path / "out", Request(day="t"))
    if days is None:
        assert rejects_of(tmp_path / "out") == [("a.csv", 2, "t", values[0])]
    else:
        assert sorted(path.name for path in (tmp_path / "out").glob("ds=*")) == [f"ds={day}" for day in days]


def test_a_schema_tells_types_and_lists(tmp_path):
    fields = {
        "item": {"kind": "categorical", "encoding": "hash", "num_embeddings": 9, "embedding_dim": 4, "type": "text"},
        "seen": {"kind": "multi_valued", "num_embeddings": 99, "embedding_dim": 4, "pooling": "sum"},
        "price": {"kind": "numeric"},
        "last": {"kind": "sequence", "num_embeddings": 9, "embedding_dim": 4, "max_length": 3, "pooling": "mean"},
    }
    schema = parse_schema({"name": "s", "label": "y", "groups": {}, "fields": fields}, "s.toml", tmp_path)
    (tmp_path / "day_0").write_text("1;7^8;1;0;2^1\n2;;2;1;\n3;7^x;3;1;\n")
    form = Form(";", ("item", "seen", "price", "y", "last"), "^")
    convert([str(tmp_path / "day_0")], tmp_path / "out", Request("", schema, {}, form))
    assert rows_of(tmp_path / "out") == [
        {"item": "1", "seen": [7, 8], "price": 1.0, "y": 0, "last": [2, 1]},
        {"item": "2", "seen": None, "price": 2.0, "y": 1, "last": None},
    ]
    assert rejects_of(tmp_path / "out") == [("day_0", 3, "seen", "7^x")]


def test_ids_with_leading_zeros_stay_texts_and_columns_may_come_later(tmp_path):
    (tmp_path / "a.csv").write_text("zip,x\n00501,1\n10001,2\n")
    (tmp_path / "b.csv").write_text("x,zip,y\n1.5,7,true\n")
    convert([str(tmp_path / "*.csv")], tmp_path / "out", Request())
    assert rows_of(tmp_path / "out") == [
        {"zip": "00501", "x": 1.0, "y": None}, {"zip": "10001", "x": 2.0, "y": None}, {"zip": "7", "x": 1.5, "y": True},
    ]  # fmt: skip


def test_a_conversion_that_ended_half_way_goes_on_with_what_is_missing(log, small, tmp_path):
    convert([str(log)], tmp_path / "one", Request(day="ts"))
    seen: list[dict[str, int]] = []

    def look(rows: int) -> None:
        seen.append({path.parent.name: path.stat().st_mtime_ns for path in tmp_path.glob(".out.work/*/*/found.json")})
        if len(seen) == 2:
            raise InputError("the power is gone")

    with pytest.raises(InputError, match="power"):
        convert([str(log)], tmp_path / "out", Request(day="ts"), Work(progress=look))
    assert not (tmp_path / "out").exists()
    convert([str(log)], tmp_path / "out", Request(day="ts"), Work(progress=look))
    assert seen[1].items() <= seen[-1].items() and len(seen[-1]) == 4, "what was done was not done again"
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "one")
    before = seen[:]
    assert convert([str(log)], tmp_path / "out", Request(day="ts"), Work(progress=look)).rows == 1_009
    assert seen == before, "a result that is there is not made again"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{log}/none"], "none"),
        (["{log}", "--day", "when"], "--day when: no such column; the files have user_id, ts"),
        (["{log}", "--type", "price"], "wanted COLUMN=TYPE"),
        (["{log}", "--type", "price=money"], "--type price=money: no such type"),
        (["{log}", "--type", "prize=double"], "--type prize=double: no such column"),
        (["{log}", "--type", "city=int64"], "1,009 of 1,009 rows cannot be read, the first at {log}/a.csv: line 2, column city: 'c0'"),
        (["{log}/../bad.csv.gz"], "bad.csv.gz: line 1: cannot be read"),
        (["{log}/../twice.csv"], "the header names 'a' 2 times"),
        (["{log}/../empty.csv"], "the files hold no rows"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_nothing_is_left(words, message, log, tmp_path, capsys):
    (tmp_path / "bad.csv.gz").write_bytes(b"no gzip")
    (tmp_path / "twice.csv").write_text("a,a\n1,2\n")
    (tmp_path / "empty.csv").write_text("a,b\n")
    before = sorted(tmp_path.rglob("*"))
    words = [word.format(log=log) for word in words]
    assert main(["data", "convert", *words, "--out", str(tmp_path / "out"), "--workers", "1"]) == 2
    error = capsys.readouterr().err
    assert message.format(log=log) in error and error.startswith("mbcnet: ") and error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_ranks_that_come_late_are_waited_for(log, tmp_path):
    command = [
        sys.executable,
        "-m",
        "mbcnet_rec.cli",
        "data",
        "convert",
        str(log / "a.csv"),
        "--out",
        str(tmp_path / "out"),
    ]
    command += ["--engine", "torchrun"]
    first, second = ({"RANK": rank, "WORLD_SIZE": "2"} for rank in "01")
    with subprocess.Popen(command, env=os.environ | first) as early:
        try:
            with pytest.raises(subprocess.TimeoutExpired):
                early.wait(2)
            assert not (tmp_path / "out").exists(), "the second rank would take the result for an earlier one"
            subprocess.run(command, env=os.environ | second, check=True, timeout=60)
            assert early.wait(60) == 0
        finally:
            early.kill()
    assert len(rows_of(tmp_path / "out")) == 500


def test_other_results_are_not_replaced(log, tmp_path):
    convert([str(log)], tmp_path / "out", Request(day="ts"))
    with pytest.raises(InputError, match="was converted from other files or otherwise"):
        convert([str(log / "a.csv")], tmp_path / "out", Request(day="ts"))


def test_delta_tables_get_their_partitions_back_as_columns(tmp_path):
    deltalake = pytest.importorskip("deltalake")
    table = pa.table({"city": ["Rome", "a/b", None], "day": ["2024-05-01"] * 3, "id": [1, 2, 3]})
    deltalake.write_deltalake(tmp_path / "t", table, partition_by=["city"])
    deltalake.write_deltalake(tmp_path / "t", table.slice(0, 1), mode="overwrite")
    made = convert([f"delta://{tmp_path}/t@0"], tmp_path / "out", Request(day="day"))
    found = sorted(rows_of(tmp_path / "out"), key=lambda row: row["id"])
    assert made.rows == 3 and found == [{"city": c, "day": "2024-05-01", "id": n} for c, n in zip(["Rome", "a/b", None], [1, 2, 3], strict=True)]  # fmt: skip
    assert convert([f"delta://{tmp_path}/t"], tmp_path / "now", Request()).rows == 1


ICEBERG = """
import sys
import pyarrow as pa
from pyiceberg.catalog import load_catalog
from mbcnet_rec.cli import main

folder = sys.argv[1]
catalog = load_catalog("x", type="sql", uri=f"sqlite:///{folder}/c.db", warehouse=f"file://{folder}/ice")
catalog.create_namespace("a")
table = catalog.create_table("a.b", schema=pa.schema([("id", pa.int64()), ("old", pa.int64())]))
table.append(pa.table({"id": [1, 2], "old": [10, 20]}))
first = table.current_snapshot().snapshot_id
with table.update_schema() as update:
    update.rename_column("old", "new")
table.append(pa.table({"id": [3], "new": [30]}))
name = f"iceberg://{table.metadata_location.removeprefix('file://')}"
for text, out in ((name, "out"), (f"{name}@{first}", "first")):
    assert main(["data", "convert", text, "--out", f"{folder}/{out}", "--workers", "1"]) == 0
assert main(["data", "check", name, "--schema", "data/schemas/adult.toml"]) == 2
"""


def test_iceberg_columns_are_found_by_number_whatever_files_call_them(tmp_path):
    pytest.importorskip("pyiceberg")
    pytest.importorskip("sqlalchemy")
    (tmp_path / "ice").mkdir()
    command = [sys.executable, "-c", ICEBERG, str(tmp_path)]  # its threads end with its process
    told = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[1])
    assert told.returncode == 0, told.stderr
    assert "are read by `mbcnet data convert`" in told.stderr
    found = sorted(rows_of(tmp_path / "out"), key=lambda row: row["id"])
    assert found == [{"id": n, "new": 10 * n} for n in (1, 2, 3)]
    assert len(rows_of(tmp_path / "first")) == 2
