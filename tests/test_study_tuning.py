"""Proves that tuning draws what the space says, gives every model as many trials, continues after a kill, prunes, and writes the winner."""

import json
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from small_data import CONFIG, SCHEMA, write_small

from data.errors import InputError
from mbcnet_rec.cli import main
from mbcnet_rec.config import RunConfig, config_text, load_config
from mbcnet_rec.study import tuning
from mbcnet_rec.study.runner import StudyRequest, conduct
from mbcnet_rec.study.runs import PRUNED, Run, place_run, train_one
from mbcnet_rec.study.studies import MODELS, STUDIES
from mbcnet_rec.study.tuning import Range, Search, load_search, tune_model, tune_models, with_overrides

SHIPPED = Path(tuning.__file__).parent / "spaces" / "small.toml"
SEARCH = Search(
    {
        "optim.dense_lr": Range(low=1e-4, high=1e-2, log=True),
        "model.dnn.hidden": Range(choices=([8], [16, 8])),
        "model.mbcnet.dropout": Range(choices=(0.0, 0.5)),
    },
    trials=3,
    sampler="random",
)


@pytest.fixture
def config(tmp_path) -> RunConfig:
    (tmp_path / "run.toml").write_text(CONFIG.format(folder=tmp_path))
    (tmp_path / "schema.toml").write_text(SCHEMA)
    for name in ("train.parquet", "valid.parquet", "test.parquet"):
        (tmp_path / name).touch()
    return load_config(tmp_path / "run.toml")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "tuned"


class Trained(list):
    """Training that only notes its config; its score is its dense learning rate."""

    def __call__(self, config, watch):
        config.run_folder.mkdir(parents=True)
        self.append(config)
        for step in (10, 20, 30):
            if watch(step, config.optim.dense_lr):
                break
        (config.run_folder / "DONE").touch()
        line = {"split": "valid", "step": 30, "auc": config.optim.dense_lr}
        (config.run_folder / "metrics.jsonl").write_text(json.dumps(line))
        return ""


def test_winner_is_a_config_that_trains_again(config, out):
    trained = Trained()
    path, winner = tune_model(config, SEARCH, "dnn", out, trained)
    best = load_config(path)
    assert best.optim.dense_lr == winner.value == max(each.optim.dense_lr for each in trained)
    assert best.model.kind == "dnn" and best.model.dnn.hidden in ((8,), (16, 8))
    assert best.train.out == config.train.out, "the config with the winner's values, not a trial's folder"
    assert len(trained) == 3 and {each.train.seed for each in trained} == {config.train.seed}
    assert all(each.model.mbcnet.dropout == 0 for each in trained), "keys of other models are not drawn"


def test_every_model_has_as_many_trials_and_the_draws_are_the_same_again(config, tmp_path, capsys):
    one, two = Trained(), Trained()
    for folder, trained in (("one", one), ("two", two)):
        tune_models(config, SEARCH, ("dnn", "mbcnet"), tmp_path / folder, trained)
    assert [each.model.kind for each in one] == ["dnn"] * 3 + ["mbcnet"] * 3
    assert [each.optim.dense_lr for each in one] == [each.optim.dense_lr for each in two]
    assert "mbcnet study table3" in capsys.readouterr().out


def test_what_starts_processes_of_its_own_is_not_started_as_ranks(config, out, monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "first", "MASTER_PORT": "9"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"mbcnet tune: started as 2 ranks.*start it once"):
        tune_models(config, SEARCH, (), out, Trained())
    with pytest.raises(InputError, match=r"mbcnet study: started as 2 ranks.*start it once"):
        conduct(StudyRequest(STUDIES["table3"], out / "run.toml"))
    assert not out.exists()


def test_a_killed_trial_is_tried_again_with_its_values(config, out):
    seen, trained = [], Trained()

    def killed(config, watch):
        seen.append(config)
        raise KeyboardInterrupt

    for _ in range(2):  # twice over
        with pytest.raises(KeyboardInterrupt):
            tune_model(config, SEARCH, "dnn", out, killed)
    for _ in range(2):
        tune_model(config, SEARCH, "dnn", out, trained)
        assert trained[0] == seen[0] == seen[1], "the same draw"
        assert len(trained) == 3, "the kill cost no trial of the budget"


