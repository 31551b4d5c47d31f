"""Proves that `mbcnet predict --engine` writes the same bytes whoever scores which file, each row once, and goes on after a kill with what is missing."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from serving_data import artifact_of, printed_by

from data.engine import Engine
from data.errors import InputError
from mbcnet_rec.scoring.predict_files import predict_files

COLUMNS = ["user", "probability", *(f"probability_{name}" for name in ("efgc", "cross", "deep"))]


@pytest.fixture(scope="module")
def log(runs, tmp_path_factory) -> Path:
    """The test rows as files of several lengths, one without rows."""
    folder, rows = tmp_path_factory.mktemp("log"), pq.read_table(runs / "test.parquet").drop_columns(["click"])
    for name, part in (("ds=1/a", rows[:700]), ("ds=2/a", rows[700:1_900]), ("b", rows[1_900:]), ("empty", rows[:0])):
        path = folder / f"{name}.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(part, path, row_group_size=300, write_page_checksum=True)
    return folder


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def whole(folder: Path) -> pa.Table:
    return pa.concat_tables(pq.read_table(folder / f"{name}.parquet") for name in ("ds=1/a", "ds=2/a", "b", "empty"))


def command(runs: Path, log: Path, out: Path, engine: str, *more: str, **env: str) -> subprocess.Popen[str]:
    words = ["predict", str(runs / "row_wise"), "--data", str(log), "--out", str(out), "--engine", engine, *more]
    script = "import sys; from mbcnet_rec.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.Popen(
        [sys.executable, "-c", script, *words], env=os.environ | env,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.long
def test_one_process_two_and_two_ranks_give_the_same_bytes_and_each_row_once(runs, log, tmp_path, capsys):
    one, two, ranks = (tmp_path / name for name in ("one", "two", "ranks"))
    assert predict_files(str(runs / "row_wise"), [str(log)], str(one), Engine()) == 0
    assert "2,000 rows in 4 files, weights of step" in capsys.readouterr().out
    started = [command(runs, log, two, "local", "--workers", "2")]
    started += [command(runs, log, ranks, "torchrun", RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank)) for rank in range(2)]  # fmt: skip
    try:
        told = [each.communicate(timeout=300)[0] for each in started]
    finally:
        for each in started:
            each.kill()
    assert [each.returncode for each in started] == [0, 0, 0], told
    assert told[2] == "", "the first rank speaks for all"
    assert sorted(bytes_of(one)) == ["_predict.json", "b.parquet", "ds=1/a.parquet", "ds=2/a.parquet", "empty.parquet"]
    assert bytes_of(one) == bytes_of(two) == bytes_of(ranks)
    found, earlier = whole(one), pq.read_table(runs / "row_wise_predicted_1" / "test.parquet")
    assert found.column_names == COLUMNS and found["user"].equals(earlier["user"])
    for name in COLUMNS[1:]:
        assert np.abs(found[name].to_numpy() - earlier[name].to_numpy()).max() < 1e-5, "as without --engine"


@pytest.mark.long
def test_a_killed_prediction_goes_on_with_the_files_that_are_missing(runs, log, tmp_path):
    data, out = tmp_path / "in", tmp_path / "out"
    data.mkdir()
    for number in range(12):
        shutil.copy(log / "ds=2" / "a.parquet", data / f"{number:02d}.parquet")
    killed = command(runs, data, out, "local", "--workers", "1")
    try:
        while not (there := sorted(out.glob("*.parquet"))):
            assert killed.poll() is None, killed.communicate()[0]
        killed.send_signal(signal.SIGKILL)
    finally:
        killed.kill()
        killed.communicate()
    there = {path: path.stat().st_mtime_ns for path in sorted(out.glob("*.parquet"))}
    assert 1 <= len(there) < 12 and all(pq.read_metadata(path).num_rows == 1_200 for path in there)
    code, text, err = printed_by("predict", runs / "row_wise", "--data", data, "--out", out, "--engine", "local", "--workers", "1")  # fmt: skip
    assert code == 0 and f"14,400 rows in 12 files ({1_200 * len(there):,} of them were there already)" in text, err
    assert there == {path: path.stat().st_mtime_ns for path in there}, "what was done was not done again"
    tables = [pq.read_table(path) for path in sorted(out.glob("*.parquet"))]
    assert all(table.equals(tables[0]) for table in tables)
    assert {path.name for path in out.iterdir()} == {
        "_predict.json",
        *(f"{number:02d}.parquet" for number in range(12)),
    }


def test_a_faulty_file_leaves_the_others_scores_and_other_weights_are_refused(runs, log, tmp_path):
    data, out = tmp_path / "in", tmp_path / "out"
    data.mkdir()
    rows = pq.read_table(log / "b.parquet")
    bad = rows.to_pydict()
    bad["user"][50] = 500
    pq.write_table(rows, data / "a.parquet")
    pq.write_table(pa.Table.from_pydict(bad, schema=rows.schema), data / "b.parquet")
    arguments = (str(runs / "row_wise"), [str(data)], str(out), Engine())
    with pytest.raises(InputError, match=r"b.parquet: row group 0, row 50, field 'user' = 500"):
        predict_files(*arguments)
    assert [path.name for path in out.rglob("*.parquet") if path.is_file()] == ["a.parquet"]
    with pytest.raises(InputError, match="holds a prediction with other weights"):
        predict_files(str(runs / "table_wise"), *arguments[1:])
    pq.write_table(rows, data / "b.parquet")
    stamp = (out / "a.parquet").stat().st_mtime_ns
    assert predict_files(*arguments) == 0 and (out / "a.parquet").stat().st_mtime_ns == stamp
    first, second = (pq.read_table(out / f"{name}.parquet") for name in "ab")
    assert first.equals(second)


def test_an_artifact_scores_files_near_its_run(runs, log, tmp_path):
    out = tmp_path / "out"
    assert predict_files(str(artifact_of(runs)), [str(log)], str(out), Engine()) == 0
    found, earlier = whole(out), pq.read_table(runs / "row_wise_predicted_1" / "test.parquet")
    assert found.column_names == COLUMNS and found["user"].equals(earlier["user"])
    for name in COLUMNS[1:]:
        assert np.abs(found[name].to_numpy() - earlier[name].to_numpy()).max() < 0.05, "its rows are int8"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--workers", "2"], "add --engine local"),
        (["--engine", "local", "--gpus", "1"], "what Ray sets aside"),
        (["--engine", "torchrun"], "RANK and WORLD_SIZE are not set"),
        (["--engine", "ray", "--cpus", "-1"], "--cpus -1"),
    ],
)
def test_what_an_engine_cannot_do_is_told(words, message, runs, log, tmp_path):
    code, _, err = printed_by("predict", runs / "row_wise", "--data", log, "--out", tmp_path / "out", *words)
    assert code == 2 and message in err and not (tmp_path / "out").exists()
