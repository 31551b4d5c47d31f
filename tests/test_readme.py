"""Proves that README is a front page, and that its short commands do what it says, typed in its order."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"```console\n(.*?)```", README, re.S)
    for line in block.splitlines()
    if line and not line.startswith("#")
]
# What is typed here in a smaller form, so that this takes seconds: the rest of a line is README's own.
SMALLER = (
    ("mbcnet train ", " --set train.max_steps=4"),
    ("torchx run -s local_cwd ", " --set train.max_steps=4"),
    ("mbcnet export ", " --no-aot"),
    ("mbcnet bench latency ", " --rows 1 --threads 1"),
)
# Checked against the parser only: hours, or a scheduler that is not everywhere. tests/test_launch_slurm.py runs the latter.
PARSED_ONLY = ("mbcnet study table3", "mbcnet tune", "torchx run -s slurm", "make ", "source ")
BINARIES = Path(sys.executable).parent


@pytest.mark.parametrize("command", [each for each in COMMANDS if each.startswith("make ")])
def test_target_is_in_the_makefile(command):
    done = subprocess.run(
        ["make", "-n", "-C", str(ROOT), command.split()[1]], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0 and done.stdout, done.stderr


def test_it_is_a_front_page():
    assert len(README.splitlines()) <= 150
    assert {"make demo", "make test"} <= set(COMMANDS) and len(COMMANDS) > 20


def typed(folder: Path, command: str) -> None:
    """Run a command as a shell in `folder` would, with our programs in front."""
    env = {"PATH": f"{BINARIES}:/usr/bin:/bin", "HOME": str(folder), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = ["bash", "-c", command]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert "Traceback" not in done.stderr


@pytest.mark.long
def test_commands_work_in_the_order_of_the_readme(tmp_path):
    """In a folder that looks like a checkout beside ../shared, with the logs of a README reader."""
    folder, shared = tmp_path / "mbcnet-rec", ROOT.parent / "shared"
    folder.mkdir()
    for path in (ROOT / "data", ROOT / "mbcnet_rec", ROOT / "launch", shared):
        (tmp_path if path == shared else folder).joinpath(path.name).symlink_to(path)
    typed(folder, "mbcnet data synth --out prepared/demo --rows 7000")
    for day in (folder / "prepared/demo").glob("ds=*"):
        shutil.copytree(day, folder / "logs" / day.name)
    (toml,) = re.findall(r"```toml\n(.*?)```", README, re.S)
    (folder / "run.toml").write_text(toml)
    ran = 0
    for command in COMMANDS:
        if command.startswith(PARSED_ONLY) or ("adult" in command and not shared.is_dir()):
            continue  # the public data set's own files are not everywhere
        for start, smaller in SMALLER:
            command += smaller if command.startswith(start) else ""
        typed(folder, command)
        ran += 1
    assert ran >= 12
    assert (folder / "runs/clicks/report.html").exists()