OTHER = {  # what changes before a second start, and how that is told
    "a choice more": (lambda home, config: (config, "choices"), "space model.dnn.hidden [[8], [16, 8]] -> [[8], [16, 8], [4]]"),
    "sampler": (lambda home, config: (config, "sampler"), "sampler"),
    "seed": (lambda home, config: (with_overrides(config, ["train.seed=7"], "x"), ""), "train.seed 0 -> 7"),
    "epochs": (lambda home, config: (with_overrides(config, ["train.epochs=9"], "x"), ""), "train.epochs 1 -> 9"),
    "data": (
        lambda home, config: ((home / "valid.parquet").write_text("x" * 9), (config, ""))[1],
        "data.valid: 1 changed (valid.parquet)",
    ),
    "more data": (
        lambda home, config: (
            (home / "more.parquet").touch(),
            (with_overrides(config, [f'data.train=["{home}/more.parquet", "{home}/train.parquet"]'], "x"), ""),
        )[1],
        "data.train: 1 new (more.parquet)",
    ),
    "schema": (
        lambda home, config: ((home / "schema.toml").write_text(SCHEMA.replace("width = 4", "width = 5")), (config, ""))[1],
        "schema image",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", OTHER)
def test_trials_of_other_settings_or_data_are_not_continued(what, config, out, tmp_path):
    change, words = OTHER[what]
    trained = Trained()
    tune_model(config, replace(SEARCH, trials=1), "dnn", out, trained)
    tune_model(replace(config, name="n"), replace(SEARCH, trials=2), "dnn", out, trained)
    other, search = change(tmp_path, config)
    more = {"model.dnn.hidden": Range(choices=([8], [16, 8], [4]))}
    changed = {"choices": replace(SEARCH, space=SEARCH.space | more), "sampler": replace(SEARCH, sampler="tpe")}
    with pytest.raises(InputError, match="choose another --out") as caught:
        tune_model(other, replace(changed.get(search, SEARCH), trials=3), "dnn", out, trained)
    assert words in str(caught.value) and "its 2 trials had other settings or data" in str(caught.value)
    assert len(trained) == 2, "more trials of the same are drawn, of others none"


def test_files_that_are_no_study_are_told_in_one_line(config, out):
    folder = out / "trials" / "dnn"
    folder.mkdir(parents=True)
    (folder / "journal.log").write_text("something else\n" * 500)
    with pytest.raises(InputError, match=r"journal.log: is no study of Optuna's \(") as caught:
        tune_model(config, SEARCH, "dnn", out, Trained())
    assert "\n" not in str(caught.value)
    (folder / "journal.log").unlink()
    study = tuning.open_study(folder, "dnn")
    study.add_trial(optuna.trial.create_trial(value=0.9))
    with pytest.raises(InputError, match="its 1 trials had other settings or data"):
        tune_model(config, SEARCH, "dnn", out, Trained())


def test_enkd_is_not_continued_with_other_teachers_than_its_first_trials_had(config, out):
    trained = Trained()
    out.mkdir()
    for width in (7, 9):
        winner = with_overrides(config, ["model.kind=dcnv2", f"model.dcnv2.hidden=[{width}]"], "test")
        (out / "dcnv2.toml").write_text(config_text(winner))
        if width == 7:
            tune_model(config, replace(SEARCH, trials=1), "enkd", out, trained)
    with pytest.raises(InputError, match=r"model.dcnv2.hidden \[7\] -> \[9\].*choose another --out"):
        tune_model(config, replace(SEARCH, trials=2), "enkd", out, trained)
    assert [each.model.dcnv2.hidden for each in trained] == [(7,)]


def test_poor_trials_are_pruned_and_not_taken_for_whole_runs(config, out):
    trained = Trained()
    tune_model(config, replace(SEARCH, trials=8), "dnn", out, trained)
    study = tuning.open_study(out / "trials" / "dnn", "dnn")
    pruned = study.get_trials(states=(TrialState.PRUNED,))
    assert pruned and len(study.trials) == 8
    best = study.best_trial.params["optim.dense_lr"]
    assert all(trial.params["optim.dense_lr"] < best for trial in pruned)
    assert sum(not (each.run_folder / "DONE").exists() for each in trained) == len(pruned)


def test_a_pruned_run_is_trained_anew_where_a_whole_one_is_wanted(tmp_path):
    rows = load_config(write_small(tmp_path / "rows", 200, 50))
    config = place_run(
        with_overrides(rows, ["model.kind=dnn", "train.epochs=2", "train.eval_every=1"], "x"), 0, tmp_path
    )
    run = Run("dnn", 0, config)

    def prune(step, auc):
        (run.folder / PRUNED).touch()
        return True

    assert train_one(config, prune) == "" and (run.folder / "DONE").exists() and not run.done, (
        "killed before it was told"
    )
    assert train_one(config) == "" and run.done
    assert json.loads((run.folder / "DONE").read_text())["step"] == 6


def test_failed_trials_are_told_and_none_left_is_an_error(config, out):
    with pytest.raises(InputError, match="none of the 3 trials of dnn came to an end"):
        tune_model(config, SEARCH, "dnn", out, lambda config, watch: "the loss is not finite")


def test_enkd_takes_teachers_that_are_tuned_already(config, out):
    ours = with_overrides(config, ["model.kind=dcnv2", "model.dcnv2.hidden=[7]"], "test")
    out.mkdir()
    (out / "dcnv2.toml").write_text(config_text(ours))
    base = tuning.base_config(config, "enkd", out)
    assert base.model.dcnv2.hidden == (7,) and base.model.kind == "enkd"
    assert base.model.crossnet.hidden == (16, 16, 8), "the others are as wide as the config's MBCnet"


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind not in ("deepfm", "fm")])
def test_the_shipped_space_fits_every_model_of_table_3(kind, config, tmp_path):
    search = load_search(SHIPPED)
    assert 1 <= search.trials <= 12
    base = tuning.base_config(config, kind, tmp_path)
    tuning.check_keys(search, base, kind)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(12):
        overrides = tuning.draw_overrides(study.ask(), search, kind)
        assert any(each.startswith(f"model.{kind}.") for each in overrides)
        assert with_overrides(base, overrides, "draw").model.kind == kind


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"\[space\] is missing"),
        ("trails = 3\n[space]\na = {low = 1, high = 2}", "trails is not a known key; did you mean 'trials'"),
        ("trials = 0\n[space]\na = {low = 1, high = 2}", "trials = 0: wanted 1 or more"),
        ("sampler = 'grid'\n[space]\na = {low = 1, high = 2}", "sampler = 'grid': wanted one of 'tpe', 'random'"),
        ("[space]\na = 3", "space.a = 3: wanted"),
        ("[space]\na = {choices = []}", "space.a.low = nan, .* wanted one or more choices"),
        ("[space]\na = {low = 2, high = 1}", "wanted one or more choices, or low <= high"),
        ("[space]\na = {low = 1, high = 2, choices = [1]}", "wanted one or more choices, or low <= high"),
        ("[space]\na = {low = 0.0, high = 1.0, log = true}", "low > 0 with log"),
        ("[space]\noptim.dense_lr = {low = 1e-3, high = 1e-2}", "a dotted key is written in quotes"),
        ("[space\n", "space.toml"),
    ],
)
def test_faulty_spaces_are_told_in_one_line(text, message, tmp_path):
    (tmp_path / "space.toml").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        load_search(tmp_path / "space.toml")
    assert "\n" not in str(caught.value)


def test_command_line_answers_mistakes(tmp_path, config, capfd):
    run = str(tmp_path / "run.toml")
    space = tmp_path / "space.toml"
    space.write_text('[space]\n"optim.dense_ll" = {low = 1e-3, high = 1e-2}\n')
    for args, words in (
        (["--config", run, "--space", "nowhere.toml"], "nowhere.toml"),
        (["--config", run, "--space", str(SHIPPED), "--models", "dnm"], "dnm"),
        (["--config", run, "--space", str(space)], "dense_ll is not a known key; did you mean 'dense_lr'?"),
        (["--config", run, "--space", str(SHIPPED), "--trials", "-1"], "trials"),
    ):
        assert main(["tune", *args, "--out", str(tmp_path / "out")]) == 2
        error = capfd.readouterr().err
        assert words in error and "Traceback" not in error and len(error.strip().splitlines()) == 1, error
