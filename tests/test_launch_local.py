"""`torchx run -s local_cwd` as a user types it, in a folder whose own data/ and launch/ would break ours: train, fail, Ctrl-C."""

import os
import signal
import subprocess
import time
import uuid
from pathlib import Path

import pytest
from tiny_run import BIN, REPOSITORY, environment, make_run, program

RUN = ("run", "-s", "local_cwd")
BY_FILE = f"{REPOSITORY}/launch/components.py:train"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A working directory with rows, a config, and packages named like ours that cannot be imported."""
    made = make_run(tmp_path_factory.mktemp("user"))
    for name in ("data", "launch", "sharding", "mbcnet_rec"):
        (made / name).mkdir()
        (made / name / "__init__.py").write_text(
            "raise RuntimeError('the folder of the user was imported')\n"
        )
    return made


def running(mark: str) -> list[str]:
    """Command lines of processes that carry a mark in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (path / "environ").read_bytes():
                found.append((path / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


def settings(out: str, **more: object) -> list[str]:
    """Arguments after `--`: the run folder and what else to set."""
    pairs = {"train.out": out, **{key.replace("__", "."): value for key, value in more.items()}}
    return ["--", *(word for key, value in pairs.items() for word in ("--set", f"{key}={value}"))]


def test_one_host_two_processes_by_entry_point(folder):
    done = program(
        "torchx",
        *RUN,
        "mbcnet.train",
        "--config",
        "tiny.toml",
        "-j",
        "1x2",
        *settings("runs/a", train__max_steps=5),
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "runs/a/DONE").is_file()
    assert "train/0 tiny: dnn on" in done.stderr and "2 processes" in done.stderr
    ranks = sorted(
        path.parent.name for path in folder.glob("logs/torchx/*/torchelastic/train/*/attempt_0/*/stderr.log")
    )
    assert ranks == ["1"], "rank 1 has a log of its own"
    assert [
        path
        for path in folder.glob("logs/torchx/*/train/0/combined.log")
        if "run folder: runs/a" in path.read_text()
    ]


@pytest.mark.long
def test_two_hosts_two_processes_by_file(folder):
    done = program(
        "torchx",
        *RUN,
        BY_FILE,
        "--config",
        "tiny.toml",
        "-j",
        "2x2",
        *settings("runs/b", train__max_steps=5),
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    assert "4 processes" in done.stderr and (folder / "runs/b/DONE").is_file()


@pytest.mark.long
def test_a_users_mistake_is_one_line_and_its_code_the_jobs(folder):
    done = program(
        "torchx",
        *RUN,
        "mbcnet.train",
        "--config",
        "tiny.toml",
        "-j",
        "1x2",
        *settings("runs/c", train__epochs=0),
        cwd=folder,
    )
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("train/0 mbcnet: ") and "epochs = 0" in lines[0], (
        done.stderr
    )


def test_a_job_that_cannot_be_is_refused_before_it_starts(folder):
    done = program("torchx", *RUN, "mbcnet.train", "--config", "tiny.toml", "-j", "2:1x2", cwd=folder)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "mbcnet: -j 2:1x2: wanted 1 or more hosts and processes, and MIN no more than MAX; write 1x2, 16x8 or 2:4x8"
    ]


@pytest.mark.long
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_torchx(folder, sent):
    mark, out = f"LAUNCH_TEST={uuid.uuid4()}", f"runs/{sent.name}"
    words = [str(BIN / "torchx"), *RUN, "mbcnet.train", "--config", "tiny.toml", "-j", "1x2"]
    words += settings(out, train__epochs=99999, train__checkpoint_every=5)
    env = environment(**dict([mark.split("=")]))
    job = subprocess.Popen(
        words, cwd=folder, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    end = time.monotonic() + 90
    while not list(folder.glob(f"{out}/checkpoints/step_*")) and time.monotonic() < end:
        time.sleep(0.2)
    assert len(running(mark)) >= 4, "torchx, the agent and two workers run"
    # the terminal sends Ctrl-C to the whole foreground group
    os.killpg(job.pid, sent)
    _, said = job.communicate(timeout=60)
    end = time.monotonic() + 15
    while running(mark) and time.monotonic() < end:
        time.sleep(0.2)
    assert running(mark) == []
    if sent == signal.SIGINT:
        assert job.returncode == 130
        assert "Traceback" not in said, said
        assert said.splitlines()[-1] == "mbcnet: stopped by SIGINT; no process is left", said
