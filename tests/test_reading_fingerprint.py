"""Proves that the fingerprint of a split changes with its rows and names, and with nothing else, and that differences are named."""

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.errors import InputError
from data.reading.files import resolve_files
from data.reading.fingerprint import fingerprint, mark_differences, mark_files


def write(path: Path, values: list[int]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"x": values}), path)
    return path


def marks(folder: Path):
    return mark_files(resolve_files([str(folder)]))


def test_the_same_files_elsewhere_have_the_same_fingerprint(tmp_path):
    write(tmp_path / "a/p.parquet", [1, 2, 3])
    before = fingerprint(marks(tmp_path / "a"))
    shutil.copytree(tmp_path / "a", tmp_path / "moved/a")
    assert fingerprint(marks(tmp_path / "moved")) == before and len(before) == 64


def test_rows_in_another_order_are_other_data_though_size_and_statistics_are_equal(tmp_path):
    first = write(tmp_path / "a/p.parquet", [1, 2, 1, 2])
    second = write(tmp_path / "b/p.parquet", [1, 2, 2, 1])
    assert first.stat().st_size == second.stat().st_size
    old, new = marks(tmp_path / "a"), marks(tmp_path / "b")
    assert fingerprint(old) != fingerprint(new)
    assert mark_differences(old, new) == "1 changed (p.parquet)"


def test_a_footer_longer_than_the_tail_counts_as_a_whole(tmp_path):
    names = [f"column_{number}" for number in range(1500)]
    for folder, first in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        columns = {name: [0] for name in names} | {names[0]: [first]}
        pq.write_table(pa.table(columns), tmp_path / folder / "p.parquet")
    old, new = marks(tmp_path / "a"), marks(tmp_path / "b")
    assert old[0].size > 200_000 and old[0].sha256 != new[0].sha256


def test_what_differs_is_named(tmp_path):
    for number in range(5):
        write(tmp_path / f"a/p{number}.parquet", [number])
    old = marks(tmp_path / "a")
    for number in (0, 1):
        (tmp_path / f"a/p{number}.parquet").unlink()
    write(tmp_path / "a/p2.parquet", [7])
    write(tmp_path / "a/q.parquet", [8])
    assert mark_differences(old, marks(tmp_path / "a")) == (
        "1 changed (p2.parquet), 2 no longer there (p0.parquet, p1.parquet), 1 new (q.parquet)"
    )
    assert mark_differences(old, old[::-1]) == "in another order"
    assert mark_differences(old, [list(mark) for mark in old]) == ""
    assert mark_differences([], old) == "5 new (p0.parquet, p1.parquet, p2.parquet, ...)"


def test_a_file_that_is_gone_or_empty(tmp_path):
    (tmp_path / "empty.parquet").touch()
    assert marks(tmp_path)[0].size == 0
    with pytest.raises(InputError, match=r"gone\.parquet: cannot be read"):
        mark_files([tmp_path / "gone.parquet"])


def test_a_uri_is_read_as_a_folder_is(tmp_path):
    path = write(tmp_path / "a/p.parquet", [1, 2, 3])
    here = mark_files([path])
    assert mark_files(resolve_files([f"file://{path}"])) == here
