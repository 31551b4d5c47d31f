"""Proves that trials and runs over an engine end as in one process: the same winner and table, where a worker is killed, and on Ray and ranks, too."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from optuna.trial import TrialState
from small_data import CONFIG, SCHEMA, write_small

from data import engine as engines
from data.engine import HERE, Engine
from mbcnet_rec.config import RunConfig, load_config
from mbcnet_rec.study.runs import Run, place_run, train_all
from mbcnet_rec.study.tuning import NUMBER, Range, Search, open_study, tune_model, with_overrides

SEARCH = Search({"optim.dense_lr": Range(low=1e-4, high=1e-2, log=True)}, trials=8, sampler="random")
TWO = Engine("local", 2)


@pytest.fixture
def config(tmp_path) -> RunConfig:
    (tmp_path / "run.toml").write_text(CONFIG.format(folder=tmp_path))
    (tmp_path / "schema.toml").write_text(SCHEMA)
    for name in ("train.parquet", "valid.parquet", "test.parquet"):
        (tmp_path / name).touch()
    return load_config(tmp_path / "run.toml")


def trained(config, watch) -> str:
    """Train nothing: the score is the learning rate of the dense part."""
    config.run_folder.mkdir(parents=True)
    for step in (10, 20, 30) if watch else ():
        if watch(step, config.optim.dense_lr):
            break
    (config.run_folder / "DONE").touch()
    line = {"split": "valid", "step": 30, "auc": config.optim.dense_lr}
    (config.run_folder / "metrics.jsonl").write_text(json.dumps(line))
    return ""


def killed(marker: Path, once: bool, config, watch) -> str:
    """The same, but the first worker that comes here is killed, or each that trains what it began."""
    key = config.run_folder.name
    try:
        with marker.open("x") as file:
            file.write(key)
    except FileExistsError:
        if once or marker.read_text() != key:
            return trained(config, watch)
    return os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.long
def test_two_workers_find_the_winner_that_one_process_finds(config, tmp_path):
    one = tune_model(config, SEARCH, "dnn", tmp_path / "one", trained)
    two = tune_model(config, SEARCH, "dnn", tmp_path / "two", trained, TWO)
    assert one[0].read_text() == two[0].read_text() and one[1].params == two[1].params
    assert one[1].user_attrs[NUMBER] == two[1].user_attrs[NUMBER]
    found = [open_study(tmp_path / name / "trials/dnn", "dnn").trials for name in ("one", "two")]
    drawn = [{each.user_attrs[NUMBER]: each.params for each in trials} for trials in found]
    assert drawn[0] == drawn[1] and len(found[0]) == len(found[1]) == 8
    assert all(any(each.state == TrialState.PRUNED for each in trials) for trials in found)


@pytest.mark.long
def test_a_killed_worker_costs_its_trial_alone_which_is_tried_again(config, tmp_path):
    one = tune_model(config, SEARCH, "dnn", tmp_path / "one", trained)
    run = partial(killed, tmp_path / "marker", True)
    two = tune_model(config, SEARCH, "dnn", tmp_path / "two", run, TWO)
    assert one[0].read_text() == two[0].read_text()
    trials = open_study(tmp_path / "two/trials/dnn", "dnn").trials
    (lost,) = (each for each in trials if each.state == TrialState.FAIL)
    again = [each for each in trials if each.user_attrs[NUMBER] == lost.user_attrs[NUMBER]]
    assert len(trials) == 9 and len(again) == 2 and again[0].params == again[1].params


@pytest.mark.long
def test_what_kills_each_worker_is_given_up_and_a_later_start_goes_on(config, tmp_path):
    run = partial(killed, tmp_path / "marker", False)
    _, winner = tune_model(config, Search(SEARCH.space, 4, "random"), "dnn", tmp_path / "out", run, TWO)
    told = {path.stem: path.read_text() for path in (tmp_path / "out/trials/dnn").glob("*.txt")}
    assert sorted(told) == ["0", "1", "2", "3"]
    (number,) = (number for number, words in told.items() if words.startswith("failed (3 processes that trained it"))
    assert winner.user_attrs[NUMBER] != int(number)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/trials/dnn").glob("*.txt")}
    tune_model(config, SEARCH, "dnn", tmp_path / "out", trained, TWO)
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}
    assert len(list((tmp_path / "out/trials/dnn").glob("*.txt"))) == 8


@pytest.mark.long
def test_a_killed_worker_costs_a_study_its_run_alone(config, tmp_path):
    runs = [Run("a", seed, place_run(config, seed, tmp_path / "out")) for seed in range(4)]
    run = partial(killed, tmp_path / "marker", False)
    failures = [failure for _, failure in train_all(runs, TWO, run)]
    assert sorted(failures)[:3] == ["", "", ""] and "start again, with fewer --workers" in max(failures)
    assert sum(each.done for each in runs) == 3 and not list(tmp_path.rglob("*.ended"))
    (again,) = train_all(runs, HERE, trained)
    assert again[1] == "" and all(each.done for each in runs)


SPACE = '[space]\n"optim.dense_lr" = { low = 1e-3, high = 1e-2, log = true }\n'
SHORT = ("--set", "train.max_steps=4", "--set", "train.eval_every=2", "--set", "model.kind=dnn")


def commands(folder: Path, out: str) -> list[list[str]]:
    config = ["--config", str(folder / "rows/run.toml"), *SHORT]
    tune = ["tune", *config, "--space", str(folder / "space.toml"), "--trials", "3", "--out", f"{out}/tuned"]
    return [tune, ["study", "table3", *config, "--models", "dnn", "--seeds", "2", "--out", f"{out}/studies"]]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Data, and what one process makes of it."""
    folder = tmp_path_factory.mktemp("home")
    write_small(folder / "rows", 480, 96)
    (folder / "space.toml").write_text('sampler = "random"\n' + SPACE)
    script = "import sys, json; from mbcnet_rec.cli import main; [main(words) for words in json.loads(sys.argv[1])]"
    done = started(folder, script, json.dumps([[*words, "--workers", "1"] for words in commands(folder, "one")]))
    assert done.wait(400) == 0
    return folder


