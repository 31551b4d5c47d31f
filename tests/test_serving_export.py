"""Proves that an exported artifact gives the probabilities of training, from a table-wise run and a row-wise one with slices for each branch alike,
at every row type, and that it loads where neither this project nor TorchRec is installed, without unpickling anything.
"""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from serving_data import ROOT, artifact_of, bare_environment, printed_by

from data.reading.encode import Encoder
from mbcnet_rec.serving import loader as serving
from mbcnet_rec.serving import preprocess
from mbcnet_rec.serving.artifact import ENCODER_FILES

# Largest change of a probability against the float model, as docs/serving.md states it for this data.
BOUNDS = {"fp32": 1e-6, "fp16": 1e-3, "int8": 5e-3, "int4": 8e-2}
ALONE = """
import importlib.util, json, pickle, sys
for name in ("mbcnet_rec", "data", "sharding", "torchrec", "safetensors"):
    assert importlib.util.find_spec(name) is None, name
sys.path.insert(0, sys.argv[1])
import mbcnet_serving, numpy, torch
def refused(*args, **kwargs):
    raise AssertionError("something was unpickled")
pickle.load = pickle.loads = pickle.Unpickler = torch.load = refused
model = mbcnet_serving.load(sys.argv[1])
whole = numpy.concatenate(list(model.predict_parquet(sys.argv[2], 333)))
print(json.dumps([whole.tolist(), model.predict(json.load(open(sys.argv[3]))).tolist()]))
"""


@pytest.fixture(scope="module")
def exported(runs):
    """Both runs, and artifacts of them as int8, of one of them as fp32 too."""
    for kind, rows in (("table_wise", "int8"), ("row_wise", "int8"), ("row_wise", "fp32")):
        artifact_of(runs, kind, rows)
    return runs


def float_scores(folder, kind, column="probability"):
    return pq.read_table(folder / f"{kind}_predicted_1" / "test.parquet")[column].to_numpy()


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        ("table_wise", "int8"),
        pytest.param("table_wise", "fp32", marks=pytest.mark.long),
        ("row_wise", "fp32"),
        pytest.param("row_wise", "fp16", marks=pytest.mark.long),
        ("row_wise", "int8"),
        ("row_wise", "int4"),
    ],
)
def test_same_probabilities_as_predict(exported, kind, rows):
    folder = artifact_of(exported, kind, rows)
    source, expected = pq.read_table(exported / "test.parquet"), float_scores(exported, kind)
    model = serving.load(folder)
    found = model.predict(source)
    assert np.abs(found - expected).max() < (1e-5 if rows == "fp32" else BOUNDS[rows])
    check = json.loads((folder / "check.json").read_text())
    assert check["rows"] == 2_000 and check["largest_probability_change"] <= BOUNDS[rows]
    if rows != "int4":
        assert abs(check["auc"] - check["float_auc"]) < 1e-4
    sizes = {"fp32": 1.0, "fp16": 0.51, "int8": 0.4, "int4": 0.3}
    assert check["table_bytes"] <= sizes[rows] * check["float_table_bytes"] + 4_096
    assert sorted(path.name for path in folder.iterdir()) == [
        "check.json", "config.toml", "dense.safetensors", "mbcnet_serving", "mbcnet_serving.py", "model.json", "schema.toml",
        "tables.safetensors", "vocabulary.json",
    ]  # fmt: skip


def test_one_row_at_a_time_and_many_forms(exported):
    """Lists, arrays, a record batch, a chunked table and single rows of them say the same."""
    model = serving.load(exported / "row_wise_int8")
    source = pq.read_table(exported / "test.parquet").slice(0, 40)
    expected = model.predict(source)
    as_lists = source.to_pydict()
    as_arrays = as_lists | {name: np.asarray(as_lists[name]) for name in ("user", "hour", "image")}
    chunked = pa.concat_tables([source.slice(0, 13), source.slice(13)])
    for form in (as_lists, as_arrays, source.combine_chunks().to_batches()[0], chunked):
        assert np.array_equal(model.predict(form), expected)
    alone = [model.predict(source.slice(row, 1).to_pydict())[0] for row in range(40)]
    assert np.abs(np.asarray(alone) - expected).max() < 1e-6
    assert model.predict(source.slice(0, 0)).shape == (0,)


def test_threads_share_a_model(exported):
    model, source = serving.load(exported / "row_wise_int8"), pq.read_table(exported / "test.parquet")
    expected = model.predict(source)
    starts = range(0, 2_000, 50)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda start: model.predict(source.slice(start, 50)), starts))
    assert np.abs(np.concatenate(found) - expected).max() < 1e-6


