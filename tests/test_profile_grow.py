"""A fit grows by the days' files: values get rows after so many sightings, none moves, those long unseen make room, each file counts once; and a
run that continues trains with the grown tables as one that had those rows from the start, at 1 and 2 ranks."""

import os
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from small_data import SCHEMA, small_table
from test_lineage import days, tensors
from test_train import ENV
from tiny_run import CONFIG, lines_of, train

from data.profile.grow import grow_fitted
from data.reading.columns import Place
from data.reading.encode import Encoder
from data.schema import load_schema
from mbcnet_rec.checkpoints.manifest import read_checkpoint
from mbcnet_rec.cli import main
from mbcnet_rec.config import load_config
from mbcnet_rec.serving import loader as serving
from mbcnet_rec.training.hooks import Hooks
from sharding.bridge.blocks import table_rows

CITY = 'city = { kind = "categorical", encoding = "vocabulary", vocabulary = "fit", embedding_dim = 4, min_count = 2, expire_after = 2 }'
HEAD = 'name = "s"\nlabel = "y"\n[groups]\n[fields]\n'


def grown(folder, field, *columns):
    """The vocabulary after each day, the first one fitted, and after each growth what waits."""
    (folder / "s.toml").write_text(HEAD + field)
    found = []
    for day, values in enumerate(columns):
        pq.write_table(pa.table({"city": values, "y": [0] * len(values)}), folder / f"{day}.parquet")
        words = ["--grow", "fit"] if day else ["s.toml", "-o", "fit"]
        assert main(["schema", "fit", words[0], *words[1:], f"{day}.parquet"]) == 0
        waiting = folder / "fit/vocabulary/waiting/city.parquet"
        counts = pq.read_table(waiting).to_pydict() if waiting.is_file() else {"value": [], "count": []}
        rows = pq.read_table(folder / "fit/vocabulary/city.parquet")["value"].to_pylist()
        found.append((rows, dict(zip(counts["value"], counts["count"], strict=True))))
    return found


