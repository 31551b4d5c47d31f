"""Proves that a checkpoint is whole or absent, on a disk and behind s3://: written beside training, made durable before it appears, the
newest one that verifies is the latest, and a storage that fails at any operation leaves the one before as it was."""

import errno
import hashlib
import os
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from pyarrow.fs import FileSelector, LocalFileSystem

from data.errors import InputError
from data.reading.storage import file_system
from mbcnet_rec.checkpoints.manifest import file_name, read_checkpoint
from mbcnet_rec.checkpoints.shards import Saved, whole_shard
from mbcnet_rec.checkpoints.storage import CheckpointStorage, DamagedCheckpointWarning, best_step, latest_step
from mbcnet_rec.checkpoints.writer import Keep, Saver
from mbcnet_rec.runtime.exits import CannotWriteError
from mbcnet_rec.runtime.process import Process

ALONE = Process(0, 1, 0, 1, torch.device("cpu"))


# Before every test's own fixtures: a server of the module is no leftover of the test that is the first to want it
@pytest.fixture(scope="module", autouse=True)
def bucket():
    pytest.importorskip("boto3", reason="needs the S3 client and server of the pinned requirements")
    pytest.importorskip("moto.server", reason="needs the S3 client and server of the pinned requirements")
    from s3_server import s3_server

    with s3_server("runs"):
        yield "s3://runs"


@pytest.fixture(params=["disk", "memory", "s3"])
def storage(request, bucket, tmp_path):
    roots = {"disk": str(tmp_path), "memory": f"memory://{tmp_path.name}", "s3": f"{bucket}/{tmp_path.name}"}
    return CheckpointStorage(f"{roots[request.param]}/checkpoints")


def shards(value):
    table = torch.full((50, 4), float(value))
    return [whole_shard("model/table", table), whole_shard("optim/table/sum", table[:, 0].clone())]


def write(storage, step, value=None, keep=Keep(last=5)):
    made = Saver(storage, ALONE, 10.0)
    made.save(step, shards(value or step), {"step": step}, keep)
    made.finish()


def value_of(storage, step):
    with storage.fetched(step) as folder:
        saved = Saved(folder)
        assert saved.manifest.extra == {"step": step}
        table = saved.whole("model/table")
    assert (table == table[0, 0]).all()
    return float(table[0, 0])


def tree(storage):
    """The file system behind a storage, and its folder there."""
    return file_system(storage.location) if storage.root is None else (LocalFileSystem(), str(storage.root))


def files_of(storage):
    system, folder = tree(storage)
    infos = system.get_file_info(FileSelector(folder, recursive=True, allow_not_found=True))
    return sorted(info.path.split("checkpoints/", 1)[1] for info in infos if info.is_file)


def test_a_checkpoint_is_read_as_it_was_written_and_replaced_by_another_of_its_step(storage):
    assert storage.steps() == [] and latest_step(storage) is None
    write(storage, 5)
    write(storage, 10)
    names = len(files_of(storage))
    write(storage, 5, value=7)
    assert storage.steps() == [5, 10] and latest_step(storage) == 10 and len(files_of(storage)) == names == 4
    assert (value_of(storage, 5), value_of(storage, 10)) == (7.0, 10.0)


def test_the_newest_and_the_best_are_kept(storage):
    for step in (1, 2, 3, 4, 5):
        write(storage, step, keep=Keep(last=2, best=((0.9, 2),)))
    assert storage.steps() == [2, 4, 5]
    assert best_step(storage) == 2
    assert all(name.startswith(("step_2/", "step_4/", "step_5/", "best.json")) for name in files_of(storage))


def spoil(storage, step):
    """Flip one bit in the file of tensors."""
    name = next(name for name in files_of(storage) if name.startswith(f"step_{step}/rank_"))
    data = bytearray(storage.read_note(name))
    data[-3] ^= 1
    system, folder = tree(storage)
    with system.open_output_stream(f"{folder}/{name}") as file:
        file.write(data)


def test_a_damaged_later_one_is_passed_over_and_not_counted_as_the_last(storage):
    """With keep_last = 1 the new checkpoint would give way to a damaged one of a later step."""
    write(storage, 5)
    write(storage, 10)
    spoil(storage, 10)
    with pytest.warns(DamagedCheckpointWarning, match=r"rank_00000.*SHA-256 differs.*passed over"):
        assert latest_step(storage) == 5
    with pytest.raises(InputError, match="SHA-256 differs"):
        value_of(storage, 10)
    write(storage, 7, keep=Keep(last=1))
    assert storage.steps() == [7, 10]
    with pytest.warns(DamagedCheckpointWarning):
        assert latest_step(storage) == 7


