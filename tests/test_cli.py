"""Proves that the command line answers at once, without torch, and in one line."""

import subprocess
import sys
import time

import pytest

from data.errors import InputError
from mbcnet_rec import cli
from mbcnet_rec.runtime.exits import PreemptedError

NAMES = [
    "doctor",
    "data",
    "schema",
    "plan",
    "launch",
    "train",
    "evaluate",
    "predict",
    "export",
    "study",
    "tune",
    "bench",
    "report",
]


def run(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "mbcnet_rec.cli", *args], capture_output=True, text=True, timeout=120)


def test_help_names_every_command_within_half_a_second():
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = run("--help")
        seconds.append(time.perf_counter() - start)
    assert done.returncode == 0 and all(f"\n    {name} " in done.stdout for name in NAMES)
    assert min(seconds) < 0.5


def test_nothing_heavy_is_imported_before_a_command_runs():
    code = (
        "import sys; from mbcnet_rec.cli import build_parser; build_parser(); "
        "print([name for name in ('torch', 'torchrec', 'pyarrow', 'numpy', 'matplotlib', 'tqdm') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0 and f"mbcnet {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "args", [["fly"], [], ["train"], ["train", "--config"], ["data", "synth"], ["plan", "explain"]]
)
def test_a_wrong_command_line_is_one_line_and_code_2(args, capsys):
    assert cli.main(args) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "--help" in said


def outcome(error: BaseException) -> int:
    """The exit code where a command raises."""

    def fail():
        raise error

    return cli.exit_code(fail)


def test_what_ends_a_command_has_its_own_code(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    assert outcome(InputError("a.toml: key: fix it")) == 2
    assert outcome(PreemptedError("stopped at step 3")) == 75
    assert outcome(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err.splitlines() == [
        "mbcnet: a.toml: key: fix it",
        "mbcnet: stopped at step 3",
        "mbcnet: stopped",
    ]


def test_of_many_ranks_one_says_a_mistake(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(cli, "SILENT_RANK_SECONDS", 0.2)
    start = time.monotonic()
    assert outcome(InputError("said by rank 0")) == 2
    assert capsys.readouterr().err == ""
    assert time.monotonic() - start >= 0.2, "a launcher would end rank 0 with this one before it has told"


def test_a_path_that_no_file_can_have_is_one_line(capsys):
    assert cli.main(["schema", "infer", "é" * 300, "--out", "s.toml"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("mbcnet: é") and "check the path" in said, said
