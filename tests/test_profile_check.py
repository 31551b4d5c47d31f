"""Proves that a check finds every fault by file, row group and column, from footers alone or in every value, and nothing else."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.errors import InputError
from data.profile.check import WHOLE_FILE, CheckReport, check_files
from data.profile.fit import write_fitted
from data.profile.infer import infer_schema
from data.profile.units import Work
from data.reading.decode import RowReader
from data.reading.encode import Encoder
from data.reading.files import RowGroup
from data.schema import parse_schema
from mbcnet_rec.cli import main

FIELDS = {
    "user": {"kind": "categorical", "num_embeddings": 10, "embedding_dim": 4},
    "word": {"kind": "categorical", "encoding": "hash", "num_embeddings": 50, "embedding_dim": 4},
    "tags": {"kind": "weighted_multi_valued", "weights": "w", "num_embeddings": 5, "embedding_dim": 4},
    "price": {"kind": "numeric"},
    "image": {"kind": "vector", "width": 2},
}
ROWS = 40


def schema_of(**changes):
    fields = {name: entry | changes.get(name, {}) for name, entry in FIELDS.items()}
    table = {"name": "s", "label": "click", "group_column": "user", "fields": fields, "groups": {}}
    return parse_schema(table, "s.toml", Path())


def good() -> dict:
    return {
        "user": np.arange(ROWS) % 10,
        "word": [f"w{n}" for n in range(ROWS)],
        "tags": [[n % 5] * (n % 3) for n in range(ROWS)],
        "w": [[0.5] * (n % 3) for n in range(ROWS)],
        "price": np.linspace(0, 1, ROWS),
        "image": [[0.0, 1.0]] * ROWS,
        "click": np.arange(ROWS) % 2,
    }


def write(folder: Path, name: str, statistics: bool = False, **columns) -> Path:
    """Write a file of 4 row groups of 10 rows with page checksums; None drops a column."""
    table = {name: column for name, column in (good() | columns).items() if column is not None}
    path = folder / f"{name}.parquet"
    options = {"write_page_checksum": True, "write_statistics": statistics, "use_dictionary": False}
    pq.write_table(pa.table(table), path, row_group_size=10, **options)
    return path


def changed(name: str, row: int, value) -> dict:
    column = list(good()[name])
    column[row] = value
    return {name: column}


def places(report) -> list[tuple[str, int, str]]:
    return [(Path(fault.file).stem, fault.row_group, fault.column) for fault in report.faults]


def found(files, full=True) -> list[tuple[str, int, str]]:
    return places(check_files(files, schema_of(), full=full))


def test_good_files_have_no_fault(tmp_path):
    full, empty = write(tmp_path, "a", True), tmp_path / "b.parquet"
    pq.write_table(pq.read_table(full).slice(0, 0), empty, write_page_checksum=True)
    seen: list[int] = []
    report = check_files([full, empty], schema_of(), full=True, work=Work(progress=seen.append))
    assert report == CheckReport([], 0, num_files=2, num_row_groups=5, num_rows=ROWS, empty_files=1)
    assert seen[-1] == ROWS


BAD_VALUES = {
    "id too large": ("user", 25, 10, r"row 5, field 'user' = 10: wanted an id in \[0, 10\)"),
    "id negative": ("user", 31, -1, "row 1, field 'user' = -1"),
    "id in a list": ("tags", 14, [0, 5], "row 4, field 'tags' = 5"),
    "nan": ("price", 9, float("nan"), "row 9, field 'price' = nan"),
    "length of a vector": ("image", 20, [1.0], "row 0, field 'image'.*length 1: wanted width = 2"),
    "weights too few": ("w", 11, [0.5], "row 1, field 'tags': 2 values but 1 weights"),
    "label 2": ("click", 39, 2, "row 9, label 'click' = 2"),
    "label null": ("click", 0, None, "row 0, label 'click' is null"),
}


@pytest.mark.parametrize("case", list(BAD_VALUES))
def test_every_bad_value_is_found_in_full(case, tmp_path):
    column, row, value, message = BAD_VALUES[case]
    files = [write(tmp_path, "a"), write(tmp_path, "b", **changed(column, row, value))]
    report = check_files(files, schema_of(), full=True)
    assert places(report) == [("b", row // 10, column.replace("w", "tags"))]
    assert re.search(message, report.faults[0].message), report.faults[0].message
    assert found(files, full=False) == []


def test_the_group_column_is_checked_as_training_reads_it(tmp_path):
    report = check_files([write(tmp_path, "a")], replace(schema_of(), group_column="price"), full=True)
    assert places(report) == [("a", row_group, "price") for row_group in range(4)]
    assert "row 1, group_column 'price' = 0.0256" in report.faults[0].message


def test_all_faults_are_listed_and_capped(tmp_path):
    bad = changed("user", 3, 99) | changed("price", 3, float("inf")) | changed("click", 33, 3)
    files = [write(tmp_path, "a", **bad), write(tmp_path, "b", **changed("user", 3, 99))]
    every = [("a", 0, "user"), ("a", 0, "price"), ("a", 3, "click"), ("b", 0, "user")]
    assert found(files) == every
    report = check_files(files, schema_of(), full=True, max_faults=2)
    assert places(report) == every[:2] and report.num_faults == 4


def test_footers_tell_missing_columns_and_wrong_types(tmp_path):
    files = [
        write(tmp_path, "a", user=None, price=["x"] * ROWS),
        write(tmp_path, "b", click=None, w=None),
        write(tmp_path, "c", tags=[["text"]] * ROWS),
    ]
    report = check_files(files, schema_of(), full=False)
    broken = {"a": ("user", "price"), "b": ("click", "tags"), "c": ("tags",)}
    assert places(report) == [(file, WHOLE_FILE, column) for file in broken for column in broken[file]]
    assert "column 'user' is missing, which is the schema's field 'user'" in report.faults[0].message
    assert "column 'price' is string: numeric field 'price' wants numbers" in report.faults[1].message
    # the full check looks at what is left of such files, and says nothing twice
    write(tmp_path, "a", user=None, price=["x"] * ROWS, **changed("click", 0, 5))
    assert found(files)[-1] == ("a", 0, "click") and len(found(files)) == 6


def test_statistics_tell_of_bad_ids_without_reading_them(tmp_path):
    bad = changed("user", 25, 77) | changed("click", 1, 2) | changed("tags", 14, [-3])
    files = [write(tmp_path, "a", True, **bad)]
    report = check_files(files, schema_of(), full=False)
    assert {*places(report)} == {("a", 2, "user"), ("a", 0, "click"), ("a", 1, "tags")}
    assert "statistics tell of field 'user' = 77: wanted 0 to 9" in next(
        f.message for f in report.faults if f.column == "user"
    )
    assert len(found(files)) == 3, "the full check does not repeat them"
    lenient = schema_of(user={"on_invalid": "modulo"})
    assert {f.column for f in check_files(files, lenient, full=False).faults} == {"click", "tags"}


def test_damage_is_named_by_column(tmp_path):
    path = write(tmp_path, "a")
    chunk = pq.read_metadata(path).row_group(2).column(4)
    assert chunk.path_in_schema == "price"
    damaged = bytearray(path.read_bytes())
    damaged[chunk.data_page_offset + chunk.total_compressed_size - 3] ^= 16
    path.write_bytes(damaged)
    report = check_files([path], schema_of(), full=True)
    assert places(report) == [("a", 2, "price")]
    assert "cannot be decoded" in report.faults[0].message
    path.write_bytes(damaged[: len(damaged) // 2])
    assert found([path], full=False) == [("a", WHOLE_FILE, "")]


def test_the_narrowest_field_of_a_column_is_what_statistics_are_compared_with(tmp_path):
    fields = {f"f{n}": FIELDS["user"] | {"column": "user", "num_embeddings": n} for n in (5, 10, 99)}
    top = {"name": "s", "label": "click", "fields": fields}
    report = check_files([write(tmp_path, "a", True)], parse_schema(top, "s.toml", tmp_path))
    assert "statistics tell of field 'f5' = 9: wanted 0 to 4" in report.faults[0].message


def test_rows_that_arrow_leaves_out_are_a_fault_in_every_command(tmp_path):
    """pyarrow writes dictionaries in lists with a page of no values in front where pages are as small, and ends reading there."""
    kind = pa.list_(pa.dictionary(pa.int32(), pa.string()))
    lists = pa.array([["a"], None, ["b"]], kind)
    path = tmp_path / "x.parquet"
    pq.write_table(
        pa.table({"y": [0, 1, 0], "w": lists}), path, data_page_size=64, row_group_size=1, store_schema=False
    )
    assert pq.read_table(path, columns=["w"]).num_rows == 0
    words = {"kind": "multi_valued", "encoding": "vocabulary", "vocabulary": "fit", "embedding_dim": 4}
    schema = parse_schema({"name": "s", "label": "y", "fields": {"w": words}}, "s.toml", tmp_path)
    lost = "0 rows to read, but 1 by the footer"
    with pytest.raises(InputError, match=f"row group 0, column .* cannot be decoded .{lost}"):
        infer_schema([path])
    with pytest.raises(InputError, match=f"row group 0, column 'w' cannot be decoded .{lost}"):
        write_fitted(schema, [path], tmp_path / "out")
    words |= {"encoding": "hash", "num_embeddings": 9}
    del words["vocabulary"]
    schema = parse_schema({"name": "s", "label": "y", "fields": {"w": words}}, "s.toml", tmp_path)
    assert places(check_files([path], schema, full=True)) == [("x", n, "w") for n in range(3)]
    with pytest.raises(InputError, match=f"row group 0: cannot be decoded .{lost}"):
        list(RowReader([path], Encoder(schema)).scan(RowGroup(0, 0, 1, 1), 64))


def test_an_unfitted_schema_is_enough_for_footers(tmp_path):
    schema = schema_of(price={"transform": "standardise", "mean": "fit", "std": "fit"})
    assert check_files([write(tmp_path, "a")], schema).faults == []
    with pytest.raises(InputError, match="still says 'fit'"):
        check_files([write(tmp_path, "a")], schema, full=True)


def test_the_command_exits_1_on_a_fault(tmp_path, capsys):
    schema = tmp_path / "s.toml"
    user = '{ kind = "categorical", num_embeddings = 10, embedding_dim = 4 }'
    schema.write_text(f'name = "s"\nlabel = "click"\n[fields]\nuser = {user}\n')
    command = ["data", "check", str(write(tmp_path, "a", **changed("user", 25, 10))), "--schema", str(schema)]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "no fault in 1 file, 4 row groups, 40 rows (footers only" in out and "label" not in out
    assert main([*command, "--full"]) == 1
    out = capsys.readouterr().out
    assert "row group 2, column user: row 5, field 'user' = 10: wanted an id" in out
    assert "1 fault(s) in 1 file" in out
    files = [str(write(tmp_path, name, True, click=pa.array([kind] * 40, type))) for name, kind, type in (("b", 1, pa.int8()), ("c", 1.0, pa.float64()))]  # fmt: skip
    for full in ([], ["--full"]):
        assert main(["data", "check", *files, "--schema", str(schema), *full]) == 0
        assert "label 'click' is 1 in every row: nothing can be learned" in capsys.readouterr().out
        assert main(["data", "check", *files, command[2], "--schema", str(schema), *full]) == bool(full)
        assert "in every row" not in capsys.readouterr().out


def test_statistics_of_a_part_of_another_column_are_not_taken_for_the_columns_own(tmp_path):
    top = {
        "name": "s",
        "label": "y",
        "fields": {"user.id": {"kind": "categorical", "num_embeddings": 9, "embedding_dim": 4}},
    }
    table = pa.table({"user": [{"id": 99}] * 4, "user.id": [1, 2, 3, 8], "y": [0, 1, 0, 1]})
    pq.write_table(table, tmp_path / "x.parquet")
    report = check_files([tmp_path / "x.parquet"], parse_schema(top, "s.toml", tmp_path))
    assert report.faults == []
    pq.write_table(table.set_column(1, "user.id", pa.array([1, 2, 3, 9])), tmp_path / "x.parquet")
    report = check_files([tmp_path / "x.parquet"], parse_schema(top, "s.toml", tmp_path))
    assert [fault.column for fault in report.faults] == ["user.id"]
