"""`torchx run -s local_cwd` as a user types it, in a folder whose own data/ and launch/ would break ours: train, fail, Ctrl-C."""

import os
import signal
import subprocess
import uuid
from pathlib import Path

import pytest
from tiny_run import BIN, REPOSITORY, environment, make_run, program, wait_for

RUN = ("run", "-s", "local_cwd")
BY_FILE = f"{REPOSITORY}/launch/components.py:train"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A working directory with rows, a config, and packages named like ours that cannot be imported."""
    made = make_run(tmp_path_factory.mktemp("user"))
    for name in ("data", "launch", "sharding", "mbcnet_rec"):
        (made / name).mkdir()
        (made / name / "__init__.py").write_text("raise RuntimeError('the folder of the user was imported')\n")
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


def words(component: str, shape: str, *settings: str) -> list[str]:
    """Arguments of `torchx run` with KEY=VALUE settings of the trainer."""
    own = [word for pair in settings for word in ("--set", pair)]
    return [*RUN, component, "--config", "tiny.toml", "-j", shape, *(["--", *own] if own else [])]


def test_one_host_two_processes_by_entry_point(folder):
    given = words("mbcnet.train", "1x2", "train.out=runs/a", "train.max_steps=5")
    done = program("torchx", *given, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "runs/a/DONE").is_file()
    assert "train/0 tiny: dnn on" in done.stderr and "2 processes" in done.stderr
    ranks = folder.glob("logs/torchx/*/torchelastic/train/*/attempt_0/*/stderr.log")
    assert [path.parent.name for path in ranks] == ["1"], "rank 1 has a log of its own"
    (log,) = folder.glob("logs/torchx/*/train/0/combined.log")
    assert "run folder: runs/a" in log.read_text()


@pytest.mark.long
def test_two_hosts_two_processes_by_file(folder):
    done = program("torchx", *words(BY_FILE, "2x2", "train.out=runs/b", "train.max_steps=5"), cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "4 processes" in done.stderr and (folder / "runs/b/DONE").is_file()


@pytest.mark.long
def test_a_users_mistake_is_one_line_and_its_code_the_jobs(folder):
    done = program("torchx", *words("mbcnet.train", "1x2", "train.epochs=0"), cwd=folder)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("train/0 mbcnet: ") and "epochs = 0" in line


def test_a_job_that_cannot_be_is_refused_before_it_starts(folder):
    done = program("torchx", *words("mbcnet.train", "2:1x2"), cwd=folder)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("mbcnet: -j 2:1x2: wanted HOSTSxPROCESSES")


@pytest.mark.long
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_torchx(folder, sent):
    mark, out = f"LAUNCH_TEST={uuid.uuid4()}", f"runs/{sent.name}"
    given = (f"train.out={out}", "train.epochs=99999", "train.checkpoint_every=5")
    command = [str(BIN / "torchx"), *words("mbcnet.train", "1x2", *given)]
    env = environment(**dict([mark.split("=")]))
    job = subprocess.Popen(command, cwd=folder, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for(lambda: list(folder.glob(f"{out}/checkpoints/step_*/manifest.json")), "no checkpoint")
    assert len(running(mark)) >= 4, "torchx, the agent and two workers run"
    # the terminal sends Ctrl-C to the whole foreground group
    os.killpg(job.pid, sent)
    _, said = job.communicate(timeout=120)
    wait_for(lambda: not running(mark), lambda: f"still running: {running(mark)}", seconds=15)
    if sent == signal.SIGINT:
        assert job.returncode == 130
        assert "Traceback" not in said, said
        assert said.splitlines()[-1] == "mbcnet: stopped by SIGINT; no process is left", said
