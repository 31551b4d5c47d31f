"""Proves that every command README prints is one we have, and that the short ones do what it says, typed in its order."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mbcnet_rec.cli import build_parser

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


def test_readme_prints_commands():
    assert {"make demo", "make test"} <= set(COMMANDS)
    assert len(COMMANDS) > 20


@pytest.mark.parametrize("command", [each for each in COMMANDS if each.startswith("mbcnet ")])
def test_command_is_one_of_ours(command):
    assert build_parser().parse_args(shlex.split(command)[1:]).run


@pytest.mark.parametrize("command", [each for each in COMMANDS if each.startswith("make ")])
def test_target_is_in_the_makefile(command):
    done = subprocess.run(
        ["make", "-n", "-C", str(ROOT), command.split()[1]], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0 and done.stdout, done.stderr


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_link_leads_somewhere(link):
    assert link.startswith("https://") or (ROOT / link).exists()


def test_it_is_a_front_page():
    assert len(README.splitlines()) <= 150


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A folder that looks like a checkout beside ../shared, with the logs of a README reader."""
    home = tmp_path_factory.mktemp("readme")
    folder = home / "mbcnet-rec"
    folder.mkdir()
    for name in ("data", "mbcnet_rec", "launch"):
        (folder / name).symlink_to(ROOT / name)
    if (ROOT.parent / "shared").is_dir():
        (home / "shared").symlink_to(ROOT.parent / "shared")
    typed(folder, "mbcnet data synth --out prepared/demo --rows 7000")
    (folder / "logs").mkdir()
    for day in (folder / "prepared/demo").glob("ds=*"):
        shutil.copytree(day, folder / "logs" / day.name)
    (toml,) = re.findall(r"```toml\n(.*?)```", README, re.S)
    (folder / "run.toml").write_text(toml)
    return folder


def typed(folder: Path, command: str) -> str:
    """Run a command as a shell in `folder` would, with our programs in front."""
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env={
            "PATH": f"{BINARIES}:/usr/bin:/bin", "HOME": str(folder), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)
        },
        capture_output=True,
        text=True,
        timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


@pytest.mark.long
def test_commands_work_in_the_order_of_the_readme(checkout):
    ran = 0
    for command in COMMANDS:
        if command.startswith(PARSED_ONLY):
            continue
        if "adult" in command and not (checkout.parent / "shared").is_dir():
            continue  # the public data set's own files are not here
        for start, smaller in SMALLER:
            command += smaller if command.startswith(start) else ""
        typed(checkout, command)
        ran += 1
    assert ran >= 12
    assert (checkout / "runs/clicks/report.html").exists()