def started(folder: Path, script: str, *words: str, **env: str) -> subprocess.Popen:
    env = os.environ | {"OMP_NUM_THREADS": "1", "HOME": str(folder), "RAY_worker_niceness": "0"} | env
    return subprocess.Popen([sys.executable, "-c", script, *words], cwd=folder, env=env)


def outcome(folder: Path, out: str) -> tuple:
    """The winner, each run's metrics but for times, and the study's table of them."""
    runs = {path.parent.name: path.parent for path in (folder / out).glob("*/runs/*/DONE")}
    scores = {key: json.loads((run / "DONE").read_text())["auc"] for key, run in runs.items()}
    (page,) = (folder / out / "studies").glob("*.html")
    rows = [line for line in page.read_text().splitlines() if "<td" in line]
    assert len(scores) == 5 and rows
    return (folder / out / "tuned/dnn.toml").read_text(), scores, rows[:1]


@pytest.mark.long
def test_two_ranks_of_torchrun_find_what_one_process_finds(home):
    script = "import sys, json; from mbcnet_rec.cli import main; sys.exit(sum(main(words) for words in json.loads(sys.argv[1])))"
    words = json.dumps([[*each, "--engine", "torchrun"] for each in commands(home, "ranks")])
    ranks = [started(home, script, words, RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank)) for rank in range(2)]
    try:
        assert [each.wait(400) for each in ranks] == [0, 0]
    finally:
        for each in ranks:
            each.kill()
    assert outcome(home, "ranks") == outcome(home, "one")


@pytest.mark.long
def test_ray_with_two_workers_finds_what_one_process_finds_and_scores_the_same_bytes(home):
    if importlib.util.find_spec("ray") is None:  # which changes the process that imports it
        pytest.skip("Ray is not installed")
    script = """
import json, sys
import ray
from mbcnet_rec.cli import main
ray.init("local", num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
codes = [main(words) for words in json.loads(sys.argv[1])]
ray.shutdown()
sys.exit(sum(codes))
"""
    run = str(next((home / "one/studies/runs").glob("*/DONE")).parent)
    lines = [["export", run, "--out", "artifact", "--no-aot"]]
    lines += [[*each, "--engine", "ray"] for each in commands(home, "ray")]
    for number, scored in enumerate(("artifact", run)):
        words = ["predict", scored, "--data", "rows/test.parquet", "rows/valid.parquet"]
        one = ["--engine", "local", "--workers", "1", "--out", f"local_{number}"]
        lines += [[*words, *one], [*words, "--engine", "ray", "--out", f"ray_{number}"]]
    done = started(home, script, json.dumps(lines))
    try:
        assert done.wait(500) == 0
    finally:
        done.kill()
    assert outcome(home, "ray") == outcome(home, "one")
    for number in range(2):
        for split in ("test", "valid"):
            ours, theirs = (home / f"{engine}_{number}" / f"{split}.parquet" for engine in ("local", "ray"))
            assert ours.read_bytes() == theirs.read_bytes()


def test_without_ray_its_engine_says_how_to_install_it(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(engines.InputError, match=r'Ray is not installed; pip install "mbcnet-rec\[ray\]"'):
        tune_model(config, SEARCH, "dnn", tmp_path / "out", trained, Engine("ray"))
    with pytest.raises(engines.InputError, match="Ray is not installed"):
        list(train_all([Run("a", 0, place_run(with_overrides(config, [], "x"), 0, tmp_path))], Engine("ray"), trained))