@pytest.mark.long
def test_the_artifact_loads_in_a_fresh_environment(exported, tmp_path):
    """torch, fbgemm_gpu, NumPy and pyarrow with their own needs; the artifact; nothing else."""
    fbgemm = importlib.metadata.packages_distributions()["fbgemm_gpu"]  # its name tells the CPU build
    python = bare_environment(tmp_path / "venv", ["torch", "numpy", "pyarrow", *fbgemm])
    source = pq.read_table(exported / "test.parquet")
    names = [name for name in source.column_names if name not in ("click", "unread")]
    head = source.select(names).slice(0, 50).to_pydict()
    head["weight"] = [None if value is not None and np.isnan(value) else value for value in head["weight"]]
    (tmp_path / "rows.json").write_text(json.dumps(head))
    folder = shutil.copytree(artifact_of(exported, "table_wise", "fp32"), tmp_path / "served")
    shutil.copy(exported / "test.parquet", tmp_path)
    done = subprocess.run(
        [str(python), "-I", "-c", ALONE, str(folder), "test.parquet", "rows.json"],
        cwd=tmp_path, env={"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    from_parquet, from_lists = json.loads(done.stdout.splitlines()[-1])
    expected = float_scores(exported, "table_wise")
    assert np.abs(np.asarray(from_parquet) - expected).max() < 1e-5
    assert np.abs(np.asarray(from_lists) - expected[:50]).max() < 1e-5


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_a_single_branch_compiled(exported):
    folder = exported / "deep"
    argv = ("export", exported / "row_wise", "--out", folder, "--branches", "deep", "--rows", "fp32", "--aot")
    code, out, err = printed_by(*argv)
    assert code == 0 and "branches deep" in out and "compiled" in out, err
    source = pq.read_table(exported / "test.parquet")
    own = float_scores(exported, "row_wise", "probability_deep")
    for compiled in (False, True):
        found = serving.load(folder, compiled=compiled).predict(source)
        assert np.abs(found - own).max() < 1e-5
    small, whole = ((path / "dense.safetensors").stat().st_size for path in (folder, exported / "row_wise_fp32"))
    assert small < whole
    with pytest.raises(ValueError, match=r"holds no dense_aot\.pt2"):
        serving.load(exported / "row_wise_fp32", compiled=True)


def test_refusals(exported):
    run = exported / "table_wise"
    (exported / "file").write_text("")
    for argv, words in (
        (("--branches", "fm", "--out", exported / "none"), "has no branch 'fm'"),
        (("--out", exported / "table_wise_int8"), "--overwrite"),
        (("--out", exported), "holds no artifact"),
        (("--out", exported / "file"), "holds no artifact"),
        (("--out", "s3://bucket/model"), "wanted a folder of this machine"),
    ):
        code, _, err = printed_by("export", run, *argv)
        assert code == 2 and words in err and err.count("\n") == 1
    assert not (exported / "none").exists()


def test_rows_that_lie_elsewhere(exported, tmp_path):
    """Without the test rows the artifact is written all the same, and says that it was not compared."""
    run = shutil.copytree(exported / "row_wise", tmp_path / "run")
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace("test.parquet", "elsewhere.parquet"))
    code, out, _ = printed_by("export", run, "--out", tmp_path / "out", "--no-aot")
    assert code == 0 and "not compared with the float model" in out and "elsewhere.parquet" in out
    assert serving.load(tmp_path / "out").predict(pq.read_table(exported / "test.parquet")).shape == (2_000,)


def test_a_damaged_artifact_is_refused(exported, tmp_path):
    folder = shutil.copytree(exported / "table_wise_int8", tmp_path / "bad")
    tables = folder / "tables.safetensors"
    data = bytearray(tables.read_bytes())
    data[-1] ^= 1
    tables.write_bytes(data)
    with pytest.raises(ValueError, match="SHA-256"):
        serving.load(folder)
    spec = json.loads((folder / "model.json").read_text())
    spec["graph"]["calls"][0]["call"] = "os.system"
    (folder / "model.json").write_text(json.dumps(spec))
    with pytest.raises(ValueError, match="not an ATen operator"):
        serving.load(folder, verify=False)
    (folder / "model.json").write_text(json.dumps(spec | {"format": 1}))
    for place, words in ((folder, "of format 1, wanted 2: export it again"), (tmp_path, "not an artifact")):
        with pytest.raises(ValueError, match=words):
            serving.load(place)


def test_the_loader_refuses_what_training_refuses(exported):
    model = serving.load(exported / "table_wise_int8")
    rows = pq.read_table(exported / "test.parquet").slice(0, 3).to_pydict()
    for column, value, words in (
        ("user", [1, 500, 2], "row 1, field 'user' = 500: wanted an id in"),
        ("price", [1.0, 2.0, float("inf")], "row 2, field 'price' = inf"),
        ("image", [[0.0] * 4, [0.0] * 3, None], "row 1, field 'image': a vector of length 3"),
        ("like_weights", [[1.0] * 9] * 3, "the lists must be equally long"),
        ("item", [1, 2], "wanted 3, as the other columns have"),
        ("hour", ["noon"] * 3, "column 'hour' is string: numeric field 'hour' wants numbers"),
        ("shop_name", [b"a"] * 3, "column 'shop_name' is binary: categorical field 'shop' wants integers or"),
        ("shop_name", [1.5, 2.0, 3.0], "row 0, field 'shop' = 1.5: wanted an id"),
        ("shop_name", ["a", float("nan"), "b"], "column 'shop_name' of field 'shop' cannot be read"),
        ("words", ["ab"] * 3, "column 'words' is string: multi_valued field 'words' wants lists"),
        ("user", [[1], [2], [3]], "column 'user' is list<"),
        ("user", 1, "column 'user' of field 'user' cannot be read"),
    ):
        with pytest.raises(ValueError, match="field") as caught:
            model.predict(rows | {column: value})
        assert words in str(caught.value)
    with pytest.raises(ValueError, match="column 'user' is missing"):
        model.predict({key: value for key, value in rows.items() if key != "user"})


def test_the_encoder_in_an_artifact_is_that_of_training(exported):
    """Byte for byte."""
    package = exported / "row_wise_int8" / "mbcnet_serving"
    ours = {"__init__.py": serving.__file__, "preprocess.py": preprocess.__file__}
    ours |= {f"data/{name}": ROOT / "data" / name for name in ENCODER_FILES}
    assert {str(path.relative_to(package)) for path in package.rglob("*.py")} == set(ours)
    for name, file in ours.items():
        assert (package / name).read_bytes() == Path(file).read_bytes(), name
    assert preprocess.Encoder is Encoder


def test_missing_values_of_every_kind(exported):
    """Columns of nothing but None have no type of their own."""
    model = serving.load(exported / "row_wise_int8")
    source = pq.read_table(exported / "test.parquet").slice(0, 4).drop_columns(["unread"])
    nothing = {name: [None] * 4 for name in source.column_names}
    empty = {name: [[], None, [], None] for name in ("words", "lost")}
    typed = pa.table({name: pa.nulls(4, source.schema.field(name).type) for name in source.column_names})
    expected = model.predict(typed)
    assert np.array_equal(model.predict(nothing), expected)
    assert np.array_equal(model.predict(nothing | empty), expected)
    stream = SimpleNamespace(__arrow_c_stream__=typed.__arrow_c_stream__)  # as a DataFrame has it
    assert np.array_equal(model.predict(stream), expected)


def test_a_file_whose_rows_arrow_leaves_out_is_refused(exported, tmp_path):
    """As tests/test_profile_check.py has it: a page of no values, at which Arrow stops."""
    model = serving.load(exported / "row_wise_int8")
    rows = pq.read_table(exported / "test.parquet").slice(0, 3)
    words = pa.array([["w1"], None, ["w2"]], pa.list_(pa.dictionary(pa.int32(), pa.string())))
    rows = rows.set_column(rows.column_names.index("words"), "words", words)
    pq.write_table(rows, tmp_path / "whole.parquet", row_group_size=3)
    pq.write_table(rows, tmp_path / "cut.parquet", row_group_size=1, data_page_size=64)
    assert sum(map(len, model.predict_parquet(tmp_path / "whole.parquet"))) == 3
    with pytest.raises(ValueError, match=r"cut.parquet: 0 rows to read, but 3 by the footer"):
        list(model.predict_parquet(tmp_path / "cut.parquet"))


def test_the_page_for_serving_engineers(exported, tmp_path, monkeypatch, capsys):
    """The Python of docs/serving.md, typed as it stands."""
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "serving.md").read_text(), re.S)
    shutil.copytree(exported / "row_wise_int8", tmp_path / "served")
    shutil.copy(exported / "test.parquet", tmp_path / "rows.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "served"))
    exec(compile(code, "serving.md", "exec"), {})
    expected = serving.load("served").predict(pq.read_table("rows.parquet").slice(0, 3))
    assert capsys.readouterr().out.strip() == str(expected)


def test_from_the_command_line(exported, tmp_path):
    """The loader is a program too: one probability a line, and one line where a row is at fault."""
    folder = exported / "row_wise_int8"
    source = pq.read_table(exported / "test.parquet").slice(0, 5)
    pq.write_table(source, tmp_path / "rows.parquet")
    command = [sys.executable, str(folder / "mbcnet_serving.py"), str(folder)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "__init__.py").write_text("raise ImportError('a package of the user')")
    env = {"OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([*command, str(tmp_path / "rows.parquet")], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = np.asarray([float(line) for line in done.stdout.split()])
    assert np.abs(found - serving.load(folder).predict(source)).max() < 1e-6
