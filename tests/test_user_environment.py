"""Proves that a user's environment does no harm: other launchers' variables, `~`, other locales, options given twice, Ctrl-C, no scheduler."""

import ast
import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data.errors import InputError
from data.whole_folder import home_path, whole_folder
from mbcnet_rec import cli
from mbcnet_rec.commands.arguments import refuse_repeats
from mbcnet_rec.config import PATH_KEYS, RunConfig, load_config
from mbcnet_rec.runtime.ranks import Ranks, found_ranks, is_first_rank

ROOT = Path(__file__).parents[1]
MEETING = {"MASTER_ADDR": "first", "MASTER_PORT": "29500"}
CONFIG = """
name = "r"
schema = "~/s.toml"
data = { train = ["~/logs", "~nobody-of-that-name/logs"] }
"""


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({}, None),
        ({"RANK": ""}, None),
        ({"RANK": "0", "WORLD_SIZE": "1"}, None),
        ({"LOCAL_RANK": "0"}, None),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, None),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", **MEETING}, Ranks(1, 2, 1, None)),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", **MEETING}, Ranks(1, 2, 1, 2)),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4", **MEETING}, Ranks(3, 4, None, None)),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2", **MEETING}, Ranks(0, 2, None, None)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", **MEETING}, Ranks(1, 2, None, None)),
    ],
)
def test_ranks_of_every_launcher_are_found(variables, wanted):
    assert found_ranks(variables) == wanted


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"RANK": "0"}, "RANK = '0', but WORLD_SIZE is not set"),
        ({"RANK": "x", "WORLD_SIZE": "1"}, "RANK = 'x'"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE = '2', but RANK is not set"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK = '2', WORLD_SIZE = '2'"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE = '0'"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR and MASTER_PORT"),
        ({"RANK": "0", "WORLD_SIZE": "2", **MEETING, "MASTER_PORT": "99999"}, "MASTER_PORT = '99999'"),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "SLURM_PROCID = '1', SLURM_NTASKS = '2'"),
    ],
)
def test_variables_that_make_no_rank_are_refused_by_name_with_a_way_out(variables, named):
    with pytest.raises(InputError, match="unset") as refused:
        found_ranks(variables)
    assert named in str(refused.value)


def test_a_rank_that_is_none_is_not_silent():
    assert is_first_rank({"RANK": "x", "WORLD_SIZE": "2"}) and is_first_rank({"RANK": "5", "WORLD_SIZE": "2"})
    assert not is_first_rank({"RANK": "1", "WORLD_SIZE": "2"})
    assert not is_first_rank({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"})


def test_home_is_the_home_folder_in_configs_overrides_and_arguments(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "run.toml"
    path.write_text(CONFIG.replace(', "~nobody-of-that-name/logs"', ""), encoding="utf-8")
    config = load_config(path, ["train.out=~/runs/x"])
    assert (config.schema, config.data.train) == (f"{tmp_path}/s.toml", (f"{tmp_path}/logs",))
    assert config.run_folder == tmp_path / "runs/x"
    args = cli.build_parser().parse_args(["predict", "~/run", "--data", "~/a", "b", "--data", "c", "--out=~/s"])
    assert (args.run_folder, args.out) == (f"{tmp_path}/run", f"{tmp_path}/s")
    assert args.data == [f"{tmp_path}/a", "b", "c"], "given again, lists add up"
    path.write_text(CONFIG, encoding="utf-8")
    with pytest.raises(InputError, match=r"data\.train = '~nobody-of-that-name/logs'.*in full"):
        load_config(path)
    assert home_path("s3://a/~b", "") == "s3://a/~b"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["predict", "r", "--data", "a", "--out", "x", "--out", "y"], "--out is given twice (x and y)"),
        (["train", "--config", "a", "--config", "b"], "--config is given twice (a and b)"),
        (["predict", "r", "--data", "a", "--out", ""], "--out is empty"),
        (["data", "check", "", "--schema", "s"], "PATH is empty"),
        (["train", "--config", "a", "--over"], "--over"),  # no option is abbreviated
        (["export", "r", "--out", "x", "--aot", "--no-aot"], "not allowed with argument --aot"),
    ],
)
def test_no_option_is_dropped_empty_or_abbreviated(args, said, capsys):
    assert cli.main(args) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and said in told, told