def test_a_draft_is_no_checkpoint_and_is_cleaned(storage):
    write(storage, 5)
    for token in ("dead-1", "dead-2"):
        with storage.write(f"step_6/{file_name(0, token)}") as file:
            file.write(b"half")
    assert storage.steps() == [5]
    storage.clean()
    assert all(name.startswith("step_5/") for name in files_of(storage)), files_of(storage)
    assert value_of(storage, 5) == 5.0


class Failing:
    """A storage that fails at the n-th operation, and stays broken for the rest of that save."""

    def __init__(self, storage, fail_at):
        self._place, self._left = storage, fail_at

    def __getattr__(self, name):
        action = getattr(self._place, name)
        if name not in ("write", "commit"):
            return action

        def counted(*args):
            self._left -= 1
            if self._left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self._opened(action(*args)) if name == "write" else action(*args)

        return counted

    @contextmanager
    def _opened(self, opened):
        with opened as file:
            yield SimpleNamespace(write=lambda data: self._write(file, data))

    def _write(self, file, data):
        self._left -= 1
        if self._left < 0:
            file.write(bytes(data[: len(data) // 2]))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        file.write(data)


def test_a_storage_that_fails_at_any_operation_leaves_the_last_checkpoint(storage):
    write(storage, 5)
    before = files_of(storage)
    for fail_at in range(50):
        failing = Failing(storage, fail_at)
        step = 5 if fail_at % 2 else 6  # a new step, and one that would replace
        try:
            write(failing, step, value=9)
        except CannotWriteError as error:
            assert f"checkpoint of step {step} could not be written (No space left on device)" in str(error)
            assert "earlier checkpoints are intact" in str(error)
            assert files_of(storage) == before and latest_step(storage) == 5 and value_of(storage, 5) == 5.0
        else:
            break
    assert fail_at >= 5, "two parts of a header, two tensors, commit"
    assert latest_step(storage) == step and value_of(storage, step) == 9.0


class Without:
    """A storage one of whose operations fails."""

    def __init__(self, storage, broken):
        self._place, self._broken = storage, broken

    def __getattr__(self, name):
        if name == self._broken:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return getattr(self._place, name)


@pytest.mark.parametrize("broken", ["settle", "write_note", "remove"])
def test_what_fails_after_a_checkpoint_is_committed_leaves_it_whole(storage, broken):
    """The disk that this checkpoint has filled has no room for best.json."""
    write(storage, 5, keep=Keep(last=1, best=((0.6, 5),)))
    with pytest.raises(CannotWriteError, match=r"step 10 is whole, but .* failed \(No space left on device\)"):
        write(Without(storage, broken), 10, keep=Keep(last=1, best=((0.7, 10),)))
    assert storage.steps() == [5, 10] and latest_step(storage) == 10
    assert (value_of(storage, 5), value_of(storage, 10)) == (5.0, 10.0)
    write(storage, 15, keep=Keep(last=1, best=((0.8, 15),)))
    assert storage.steps() == [15] and best_step(storage) == 15


def test_files_are_durable_before_the_name_appears(tmp_path, monkeypatch):
    """Every file and the folder are fsynced, then the manifest comes by one rename, then both folders are fsynced."""
    calls = []
    real_sync, real_replace = os.fsync, os.replace

    def named(handle):
        return os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))

    def fsync(handle):
        calls.append(f"sync {named(handle)}")
        real_sync(handle)

    def replace(source, target):
        calls.append(f"rename to {os.path.basename(target)}")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    storage = CheckpointStorage(tmp_path / "checkpoints")
    write(storage, 5)
    assert calls[0].startswith("sync rank_00000.") and calls[1:3] == ["sync step_5", "sync .manifest.json.partial"]
    assert calls[3:] == ["rename to manifest.json", "sync step_5", "sync checkpoints"]


def test_a_crash_at_the_rename_that_would_replace_a_checkpoint_leaves_it(tmp_path, monkeypatch):
    storage = CheckpointStorage(tmp_path / "checkpoints")
    write(storage, 5)
    before = files_of(storage)
    with storage.write(f"step_5/{file_name(0, 'ab')}") as file:
        file.write(b"half")
    monkeypatch.setattr(os, "replace", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        storage.commit(5, b"{}", [file_name(0, "ab")])
    monkeypatch.undo()
    storage.clean()
    assert storage.steps() == [5] and value_of(storage, 5) == 5.0
    write(storage, 5, value=6)
    assert value_of(storage, 5) == 6.0 and len(files_of(storage)) == len(before)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path):
    storage, gate = CheckpointStorage(tmp_path), threading.Event()
    made, table = Saver(storage, ALONE, 10.0, lambda: gate.wait(10)), torch.full((500_000, 4), 5.0)
    start = time.perf_counter()
    made.save(5, [whole_shard("model/table", table)], {"step": 5}, Keep(last=2))
    returned = time.perf_counter() - start
    table.fill_(6.0)  # the next step
    assert storage.steps() == [] and 0 < made.stalled_seconds <= returned
    gate.set()
    made.finish()
    assert value_of(storage, 5) == 5.0, "what was saved is the state of its step"
    assert made.written_seconds >= returned - made.stalled_seconds


def test_a_stuck_storage_is_named_in_time(tmp_path):
    gate = threading.Event()
    made = Saver(CheckpointStorage(tmp_path), ALONE, 0.3, lambda: gate.wait(10))
    made.save(5, shards(5), {}, Keep(last=2))
    start = time.monotonic()
    with pytest.raises(CannotWriteError, match=r"rank 0: .* step 5 is still being written after 0\.3 s"):
        made.finish()
    assert time.monotonic() - start < 2
    gate.set()


def test_folders_that_hosts_do_not_share_are_refused(tmp_path):
    """Rank 0 finds no file of rank 1 in its own folder: no manifest vouches for it."""
    storage = CheckpointStorage(tmp_path)
    with pytest.raises(CannotWriteError, match=r"rank_00001.*hosts do not share this folder"):
        storage.commit(5, b"{}", ["rank_00001.ab.safetensors"])
    assert storage.steps() == []


def test_a_server_that_goes_away_is_named(bucket, monkeypatch):
    import data.reading.storage

    storage = CheckpointStorage(f"{bucket}/away/checkpoints")
    write(storage, 5)
    monkeypatch.setattr(data.reading.storage, "CONNECT_SECONDS", 0.5)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    gone = CheckpointStorage(f"{bucket}/away/checkpoints")
    start = time.monotonic()
    with pytest.raises(CannotWriteError, match="checkpoint of step 6 could not be written"):
        write(gone, 6)
    assert time.monotonic() - start < 20
    assert latest_step(storage) == 5


def test_an_unknown_place_is_refused():
    with pytest.raises(InputError, match=r"nonsense://bucket/prefix: cannot be opened .*or use a folder"):
        CheckpointStorage("nonsense://bucket/prefix")


def test_checkpoints_share_copies_of_the_runs_files(storage, tmp_path):
    """The first takes a file from the run folder, the later ones from the checkpoint before, at no bytes on a disk, until the file is another one;
    where it cannot be had the try leaves nothing."""
    run = tmp_path / "run"
    run.mkdir()

    def files(text):
        (run / "schema.toml").write_text(text)
        return {"run": {"files": {"schema.toml": hashlib.sha256(text.encode()).hexdigest()}}}

    def text_of(step):
        with storage.fetched(step) as folder:
            ((file, _),) = read_checkpoint(folder).copies.values()
            return (folder / file).read_text()

    made = Saver(storage, ALONE, 10.0, folder=run)
    extra = files("one")
    for step in (1, 2):
        made.save(step, shards(step), extra, Keep(last=2))
        made.finish()
        (run / "schema.toml").unlink(missing_ok=True)
    if storage.root is not None:
        one, two = storage.root.glob("step_*/copy_*")
        assert one.samefile(two) and one.stat().st_nlink == 2
    made.save(3, shards(3), files("three"), Keep(last=2))
    made.finish()
    assert storage.steps() == [2, 3] and [text_of(2), text_of(3)] == ["one", "three"]
    before = files_of(storage)
    other = Saver(storage, ALONE, 10.0, folder=run)
    other.save(4, shards(4), extra, Keep(last=2))
    with pytest.raises(CannotWriteError, match=r"run/schema.toml: changed since this run began"):
        other.finish()
    assert files_of(storage) == before
