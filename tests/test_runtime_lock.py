"""Proves that two processes never share a folder: the second is refused by name, a dead owner's LOCK is taken over, none is left."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
from small_data import write_small
from tiny_run import train, wait_for

from data.errors import InputError
from mbcnet_rec.cli import main
from mbcnet_rec.runtime import lock
from mbcnet_rec.runtime.lock import LOCK, locked, this_process

# one process imports, and forks an owner for each folder, which it does not wait for
HOLD = """
import os, sys, time
from pathlib import Path
from mbcnet_rec.runtime.lock import locked
for folder in sys.argv[1:]:
    ours, theirs = os.pipe()
    owner = os.fork()
    if not owner:
        with locked(Path(folder), "train"):
            os.write(theirs, b"held")
            time.sleep(100)
    assert os.read(ours, 4) == b"held"
    print(owner, flush=True)
time.sleep(100)
"""


@dataclass(frozen=True)
class Holder:
    """Another process, and the folder that it has."""

    pid: int
    run: Path


@pytest.fixture(scope="module")
def holders(tmp_path_factory):
    """One for each test that wants one."""
    folders = [tmp_path_factory.mktemp("held") / "run" for _ in range(4)]
    command = [sys.executable, "-c", HOLD, *map(str, folders)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        found = [Holder(int(process.stdout.readline()), folder) for folder in folders]
        yield iter(found)
        for each in found:  # those that a test ended are zombies still
            os.kill(each.pid, signal.SIGKILL)
        process.kill()


@pytest.fixture
def holder(holders):
    return next(holders)


def test_every_command_refuses_a_folder_in_use_and_changes_nothing(tmp_path, holder, capfd, monkeypatch):
    monkeypatch.setattr(lock, "ENDING_SECONDS", 0.01)  # this owner does not end
    config, run = write_small(tmp_path, 200, 50), holder.run
    (tmp_path / "space.toml").write_text('[space]\n"optim.dense_lr" = { low = 1e-3, high = 1e-2 }\n')
    (run / "config.toml").write_text("mine")
    before = {path: path.read_text() for path in run.iterdir()}
    common = ("--config", str(config), "--out", str(run))
    for command in (
        lambda: train(config, f"train.out={run}"),
        lambda: train(config, f"train.out={run}", resume=True),
        lambda: train(config, f"train.out={run}", overwrite=True),
        lambda: train(config, f"train.out={tmp_path}/other", f"train.checkpoint_folder={run}"),
        lambda: main(["tune", "--space", str(tmp_path / "space.toml"), *common]),
        lambda: main(["study", "table3", "--models", "dnn", *common]),
    ):
        assert command() == 2
        (said,) = capfd.readouterr().err.splitlines()
        for word in (
            f"{run}: in use by `mbcnet train`",
            f"process {holder.pid} on host {os.uname().nodename}, since 2",
        ):
            assert word in said
        assert {path: path.read_text() for path in run.iterdir()} == before
        assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_a_dead_owner_is_followed_at_once(holder, capfd, end):
    os.kill(holder.pid, end)  # not waited for: a zombie is dead too
    wait_for(lambda: "Z" in Path(f"/proc/{holder.pid}/stat").read_text().rpartition(")")[2], "it ends")
    assert (holder.run / LOCK).exists() == (end == signal.SIGKILL)
    with locked(holder.run, "train"):
        assert json.loads((holder.run / LOCK).read_text())["pid"] == os.getpid()
    assert (f"taken over from `mbcnet train`, process {holder.pid} " in capfd.readouterr().err) == (
        end == signal.SIGKILL
    )
    assert not (holder.run / LOCK).exists()


def write_lock(folder, **changes):
    folder.mkdir(exist_ok=True)
    (folder / LOCK).write_text(json.dumps(asdict(this_process("train")) | changes))


def test_a_process_id_that_is_used_again_is_no_owner(tmp_path, capfd):
    write_lock(tmp_path, pid=os.getppid())
    with locked(tmp_path, "train"):
        assert "taken over" in capfd.readouterr().err


def test_a_copy_of_a_folder_is_free(tmp_path, holder):
    shutil.copytree(holder.run, tmp_path / "copy")
    (tmp_path / "link").symlink_to(holder.run)
    with locked(tmp_path / "copy", "train"):
        pass
    with pytest.raises(InputError, match="in use"), locked(tmp_path / "link", "train"):
        pass


def test_an_owner_elsewhere_is_alive_while_it_touches_its_lock(tmp_path, capfd):
    write_lock(tmp_path, machine="another", host="node7")
    ended = threading.Event()

    def touch():
        while not ended.wait(0.05):
            os.utime(tmp_path / LOCK)

    beat = threading.Thread(target=touch)
    beat.start()
    with pytest.raises(InputError, match=r"in use by .* on host node7"), locked(tmp_path, "train"):
        pass
    ended.set()
    beat.join()
    with locked(tmp_path, "train", silent_seconds=0.3):
        assert "no longer there" in capfd.readouterr().err
    for damaged in ("[" * 5000, json.dumps(asdict(this_process("x")) | {"pid": "7"})):
        (tmp_path / LOCK).write_text(damaged)
        with locked(tmp_path, "train", silent_seconds=0.3):
            assert "taken over from a process" in capfd.readouterr().err


def test_nothing_is_left_whatever_happens_inside(tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError), locked(tmp_path / "a" / "b", "train"), locked(tmp_path / "a" / "b", "train"):
        raise ValueError  # the inner one, of the same process, leaves the outer one's LOCK
    with pytest.raises(ValueError), locked(tmp_path / "mine", "train"):
        raise ValueError
    assert [path.name for path in tmp_path.iterdir()] == ["mine"], "a folder that was made for the lock alone goes"
    (tmp_path / "file").touch()
    for name in ("file", "file/below", "nul\0", "long" * 100):
        with pytest.raises(InputError, match="no folder can be there"), locked(tmp_path / name, "train"):
            pass