@pytest.mark.parametrize("second", ["a.b=2", "a={ b = 2 }"])
def test_what_one_set_says_no_other_replaces(second):
    with pytest.raises(InputError, match=r"--set a\.b=1 comes before it"):
        refuse_repeats(["a.b=1", second])
    refuse_repeats(["a={ c = 3 }", "a.d=4"])


@pytest.mark.parametrize("variables", [{"PYTHONIOENCODING": "latin-1"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_names_are_shown_where_output_is_not_utf8(variables, tmp_path):
    (tmp_path / "s.toml").write_text(
        'name = "s"\nlabel = "label"\n[fields]\n"\u5546" = { kind = "categorical", num_embeddings = 4, embedding_dim = 4 }\n[groups]\ng = ["\u5546"]\n',
        encoding="utf-8",
    )
    done = command("schema", "show", "s.toml", folder=tmp_path, **variables)
    assert done.returncode == 0 and b"\\u5546" in done.stdout, done.stderr
    assert command("schema", "show", "s.toml", folder=tmp_path, closed=">&- 2>&-").returncode == 0
    full = command("schema", "show", "s.toml", folder=tmp_path, closed="> /dev/full")
    assert (full.returncode, full.stderr.count(b"\n")) == (74, 1), full.stderr


def command(*words, folder, closed="", **variables):
    line = f'exec "{sys.executable}" -m mbcnet_rec.cli "$@" {closed}'
    environ = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(["sh", "-c", line, "sh", *words], cwd=folder, env=environ, capture_output=True, timeout=60)


def test_ctrl_c_in_an_import_that_swallows_it_ends_with_130(tmp_path):
    """A library's own `except` cannot lose it: the command leaves at once."""
    (tmp_path / "swallows.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept BaseException:\n    pass\n",
        encoding="utf-8",
    )
    code = "from launch.interrupt import heed_interrupts\nheed_interrupts()\nimport swallows\nprint('lost')"
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "mbcnet: stopped\n")


def test_ctrl_c_in_a_finalizer_comes_again_outside_of_it():
    code = (
        "import os, signal, time\nfrom launch.interrupt import heed_interrupts\nheed_interrupts()\n"
        "class Closed:\n    def __del__(self): os.kill(os.getpid(), signal.SIGINT); time.sleep(0)\n"
        "try:\n    Closed()\n    time.sleep(300)\nexcept KeyboardInterrupt:\n    print('stopped')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "stopped\n", "")


def test_sigterm_leaves_nothing_half_written(tmp_path):
    code = (
        "import os, pathlib, signal, time\nfrom data.whole_folder import whole_folder\n"
        "from launch.interrupt import heed_termination\nheed_termination()\n"
        "with whole_folder(pathlib.Path('out')):\n    os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep(300)"
    )
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environ, cwd=tmp_path, timeout=60)
    assert done.returncode == 143 and not list(tmp_path.iterdir())


REPLACED = """
import os, pathlib, signal, sys
from data.whole_folder import whole_folder
replace = os.replace
def killed(*paths):
    replace(*paths)
    os.kill(os.getpid(), signal.SIGKILL)
os.replace = killed
with whole_folder(pathlib.Path("out")) as draft:
    (draft / "new").touch()
"""


def test_a_folder_that_is_replaced_is_there_whenever_the_process_is_killed(tmp_path):
    (tmp_path / "out").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", REPLACED], env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=tmp_path, timeout=60
    )
    assert done.returncode == -signal.SIGKILL and (tmp_path / "out" / "new").exists()


def test_a_folder_is_replaced_where_two_cannot_change_places(tmp_path, monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: None)
    for name in ("old", "new"):
        with whole_folder(tmp_path / "out") as draft:
            (draft / name).touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new"]


def test_every_text_file_is_opened_with_its_encoding():
    faults = []
    for room in ("data", "sharding", "mbcnet_rec", "launch"):
        for path in (ROOT / room).rglob("*.py"):
            for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(call, ast.Call) and getattr(call.func, "attr", "") in ("read_text", "write_text"):
                    named = any(word.arg == "encoding" for word in call.keywords)
                    faults += [] if named else [f"{path}:{call.lineno}"]
    assert not faults


def test_path_keys_are_keys_of_the_config():
    known = {"schema": RunConfig, "plugins": RunConfig}
    assert all(key in known or key.count(".") == 1 for key in PATH_KEYS) and signal.SIGINT == 2
