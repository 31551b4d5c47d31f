"""infer, fit and check give the same bytes whoever reads which unit: one process, several, torchrun's ranks, Ray, in another order, after a worker
was killed, and after a job that ended half-way; a file that changes under a job is refused."""

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import engine as engines
from data.engine import HERE, Engine, run_tasks
from data.errors import InputError
from data.profile import scan, units, values
from data.profile.check import check_files
from data.profile.fit import CountUnit, count_unit, write_fitted
from data.profile.infer import infer_schema
from data.profile.units import Work
from data.profile.values import BY_COUNT, Counts, in_order
from data.schema import load_schema
from mbcnet_rec.cli import main

ROWS = 3_000
SCHEMA = """
name = "s"
label = "click"
[fields]
city = { kind = "categorical", encoding = "vocabulary", vocabulary = "fit", min_count = 2, embedding_dim = 4 }
user = { kind = "categorical", encoding = "vocabulary", vocabulary = "fit", min_count = 1, embedding_dim = 4 }
seen = { kind = "multi_valued", encoding = "vocabulary", vocabulary = "fit", min_count = 3, embedding_dim = 4 }
price = { kind = "numeric", transform = "standardise", mean = "fit", std = "fit" }
age = { kind = "numeric", transform = "bucketise", boundaries = "fit", num_buckets = 8, embedding_dim = 4 }
[groups]
"""
SMALL_UNITS = (
    "import data.profile.units as u, data.profile.scan as s, sys; u.UNIT_BYTES, s.UNIT_CELLS = 30_000, 4_000; "
)


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    """Three files of several row groups, and a schema to fit."""
    folder, draw = tmp_path_factory.mktemp("log"), np.random.default_rng(0)
    for name in "abc":
        columns = {
            "city": [f"c{n}" for n in (30 * draw.random(ROWS) ** 3).astype(int)],
            "user": (2**40 * draw.random(ROWS) ** 8).astype(np.int64),
            "seen": [draw.integers(0, 500, size).tolist() for size in draw.integers(0, 4, ROWS)],
            "price": draw.lognormal(size=ROWS),
            "age": pa.array(draw.integers(18, 90, ROWS), mask=draw.random(ROWS) < 0.1),
            "click": draw.integers(0, 2, ROWS),
        }
        pq.write_table(pa.table(columns), folder / f"{name}.parquet", row_group_size=700, write_page_checksum=True)
    (folder / "s.toml").write_text(SCHEMA)
    return folder


@pytest.fixture
def small(monkeypatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 30_000)
    monkeypatch.setattr(scan, "UNIT_CELLS", 4_000)


def files_of(log: Path) -> list[Path]:
    return sorted(log.glob("*.parquet"))


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fitted(log: Path, out: Path, engine: Engine = HERE) -> dict[str, bytes]:
    write_fitted(load_schema(log / "s.toml"), files_of(log), out, work=Work(engine))
    assert not out.with_name(f".{out.name}.work").exists()
    return bytes_of(out)


def test_one_process_several_and_other_merges_give_the_same_bytes(log, small, tmp_path, monkeypatch):
    assert len(units.units_of(files_of(log))) > 5
    one = fitted(log, tmp_path / "one")
    assert one == fitted(log, tmp_path / "several", Engine("local", 2))
    monkeypatch.setattr(values, "MERGE_ROWS", 500)
    assert one == fitted(log, tmp_path / "shared"), "many merges, each of a few buckets"
    text, _ = infer_schema(files_of(log))
    assert text == infer_schema(files_of(log), work=Work(Engine("local", 2)))[0]
    schema = load_schema(tmp_path / "one" / "schema.toml")
    assert check_files(files_of(log), schema, full=True) == check_files(
        files_of(log), schema, full=True, work=Work(Engine("local", 2))
    )


def test_units_change_no_count_and_no_vocabulary(log, small, tmp_path, monkeypatch):
    in_units = fitted(log, tmp_path / "units")
    monkeypatch.setattr(units, "UNIT_BYTES", 1 << 30)
    whole = fitted(log, tmp_path / "whole")
    assert {name for name in whole if whole[name] != in_units[name]} <= {"schema.toml"}, (
        "but moments, in the last digit"
    )


