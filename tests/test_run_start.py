"""Proves that --overwrite removes a run only when all was checked, whole or not at all, and nothing besides; --resume begins no lost run anew."""

import shutil
from pathlib import Path

import pytest
from tiny_run import lines_of, make_run, train

from data.errors import InputError
from mbcnet_rec.checkpoints.run_folder import CONFIG, GOING, NEW, REPLACED, put_in_place, recover
from mbcnet_rec.checkpoints.storage import CheckpointStorage
from mbcnet_rec.cli import main
from mbcnet_rec.config import load_config
from mbcnet_rec.run_training import run_training

SHORT = ("train.max_steps=2", "data.test=[]")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A config and a short run of it, in `first`."""
    folder = make_run(tmp_path_factory.mktemp("start"))
    config = folder / "tiny.toml"
    config.write_text(config.read_text().replace("rows/", f"{folder}/rows/"))
    assert train(config, *SHORT, f"train.out={folder}/first") == 0
    return config


@pytest.fixture
def run(tiny, tmp_path) -> Path:
    return Path(shutil.copytree(tiny.parent / "first", tmp_path / "run"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


MISTAKES = {
    "data": ('data.train=["lgos"]', "lgos"),
    "no rows of the test split": ('data.test=["nothing"]', "nothing"),
    "schema": ("schema=nope.toml", "nope.toml"),
    "plan": ("sharding.plan=nope.json", "nope.json"),
    "itself as a warm start": ("train.warm_start={run}", "--overwrite replaces this very run"),
    "a warm start from nothing": ("train.warm_start=runs/none", "runs/none"),
    "optimizer": ("optim.embedding.name=adam", "adam"),
    "batch size": ("data.batch_size=50", "batch_size = 50"),
    "checkpoints": ("train.checkpoint_folder={run}/config.toml", "no folder can be there"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_leaves_the_earlier_run_as_it_was(tiny, run, capfd, mistake):
    setting, words = MISTAKES[mistake]
    before = contents(run)
    code = train(tiny, *SHORT, f"train.out={run}", setting.replace("{run}", str(run)), overwrite=True)
    assert code == 2 and words in capfd.readouterr().err.splitlines()[-1]
    assert contents(run) == before


def test_a_student_without_its_teachers_leaves_the_earlier_run_as_it_was(tiny, run):
    before = contents(run)
    with pytest.raises(InputError, match="its teachers are trained first"):
        run_training(load_config(tiny, [*SHORT, f"train.out={run}", "model.kind=enkd"]), overwrite=True)
    assert contents(run) == before


def test_a_run_is_replaced_but_not_what_a_user_has_put_beside_it(tiny, run):
    (run / "scores").mkdir()
    (run / "scores/part.parquet").write_text("mine")
    settings = ("train.max_steps=1", "data.test=[]", f"train.out={run}")
    assert train(tiny, *settings, overwrite=True) == 0
    assert (run / "scores/part.parquet").read_text() == "mine"
    assert [path.name for path in (run / "checkpoints").glob("step_*")] == ["step_1"]
    assert load_config(run / CONFIG).train.max_steps == 1
    assert not (run / NEW).exists() and not (run / REPLACED).exists()


def test_resume_and_overwrite_contradict_each_other(tiny, run, capfd):
    before = contents(run)
    command = ["--config", str(tiny), "--set", f"train.out={run}", "--resume", "--overwrite"]
    for words in (["train", *command], ["launch", *command]):
        assert main(words) == 2 and "not allowed with" in capfd.readouterr().err
    assert train(tiny, f"train.out={run}", resume=True, overwrite=True) == 2
    assert "--resume with --overwrite" in capfd.readouterr().err and contents(run) == before


@pytest.mark.parametrize("moved_out", range(4))
@pytest.mark.parametrize("moved_in", range(4))
def test_a_crash_leaves_one_run_or_the_other(tmp_path, moved_out, moved_in):
    """Every state that a killed process can leave behind."""
    names = [CONFIG, "metrics.jsonl", "plan.json"]
    for place in (tmp_path, tmp_path / NEW):
        place.mkdir(exist_ok=True)
        for name in names:
            (place / name).write_text("old" if place == tmp_path else "new")
    if moved_in and moved_out < 3:
        return  # the one is gone before the other comes
    (tmp_path / REPLACED).mkdir()
    for name in names[:moved_out]:
        (tmp_path / name).rename(tmp_path / REPLACED / name)
    for name in names[::-1][:moved_in]:
        (tmp_path / NEW / name).rename(tmp_path / name)
    recover(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(
        names, "new" if moved_in == 3 else "old"
    )


def test_a_replacement_that_cannot_be_made_is_taken_back(tmp_path):
    (tmp_path / "data.json").mkdir()
    (tmp_path / "data.json/mine").write_text("in the way")
    for place in (tmp_path, tmp_path / NEW):
        place.mkdir(exist_ok=True)
        (place / CONFIG).write_text(place.name)
    (tmp_path / NEW / "data.json").write_text("new")
    before = contents(tmp_path)
    with pytest.raises(OSError):
        put_in_place(tmp_path, {CONFIG}, elsewhere=False)
    assert contents(tmp_path) == {name: text for name, text in before.items() if not name.startswith(NEW)}


@pytest.mark.parametrize("is_going", [True, False])
@pytest.mark.parametrize("removed", range(3))
@pytest.mark.parametrize("moved_in", range(3))
def test_a_crash_while_checkpoints_elsewhere_go_leaves_the_new_run(tmp_path, is_going, removed, moved_in):
    """Before the first of them goes it leaves the earlier one with all."""
    run, storage, names = tmp_path / "run", CheckpointStorage(tmp_path / "checkpoints"), ["a", "metrics.jsonl", CONFIG]
    text = f'[train]\ncheckpoint_folder = "{storage.root}"\n'
    for place in (run / NEW, run / REPLACED):
        place.mkdir(parents=True)
        for name in names:
            (place / name).write_text(f"{text}# {place.name}")
    if is_going:
        (run / REPLACED / GOING).touch()
    elif removed or moved_in:
        return
    steps = list(range(removed, 2))
    for step in steps:
        storage.write_note(f"step_{step}/manifest.json", b"{}")
    if moved_in and steps:
        return  # the ones are gone before the other comes
    for name in names[:moved_in]:
        (run / NEW / name).rename(run / name)
    recover(run)
    kept = (f"{text}# {NEW}", []) if is_going else (f"{text}# {REPLACED}", steps)
    assert ({path.name: path.read_text() for path in run.iterdir()}, storage.steps()) == (
        dict.fromkeys(names, kept[0]),
        kept[1],
    )


def test_checkpoints_elsewhere_that_cannot_be_removed_go_with_the_next_start(tiny, tmp_path, capfd):
    place, run = tmp_path / "checkpoints", tmp_path / "run"
    settings = ("data.test=[]", f"train.out={run}", f"train.checkpoint_folder={place}")
    assert train(tiny, *settings, "train.max_steps=3", "train.checkpoint_every=1", "train.keep_last=3") == 0
    (place / "step_2/manifest.json").unlink()
    (place / "step_2/manifest.json/stuck").mkdir(parents=True)
    for asked in ("overwrite", "resume"):
        assert train(tiny, *settings, "train.max_steps=1", **{asked: True}) == 74
        said = capfd.readouterr().err.splitlines()[-1]
        assert "checkpoints of the run that is replaced cannot be removed" in said and "again with --resume" in said
        assert not (run / CONFIG).exists(), "the run that has lost a checkpoint is not back"
    shutil.rmtree(place / "step_2")
    assert train(tiny, *settings, "train.max_steps=1", resume=True) == 0
    assert "from the start" in capfd.readouterr().out
    assert CheckpointStorage(place).steps() == [1] and not (run / REPLACED).exists()


def test_checkpoints_elsewhere_are_replaced_with_their_own_run_only(tiny, tmp_path, capfd):
    place = f"train.checkpoint_folder={tmp_path}/checkpoints"
    first, second = f"train.out={tmp_path}/first", f"train.out={tmp_path}/second"
    assert train(tiny, *SHORT, place, first) == 0
    before = contents(tmp_path / "checkpoints")
    for overwrite, words in ((False, "holds checkpoints already"), (True, "not those of the run in")):
        assert train(tiny, *SHORT, place, second, overwrite=overwrite) == 2
        assert words in capfd.readouterr().err
    assert train(tiny, *SHORT, place, first, 'data.train=["lgos"]', overwrite=True) == 2
    assert contents(tmp_path / "checkpoints") == before
    assert train(tiny, "train.max_steps=1", "data.test=[]", place, first, overwrite=True) == 0
    assert CheckpointStorage(tmp_path / "checkpoints").steps() == [1]


def test_resume_does_not_begin_a_run_anew_whose_checkpoints_are_elsewhere_or_lost(tiny, run, tmp_path, capfd):
    before = contents(run)
    settings = (*SHORT, f"train.out={run}")
    assert train(tiny, *settings, f"train.checkpoint_folder={tmp_path}/other", resume=True) == 2
    assert f"those of {run} are in {run}/checkpoints; set it so" in capfd.readouterr().err
    assert contents(run) == before
    (run / "checkpoints").rename(run / "moved")
    assert train(tiny, *settings, resume=True) == 2
    assert f"{run}: is done, but has no checkpoint" in capfd.readouterr().err
    (run / "moved").rename(run / "checkpoints")
    assert train(tiny, "train.max_steps=3", "data.test=[]", f"train.out={run}", resume=True) == 0
    assert "from step 2" in capfd.readouterr().out


def test_a_restarted_worker_resumes_what_overwrite_has_begun(tiny, run, capfd, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    config = load_config(tiny, [f"train.out={run}", "train.max_steps=3", "data.test=[]"])
    assert run_training(config, overwrite=True) == 0
    assert "from step 2" in capfd.readouterr().out


def test_what_lies_beside_the_checkpoints_and_is_not_ours_stays(tmp_path):
    for place in (str(tmp_path), f"memory://{tmp_path.name}"):
        storage = CheckpointStorage(place)
        theirs = ["step_1000/model.pt", "step_by_step/notes.txt", "runs/step_5/manifest.json"]
        ours = ["step_7/rank_00000.safetensors"]
        for name in theirs + ours:
            folder = name.rsplit("/", 1)[0]
            if place == str(tmp_path):
                (tmp_path / folder).mkdir(parents=True)
                (tmp_path / name).write_text("x")
            else:
                storage.write_note(name, b"x")
        (tmp_path / ".their.partial").write_text("x")
        assert storage.steps() == []
        storage.clean()
        for name in theirs:
            assert (tmp_path / name).exists() if place == str(tmp_path) else storage.read_note(name) == b"x"
        with pytest.raises(OSError):
            storage.read_note(ours[0])
    assert (tmp_path / ".their.partial").exists()


def test_metrics_of_the_earlier_run_do_not_stay(tiny, run):
    assert lines_of(run) == []  # two steps: none is logged
    (run / "metrics.jsonl").write_text('{"step": 1, "split": "train", "loss": 0.5}\n')
    assert train(tiny, *SHORT, f"train.out={run}", overwrite=True) == 0
    assert lines_of(run) == []


def test_a_folder_with_a_config_of_the_users_is_no_run(tiny, tmp_path, capfd):
    (tmp_path / CONFIG).write_text(tiny.read_text())
    for options in ({"overwrite": True}, {"resume": True}, {}):
        assert train(tmp_path / CONFIG, f"train.out={tmp_path}", **options) == 2
        assert "exists and holds no run" in capfd.readouterr().err
    assert contents(tmp_path) == {CONFIG: tiny.read_bytes()}
