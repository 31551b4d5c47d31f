"""Proves that a run is read as it was trained, whatever became of schema, vocabulary, plan and data since, and refuses what would not be."""

import hashlib
import json
import os
import shutil
from contextlib import chdir
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_run import SMALL_MODEL, train

from data.schema import Schema, load_schema
from mbcnet_rec.checkpoints.run_schema import other_ids
from mbcnet_rec.cli import main
from mbcnet_rec.config import load_config
from mbcnet_rec.runtime.process import joined_process
from mbcnet_rec.serving import loader
from mbcnet_rec.teachers import load_teacher

SHOPS, ROWS = 8, 960
SCHEMA = """
name = "shops"
label = "label"
[fields]
shop = { kind = "categorical", encoding = "vocabulary", vocabulary = "fit", embedding_dim = 4 }
price = { kind = "numeric", transform = "standardise", mean = "fit", std = "fit" }
"""
CONFIG = f"""
name = "r"
schema = "fitted/schema.toml"
[data]
train = ["logs/day1"]
test = ["logs/day1"]
{SMALL_MODEL}
epochs = 3
[optim]
dense_lr = 0.02
"""


def write_log(path: Path, order: list[int]) -> None:
    """Shops by falling frequency in this order; every second one is clicked."""
    rng = np.random.default_rng(1)
    shop = np.minimum(rng.geometric(0.35, ROWS) - 1, SHOPS - 1)
    names = np.array(order)[shop]
    label = (rng.random(ROWS) < np.where(names % 2, 0.9, 0.1)).astype(np.int8)
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"label": label, "shop": [f"shop{each}" for each in names], "price": names * 10.0 + order[0]}
    pq.write_table(pa.table(columns), path, write_page_checksum=True)


def fit(day: int) -> None:
    assert main(["schema", "fit", "s.toml", f"logs/day{day}", "-o", "fitted", "--force"]) == 0


def predict(run: str, out: str) -> np.ndarray:
    assert main(["predict", run, "--data", "logs/day1", "--out", out]) == 0
    return pq.read_table(f"{out}/a.parquet")["probability"].to_numpy()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Two days of logs, a schema fitted on the first, a run of it in runs/r and its scores in before/."""
    folder = tmp_path_factory.mktemp("whole")
    with chdir(folder):
        write_log(Path("logs/day1/a.parquet"), list(range(SHOPS)))
        write_log(Path("logs/day2/a.parquet"), list(range(SHOPS))[::-1])
        Path("s.toml").write_text(SCHEMA)
        Path("run.toml").write_text(CONFIG)
        fit(1)
        assert train(Path("run.toml")) == 0
        predict("runs/r", "before")
    return folder


@pytest.fixture
def place(trained, tmp_path):
    """A copy of it all, in which the test works."""
    shutil.copytree(trained, tmp_path / "place")
    with chdir(tmp_path / "place"):
        yield tmp_path / "place"


def test_a_run_is_read_as_it_was_trained_after_the_next_days_fit(place, capfd):
    before = pq.read_table("before/a.parquet")["probability"].to_numpy()
    fit(2)
    np.testing.assert_array_equal(predict("runs/r", "after"), before)
    assert main(["evaluate", "runs/r", "--json"]) == 0
    done = json.loads(Path("runs/r/DONE").read_text())
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["auc"] == pytest.approx(done["auc"], abs=1e-6)
    assert main(["export", "runs/r", "--out", "served", "--no-aot", "--rows", "fp32"]) == 0
    request = pq.read_table("logs/day1/a.parquet").select(["shop", "price"])
    np.testing.assert_allclose(loader.load(Path("served")).predict(request).reshape(-1), before, atol=1e-6)
    capfd.readouterr()
    assert train(Path("run.toml"), "train.epochs=4", resume=True) == 0
    said = capfd.readouterr().out
    assert "note: schema = 'fitted/schema.toml' is another one now (field price, vocabulary/shop.parquet)" in said
    assert json.loads(Path("runs/r/DONE").read_text())["auc"] > 0.8, "not by the vocabulary of the second day"


def test_a_run_is_read_without_what_it_was_made_of_from_anywhere_under_any_name(place, capfd):
    before = pq.read_table("before/a.parquet")["probability"].to_numpy()
    for name in ("fitted", "s.toml", "run.toml"):
        path = Path(name)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    Path("runs/r").rename("renamed")
    os.mkdir("elsewhere")
    with chdir("elsewhere"):
        assert main(["predict", "../renamed", "--data", "../logs/day1", "--out", "out"]) == 0
        np.testing.assert_array_equal(pq.read_table("out/a.parquet")["probability"].to_numpy(), before)
    for again in ([], ["--resume"], ["--overwrite"]):
        assert main(["train", "--config", "renamed/config.toml", *again]) == 2
        said = capfd.readouterr().err.splitlines()[-1]
        assert f"the run in {place}/renamed, but by its train.out that run is in {place}/runs/r" in said
        assert f"add --set train.out={place}/renamed" in said and not Path("runs/r").exists()
    assert main(["train", "--config", "renamed/config.toml", "--resume", "--set", f"train.out={place}/renamed"]) == 0


def test_a_run_resumes_without_the_files_that_it_was_fitted_from(place):
    shutil.rmtree("fitted")
    assert train(Path("run.toml"), "train.epochs=4", resume=True) == 0


@pytest.mark.parametrize("name", ["schema.toml", "vocabulary/shop.parquet"])
@pytest.mark.parametrize("change", ["other bytes", "gone"])
def test_where_a_copy_was_changed_the_checkpoints_own_is_read(place, capfd, name, change):
    path, before = Path("runs/r") / name, pq.read_table("before/a.parquet")["probability"].to_numpy()
    whole = path.read_bytes()
    path.unlink() if change == "gone" else path.write_bytes(whole + b"\n")
    np.testing.assert_array_equal(predict("runs/r", "out"), before)
    assert f"warning: runs/r/{name}: is not that of the checkpoint of step 60" in capfd.readouterr().err
    assert main(["export", "runs/r", "--out", "served", "--no-aot"]) == 0
    assert path.exists() == (change != "gone"), "what only reads a run writes nothing there"
    assert train(Path("run.toml"), "train.epochs=4", resume=True) == 0
    assert path.read_bytes() == whole, "a run that goes on brings it back"


def without_copies(*checkpoints: Path) -> None:
    """Make checkpoints what earlier versions wrote: with the SHA-256 of the schema's files alone."""
    for folder in checkpoints:
        body = json.loads((folder / "manifest.json").read_text())["body"]
        for file, _ in body.pop("copies").values():
            (folder / file).unlink()
        text = json.dumps(body)
        shell = f'{{"sha256": "{hashlib.sha256(text.encode()).hexdigest()}", "body": {text}}}\n'
        (folder / "manifest.json").write_text(shell)


