"""Proves that the example learns what its log holds, in one process and in two ranks."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "minimal.py"


def losses(folder: Path, *launcher: str) -> list[float]:
    """The losses that the example prints, with its log in a folder of the test's own."""
    env = {"PATH": "/usr/bin:/bin", "TMPDIR": str(folder), "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launcher, str(EXAMPLE)], env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [float(number) for number in re.findall(r"([\d.]+)$", done.stdout, re.M)]


def learned(found: list[float]) -> bool:
    return len(found) == 5 and found[-1] < found[0] - 0.2


def test_it_learns(tmp_path):
    assert learned(losses(tmp_path))


@pytest.mark.long
def test_two_ranks_learn_as_much(tmp_path):
    one = losses(tmp_path)
    two = losses(tmp_path, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert learned(two) and abs(two[-1] - one[-1]) < 0.1, "initial rows are drawn by shard: the end agrees"