@pytest.mark.parametrize("kind", [str, int])
def test_values_get_rows_and_lose_them(tmp_path, monkeypatch, capsys, kind):
    monkeypatch.chdir(tmp_path)
    letters = ["aabbc", "aacdd", "aaeef", "aagge", "abbbf"]
    names = {each: each if kind is str else 2**40 + ord(each) for each in "abcdefg"}
    found = grown(tmp_path, CITY, *([names[each] for each in day] for day in letters))
    back = {value: letter for letter, value in names.items()}
    rows = ["".join(back.get(value, "-") for value in values) for values, _ in found]
    assert rows == ["ab", "abcd", "aecd", "aeg-", "aegbf"], (
        "b leaves after two days, c and d after two more, b comes back into a free row"
    )
    waits = [{back[value]: count for value, count in waiting.items()} for _, waiting in found]
    assert waits == [{"c": 1}, {}, {"f": 1}, {"f": 1}, {}]
    assert [each.num_embeddings for each in load_schema(tmp_path / "fit/schema.toml").features] == [7]
    ids = pa.record_batch({"city": pa.array([*names.values(), None])})
    read = (
        Encoder(load_schema(tmp_path / "fit/schema.toml"), has_labels=False).encode(ids, Place("x", None)).single_ids[0]
    )
    assert read.tolist() == [2, 5, 1, 1, 3, 6, 4, 0], "what has lost its row is out of vocabulary"
    before = {path: path.read_bytes() for path in (tmp_path / "fit").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(["schema", "fit", "--grow", "fit", "3.parquet"]) == 0
    assert "were counted before; nothing changes" in capsys.readouterr().out
    pq.write_table(pa.table({"city": [names["a"]], "y": [1]}), "new.parquet")
    assert main(["schema", "fit", "--grow", "fit", "new.parquet", "2.parquet"]) == 2
    assert "2.parquet: was counted before (1 of 2 files" in capsys.readouterr().err
    (tmp_path / "fit/mine.txt").write_text("mine")
    assert main(["schema", "fit", "--grow", "fit", "new.parquet"]) == 2
    assert "fit: holds something else than the fit that grows; name a new folder" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before


def test_each_file_counts_once_whoever_grows_it(tmp_path):
    """Over days of a power law: what every day has keeps its row, what has gone for two days has none, and nobody has one who was seen once."""
    (tmp_path / "s.toml").write_text(HEAD + CITY)
    rng, files = np.random.default_rng(1), []
    for day in range(6):
        files.append(tmp_path / f"{day}.parquet")
        pq.write_table(pa.table({"city": rng.zipf(1.3, 400) % 500, "y": [0] * 400}), files[-1])
    assert main(["schema", "fit", str(tmp_path / "s.toml"), str(files[0]), "-o", str(tmp_path / "fit")]) == 0
    schema = load_schema(tmp_path / "fit/schema.toml")
    for number, file in enumerate(files[1:], 1):
        grow_fitted(schema, [file], tmp_path / f"{number}")
        schema = load_schema(tmp_path / f"{number}/schema.toml")
    seen = [pq.read_table(each)["city"].to_pylist() for each in files]
    counts = Counter(value for day in seen for value in day)
    rows = set(pq.read_table(tmp_path / "5/vocabulary/city.parquet")["value"].to_pylist())
    lasting = {value for value in counts if all(value in day for day in seen)}
    gone = {value for value in seen[0] if not any(value in day for day in seen[-2:])}
    assert len(lasting) > 5 and lasting <= rows
    assert len(gone) > 5 and not gone & rows
    assert min(counts[value] for value in rows - {None}) >= 2


VOCABULARY = 'encoding = "vocabulary", vocabulary = "fit", expire_after = {0}'


@pytest.fixture
def log(tmp_path, monkeypatch):
    """Three days, of which each brings users and things of its own; a schema fitted on the first, grown by each."""
    monkeypatch.chdir(tmp_path)
    write_growing(tmp_path)
    return tmp_path


def write_growing(folder, expire_after=0, kind="adagrad"):
    for day in range(1, 4):
        (folder / f"log/ds=2024-06-0{day}").mkdir(parents=True)
        table = small_table(240, day)
        users = table["user"].to_numpy() % (50 - 5 * day) + 20 * day
        things = pa.array(table["item"].to_numpy(zero_copy_only=False) % 20 + 10 * day, pa.int64(), from_pandas=True)
        table = table.set_column(table.column_names.index("user"), "user", pa.array([f"u{each}" for each in users]))
        table = table.set_column(table.column_names.index("item"), "item", things)
        history = [[each % 20 + 10 * day for each in row] for row in table["history"].to_pylist()]
        table = table.set_column(table.column_names.index("history"), "history", pa.array(history))
        pq.write_table(table, folder / f"log/ds=2024-06-0{day}/part.parquet", row_group_size=100)
    settings = VOCABULARY.format(expire_after)
    text = SCHEMA.replace('"categorical", num_embeddings = 120', f'"categorical", {settings}')
    text = text.replace("thing = { num_embeddings = 60,", "thing = {").replace(
        'table = "thing"', f'table = "thing", {settings}'
    )
    (folder / "schema.toml").write_text(text)
    config = (
        CONFIG.replace("rows/schema", "fit/schema")
        .replace("rows/train.parquet", "log")
        .replace('test = ["rows/test.parquet"]', "")
    )
    config = config.replace("lanes = 12", 'lanes = 12\norder = "chronological"')
    (folder / "tiny.toml").write_text(f'{config}[optim.embedding]\nname = "{kind}"\nlr = 0.1\n')
    assert main(["schema", "fit", "schema.toml", "log/ds=2024-06-01", "-o", "fit"]) == 0


def night(day, *words):
    assert main(["schema", "fit", "--grow", "fit", f"log/ds=2024-06-0{day}"]) == 0
    assert main(["train", "--continue", "run", "--data", f"ds=2024-06-0{day}", *words]) == 0


def test_days_with_growth_equal_a_run_that_had_the_rows_from_the_start(log, capsys):
    assert train("tiny.toml", "train.out=run", 'data.train=["log/ds=2024-06-01"]') == 0
    before = load_schema(log / "run/schema.toml")
    night(2, "--progressive")
    night(3, "--progressive")
    after = load_schema(log / "run/schema.toml")
    assert [each.num_embeddings for each in after.tables[:2]] > [each.num_embeddings for each in before.tables[:2]]
    assert train("tiny.toml", "train.out=whole") == 0
    ours, theirs = tensors(log / "run", 15), tensors(log / "whole", 15)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    found = days(log / "run")
    assert [each.get("growth", {}).get("user", {}).get("admitted") for each in found] == [None, 16, 15]
    assert all(each["profile"]["new/user"] > 0.1 for each in found[1:]), (
        "a day is scored as the model of the days before reads it"
    )
    assert " 10 admitted" in capsys.readouterr().out
    (line,) = [each for each in lines_of(log / "run", "growth") if each["step"] == 5]
    assert (line["admitted/user"], line["expired/user"]) == (16, 0)
    page = (log / "run/report.html").read_text()
    assert "admitted" in page and "progressive split, 240 rows, weights of step 10" in page


def test_a_row_that_expires_begins_anew_also_where_the_day_died_before_its_first_checkpoint(log, capsys):
    """Freed rows have initial values and state; the day goes on from the growth that it began with; serving gets the change as a delta."""
    write = (log / "schema.toml").read_text().replace("expire_after = 0", "expire_after = 1")
    (log / "schema.toml").write_text(write)
    assert main(["schema", "fit", "schema.toml", "log/ds=2024-06-01", "-o", "fit", "--force"]) == 0
    first = ("tiny.toml", 'data.train=["log/ds=2024-06-01"]', "train.out=run")
    assert train(*first) == 0
    assert main(["export", "run", "--out", "before", "--no-aot"]) == 0
    shutil.copytree("run", "died")

    def die(loss, outputs):
        raise RuntimeError("died")

    assert main(["schema", "fit", "--grow", "fit", "log/ds=2024-06-02"]) == 0
    second = ("run/config.toml", 'data.train=["log/ds=2024-06-02"]', "train.keep_last=9")
    assert train(*second, continues=True) == 0
    with pytest.raises(RuntimeError, match="died"):
        train(*second, "train.out=died", continues=True, hooks=Hooks(on_loss=die))
    assert not (log / "died/schema_before").exists(), "the checkpoint has the vocabulary of its day"
    assert main(["evaluate", "died", "--data", "log/ds=2024-06-02"]) == 0, (
        "its last checkpoint is read with the vocabulary of its day"
    )
    assert main(["schema", "fit", "--grow", "fit", "log/ds=2024-06-03"]) == 0
    assert train("died/config.toml", resume=True) == 0, "the day goes on with the vocabulary that it began with"
    ours, theirs = tensors(log / "run", 10), tensors(log / "died", 10)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []

    values = pq.read_table("run/vocabulary/user.parquet")["value"].to_pylist()
    free = torch.tensor([row for row, value in enumerate(values, 2) if value is None])
    assert len(free) > 2 and days(log / "run")[-1]["growth"]["user"]["expired"] > len(free), "some were given to others"
    config = load_config("tiny.toml")
    ((_, initial),) = table_rows(config.train.seed, "user", 0, len(values) + 2, 16, config.optim.embedding.init_std)
    (rows, state) = (
        next(each for name, each in ours.items() if name.startswith(part) and ".user." in name)
        for part in ("model/", "optim/")
    )
    assert torch.equal(rows[free], initial[free]) and not state[free].any()

    capsys.readouterr()
    assert main(["export", "run", "--since", "before", "--out", "delta"]) == 0
    nulls = sum(pq.read_table(path)["value"].null_count for path in (log / "run/vocabulary").glob("*.parquet"))
    assert f"{nulls} freed" in capsys.readouterr().out
    assert main(["export", "run", "--out", "after", "--no-aot"]) == 0
    model, whole = serving.load("before"), serving.load("after")
    model.apply("delta")
    assert model.digest == whole.digest and model.vocabularies == whole.vocabularies
    assert all(torch.equal(each.weights_host, whole.tables[name].weights_host) for name, each in model.tables.items())
    night(3)


def often(log, min_count=9):
    """Make ids wait for a row: fit anew, and train the first day."""
    text = (log / "schema.toml").read_text()
    (log / "schema.toml").write_text(text.replace("expire_after = 0", f"expire_after = 0, min_count = {min_count}"))
    assert main(["schema", "fit", "schema.toml", "log/ds=2024-06-01", "-o", "fit", "--force"]) == 0
    assert train("tiny.toml", "train.out=run", 'data.train=["log/ds=2024-06-01"]', "train.checkpoint_every=2") == 0


def copy_in(run, step, name):
    """Where a checkpoint has its copy of a file of the run folder."""
    folder = run / f"checkpoints/step_{step}"
    return folder / read_checkpoint(folder).copies[name][0]


def rows_and_counts(run, step):
    """What a checkpoint has of users: those with a row, and the sightings of the others."""
    rows, waiting = (pq.read_table(copy_in(run, step, f"vocabulary/{name}user.parquet")) for name in ("", "waiting/"))
    return set(rows["value"].to_pylist()), dict(zip(waiting["value"].to_pylist(), waiting["count"].to_pylist()))


def test_a_checkpoint_has_the_counts_themselves(log, capfd):
    """Exactly those of all rows so far, in files that the checkpoints of a day share; and with nothing else left the next day grows, and trains,
    to the same bit."""
    often(log)
    copies = {name: [copy_in(log / "run", step, name) for step in (4, 5)] for name in COUNTS}
    for name, (one, other) in copies.items():
        assert one.samefile(other), "an unchanged vocabulary costs no bytes"
        assert not one.samefile(log / "run" / name), "what overwrites the one in the run folder leaves them as they are"
    seen, known = Counter(), set()
    for day in (1, 2):
        if day == 2:
            night(2)
        seen.update(pq.read_table(f"log/ds=2024-06-0{day}")["user"].to_pylist())
        known |= {value for value, count in seen.items() if count >= 9}
        waiting = {value: count for value, count in seen.items() if value not in known}
        assert rows_and_counts(log / "run", 5 * day) == (known, waiting) and len(known) > 5 and len(waiting) > 5
    shutil.copytree("run", "lost")
    assert main(["schema", "fit", "--grow", "fit", "log/ds=2024-06-03"]) == 0
    assert train("run/config.toml", 'data.train=["log/ds=2024-06-03"]', continues=True) == 0

    shutil.rmtree("lost/vocabulary")
    os.remove("lost/schema.toml")
    assert main(["schema", "fit", "--grow", "lost", "log/ds=2024-06-03", "-o", "again"]) == 0
    assert "warning: lost/schema.toml: is not that of the checkpoint of step 10" in capfd.readouterr().err
    for name in COUNTS:
        assert (log / "again" / name).read_bytes() == (log / "fit" / name).read_bytes()
    third = ("run/config.toml", 'data.train=["log/ds=2024-06-03"]', "train.out=lost", "schema=again/schema.toml")
    assert train(*third, continues=True) == 0
    ours, theirs = tensors(log / "run", 15), tensors(log / "lost", 15)
    assert ours.keys() == theirs.keys() and [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert rows_and_counts(log / "run", 15) == rows_and_counts(log / "lost", 15)
    assert days(log / "lost")[-1]["growth"] == days(log / "run")[-1]["growth"]


COUNTS = ("vocabulary/user.parquet", "vocabulary/waiting/user.parquet", "vocabulary/growth.json")


def test_a_run_folder_that_is_newer_than_the_checkpoint_does_not_count(log, capfd):
    """A day that died after its vocabulary had grown: it counts again from the checkpoint, and goes on though the run folder has lost what it began
    with; a run that goes back to an older checkpoint trains the day again, all to the same bit."""
    often(log)
    shutil.copytree("run", "died")
    shutil.copytree("run/checkpoints", "kept")

    def die(loss, outputs):
        raise RuntimeError("died")

    second = ("run/config.toml", 'data.train=["log/ds=2024-06-02"]')
    assert main(["schema", "fit", "--grow", "fit", "log/ds=2024-06-02"]) == 0
    assert train(*second, continues=True) == 0
    with pytest.raises(RuntimeError, match="died"):
        train(*second, "train.out=died", continues=True, progressive=True, hooks=Hooks(on_loss=die))
    capfd.readouterr()
    assert main(["schema", "fit", "--grow", "died", "log/ds=2024-06-02", "-o", "again"]) == 0
    assert (
        "warning: died/schema.toml: is not that of the checkpoint of step 5, whose own is read"
        in capfd.readouterr().err
    )
    shutil.rmtree("died/vocabulary")
    assert train("died/config.toml", resume=True, progressive=True) == 0
    begun = [line["split"] for line in lines_of(log / "died", "growth", "progressive")]
    assert begun == ["growth", "progressive"], "what was begun twice is told once"
    for name in COUNTS:
        found = {(log / each / name).read_bytes() for each in ("fit", "again", "died", "run")}
        assert len(found) == 1, name
    wanted = tensors(log / "run", 10)
    shutil.copytree("run", "back", ignore=shutil.ignore_patterns("step_*"))
    shutil.copytree("kept/step_5", "back/checkpoints/step_5")
    assert train(*second, "train.out=back", continues=True) == 0
    for other in ("died", "back"):
        found = tensors(log / other, 10)
        assert [name for name in wanted if not torch.equal(wanted[name], found[name])] == []


def test_damaged_counts_are_refused_by_name(log, capfd):
    often(log)
    (log / "run/checkpoints/step_4").rename(log / "step_4")
    copy = copy_in(log / "run", 5, "vocabulary/waiting/user.parquet")
    data = bytearray(copy.read_bytes())
    data[len(data) // 2] ^= 1
    copy.write_bytes(data)
    shutil.rmtree("run/vocabulary")
    capfd.readouterr()
    words = f"{copy.relative_to(log)} (vocabulary/waiting/user.parquet): changed since it was written (SHA-256 differs)"
    assert main(["schema", "fit", "--grow", "run", "log/ds=2024-06-02", "-o", "again"]) == 2
    assert words in capfd.readouterr().err and not (log / "again").exists()
    assert main(["train", "--continue", "run", "--data", "ds=2024-06-02"]) == 2
    said = capfd.readouterr().err
    assert f"warning: {words}" in said and "run: of 1 checkpoints none is whole" in said
    waiting = log / "fit/vocabulary/waiting/user.parquet"
    data = bytearray(waiting.read_bytes())
    data[20] ^= 1
    waiting.write_bytes(data)
    assert main(["schema", "fit", "--grow", "fit", "log/ds=2024-06-02"]) == 2
    assert "fit/vocabulary/waiting/user.parquet: cannot be read (" in capfd.readouterr().err
    waiting.unlink()  # before any growth: counting would begin anew
    assert main(["schema", "fit", "--grow", "fit", "log/ds=2024-06-02"]) == 2
    assert "fit/vocabulary/waiting/user.parquet: cannot be read (" in capfd.readouterr().err


@pytest.mark.long
def test_two_ranks_grow_as_one_run_of_two_ranks(log):
    """By processes: day by day with growth equals the whole run of two ranks with the last vocabulary, bit for bit, also where before the last day
    all but the checkpoints was lost."""

    def start(*words):
        launch = [
            sys.executable,
            "-m",
            "launch.agent",
            "--nproc_per_node=2",
            "--rdzv_backend=c10d",
            "--rdzv_endpoint=localhost:0",
        ]
        subprocess.run([*launch, "-m", "mbcnet_rec.cli", "train", *words], env=ENV, check=True, timeout=300)

    kinds = ["--set", 'sharding.sharding_types=["table_wise"]']
    start("--config", "tiny.toml", *kinds, "--set", "train.out=run", "--set", 'data.train=["log/ds=2024-06-01"]')
    for day in (2, 3):
        source = "fit"
        if day == 3:
            shutil.rmtree("fit")
            shutil.rmtree("run/vocabulary")
            source = "run"
        assert main(["schema", "fit", "--grow", source, f"log/ds=2024-06-0{day}", "-o", "fit"]) == 0
        start("--continue", "run", "--data", f"ds=2024-06-0{day}", "--progressive")
    start("--config", "tiny.toml", *kinds, "--set", "train.out=whole")
    ours, theirs = tensors(log / "run", 15), tensors(log / "whole", 15)
    assert ours.keys() == theirs.keys() and [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    rates = [each["label_rate"] for each in days(log / "run")]
    assert rates == [pq.read_table(log / f"log/ds=2024-06-0{day}")["click"].to_numpy().mean() for day in (1, 2, 3)]
