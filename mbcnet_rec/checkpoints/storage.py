"""Where checkpoints lie: a folder on a disk, or a prefix behind a URI (s3://, gs://, memory://).

On a disk a checkpoint is written to a hidden folder and appears by one rename. Object stores have no rename: there the
files of each try have names of their own, and the manifest, which is one object that names them, is written last.
A draft is a checkpoint that is being written; its token, equal on all ranks, tells it from other tries of its step.
"""

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.fs as pafs

from data.errors import InputError
from data.reading.storage import file_system, retried
from data.whole_folder import write_whole
from mbcnet_rec.checkpoints.manifest import MANIFEST, Manifest, file_name, is_file_name, read_checkpoint, read_manifest
from mbcnet_rec.runtime.exits import CannotWriteError

BEST = "best.json"
PARTIAL = ".partial"
OLD = ".old"  # marks a checkpoint that is being replaced by another one of its step
READ_ATTEMPTS = 3


class DamagedCheckpointWarning(UserWarning):
    """A checkpoint did not verify, and an older one is used instead."""


class LocalStorage:
    """A folder on a disk that every rank sees."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.root / f"step_{step}"

    def _draft(self, step: int, token: str) -> Path:
        return self.root / f".step_{step}.{token}{PARTIAL}"

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending; whether they verify is not asked."""
        return _numbers(path.parent.name for path in self.root.glob(f"step_*/{MANIFEST}"))

    def file_name(self, rank: int, token: str) -> str:
        """The file of a rank in a draft."""
        return file_name(rank)

    @contextmanager
    def write(self, step: int, token: str, name: str) -> Iterator[BinaryIO]:
        """A stream into a file of the draft, safe on storage when it closes without an error."""
        draft = self._draft(step, token)
        draft.mkdir(parents=True, exist_ok=True)
        with (draft / name).open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    def commit(self, step: int, token: str, manifest: bytes, names: Sequence[str]) -> None:
        """Make the draft of these files the checkpoint of its step; an earlier one is replaced atomically.

        Raises:
            CannotWriteError: a rank's file is missing, because its host has another disk.
        """
        draft, final = self._draft(step, token), self.folder(step)
        for name in names:
            if not (draft / name).is_file():
                raise CannotWriteError(
                    f"{self.root}: {name} of step {step} was written but is not there: the ranks' hosts do not share this folder; set "
                    "train.checkpoint_folder to one that they share, or to a URI"
                )
        with self.write(step, token, MANIFEST) as file:
            file.write(manifest)
        _sync_folder(draft)
        old = self._draft(step, f"{token}{OLD}")
        if final.exists():
            os.replace(final, old)
        os.replace(draft, final)
        _sync_folder(self.root)
        shutil.rmtree(old, ignore_errors=True)

    def discard(self, step: int, token: str) -> None:
        """Remove a draft."""
        shutil.rmtree(self._draft(step, token), ignore_errors=True)

    def remove(self, step: int) -> None:
        """Remove a checkpoint. The manifest goes first: what a crash leaves after that does not count as a checkpoint."""
        (self.folder(step) / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(self.folder(step), ignore_errors=True)

    def clean(self) -> None:
        """Remove drafts of dead runs. A checkpoint that was being replaced by one that never came is put back."""
        for path in self.root.glob(f".step_*{OLD}{PARTIAL}"):
            for step in _numbers([path.name.split(".")[1]]):
                if (path / MANIFEST).is_file() and not self.folder(step).exists():
                    os.replace(path, self.folder(step))
        for pattern in (f".step_*{PARTIAL}", f".{BEST}{PARTIAL}", f".probe{PARTIAL}"):
            for path in self.root.glob(pattern):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        for path in self.root.glob("step_*"):
            if path.is_dir() and not path.is_symlink() and _numbers([path.name]):
                names = [each.name for each in path.iterdir()]
                if MANIFEST not in names and all(map(is_file_name, names)):  # others are not ours
                    shutil.rmtree(path, ignore_errors=True)

    def check_writable(self) -> None:
        """Write a small file and remove it; OSError if that fails. A folder that was not there is not left behind."""
        made = [path for path in (self.root, *self.root.parents) if not path.exists()]
        self.root.mkdir(parents=True, exist_ok=True)
        probe = self.root / f".probe{PARTIAL}"
        try:
            probe.write_bytes(b"1")
        finally:
            probe.unlink(missing_ok=True)
            for path in made:
                path.rmdir()

    @contextmanager
    def fetched(self, step: int) -> Iterator[Path]:
        """A local folder with the checkpoint."""
        yield self.folder(step)

    def manifest(self, step: int) -> Manifest:
        """The manifest of a step alone."""
        return read_manifest(self.folder(step))

    def write_note(self, name: str, data: bytes) -> None:
        """Write a small file next to the checkpoints, atomically."""
        write_whole(self.root / name, data.decode())

    def remove_note(self, name: str) -> None:
        """Remove such a file, if it is there."""
        (self.root / name).unlink(missing_ok=True)

    def read_note(self, name: str) -> bytes:
        """Read such a file; OSError if it does not exist."""
        return (self.root / name).read_bytes()


class RemoteStorage:
    """A prefix behind a URI; its methods do what those of LocalStorage do."""

    def __init__(self, uri: str) -> None:
        """Raise InputError if the URI's scheme is unknown or its client is not installed."""
        self.uri = uri.rstrip("/")
        system, root = file_system(self.uri)
        self._system = pafs.SubTreeFileSystem(root, system)  # paths are below the prefix

    def _files(self, folder: str = "") -> list[str]:
        """Paths of all files at and below a folder."""
        selector = pafs.FileSelector(folder, recursive=True, allow_not_found=True)
        return [info.path for info in self._system.get_file_info(selector) if info.is_file]

    def steps(self) -> list[int]:
        """Steps that have a manifest, ascending."""
        return _numbers(path.removesuffix(f"/{MANIFEST}") for path in self._files())

    def file_name(self, rank: int, token: str) -> str:
        """A name with the token, so that the manifest of an earlier try still finds that try's files."""
        return file_name(rank, token)

    def write(self, step: int, token: str, name: str) -> AbstractContextManager[pa.NativeFile]:
        """A stream into a file of the draft."""
        self._system.create_dir(f"step_{step}")
        return self._opened(f"step_{step}/{name}")

    @contextmanager
    def _opened(self, path: str) -> Iterator[pa.NativeFile]:
        file = self._system.open_output_stream(path)
        try:
            yield file
        finally:
            written = file.tell()
            try:
                file.close()
            except OSError:
                # An object is there whole or not at all, and some servers (moto) answer in words that Arrow takes for a failure
                if self._system.get_file_info(path).size != written:
                    raise

    def commit(self, step: int, token: str, manifest: bytes, names: Sequence[str]) -> None:
        """Write the manifest, then remove the files of other tries."""
        with self.write(step, token, MANIFEST) as file:
            file.write(manifest)
        self._delete(path for path in self._files(f"step_{step}") if _name(path) not in {MANIFEST, *names})

    def discard(self, step: int, token: str) -> None:
        """Remove the files of a draft."""
        self._delete(path for path in self._files(f"step_{step}") if f".{token}." in _name(path))

    def remove(self, step: int) -> None:
        """Remove a checkpoint, the manifest first."""
        self._delete([f"step_{step}/{MANIFEST}"])
        with suppress(FileNotFoundError):
            self._system.delete_dir(f"step_{step}")

    def _delete(self, paths: Iterable[str]) -> None:
        for path in paths:
            with suppress(FileNotFoundError):
                self._system.delete_file(path)

    def clean(self) -> None:
        """Remove the files of steps that have no manifest; others than ours stay."""
        for step in set(_numbers(path.rpartition("/")[0] for path in self._files())).difference(self.steps()):
            self._delete(path for path in self._files(f"step_{step}") if is_file_name(_name(path)))

    def check_writable(self) -> None:
        """Write a small file and remove it."""
        self.write_note("probe", b"1")
        self._system.delete_file("probe")

    @contextmanager
    def fetched(self, step: int) -> Iterator[Path]:
        """A copy of the files that the manifest names, and of no others."""
        with tempfile.TemporaryDirectory(prefix="mbcnet-checkpoint-") as name:
            folder = Path(name)
            self._fetch(step, MANIFEST, folder)
            for rank_file in read_manifest(folder).files:
                self._fetch(step, rank_file.name, folder)
            yield folder

    def manifest(self, step: int) -> Manifest:
        """The manifest of a step alone."""
        with tempfile.TemporaryDirectory(prefix="mbcnet-manifest-") as name:
            self._fetch(step, MANIFEST, Path(name))
            return read_manifest(Path(name))

    def _fetch(self, step: int, name: str, folder: Path) -> None:
        copy = partial(pafs.copy_files, f"step_{step}/{name}", str(folder / name), self._system, pafs.LocalFileSystem())
        retried(copy, f"{self.uri}/step_{step}/{name}", READ_ATTEMPTS, "use another checkpoint")

    def write_note(self, name: str, data: bytes) -> None:
        """Write a small object next to the checkpoints."""
        with self._opened(name) as file:
            file.write(data)

    def remove_note(self, name: str) -> None:
        """Remove such an object, if it is there."""
        self._delete([name])

    def read_note(self, name: str) -> bytes:
        """Read such a file; OSError if it does not exist."""
        with self._system.open_input_stream(name) as file:
            return file.read()


CheckpointStorage = LocalStorage | RemoteStorage


def open_storage(location: str | Path) -> CheckpointStorage:
    """The storage of a path or URI; InputError if the URI's scheme is unknown or its client is not installed."""
    return RemoteStorage(str(location)) if "://" in str(location) else LocalStorage(Path(location))


def latest_step(storage: CheckpointStorage) -> int | None:
    """The newest step whose checkpoint verifies; None if there is none. Warns of newer ones that do not."""
    return next((step for step in reversed(storage.steps()) if _verifies(storage, step)), None)


def best_step(storage: CheckpointStorage) -> int | None:
    """The step of a run's best checkpoint, else of its latest whole one; None if it has none."""
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):  # no such note, or a damaged one
        note = json.loads(storage.read_note(BEST))
        step = int(note["step"])
        # earlier versions noted the first evaluation even where none had an AUC
        if note.get("auc", 0) is not None and step in storage.steps() and _verifies(storage, step):
            return step
    return latest_step(storage)


def _verifies(storage: CheckpointStorage, step: int) -> bool:
    """Whether a checkpoint is whole; a warning says why not."""
    try:
        with storage.fetched(step) as folder:
            read_checkpoint(folder)
    except InputError as error:
        warnings.warn(f"{error} (passed over)", DamagedCheckpointWarning, stacklevel=3)
        return False
    return True


def _numbers(names: Iterable[str]) -> list[int]:
    return sorted({int(name[5:]) for name in names if name.startswith("step_") and name[5:].isdecimal()})


def _name(path: str) -> str:
    return path.rsplit("/", 1)[-1]


def _sync_folder(path: Path) -> None:
    """Make names in a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
