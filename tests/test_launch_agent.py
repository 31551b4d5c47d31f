"""The agent: a job's first error is told once, by the rank whose it is; exit codes are the workers'; restarts continue."""

import shlex
from pathlib import Path

import pytest
from tiny_run import program

from launch import worker

# A worker whose command line is the module `crash` of the working directory
WORKER = """
import os, sys
sys.path.insert(0, os.getcwd())
from launch import worker
worker.COMMAND_LINE = "crash"
code = worker.main(sys.argv[1:])
sys.stdout.flush(); sys.stderr.flush()
os._exit(code)
"""


def run_agent(folder: Path, crash: str, *options: str, processes: int = 3):
    (folder / "worker.py").write_text(WORKER)
    (folder / "crash.py").write_text(crash)
    words = shlex.split("-P -m launch.agent --nnodes 1 --rdzv-backend c10d --rdzv-endpoint localhost:0")
    words += ["--nproc-per-node", str(processes), *options, "worker.py", "train", "--overwrite"]
    return program("python", *words, cwd=folder, LOGLEVEL="CRITICAL")


def test_the_first_error_is_told_once_and_the_echoes_are_not(tmp_path):
    crash = """
import os, torch, torch.distributed as dist
def run(argv):
    dist.init_process_group("gloo")
    if os.environ["RANK"] == "1":
        raise ValueError("row 7 is bad")
    dist.all_reduce(torch.ones(1))
"""
    done = run_agent(tmp_path, crash, processes=2)
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1 and done.stderr.startswith("rank 1 failed:"), done.stderr
    assert done.stderr.splitlines()[-1] == "ValueError: row 7 is bad"
    assert "worker.py" not in done.stderr, "the traceback begins where the command does"


MISTAKE = """
import os, time
class Mistake(ValueError):
    exit_code = 2
def run(argv):
    if os.environ["RANK"] in %r:
        raise Mistake("rows.parquet: column user is missing")
    time.sleep(30)
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("crash", "code", "line"),
    [
        (MISTAKE % "2", 2, "mbcnet: rows.parquet: column user is missing"),
        (MISTAKE % "012", 2, "mbcnet: rows.parquet: column user is missing"),
        ("def run(argv): return 9", 9, "ended with exit code 9"),
        ("import os\ndef run(argv): os.kill(os.getpid(), 9)", 137, "was ended by SIGKILL; most often"),
    ],
    ids=["a mistake of one rank", "a mistake of all ranks", "an exit code", "a signal"],
)
def test_an_end_is_one_line_whichever_rank_meets_it(tmp_path, crash, code, line):
    done = run_agent(tmp_path, crash)
    assert done.returncode == code
    assert line in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.long
def test_a_restart_goes_on_and_a_mistake_is_not_tried_again(tmp_path):
    crash = """
import os
def run(argv):
    count = os.environ["TORCHELASTIC_RESTART_COUNT"]
    open(f"start_{count}", "w").write(" ".join(argv))
    return %s if count == "0" else 0
"""
    done = run_agent(tmp_path, crash % 9, "--max-restarts", "2", processes=1)
    assert done.returncode == 0
    assert [(tmp_path / f"start_{n}").read_text() for n in (0, 1)] == ["train --overwrite", "train --resume"]
    assert done.stderr.splitlines() == [
        "rank 0 ended with exit code 9",
        "mbcnet: all workers restart from the last checkpoint (1 of 2 restarts left)",
    ]
    (tmp_path / "start_1").unlink()
    done = run_agent(tmp_path, crash % 2, "--max-restarts", "2", processes=1)
    assert done.returncode == 2 and not (tmp_path / "start_1").exists()


@pytest.mark.parametrize(
    ("environ", "args"),
    [
        ({}, ["train", "--overwrite"]),
        ({"SLURM_RESTART_COUNT": "0", "AWS_BATCH_JOB_ATTEMPT": "1"}, ["train", "--overwrite"]),
        ({"SLURM_RESTART_COUNT": "1"}, ["train", "--resume"]),
        ({"AWS_BATCH_JOB_ATTEMPT": "2"}, ["train", "--resume"]),
    ],
)
def test_schedulers_count_starts_each_in_its_own_way(environ, args):
    assert worker.resumed(["train", "--overwrite"], environ) == args
    assert worker.resumed(["evaluate", "run"], environ) == ["evaluate", "run"]
