"""A run of seconds for the launch tests: small_data's rows, one small model."""

import os
import subprocess
import sys
from pathlib import Path

from small_data import write_small

BIN = Path(sys.executable).parent
REPOSITORY = Path(__file__).parents[1]
CONFIG = """name = "tiny"
schema = "rows/schema.toml"
[data]
train = ["rows/train.parquet"]
test = ["rows/test.parquet"]
batch_size = 48
lanes = 12
[model]
kind = "dnn"
[model.dnn]
hidden = [8]
[train]
device = "cpu"
log_every = 5
"""


def make_run(folder: Path) -> Path:
    """Write rows and config into a folder; return it."""
    write_small(folder / "rows", 960, 96)  # 20 steps an epoch
    (folder / "tiny.toml").write_text(CONFIG)
    return folder


def program(
    name: str, *args: str, cwd: Path, timeout: float = 120, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run a program of this environment as a user without an activated shell would."""
    return subprocess.run(
        [str(BIN / name), *args],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment(**env),
    )


def environment(**env: str) -> dict[str, str]:
    """The variables of a plain shell. Nothing of pytest's own process may make a job work that would not elsewhere."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
    return kept | {"OMP_NUM_THREADS": "1"} | env
