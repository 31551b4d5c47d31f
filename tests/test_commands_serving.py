"""Proves that one set of rows gets one set of probabilities: in training's own evaluation, in `mbcnet evaluate` and `mbcnet predict` on 1, 2
and 4 ranks, and in the exported artefact, from a table-wise and a row-wise run alike; and that the artefact loads without this project.
"""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from serving_data import serving_table, work, write_serving_data

from data.errors import InputError
from mbcnet_rec import serving
from mbcnet_rec.cli import main
from mbcnet_rec.predict import run_prediction

KINDS = ("table_wise", "row_wise")
ROOT = Path(__file__).parents[1]
ALONE = """
import sys
sys.path = [p for p in sys.path if p and not p.startswith(sys.argv[1])]
class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("mbcnet_rec", "data", "sharding", "launch", "torchrec", "safetensors", "pickle5"):
            raise ImportError(f"{name} is not there")
sys.meta_path.insert(0, Refused())
sys.path.insert(0, sys.argv[2])
import json, mbcnet_serving, numpy, torch
def refused(*args, **kwargs):
    raise AssertionError("something was unpickled")
import pickle
pickle.load = pickle.loads = pickle.Unpickler = torch.load = refused
model = mbcnet_serving.load(sys.argv[2])
from_parquet = numpy.concatenate(list(model.predict_parquet(sys.argv[3], 333)))
rows = json.load(open(sys.argv[4]))
print(json.dumps([from_parquet.tolist(), model.predict(rows).tolist()]))
"""


