"""Proves that the example learns what its log holds, in one process and in two ranks; and that the week of daily.sh goes through, with a scorer
that has each day's model byte for byte."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from forked_ranks import run_script

EXAMPLE = Path(__file__).parents[1] / "examples" / "minimal.py"


def losses_in(words: str) -> list[float]:
    return [float(number) for number in re.findall(r"^epoch .* ([\d.]+)$", words, re.M)]


def losses(folder: Path, *launcher: str) -> list[float]:
    """The losses that the example prints, with its log in a folder of the test's own."""
    env = {"PATH": "/usr/bin:/bin", "TMPDIR": str(folder), "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launcher, str(EXAMPLE)], env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return losses_in(done.stdout)


def learned(found: list[float]) -> bool:
    return len(found) == 5 and found[-1] < found[0] - 0.2


def test_two_epochs_begin_to_learn(tmp_path):
    found = losses_in(run_script("example_script.py", str(tmp_path), "2"))
    assert len(found) == 2 and found[1] < found[0] - 0.05


@pytest.mark.long
def test_it_learns(tmp_path):
    assert learned(losses(tmp_path))


@pytest.mark.long
def test_two_ranks_learn_as_much(tmp_path):
    one = losses(tmp_path)
    two = losses(tmp_path, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert learned(two) and abs(two[-1] - one[-1]) < 0.1, "initial rows are drawn by shard: the end agrees"


@pytest.mark.long
def test_days_of_training_reach_a_scorer(tmp_path):
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    command = ["bash", str(EXAMPLE.with_name("daily.sh")), str(tmp_path / "week"), "6000", "3"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    assert (
        len(
            re.findall(
                r"^ds=\S+: the scorer has its model, equal to the whole artifact; \d+% of its bytes$", done.stdout, re.M
            )
        )
        == 2
    )
    lines = (tmp_path / "week/run/lineage.jsonl").read_text().splitlines()
    assert len(lines) == 3 and '"progressive": {"' in lines[2].replace("{}", "")
    assert (tmp_path / "week/run/report.html").is_file()