@pytest.mark.parametrize("name", ["schema.toml", "vocabulary/shop.parquet"])
@pytest.mark.parametrize("change", ["other bytes", "gone"])
def test_beside_checkpoints_of_earlier_versions_a_changed_copy_is_refused(place, capfd, name, change):
    without_copies(*Path("runs/r/checkpoints").glob("step_*"))
    predict("runs/r", "whole")
    path = Path("runs/r") / name
    path.unlink() if change == "gone" else path.write_bytes(path.read_bytes() + b"\n")
    commands = [
        ["predict", "runs/r", "--data", "logs/day1", "--out", "out"],
        ["evaluate", "runs/r"],
        ["export", "runs/r", "--out", "served", "--no-aot"],
    ]
    if not (name == "schema.toml" and change == "gone"):  # then the config's is read, if it is the same
        commands += [["train", "--config", "run.toml", "--resume", "--set", "train.epochs=4"]]
    for command in commands:
        assert main(command) == 2
        (said,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("mbcnet: ")]
        assert f"runs/r/{name}: " in said and "bring the file back" in said


def test_a_lost_run_folder_resumes_with_the_schema_of_its_checkpoints_only(place, capfd):
    checkpoints = "train.checkpoint_folder=kept"
    assert train(Path("run.toml"), checkpoints, "train.out=runs/s", "train.max_steps=20") == 0
    shutil.rmtree("runs/s")
    shutil.copytree("fitted", "yesterday")
    fit(2)
    shutil.copytree("kept", "earlier")
    without_copies(*Path("earlier").glob("step_*"))
    earlier = ("train.checkpoint_folder=earlier", "train.out=runs/e")
    assert train(Path("run.toml"), *earlier, resume=True) == 2
    assert "runs/e/schema.toml: changed since the run was trained" in capfd.readouterr().err.splitlines()[-1]
    assert train(Path("run.toml"), *earlier, "schema=yesterday/schema.toml", resume=True) == 0
    assert train(Path("run.toml"), checkpoints, "train.out=runs/s", resume=True) == 0
    out, err = capfd.readouterr()
    assert out.count("from step 20") == 2 and "runs/s/schema.toml: is not that of the checkpoint of step 20" in err
    found, wanted = (Path(each, "vocabulary/shop.parquet").read_bytes() for each in ("runs/s", "yesterday"))
    assert found == wanted != Path("fitted/vocabulary/shop.parquet").read_bytes()
    assert other_ids(load_schema("runs/s/schema.toml"), load_schema("yesterday/schema.toml")) == {}