def launch(folder, ranks, *stages):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--standalone"]
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    done = subprocess.run(
        [*command, str(ROOT / "tests" / "serving_data.py"), str(folder), *stages],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Both kinds trained on 2 ranks, evaluated and predicted there, on 4 (evaluated) and on 1."""
    folder = tmp_path_factory.mktemp("serving")
    write_serving_data(folder)
    launch(folder, 2, "train", "evaluate=2", "stream=2", "predict=2")
    work(folder, ["evaluate=1", "stream=1", "predict=1"])
    return folder


def predicted(folder, name):
    return pq.read_table(folder / name / "test.parquet")


def printed_by(*argv):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(each) for each in argv])
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="session")
def exported(runs):
    """Artefacts of both runs: fp32 and int8."""
    for kind in KINDS:
        for rows in ("fp32", "int8"):
            assert printed_by("export", runs / kind, "--out", runs / f"{kind}_{rows}", "--rows", rows)[0] == 0
    return runs


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_equal_training_and_other_world_sizes(runs, kind):
    one, two = (json.loads((runs / f"{kind}_evaluate_{ranks}.json").read_text()) for ranks in (1, 2))
    logged = next(
        entry
        for entry in map(json.loads, (runs / kind / "metrics.jsonl").read_text().splitlines())
        if entry["split"] == "test"
    )
    for key in ("auc", "gauc", "log_loss", "ne", "calibration", "auc/efgc", "log_loss/cross", "ne/deep"):
        assert abs(one[key] - two[key]) < 1e-6, key
        if key in logged:
            assert abs(one[key] - logged[key]) < 1e-6, key
    assert one["auc"] > 0.6 and one["rows"] == two["rows"] == logged["rows"] == 2_000
    assert one["slices"]["hour"].keys() == two["slices"]["hour"].keys()
    for hour, entry in one["slices"]["hour"].items():
        assert abs(entry["log_loss"] - two["slices"]["hour"][hour]["log_loss"]) < 1e-6
        assert entry["positives"] == two["slices"]["hour"][hour]["positives"]


def test_four_ranks(runs):
    launch(runs, 4, "evaluate=4")
    for kind in KINDS:
        one, four = (json.loads((runs / f"{kind}_evaluate_{ranks}.json").read_text()) for ranks in (1, 4))
        for key in ("auc", "gauc", "log_loss", "ne", "calibration", "auc/deep"):
            assert abs(one[key] - four[key]) < 1e-6, key


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_metrics_keep_their_bound(runs, kind):
    exact = json.loads((runs / f"{kind}_evaluate_1.json").read_text())
    for ranks in (1, 2):
        streamed = json.loads((runs / f"{kind}_stream_{ranks}.json").read_text())
        assert not streamed["exact"] and streamed["rows"] == 2_000
        for key in ("auc", "auc/efgc", "auc/cross", "auc/deep"):
            assert abs(streamed[key] - exact[key]) <= streamed["bounds"].get(key, 0) + 1e-12
        for key in ("log_loss", "ne", "calibration", "log_loss/deep"):
            assert abs(streamed[key] - exact[key]) < 1e-6
        assert abs(streamed["gauc"] - exact["gauc"]) < 0.2  # of every fourth group
        assert {k: v["rows"] for k, v in streamed["slices"]["hour"].items()} == {
            k: v["rows"] for k, v in exact["slices"]["hour"].items()
        }


@pytest.mark.parametrize("kind", KINDS)
def test_one_probability_everywhere(exported, kind):
    one, two = predicted(exported, f"{kind}_predicted_1"), predicted(exported, f"{kind}_predicted_2")
    source = pq.read_table(exported / "test.parquet")
    branches = [f"probability_{name}" for name in ("efgc", "cross", "deep")]
    assert one.column_names == ["user", "probability", *branches]
    assert one["user"].equals(source["user"]) and two["user"].equals(source["user"])  # order and count
    for name in one.column_names[1:]:
        assert np.abs(one[name].to_numpy() - two[name].to_numpy()).max() < 1e-5
    fused = one["probability"].to_numpy()
    assert fused.std() > 0.05
    y = source["click"].to_numpy()
    z = np.log(fused.astype(np.float64)) - np.log1p(-fused.astype(np.float64))
    logged = json.loads((exported / f"{kind}_evaluate_1.json").read_text())
    assert abs(np.mean(np.logaddexp(0, z) - y * z) - logged["log_loss"]) < 1e-6
    whole = {rows: serving.load(exported / f"{kind}_{rows}").predict(source) for rows in ("fp32", "int8")}
    assert np.abs(whole["fp32"] - fused).max() < 1e-5
    assert 0 < np.abs(whole["int8"] - fused).max() < 5e-3
    check = json.loads((exported / f"{kind}_int8" / "check.json").read_text())
    assert abs(check["auc"] - check["float_auc"]) < 1e-4 and check["rows"] == 2_000
    assert check["table_bytes"] < 0.5 * check["float_table_bytes"]


def test_the_artefact_loads_without_this_project(exported, tmp_path):
    source = pq.read_table(exported / "test.parquet")
    names = [name for name in source.column_names if name not in ("click", "unread")]
    head = source.select(names).slice(0, 50).to_pydict()
    head["weight"] = [None if value is not None and np.isnan(value) else value for value in head["weight"]]
    (tmp_path / "rows.json").write_text(json.dumps(head))
    folder = shutil.copytree(exported / "table_wise_fp32", tmp_path / "served")
    script = tmp_path / "alone.py"
    script.write_text(ALONE)
    done = subprocess.run(
        [sys.executable, "-P", str(script), str(ROOT), str(folder), str(exported / "test.parquet"),
         str(tmp_path / "rows.json")],
        cwd=tmp_path, env={"OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"]}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    from_parquet, from_lists = json.loads(done.stdout.splitlines()[-1])
    expected = predicted(exported, "table_wise_predicted_1")["probability"].to_numpy()
    assert np.abs(np.asarray(from_parquet) - expected).max() < 1e-5
    assert np.abs(np.asarray(from_lists) - expected[:50]).max() < 1e-5


def test_branches_served_alone_and_refusals(exported):
    run = exported / "table_wise"
    code, out, _ = printed_by(
        "export", run, "--out", exported / "deep", "--branches", "deep", "--rows", "fp32"
    )
    assert code == 0 and "branches deep" in out
    source = pq.read_table(exported / "test.parquet")
    own = predicted(exported, "table_wise_predicted_1")["probability_deep"].to_numpy()
    assert np.abs(serving.load(exported / "deep").predict(source) - own).max() < 1e-5
    assert (exported / "deep" / "dense.safetensors").stat().st_size < (
        exported / "table_wise_fp32" / "dense.safetensors"
    ).stat().st_size
    for argv, words in (
        (("--branches", "fm", "--out", exported / "none"), "has no branch 'fm'"),
        (("--out", exported / "deep"), "--overwrite"),
        (("--out", exported), "no artefact"),
    ):
        code, _, err = printed_by("export", run, *argv)
        assert code == 2 and words in err and err.count("\n") == 1
    assert not (exported / "none").exists()


def test_a_damaged_artefact_is_refused(exported, tmp_path):
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
    with pytest.raises(ValueError, match="no ATen operator"):
        serving.load(folder, verify=False)


def test_the_loader_refuses_what_training_refuses(exported):
    model = serving.load(exported / "table_wise_int8")
    rows = pq.read_table(exported / "test.parquet").slice(0, 3).to_pydict()
    for column, value, words in (
        ("user", [1, 500, 2], "row 1, field 'user' = 500: wanted an id in"),
        ("price", [1.0, 2.0, float("inf")], "row 2, field 'price' = inf"),
        ("image", [[0.0] * 4, [0.0] * 3, None], "row 1, field 'image': a vector of length 3"),
        ("like_weights", [[1.0] * 9] * 3, "not as many"),
    ):
        with pytest.raises(ValueError, match="field") as caught:
            model.predict(rows | {column: value})
        assert words in str(caught.value)
    with pytest.raises(ValueError, match="column 'user' is missing"):
        model.predict({key: value for key, value in rows.items() if key != "user"})


def test_predict_without_labels_resumes_and_loses_no_row(runs, tmp_path, monkeypatch):
    """A faulty row stops its own piece only; mended, the same command finishes; nothing is scored twice."""
    monkeypatch.setattr("mbcnet_rec.pieces.PIECE_ROWS", 1_000)
    source = pq.read_table(runs / "test.parquet").drop_columns(["click"])
    data = tmp_path / "in"
    (data / "ds=1").mkdir(parents=True)
    bad = source.slice(0, 1_900).to_pydict()
    bad["user"][1_500] = 500
    broken = pa.Table.from_pydict(bad, schema=source.schema)
    pq.write_table(broken, data / "ds=1" / "a.parquet", row_group_size=500, write_page_checksum=True)
    pq.write_table(source, data / "b.parquet", row_group_size=400, write_page_checksum=True)
    pq.write_table(source.slice(0, 0), data / "empty.parquet", write_page_checksum=True)
    argv = ("predict", runs / "row_wise", "--data", data, "--out", tmp_path / "out", "--keep", "unread,user")
    code, _, err = printed_by(*argv)
    assert code == 2 and "a.parquet: row group 3, row 0, field 'user' = 500" in err.splitlines()[-1]
    pieces = sorted(str(each.relative_to(tmp_path / "out")) for each in (tmp_path / "out").rglob("*.parquet"))
    assert pieces == [
        "_pieces/b.parquet/000000.parquet",
        "_pieces/b.parquet/000001.parquet",
        "_pieces/ds=1/a.parquet/000000.parquet",
        "_pieces/empty.parquet/000000.parquet",
    ]
    kept = (tmp_path / "out" / pieces[0]).stat().st_mtime_ns
    code, _, err = printed_by(*argv[:-1], "user")
    assert code == 2 and "other columns" in err
    mended = source.slice(0, 1_900)
    pq.write_table(mended, data / "ds=1" / "a.parquet", row_group_size=500, write_page_checksum=True)
    code, _, err = printed_by(*argv)
    assert code == 2 and "a.parquet has changed since its rows were scored" in err
    # what was scored of the old file is thrown away with its note; the rest stays
    note = tmp_path / "out" / "_predict.json"
    request = json.loads(note.read_text())
    del request["files"]["ds=1/a.parquet"]
    note.write_text(json.dumps(request))
    shutil.rmtree(tmp_path / "out" / "_pieces" / "ds=1")
    scored = []
    monkeypatch.setattr(
        "mbcnet_rec.predict.write_pieces",
        lambda job, scorer, dealt, process, original=__import__("mbcnet_rec.predict").predict.write_pieces: (
            scored.extend(piece for own in dealt for piece in own),
            original(job, scorer, dealt, process),
        ),
    )
    code, out, _ = printed_by(*argv)
    assert code == 0 and "3,900 rows in 3 files" in out
    assert [piece.num_rows for piece in scored] == [1_000, 900] and kept
    for name, wanted in (
        ("ds=1/a.parquet", mended),
        ("b.parquet", source),
        ("empty.parquet", source.slice(0, 0)),
    ):
        found = pq.read_table(tmp_path / "out" / name)
        assert found["unread"].to_pylist() == wanted["unread"].to_pylist()
    assert not (tmp_path / "out" / "_pieces").exists()
    expected = predicted(runs, "row_wise_predicted_1")["probability"].to_numpy()
    assert (
        np.abs(pq.read_table(tmp_path / "out" / "b.parquet")["probability"].to_numpy() - expected).max()
        < 1e-5
    )


def test_predict_refuses_a_folder_that_is_not_its_own(runs, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="no prediction"):
        run_prediction(str(runs / "row_wise"), [str(runs / "test.parquet")], str(tmp_path))
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(InputError, match="no such column"):
        run_prediction(
            str(runs / "row_wise"), [str(runs / "test.parquet")], str(tmp_path / "x"), keep=["nothing"]
        )


def test_evaluate_other_data_and_refusals(runs, tmp_path):
    pq.write_table(serving_table(300, 9), tmp_path / "other.parquet", write_page_checksum=True)
    code, out, _ = printed_by(
        "evaluate", runs / "row_wise", "--data", tmp_path / "other.parquet", "--by", "city", "--json"
    )
    answer = json.loads(out)
    assert code == 0 and answer["rows"] == 300
    assert answer["slices"]["city"]["(null)"]["rows"] > 0
    low, high = answer["intervals"]["auc"]
    assert low < answer["auc"] < high
    code, out, _ = printed_by("evaluate", runs / "row_wise", "--by", "hour")
    assert code == 0 and "+-" in out and "largest difference from what training logged" in out
    code, _, err = printed_by("evaluate", runs / "row_wise", "--by", "tags")
    assert code == 2 and "wanted one value a row" in err
    code, _, err = printed_by("evaluate", tmp_path)
    assert code == 2 and "no run folder" in err
