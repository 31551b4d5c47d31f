"""Proves that a run that names a version of a Delta table reads its rows, also when it resumes after the table has moved on."""

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_data import small_table, write_small
from tiny_run import train

from data.errors import InputError
from data.reading.config import StreamOptions
from data.reading.files import files_in_words, resolve_files
from data.reading.storage import FileList
from data.schema import load_schema
from data.stream import ParquetStream
from mbcnet_rec.config import load_config

deltalake = pytest.importorskip("deltalake")


@pytest.fixture
def table(tmp_path) -> Path:
    write_small(tmp_path, train_rows=600, other_rows=96)
    rows = small_table(600, 1)
    day = pa.array([f"2024-05-0{n % 2 + 1}" for n in range(600)])
    deltalake.write_deltalake(tmp_path / "log", rows.append_column("ds", day), partition_by=["ds"])
    return tmp_path / "log"


def append(table: Path) -> None:
    rows = small_table(120, 9)
    deltalake.write_deltalake(table, rows.append_column("ds", pa.array(["2024-05-03"] * 120)), mode="append")


def rows_in(files: FileList) -> int:
    return sum(pq.ParquetFile(file).metadata.num_rows for file in files)


def test_a_version_is_its_files_and_no_others(table, tmp_path):
    append(table)
    deltalake.DeltaTable(table).delete("ds = '2024-05-01'")
    assert [rows_in(resolve_files([f"delta://{table}{at}"])) for at in ("@0", "@1", "@2", "")] == [600, 720, 420, 420]
    day = resolve_files([f"delta://{table}@1/ds=2024-05-03"])
    assert rows_in(day) == 120 and files_in_words(day) == "1 file (of a Delta table's version 1)"
    schema = load_schema(tmp_path / "schema.toml")
    of = {
        at: ParquetStream(resolve_files([f"delta://{table}@{at}/ds=2024-05-02"]), schema, StreamOptions(batch_size=96))
        for at in (0, 1)
    }
    assert of[0].num_rows == of[1].num_rows == 300
    assert of[0].fingerprint() != of[1].fingerprint(), "a position belongs to a version"
    kept = ParquetStream(
        resolve_files([f"delta://{table}@1"]), schema, StreamOptions(batch_size=96, where=("ds = 2024-05-03",))
    )
    assert kept.num_rows == 120 and kept.files.versions == [1]


def test_a_run_resumes_with_the_rows_that_it_began_with(table, tmp_path, capsys):
    words = (tmp_path / "run.toml", f'data.train=["delta://{table}"]')
    assert train(*words, "train.epochs=1") == 0
    append(table)
    capsys.readouterr()
    assert train(*words, "train.epochs=2", resume=True) == 0
    assert "train 600 rows of" in capsys.readouterr().out
    run = tmp_path / "run"
    assert load_config(run / "config.toml").data.train == (f"delta://{table}@0",)
    assert len(json.loads((run / "data.json").read_text())["train"]) == 2
    assert train(*words, "train.epochs=1", overwrite=True) == 0
    assert load_config(run / "config.toml").data.train == (f"delta://{table}@1",)


def with_log(table: Path, change) -> None:
    log = table / "_delta_log" / "00000000000000000000.json"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for line in lines:
        change(line)
    log.write_text("\n".join(map(json.dumps, lines)))


def features(line: dict, *names: str) -> None:
    if "protocol" in line:
        line["protocol"] = {
            "minReaderVersion": 3, "minWriterVersion": 7, "readerFeatures": [*names], "writerFeatures": [*names],
        }  # fmt: skip


def test_tables_whose_files_do_not_tell_their_rows_are_refused(table):
    with_log(table, lambda line: features(line, "deletionVectors"))
    assert rows_in(resolve_files([f"delta://{table}"])) == 600, "a table that may have them, but has none"
    vector = {"storageType": "u", "pathOrInlineDv": "vBn[lx{q8@P<9BNH/isA", "offset": 1, "sizeInBytes": 36, "cardinality": 2}  # fmt: skip
    with_log(table, lambda line: line.get("add", {}).update(deletionVector=vector))
    with pytest.raises(InputError, match="deleted by deletion vectors"):
        resolve_files([f"delta://{table}"])
    with_log(table, lambda line: line.get("add", {}).pop("deletionVector", None))

    def mapped(line: dict) -> None:
        features(line, "columnMapping")
        if "metaData" in line:
            line["metaData"]["configuration"] = {"delta.columnMapping.mode": "name"}

    with_log(table, mapped)
    with pytest.raises(InputError, match=r"maps its columns to other names|cannot be read as a version"):
        resolve_files([f"delta://{table}"])


def test_mistakes_are_named(table, tmp_path, monkeypatch):
    for text, message in (
        (f"delta://{table}@7", "cannot be read as a version of a Delta table"),
        (f"delta://{tmp_path}/none", "cannot be read as a version of a Delta table"),
        (f"delta://{table}@0/ds=1999-01-01", "no Parquet file there"),
    ):
        with pytest.raises(InputError, match=message):
            resolve_files([text])
    monkeypatch.setitem(sys.modules, "deltalake", None)
    with pytest.raises(InputError, match=r'deltalake is not installed; pip install "mbcnet-rec\[delta\]"'):
        resolve_files([f"delta://{table}"])