def test_rows_of_other_ids_are_neither_loaded_in_part_nor_at_a_warm_start(place, capfd):
    fit(2)
    assert train(Path("run.toml"), "train.epochs=4", resume=True, allow_partial=True) == 2
    said = capfd.readouterr().err.splitlines()[-1]
    assert "table shop: its rows in the checkpoint are of other ids (another vocabulary)" in said
    warm = ("train.out=runs/warm", "train.warm_start=runs/r")
    assert train(Path("run.toml"), *warm) == 2
    said = capfd.readouterr().err.splitlines()[-1]
    assert "table shop: its rows are of other ids (another vocabulary)" in said and not Path("runs/warm").exists()
    grown = pa.concat_arrays(
        [pq.read_table("runs/r/vocabulary/shop.parquet")["value"].combine_chunks(), pa.array(["new"])]
    )
    pq.write_table(pa.table({"value": grown}), "fitted/vocabulary/shop.parquet")
    text = Path("fitted/schema.toml").read_text()
    Path("fitted/schema.toml").write_text(text.replace("num_embeddings = 10", "num_embeddings = 11"))
    assert train(Path("run.toml"), *warm) == 0
    assert "warm start from step 60 of runs/r" in capfd.readouterr().out


def schema_of(folder: Path, entry: str, values: list | None = None) -> Schema:
    folder.mkdir()
    if values is not None:
        pq.write_table(pa.table({"value": values}), folder / "v.parquet")
    text = f'name = "x"\nlabel = "y"\n[fields]\nf = {{ kind = "categorical", embedding_dim = 4, {entry} }}\n'
    (folder / "s.toml").write_text(text)
    return load_schema(folder / "s.toml")