def killed_once(marker: Path, task: CountUnit) -> None:
    """Count a unit in a process that the first to come here kills."""
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return count_unit(task)
    return os.kill(os.getpid(), signal.SIGKILL)


def tasks_of(log: Path, folder: Path) -> dict[Path, CountUnit]:
    folder.mkdir()
    fields = load_schema(log / "s.toml").features
    paths = {folder / f"{number}": unit for number, unit in enumerate(units.units_of(files_of(log)))}
    return {
        path: CountUnit(path, unit, fields, tuple(each.table_name for each in fields)) for path, unit in paths.items()
    }


def test_results_are_the_same_in_another_order_and_after_a_worker_was_killed(log, small, tmp_path):
    one, other, shuffled = (tasks_of(log, tmp_path / name) for name in ("one", "killed", "shuffled"))
    assert set(run_tasks(HERE, count_unit, one)) == set(one)
    assert set(run_tasks(Engine("local", 2), partial(killed_once, tmp_path / "marker"), other)) == set(other)
    assert (tmp_path / "marker").exists()
    list(run_tasks(HERE, count_unit, dict(sorted(shuffled.items(), key=lambda each: hash(each[0].name)))))
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "killed") == bytes_of(tmp_path / "shuffled")


def touched(task: tuple[Path, bool]) -> None:
    """Leave a result, and soon the worker is gone."""
    path, dies = task
    path.touch()
    if dies:
        threading.Timer(0.2, os._exit, (9,)).start()


def test_a_worker_that_is_killed_between_two_tasks_costs_no_task(tmp_path):
    tasks = {tmp_path / f"{number}": (tmp_path / f"{number}", number == 0) for number in range(4)}
    done = []
    for path in run_tasks(Engine("local", 2), touched, tasks):
        done.append(path)
        time.sleep(1)  # what the caller does with a result
    assert sorted(done) == sorted(tasks)


STOPPED = """
import os, signal, sys, threading, time
from pathlib import Path
from data.engine import Engine, run_tasks
from data.whole_folder import whole_folder
from launch.interrupt import heed_termination
def write(task):
    path, seconds = task
    with whole_folder(path):
        time.sleep(seconds)
if __name__ == "__main__":
    heed_termination()
    tasks = {Path(name): (Path(name), seconds) for name, seconds in (("a", 0), ("b", 60), ("c", 60))}
    for path in run_tasks(Engine("local", 2), write, tasks):
        if sys.argv[1] == "waits":
            threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        else:
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.mark.parametrize("job", ["waits", "works"])
def test_a_stop_waits_for_no_task_and_leaves_no_worker_and_nothing_half_written(job, tmp_path):
    """The workers have the pipe of this process, too: it is read to its end when they are gone."""
    (tmp_path / "job.py").write_text(STOPPED)
    done = subprocess.run([sys.executable, "job.py", job], cwd=tmp_path, capture_output=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (143, b"", b"")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "job.py"]


def test_a_job_that_ended_half_way_goes_on_with_what_is_missing(log, small, tmp_path):
    one = fitted(log, tmp_path / "one")
    results: dict[str, int] = {}

    def ends(rows: int) -> None:
        if rows > ROWS:
            results.update({path.name: path.stat().st_mtime_ns for path in tmp_path.glob(".again.work/*/*")})
            raise InputError("the power is gone")

    schema = load_schema(log / "s.toml")
    with pytest.raises(InputError, match="power"):
        write_fitted(schema, files_of(log), tmp_path / "again", work=Work(progress=ends))
    assert not (tmp_path / "again").exists() and len(results) > 1
    seen: dict[str, int] = {}

    def looks(rows: int) -> None:
        seen.update({path.name: path.stat().st_mtime_ns for path in tmp_path.glob(".again.work/*/*")})

    write_fitted(schema, files_of(log), tmp_path / "again", work=Work(progress=looks))
    assert results.items() <= seen.items(), "what was done was not done again"
    assert bytes_of(tmp_path / "again") == one


def test_workers_that_are_lost_again_and_again_end_in_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "LOST_WORKERS", 1)
    with pytest.raises(InputError, match="1 worker processes were lost, by the system's memory limit"):
        list(run_tasks(Engine("local", 2), os._exit, {tmp_path / "a": 9, tmp_path / "b": 9}))


def test_a_file_that_changes_under_the_job_is_refused(log, small, tmp_path):
    for name in ("a.parquet", "b.parquet"):
        (tmp_path / name).write_bytes((log / name).read_bytes())

    def changes(rows: int) -> None:
        pq.write_table(pq.read_table(log / "c.parquet"), tmp_path / "b.parquet")

    files = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    with pytest.raises(InputError, match=r"b\.parquet: was changed while its rows were counted; run the command again"):
        write_fitted(load_schema(log / "s.toml"), files, tmp_path / "out", work=Work(progress=changes))
    assert not (tmp_path / "out").exists()


def test_two_ranks_of_torchrun_give_the_same_bytes(log, small, tmp_path):
    one = fitted(log, tmp_path / "one")
    text, _ = infer_schema(files_of(log), name="two")
    script = SMALL_UNITS + "from mbcnet_rec.cli import main; sys.exit(main(sys.argv[1:]))"
    data = [str(path) for path in files_of(log)]
    commands = (
        ["schema", "fit", str(log / "s.toml"), *data, "-o", str(tmp_path / "two")],
        ["schema", "infer", *data, "-o", str(tmp_path / "two.toml")],
        ["data", "check", *data, "--schema", str(tmp_path / "one" / "schema.toml"), "--full"],
    )
    for command in commands:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", script, *command, "--engine", "torchrun"],
                env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2"},
                cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for rank in range(2)
        ]  # fmt: skip
        try:
            told = [each.communicate(timeout=120)[0] for each in ranks]
        finally:
            for each in ranks:
                each.kill()
        assert [each.returncode for each in ranks] == [0, 0], told
        assert told[1] == "", "the first rank speaks for all"
    assert bytes_of(tmp_path / "two") == one
    assert (tmp_path / "two.toml").read_text() == text
    assert not list(tmp_path.glob(".*.work"))


JOB = """
import sys, time
from pathlib import Path
from data.engine import Engine, meet, run_tasks
engine, out, is_killed = Engine("torchrun"), Path("out"), sys.argv[1] == "killed"
tasks = {out / str(number): number for number in range(4)}
def run(number):
    time.sleep(300 if is_killed and number == 2 else 0)
    (out / str(number)).touch()
