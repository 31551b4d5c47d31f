"""Where checkpoints lie: a folder on a disk that every rank sees, or a prefix behind a URI (s3://, gs://, memory://).

Object stores have no rename, so none is needed: the files of each try of a step have names of their own, and the manifest, which names
them, appears last and whole. Until then an earlier checkpoint of the step stands. A try's token is equal on all ranks.
"""

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.fs as pafs

from data.errors import InputError
from data.reading.storage import file_system, is_uri, local_path, retried
from data.whole_folder import write_whole
from mbcnet_rec.checkpoints.manifest import MANIFEST, Manifest, is_file_name, read_checkpoint, read_manifest, sha256_of
from mbcnet_rec.runtime.exits import CannotWriteError

BEST = "best.json"
PROBE = "probe"
READ_ATTEMPTS = 3


class DamagedCheckpointWarning(UserWarning):
    """A checkpoint did not verify, and an older one is used instead."""


class CheckpointStorage:
    """The checkpoints of a run; names are relative to their place. `root`: their folder on a disk; None behind a URI."""

    def __init__(self, location: str | Path) -> None:
        """Raise InputError if a URI's scheme is unknown or its client is not installed."""
        self.location = str(location)
        self.root = local_path(self.location) if is_uri(self.location) else Path(location)
        local = pafs.LocalFileSystem(), str(self.root)
        system, base = file_system(self.location.rstrip("/")) if self.root is None else local
        self._system = pafs.SubTreeFileSystem(base, system)

    def _files(self) -> list[tuple[str, str]]:
        """(folder, name) of each file in the folders right below this place."""
        if self.root is not None:
            return [(path.parent.name, path.name) for path in self.root.glob("step_*/*")]
        selector = pafs.FileSelector("", recursive=True, allow_not_found=True)
        parts = [info.path.split("/") for info in self._system.get_file_info(selector) if info.is_file]
        return [(each[0], each[1]) for each in parts if len(each) == 2]

    def _names(self, step: int) -> list[str]:
        return [name for folder, name in self._files() if folder == f"step_{step}"]

    def steps(self) -> list[int]:
        """Steps that have a manifest, ascending; whether they verify is not asked."""
        return _numbers(folder for folder, name in self._files() if name == MANIFEST)

    @contextmanager
    def write(self, name: str) -> Iterator[BinaryIO | pa.NativeFile]:
        """A stream into a file, safe on storage when it closes without an error."""
        if "/" in name:
            self._system.create_dir(name.rpartition("/")[0])
        if self.root is not None:
            with (self.root / name).open("wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            return
        file = self._system.open_output_stream(name)
        try:
            yield file
        finally:
            written = file.tell()
            try:
                file.close()
            except OSError:
                # An object is there whole or not at all, and some servers (moto) answer in words that Arrow takes for a failure
                if self._system.get_file_info(name).size != written:
                    raise

    def copy(self, name: str, source: Path, sha256: str, before: str) -> None:
        """Link the file of an earlier checkpoint, `before`, where that can be, or copy the source; InputError if it is gone or has another sum."""
        if before:
            with suppress(OSError, pa.ArrowException):
                if self.root is not None:
                    os.link(self.root / before, self.root / name)
                else:  # within the object store
                    self._system.copy_file(before, name)
                return
        if sha256_of(source) != sha256:
            raise InputError(f"{source}: changed since this run began; bring the file back")
        with source.open("rb") as file, self.write(name) as sink:
            shutil.copyfileobj(file, sink)

    def commit(self, step: int, manifest: bytes, names: Sequence[str]) -> None:
        """Make these files the checkpoint of a step, which `settle` ends; CannotWriteError if a rank's file is missing: its host has another disk."""
        there = self._names(step)
        for name in names:
            if name not in there:
                raise CannotWriteError(
                    f"{self.location}: {name} of step {step} was written but is not there: the ranks' hosts do not share this folder; set "
                    "train.checkpoint_folder to one that they share, or to a URI"
                )
        self._sync_folders(f"step_{step}")
        self.write_note(f"step_{step}/{MANIFEST}", manifest)

    def settle(self, step: int, names: Sequence[str]) -> None:
        """Make the manifest's name durable, and remove the step's files of other tries."""
        self._sync_folders(f"step_{step}", "")
        self._delete(step, (name for name in self._names(step) if name not in {MANIFEST, *names}))

    def _sync_folders(self, *folders: str) -> None:
        """Make names in folders durable."""
        for path in [self.root / folder for folder in folders] if self.root is not None else []:
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    def discard(self, step: int, token: str) -> None:
        """Remove the files of a try."""
        self._delete(step, (name for name in self._names(step) if f".{token}." in name))

    def remove(self, step: int) -> None:
        """Remove a checkpoint. The manifest goes first: what a crash leaves after that does not count as a checkpoint."""
        self._delete(step, [MANIFEST])
        with suppress(OSError):
            self._system.delete_dir(f"step_{step}")

    def clear(self) -> None:
        """Remove all checkpoints, and which is the best."""
        for step in self.steps():
            self.remove(step)
        self.remove_note(BEST)

    def _delete(self, step: int, names: Iterable[str]) -> None:
        """Remove files of a step, and on a disk its folder with the last one."""
        for name in names:
            self.remove_note(f"step_{step}/{name}")
        if self.root is not None:
            with suppress(OSError):
                (self.root / f"step_{step}").rmdir()

    def clean(self) -> None:
        """Remove what dead runs have left of checkpoints that never came; files of others stay."""
        for pattern in (f".{BEST}.partial", f".{PROBE}.partial", f"step_*/.{MANIFEST}.partial"):
            for path in self.root.glob(pattern) if self.root is not None else ():
                path.unlink(missing_ok=True)
        files = self._files()
        for step in set(_numbers(folder for folder, _ in files)) - set(self.steps()):
            self._delete(step, (name for folder, name in files if folder == f"step_{step}" and is_file_name(name)))

    def check_writable(self) -> None:
        """Write a small file and remove it; OSError if that fails. A folder that was not there is not left behind."""
        made = [] if self.root is None else [path for path in (self.root, *self.root.parents) if not path.exists()]
        try:
            self.write_note(PROBE, b"1")
            self.remove_note(PROBE)
        finally:
            for path in made:
                with suppress(OSError):
                    path.rmdir()

    @contextmanager
    def fetched(self, step: int, *, tensors: bool = True, copies: bool = True) -> Iterator[Path]:
        """A local folder with the manifest of a step and those files that it names, and no others; on a disk the step's own."""
        if self.root is not None:
            yield self.root / f"step_{step}"
            return
        with tempfile.TemporaryDirectory(prefix="mbcnet-checkpoint-") as place:
            folder = Path(place)
            self._fetch(step, MANIFEST, folder)
            manifest = read_manifest(folder)
            files = [each.name for each in manifest.files if tensors]
            for name in (*files, *(file for file, _ in manifest.copies.values() if copies)):
                self._fetch(step, name, folder)
            yield folder

    def manifest(self, step: int) -> Manifest:
        """The manifest of a step alone."""
        with self.fetched(step, tensors=False, copies=False) as folder:
            return read_manifest(folder)

    def _fetch(self, step: int, name: str, folder: Path) -> None:
        source = f"step_{step}/{name}"
        copy = partial(pafs.copy_files, source, str(folder / name), self._system, pafs.LocalFileSystem())
        retried(copy, f"{self.location}/{source}", READ_ATTEMPTS, "use another checkpoint")

    def write_note(self, name: str, data: bytes) -> None:
        """Write a small file at once or not at all."""
        if self.root is not None:
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.root / name, data.decode())
        else:
            with self.write(name) as file:
                file.write(data)

    def remove_note(self, name: str) -> None:
        """Remove a file, if it is there."""
        with suppress(FileNotFoundError):
            self._system.delete_file(name)

    def read_note(self, name: str) -> bytes:
        """Read a small file; OSError if it does not exist."""
        with self._system.open_input_stream(name) as file:
            return file.read()


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
