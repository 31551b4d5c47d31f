"""Three days in one chronological run are day 1, then 2, then 3, bit for bit, also where day 2 was killed and day 3 has another world size;
a run knows its days, and refuses what it has trained, what is not done and what it cannot begin from."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from small_data import SCHEMA, small_table
from test_train import ENV
from tiny_run import CONFIG, lines_of, train, wait_for

from mbcnet_rec.checkpoints.shards import Saved
from mbcnet_rec.cli import main
from mbcnet_rec.training.hooks import Hooks

ROWS = 240  # of a day: 5 steps


@pytest.fixture
def log(tmp_path, monkeypatch):
    """Three days, in partitions, and a config of all of them."""
    monkeypatch.chdir(tmp_path)
    write_days(tmp_path)
    return tmp_path


def write_days(folder, rows=ROWS):
    for day in range(1, 4):
        (folder / f"log/ds=2024-06-0{day}").mkdir(parents=True)
        pq.write_table(small_table(rows, day), folder / f"log/ds=2024-06-0{day}/part.parquet", row_group_size=100)
    pq.write_table(small_table(96, 9), folder / "test.parquet")
    zch = 'user    = { kind = "categorical", encoding = "zch", num_embeddings = 64, eviction_interval = 3, embedding_dim = 16 }'
    (folder / "schema.toml").write_text(re.sub("(?m)^user .*$", zch, SCHEMA))
    config = CONFIG.replace("rows/schema", "schema").replace("rows/train.parquet", "log").replace("rows/test", "test")
    (folder / "tiny.toml").write_text(config.replace("lanes = 12", 'lanes = 12\norder = "chronological"'))


def tensors(run, step):
    saved = Saved(run / f"checkpoints/step_{step}")
    stored = {entry.name for entry, _ in saved.tensors()}
    names = {name for name in saved.shapes if f"{name}@0" not in stored}
    return {name: saved.whole(name) for name in sorted(names)}


def assert_equal(one, other, step=15):
    ours, theirs = tensors(one, step), tensors(other, step)
    assert ours.keys() == theirs.keys() and len(ours) > 10
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def days(run):
    return [json.loads(line) for line in (run / "lineage.jsonl").read_text().splitlines()]


SETTINGS = ("optim.dense_schedule.warmup_steps=8", "optim.accumulate=2", "optim.dense_average=0.9")


def test_day_after_day_is_one_run(log, capfd):
    assert train("tiny.toml", *SETTINGS, "train.out=whole") == 0
    assert train("tiny.toml", *SETTINGS, "train.out=run", 'data.train=["log/ds=2024-06-01"]') == 0
    assert main(["train", "--continue", "run", "--data", "ds=2024-06-02"]) == 0
    third = ("run/config.toml", 'data.train=["log/ds=2024-06-03"]')
    assert train(*third, continues=True) == 0
    assert_equal(log / "whole", log / "run")
    found = days(log / "run")
    assert [each["name"] for each in found] == ["ds=2024-06-01", "ds=2024-06-02", "ds=2024-06-03"]
    assert [(each["first_step"], each["step"], each["rows"]) for each in found] == [
        (0, 5, 240),
        (5, 10, 240),
        (10, 15, 240),
    ]
    for number, each in enumerate(found, 1):
        clicks = pq.read_table(log / f"log/ds=2024-06-0{number}/part.parquet")["click"].to_numpy()
        assert each["label_rate"] == clicks.mean()
    tested = lines_of(log / "run", "test")
    assert [line["step"] for line in tested] == [5, 10, 15], "the tests of earlier days stay"
    assert [each["metrics"]["auc"] for each in found] == [line["auc"] for line in tested]
    capfd.readouterr()
    assert main(["train", "--continue", "run", "--data", "ds=2024-06-02"]) == 2
    assert "part.parquet was trained already, in 'ds=2024-06-02' (1 of 1 files" in capfd.readouterr().err
    assert train(*third, continues=True, again=True) == 0
    assert [each["name"] for each in days(log / "run")][2:] == ["ds=2024-06-03"] * 2


def test_what_died_in_a_day_goes_on_within_it(log, capfd):
    """Before the first checkpoint of day 2, and after one; by the same command, or by --resume."""

    def dies(number):
        steps = iter(range(number))

        def on_loss(loss, outputs):
            if next(steps, None) is None:
                raise RuntimeError("died")
            return loss, outputs

        return Hooks(on_loss=on_loss)

    assert train("tiny.toml", "train.out=whole") == 0
    assert train("tiny.toml", "train.out=run", 'data.train=["log/ds=2024-06-01"]') == 0
    second = ('data.train=["log/ds=2024-06-02"]', "train.out=run", "train.checkpoint_every=4")
    for steps in (1, 3):
        with pytest.raises(RuntimeError, match="died"):
            train("tiny.toml", *second, continues=True, hooks=dies(steps))
    assert [each["name"] for each in days(log / "run")] == ["ds=2024-06-01", "ds=2024-06-02"]
    capfd.readouterr()
    assert main(["train", "--continue", "run", "--data", "ds=2024-06-03"]) == 2
    assert "run: 'ds=2024-06-02' is not done, and its files are others; finish it with" in capfd.readouterr().err
    assert train("run/config.toml", "train.checkpoint_every=0", resume=True) == 0
    clicks = pq.read_table(log / "log/ds=2024-06-02/part.parquet")["click"].to_numpy()
    assert days(log / "run")[1]["label_rate"] == clicks.mean(), "what was trained before the fault counts once"
    assert train("run/config.toml", 'data.train=["log/ds=2024-06-03"]', continues=True) == 0
    assert_equal(log / "whole", log / "run")


def test_a_run_goes_back_to_an_older_checkpoint(log, capfd):
    """To the end of a day, from which the next one is trained again, whatever days came after; to the inside of one, which is finished first."""
    second, third = (('data.train=["log/ds=2024-06-02"]',), ('data.train=["log/ds=2024-06-03"]',))
    kept = ("train.keep_last=9", "train.checkpoint_every=3", "train.out=run")
    assert train("tiny.toml", *kept, 'data.train=["log/ds=2024-06-01"]') == 0
    for day in (second, third):
        assert train("run/config.toml", *day, continues=True) == 0
    for folder, last in (("end", 5), ("inside", 8)):
        shutil.copytree("run", folder)
        for path in (log / folder / "checkpoints").glob("step_*"):
            if int(path.name[5:]) > last:
                shutil.rmtree(path)
    capfd.readouterr()
    assert train("run/config.toml", *second, "train.out=end", continues=True) == 0
    assert (
        "no checkpoint has ds=2024-06-02, ds=2024-06-03: the run goes on from step 5, before" in capfd.readouterr().out
    )
    for options in ({"continues": True}, {"resume": True}):
        assert train("run/config.toml", *third, "train.out=inside", **options) == 2
        assert "of step 6, is not of the end of 'ds=2024-06-02'; bring the later one back" in capfd.readouterr().err
    assert train("run/config.toml", *second, "train.out=inside", resume=True) == 0
    for folder in ("end", "inside"):
        assert_equal(log / "run", log / folder, 10)
        assert [each["name"] for each in days(log / folder)] == ["ds=2024-06-01", "ds=2024-06-02"]
        assert train("run/config.toml", *third, f"train.out={folder}", continues=True) == 0
        assert_equal(log / "run", log / folder)


def test_what_cannot_be_continued_is_said(log, capfd):
    for words, message in (
        (["--continue", "run", "--data", "ds=2024-06-02"], "run/config.toml"),
        (["--config", "tiny.toml", "--data", "log"], "--data and --again go with --continue"),
        (["--data", "log"], "wanted --config FILE, or --continue RUN"),
        (["--continue", "run", "--resume"], "not allowed with"),
    ):
        assert main(["train", *words]) == 2
        assert message in capfd.readouterr().err
    assert not (log / "run").exists()


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_kill_in_day_two_and_another_world_size_on_day_three(tmp_path, monkeypatch, ranks):
    """By processes: day 2 is killed by SIGKILL after its second checkpoint and begun again; day 3 equals a whole run whose last day was
    trained by that other world size, too."""

    def start(world, *words, **options):
        launch = [sys.executable, "-m", "launch.agent", f"--nproc_per_node={world}", "--rdzv_backend=c10d"]
        launch += ["--rdzv_endpoint=localhost:0", "-m", "mbcnet_rec.cli", "train", *words]
        return subprocess.Popen(launch, env=ENV, start_new_session=True, **options)

    def run(world, *words):
        assert start(world, *words).wait(300) == 0

    config = ["--config", "tiny.toml", *(f"--set={each}" for each in SETTINGS)]
    log, steps = tmp_path, 200
    monkeypatch.chdir(log)
    write_days(log, 48 * steps)
    second = ["--continue", "run", "--data", "ds=2024-06-02", "--set", "train.checkpoint_every=9"]
    run(ranks, *config, "--set", "train.out=run", "--set", 'data.train=["log/ds=2024-06-01"]')
    killed = start(ranks, *second)
    wait_for(
        lambda: any(int(path.parent.name[5:]) > steps for path in log.glob("run/checkpoints/step_*/manifest.json")),
        "no checkpoint",
    )
    workers = Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()
    for pid in (killed.pid, *map(int, workers)):  # the agent first: it would begin them again
        os.kill(pid, signal.SIGKILL)
    killed.wait()
    assert not (log / "run/DONE").exists(), "it was killed within the day"
    run(ranks, *second)
    run(3 - ranks, "--continue", "run", "--data", "ds=2024-06-03")
    run(ranks, *config, "--set", "train.out=whole", "--set", f"train.max_steps={2 * steps}")
    run(3 - ranks, *config, "--set", "train.out=whole", "--resume")
    assert_equal(log / "run", log / "whole", 3 * steps)


def test_each_day_is_scored_before_it_is_trained(log, capfd):
    """Played by one command: a day's progressive metrics are those of the run that ended the day before; a null share that leaves its range
    is named; the report draws the days."""
    table = pq.read_table(log / "log/ds=2024-06-03/part.parquet")
    price = pa.array([None if row % 2 else 1.0 for row in range(ROWS)], pa.float64())
    table = table.set_column(table.column_names.index("price"), "price", price)
    pq.write_table(table, log / "log/ds=2024-06-03/part.parquet")
    assert main(["train", "--config", "tiny.toml", "--set", "train.out=run", "--progressive"]) == 0
    told = capfd.readouterr().out
    assert re.search(
        r"ALARM: ds=2024-06-03: null share of price is 0\.5, on the days before it was 0\.0\d+ to 0\.0\d+", told
    )
    found = days(log / "run")
    assert [each["name"] for each in found] == ["ds=2024-06-01", "ds=2024-06-02", "ds=2024-06-03"]
    assert [len(each["alarms"]) for each in found] == [0, 0, 1]
    assert not found[0]["progressive"], "nothing was learned yet"
    assert (
        train("tiny.toml", "train.out=one", 'data.train=["log/ds=2024-06-01"]', 'data.test=["log/ds=2024-06-02"]') == 0
    )
    (scored,) = lines_of(log / "one", "test")
    logged = lines_of(log / "run", "progressive")
    assert [line["step"] for line in logged] == [5, 10]
    for key in ("auc", "log_loss", "ne", "calibration", "gauc"):
        assert logged[0][key] == scored[key] == found[1]["progressive"][key]
    for each in found:
        assert each["profile"]["label_rate"] == pytest.approx(each["label_rate"])
    page = (log / "run/report.html").read_text()
    assert "Days" in page and "null share of price" in page
    assert main(["train", "--config", "tiny.toml", "--set", "train.out=run", "--progressive", "--resume"]) == 0
    assert days(log / "run") == found, "all its days are done"


def test_a_fault_in_rows_that_are_scored_loses_no_model(log, capfd):
    bad = small_table(96, 3)
    bad = bad.set_column(bad.column_names.index("hour"), "hour", pa.array([float("inf")] * 96))
    pq.write_table(bad, log / "bad.parquet")
    for split in ("valid", "test"):
        assert train("tiny.toml", f'data.{split}=["bad.parquet"]', f"train.out={split}", "train.max_steps=2") == 2
        out, err = capfd.readouterr()
        assert (
            f"run folder: {split}" in out
            and f"data.{split}: " in err
            and "the run is done and its model is whole" in err
        )
        assert json.loads((log / split / "DONE").read_text())["step"] == 2
    early = ("train.eval_every=2", "train.max_steps=4", "train.out=early")
    assert train("tiny.toml", 'data.valid=["bad.parquet"]', *early) == 2
    assert "the checkpoint of step 2 is written: fix the rows" in capfd.readouterr().err
    assert train("tiny.toml", 'data.valid=["test.parquet"]', *early, resume=True) == 0
