"""A run of seconds for the launch tests: small_data's rows, one small model; and `mbcnet train` with hooks."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from small_data import write_small

from mbcnet_rec.cli import exit_code, plain_words
from mbcnet_rec.config import load_config
from mbcnet_rec.logs.metrics_log import TIMINGS

BIN = Path(sys.executable).parent
REPOSITORY = Path(__file__).parents[1]
SMALL_MODEL = """
batch_size = 48
[model]
kind = "dnn"
[model.dnn]
hidden = [8]
[train]
device = "cpu"
"""
CONFIG = f"""name = "tiny"
schema = "rows/schema.toml"
[data]
train = ["rows/train.parquet"]
test = ["rows/test.parquet"]
lanes = 12
{SMALL_MODEL}
log_every = 5
"""


def make_run(folder: Path) -> Path:
    """Write rows and config into a folder; return it."""
    write_small(folder / "rows", 960, 96)  # 20 steps an epoch
    (folder / "tiny.toml").write_text(CONFIG)
    return folder


def train(config: Path, *settings: str, **options: Any) -> int:
    """The exit code of `mbcnet train --config CONFIG --set SETTING ...`, which draws no report; options are run_training's."""

    def command() -> int:
        from mbcnet_rec.run_training import run_training  # imports torchrec, which the launch tests do without

        with plain_words():
            return run_training(load_config(config, settings), **options)

    return exit_code(command)


def program(name: str, *args: str, cwd: Path, timeout: float = 400, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a program of this environment as a user without an activated shell would."""
    return subprocess.run(
        [str(BIN / name), *args], cwd=cwd, capture_output=True, text=True, timeout=timeout, env=environment(**env)
    )


def environment(**env: str) -> dict[str, str]:
    """The variables of a plain shell. Nothing of pytest's own process may make a job work that would not elsewhere."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR", "PYTHONPATH") if name in os.environ}
    return kept | {"OMP_NUM_THREADS": "1"} | env


def wait_for(what: Callable[[], object], message: Callable[[], str] | str, seconds: float = 90) -> None:
    """Wait, generously: other work may hold the cores."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, message if isinstance(message, str) else message()
        time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    """Consecutive ports that nobody listens on: slurm.conf wants a range for several nodes."""
    start = 17800 + 400 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])  # workers keep apart
    for first in range(start, start + 400, count):
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return list(range(first, first + count))
    raise AssertionError("no free ports")


def lines_of(run: Path, *splits: str, timing: bool = False) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl, of all splits or of these; without `timing` but for what tells of the machine."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if timing or key not in TIMINGS}
        for line in lines
        if not splits or line["split"] in splits
    ]


def learned(run: Path) -> list[tuple]:
    """What a run has learned, step by step: everything but times."""
    keys = ("step", "split", "loss", "auc", "log_loss")
    return [tuple(map(line.get, keys)) for line in lines_of(run)]
