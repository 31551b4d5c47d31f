"""Proves that `mbcnet data` and `mbcnet schema` go from raw files to a fitted schema without torch, and fail in one line."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.schema import load_schema, parse_schema
from data.schema.show import bytes_in_words, print_schema, summary_line
from mbcnet_rec.cli import main


@pytest.fixture
def log(tmp_path) -> Path:
    generator = np.random.default_rng(0)
    for day in range(2):
        columns = {
            "user_id": generator.integers(0, 30, 400),
            "city": [f"c{n}" for n in generator.integers(0, 9, 400)],
            "price": generator.normal(5, 1, 400),
            "click": generator.integers(0, 2, 400),
        }
        path = tmp_path / "log" / f"ds={day}" / "part.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(pa.table(columns), path, write_page_checksum=True)
    return tmp_path / "log"


def test_from_a_folder_to_a_fitted_schema(log, tmp_path, capsys):
    schema = tmp_path / "shop.toml"
    assert main(["schema", "infer", str(log), "-o", str(schema)]) == 0
    assert load_schema(schema).name == "shop"
    assert main(["schema", "fit", str(schema), str(log / "ds=0"), "-o", str(tmp_path / "fit")]) == 0
    fitted = str(tmp_path / "fit" / "schema.toml")
    assert main(["data", "check", str(log), "--schema", fitted, "--full"]) == 0
    assert "no fault in 2 files" in capsys.readouterr().out
    assert main(["schema", "show", fitted]) == 0
    out = capsys.readouterr().out
    assert "3 fields" in out and "vocabulary" in out and "wait for" not in out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["schema", "infer", "{log}", "-o", "{log}/ds=0/part.parquet"], "exists already"),
        (["schema", "infer", "{log}", "-o", "{log}/none/s.toml"], "wanted a file in a folder that is there"),
        (["schema", "infer", "{log}", "-o", "{log}/s.toml", "--rows", "-1"], "--rows -1: wanted 0"),
        (["schema", "infer", "{log}/none", "-o", "{log}/s.toml"], "no Parquet file there"),
        (["schema", "fit", "{log}/none.toml", "{log}", "-o", "{log}/out"], "no such file"),
        (["schema", "show", "{log}/none.toml"], "no such file"),
        (["data", "check", "{log}", "--schema", "{log}/none.toml"], "no such file"),
        (["data", "prepare", "none", "--src", "{log}", "--out", "{log}/out"], "'none' is not known; use one of"),
        (["data", "synth", "--out", "{log}", "--rows", "9", "--days", "3"], "holds no synthetic log"),
    ],
)
def test_mistakes_are_one_line_and_code_2(command, message, log, capsys):
    before = sorted(log.rglob("*"))
    assert main([part.format(log=log) for part in command]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("mbcnet: ") and error.count("\n") == 1
    assert sorted(log.rglob("*")) == before


def test_show_is_a_table_that_answers_before_torch_is_imported():
    code = "import sys; from mbcnet_rec.cli import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, "schema", "show", "data/schemas/pailitao.toml"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert "192 fields" in lines[0] and "\x1b" not in run.stdout
    user = next(line for line in lines if line.startswith("user_id "))
    assert user[: lines[1].index("rows") + 4].endswith("480,028,940"), "numbers stand under their header"
    words = [line.split() for line in lines]
    assert ["user_id", "categorical", "ids", "480,028,940", "32"] in [each[:5] for each in words]
    assert ["visual_relevance", "2", "128"] in [each[:3] for each in words], "groups with their widths"
    assert ["item", "974,333,635", "32", "116.1", "GiB"] in [each[:5] for each in words], "tables with their bytes"
    assert lines[-1].startswith("pailitao: 192 fields, 2,780 dims")


def test_show_prints_names_as_they_are(capsys):
    fields = {"[red]x": {"kind": "numeric"}, "image": {"kind": "vector", "width": 8, "projection": 4}}
    schema = parse_schema(
        {"name": "s", "label": "y", "fields": fields, "groups": {"[b]": ["[red]x", "image"]}}, "s", Path()
    )
    print_schema(schema)
    out = capsys.readouterr().out
    assert "[red]x" in out and "[b]" in out and "8 numbers -> 4" in out
    assert summary_line(schema) == "s: 2 fields, 5 dims, 0 tables, 0 rows, 0 (fp32); label y"


def test_sizes_in_words():
    words = [bytes_in_words(n) for n in (0, 1023, 1024, 3 * 2**30, 5 * 2**50)]
    assert words == ["0", "1.0 KiB", "1.0 KiB", "3.0 GiB", "5,242,880.0 GiB"]