if engine.is_first:
    time.sleep(0 if is_killed else 0.5)  # the other rank is ahead
    for path in tasks:
        path.unlink(missing_ok=True)  # as a study does with what it heard of its runs
meet(engine, out)
found = list(run_tasks(engine, run, tasks, last=True))
time.sleep(0 if engine.is_first else 1)  # here the first is
assert all(path.exists() for path in found)
meet(engine, out)
for path in tasks if engine.is_first else ():
    path.unlink()
"""


def test_what_killed_ranks_have_left_is_no_answer_to_those_of_the_next_start(tmp_path):
    port = {"WORLD_SIZE": "2", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "none"}  # torchrun's, at every start

    def start(how: str) -> list[subprocess.Popen]:
        command = [sys.executable, "-c", JOB, how]
        return [
            subprocess.Popen(command, cwd=tmp_path, env=os.environ | port | {"RANK": str(rank)}) for rank in range(2)
        ]

    started = start("killed")
    try:
        while not {"0", "1", "3"} <= {path.name for path in tmp_path.glob("out/*")}:
            time.sleep(0.05)
        time.sleep(0.5)  # the second rank has ended, or waits for the first
        for each in started:
            each.kill()
        started += start("whole")
        assert [each.wait(30) for each in started[2:]] == [0, 0]
    finally:
        for each in started:
            each.kill()
            each.wait()
    assert not list(tmp_path.glob("out/*"))


def test_without_ray_its_engine_says_how_to_install_it(log, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r'Ray is not installed; pip install "mbcnet-rec\[ray\]"'):
        list(run_tasks(Engine("ray"), count_unit, {Path("x"): None}))


@pytest.mark.parametrize("kind", [str, np.int64])
def test_counts_that_outgrow_their_memory_are_exact(kind, tmp_path):
    draw, rows = np.random.default_rng(0), []
    drawn = (5_000 * draw.random(60_000) ** 2).astype(np.int64).astype(kind)
    counts = Counts(lambda owner, **columns: rows.append(columns), held_bytes=20_000)
    for start in range(0, len(drawn), 1_000):
        counts.add("x", pa.array(drawn[start : start + 1_000].tolist()))
        counts._count("x")
    counts.write()
    assert len(rows) > 3
    total: dict = {}
    for row in rows:
        found = row["text" if kind is str else "integer"].to_pylist()
        assert len(set(found)) == len(found)
        for value, count in zip(found, row["counts"].to_pylist(), strict=True):
            total[value] = total.get(value, 0) + count
    assert total == dict(zip(*(each.tolist() for each in np.unique(drawn, return_counts=True)), strict=True))


def test_integers_are_counted_exactly_wherever_they_lie(monkeypatch):
    monkeypatch.setattr(values, "COUNTED_ROWS", 64)
    ends = [-(2**63), 2**63 - 1]
    close, far = [3, 5, 5, None, -2] * 40, [2**40, -(2**40), 5]
    pieces = [close, [7], [], [None], [200, 201], close, far, ends, list(range(4_000)), [-4], ends, close]
    rows = []
    counts = Counts(lambda owner, **columns: rows.append(columns))
    for piece in pieces:
        counts.add("x", pa.array(piece, pa.int64()))
    assert counts.places, "nothing lay close"
    counts.add("x", pa.array([2**63 + 5, 5], pa.uint64()))
    counts.write()
    total = Counter()
    for row in rows:
        found = row["integer" if "integer" in row else "unsigned"].to_pylist()
        total.update(dict(zip(found, row["counts"].to_pylist(), strict=True)))
    whole = [each for piece in pieces for each in piece if each is not None] + [2**63 + 5, 5]
    assert total == Counter(whole)


def test_stretches_of_sorted_runs_are_row_groups_of_their_sorted_whole(monkeypatch):
    monkeypatch.setattr(values, "STRETCH_ROWS", 64)
    monkeypatch.setattr(values, "STEP_ROWS", 8)
    draw = np.random.default_rng(0)
    whole = pa.table({"value": draw.permutation(1_000), "count": draw.integers(1, 5, 1_000)})
    runs = [whole.filter(pa.array(whole["value"].to_numpy() % 3 == part)).sort_by(BY_COUNT) for part in range(3)]
    pieces = list(in_order(runs, BY_COUNT, pa.int64()))
    assert pa.concat_tables(pieces).equals(whole.sort_by(BY_COUNT))
    assert {len(piece) for piece in pieces[:-1]} == {64}


@pytest.mark.long
def test_ray_with_two_workers_gives_the_same_bytes(log, small, tmp_path):
    if importlib.util.find_spec("ray") is None:  # which changes the process that imports it
        pytest.skip("Ray is not installed")
    one = fitted(log, tmp_path / "one")
    text, _ = infer_schema(files_of(log), name="ray")
    for number in range(3):
        rows = "".join(f"{row},2024-05-0{row % 3 + 1}\n" for row in range(100 * number, 100 * number + 100))
        (tmp_path / f"{number}.csv").write_text(f"user_id,day\n{rows}", encoding="utf-8")
    convert = ["data", "convert", *(str(tmp_path / f"{number}.csv") for number in range(3)), "--day", "day", "--out"]
    assert main([*convert, str(tmp_path / "days")]) == 0
    script = f"""
{SMALL_UNITS}
import ray
from mbcnet_rec.cli import main
ray.init("local", num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
schema, *data, out = sys.argv[1:]
for words in (["schema", "fit", schema, *data, "-o", out], ["schema", "infer", *data, "-o", out + ".toml"],
              ["data", "check", *data, "--schema", out + "/schema.toml", "--full"], {[*convert, str(tmp_path / "ray_days")]}):
    assert main([*words, "--engine", "ray"]) == 0
ray.shutdown()
"""
    words = [str(log / "s.toml"), *map(str, files_of(log)), str(tmp_path / "ray")]
    subprocess.run(
        [sys.executable, "-c", script, *words],
        cwd=tmp_path,
        env=os.environ | {"HOME": str(tmp_path), "RAY_worker_niceness": "0"},
        timeout=300,
        check=True,
    )
    assert bytes_of(tmp_path / "ray") == one
    assert bytes_of(tmp_path / "ray_days") == bytes_of(tmp_path / "days")
    assert (tmp_path / "ray.toml").read_text() == text