VOCABULARY = 'encoding = "vocabulary", vocabulary = "v.parquet", num_embeddings = 9'
PAIRS = {
    "the same": ((VOCABULARY, [3, 1]), (VOCABULARY, [3, 1]), ""),
    "grown": ((VOCABULARY, ["a", "b"]), (VOCABULARY, ["a", "b", "c"]), ""),
    "reordered": ((VOCABULARY, ["a", "b"]), (VOCABULARY, ["b", "a"]), "another vocabulary"),
    "shrunk": ((VOCABULARY, ["a", "b"]), (VOCABULARY, ["a"]), "another vocabulary"),
    "of another type": ((VOCABULARY, [1, 2]), (VOCABULARY, ["1", "2"]), "another vocabulary"),
    "of another width": ((VOCABULARY, pa.array([1, 2], pa.int32())), (VOCABULARY, [1, 2]), ""),
    "hash size": (('encoding = "hash", num_embeddings = 9',), ('encoding = "hash", num_embeddings = 10',), "num_embeddings 9 -> 10"),
    "modulo": (('on_invalid = "modulo", num_embeddings = 9',), ('on_invalid = "modulo", num_embeddings = 10',), "num_embeddings 9 -> 10"),
    "more ids": (("num_embeddings = 9",), ("num_embeddings = 10",), ""),
    "encoding": (("num_embeddings = 9",), ('encoding = "hash", num_embeddings = 9',), "encoding ids -> hash"),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_what_makes_rows_belong_to_other_ids(tmp_path, name):
    before, now, words = PAIRS[name]
    found = other_ids(schema_of(tmp_path / "before", *before), schema_of(tmp_path / "now", *now))
    assert set(found) == ({"f"} if words else set()) and words in found.get("f", "")


def test_a_teacher_that_knows_other_rows_is_refused(place, capfd):
    config = load_config("run.toml")
    with joined_process("cpu") as process:
        own = load_schema("runs/r/schema.toml")
        load_teacher(config, own, process)
        fit(2)
        with pytest.raises(ValueError, match=r"another schema \(table shop: another vocabulary\)"):
            load_teacher(config, load_schema("fitted/schema.toml"), process)


def test_resume_over_other_training_rows_is_refused_by_name(place, capfd):
    table = pq.read_table("logs/day1/a.parquet")
    pq.write_table(table.take(list(range(ROWS))[::-1]), "logs/day1/a.parquet", write_page_checksum=True)
    more = ("train.epochs=4",)
    assert train(Path("run.toml"), *more, resume=True) == 2
    assert "runs/r: data.train: 1 changed (a.parquet): the place in the data" in capfd.readouterr().err
    assert train(Path("run.toml"), *more, resume=True, allow_partial=True) == 0
    assert "partial load: data.train: 1 changed (a.parquet)" in capfd.readouterr().out


def test_resume_over_other_validation_rows_is_noted(place, capfd):
    shutil.copytree("logs/day2", "valid")
    more = ('data.valid=["valid"]', "train.out=runs/v")
    assert train(Path("run.toml"), *more, "train.epochs=1") == 0
    assert train(Path("run.toml"), *more, "train.epochs=2", resume=True) == 0
    assert "note: data.valid" not in capfd.readouterr().out
    shutil.copy("logs/day1/a.parquet", "valid/a.parquet")
    assert train(Path("run.toml"), *more, resume=True) == 0
    assert capfd.readouterr().out.count("note: data.valid: 1 changed (a.parquet): scores, and which step") == 1


def test_the_same_training_rows_elsewhere_are_the_same(place):
    Path("logs/day1").rename("logs/moved")
    moved = ('data.train=["logs/moved/a.parquet"]', "data.test=[]", "train.epochs=4")
    assert train(Path("run.toml"), *moved, resume=True) == 0


OPTIONS = {
    "data.batch_size=96": "data.batch_size = 96, but 48 in its checkpoint",
    "data.lanes=8": "data.lanes = 8, but 4 in its checkpoint",
    "data.order=partitioned": "data.order = 'partitioned', but 'shuffled' in its checkpoint",
    "data.window_rows=7": "data.window_rows = 7, but 65536 in its checkpoint",
    "data.keep_negatives=0.5": "data.keep_negatives = 0.5, but 1.0 in its checkpoint",
    "train.seed=5": "train.seed = 5, but 0 in its checkpoint",
    "model.dnn.hidden=[16]": "options that differ: model.dnn.hidden [8] -> [16]",
    "optim.embedding.name=adagrad": "options that differ: optim.embedding.name 'rowwise_adagrad' -> 'adagrad'",
}


@pytest.mark.parametrize("option", OPTIONS)
def test_resume_names_the_option_that_differs(place, capfd, option):
    assert train(Path("run.toml"), option, resume=True) == 2
    said = capfd.readouterr().err.splitlines()[-1]
    assert OPTIONS[option] in said and "--allow-partial" in said


def test_resume_notes_the_options_that_may_differ_and_says_once_what_is_left_out(place, capfd):
    Path("logs/day1/part-0.csv").write_text("label,shop,price\n")
    assert train(Path("run.toml"), "train.epochs=4", "optim.dense_lr=0.01", resume=True) == 0
    said = capfd.readouterr().out
    assert "note: other options than before: optim.dense_lr 0.02 -> 0.01, train.epochs 3 -> 4" in said
    left = "(no Parquet, by name, and left out: logs/day1/part-0.csv)"
    assert f"data: train 960 rows of 1 file {left}, test 960 rows of 1 file\n" in said


def test_a_run_keeps_the_type_of_its_ids(place):
    """The row of an id is the same, whatever type the column has another day."""
    ids = pa.array(np.arange(ROWS) % 7 * 1000)
    table = pq.read_table("logs/day1/a.parquet").append_column("item", ids)
    Path("hashed").mkdir()
    pq.write_table(table, "hashed/a.parquet")
    text = 'name = "h"\nlabel = "label"\n[fields]\nitem = { kind = "categorical", encoding = "hash", num_embeddings = 50, embedding_dim = 4 }\n'
    Path("hashed/schema.toml").write_text(text)
    settings = ("schema=hashed/schema.toml", 'data.train=["hashed"]', "data.test=[]", "train.out=runs/h")
    assert train(Path("run.toml"), *settings) == 0
    assert load_schema("runs/h/schema.toml").features[0].type == "integer"
    Path("later").mkdir()
    pq.write_table(table.set_column(3, "item", ids.cast(pa.string())), "later/a.parquet")
    for day in ("hashed", "later"):
        assert main(["predict", "runs/h", "--data", f"{day}/a.parquet", "--out", f"of_{day}"]) == 0
    first, second = (pq.read_table(f"of_{day}/a.parquet")["probability"] for day in ("hashed", "later"))
    assert first.equals(second) and len(first.unique()) == 7


def test_a_table_of_another_type_of_ids_has_other_rows(tmp_path):
    entries = [f'encoding = "hash", type = "{each}", num_embeddings = 9' for each in ("text", "integer")]
    schemas = [schema_of(tmp_path / str(number), entry) for number, entry in enumerate(entries)]
    assert other_ids(*schemas) == {"f": "ids are text there, integer here"}
