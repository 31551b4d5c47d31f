"""Proves that the example learns what its log holds, in one process and in two ranks."""

import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "examples" / "minimal.py"


def losses(folder: Path, *launcher: str) -> list[float]:
    """The losses that the example prints, with its log in a folder of the test's own."""
    env = {"PATH": "/usr/bin:/bin", "TMPDIR": str(folder), "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launcher, str(EXAMPLE)], env=env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [float(number) for number in re.findall(r"([\d.]+)$", done.stdout, re.M)]


def test_it_learns_in_one_process_and_in_two_ranks(tmp_path):
    one = losses(tmp_path)
    assert len(one) == 5 and one[-1] < one[0] - 0.2
    two = losses(tmp_path, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert abs(two[-1] - one[-1]) < 0.1, "initial rows are drawn by shard here, so only the end agrees"


def test_it_fits_on_one_page():
    assert len(EXAMPLE.read_text().splitlines()) < 120
