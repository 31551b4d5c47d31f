"""Where checkpoints lie: a folder on a disk, or a prefix behind a URI (s3://, gs://, memory://) by fsspec.

On a disk a checkpoint is written to a hidden folder and appears by one rename. Object stores have no rename: there the
files of each try have names of their own, and the manifest, which is one object that names them, is written last.
"""

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import fsspec
from fsspec.implementations.arrow import ArrowFSWrapper

from data.errors import InputError
from data.reading.storage import arrow_file_system
from mbcnet_rec.checkpoints.manifest import MANIFEST, check_files, file_name, read_manifest
from mbcnet_rec.runtime.exits import CannotWriteError

PARTIAL = ".partial"
OLD = ".old"  # of a checkpoint that gives way to another one of its step


class DamagedCheckpointWarning(UserWarning):
    """A checkpoint that does not verify was passed over for an older one."""


class CheckpointStorage(Protocol):
    """What a saver and a reader ask of storage. A draft is a checkpoint that is being written."""

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending; whether they verify is not asked."""
        ...

    def file_name(self, rank: int, token: str) -> str:
        """The file of a rank in a draft."""
        ...

    def begin(self, step: int, token: str) -> None:
        """Make room for a draft. Every rank may call it."""
        ...

    def write(self, step: int, token: str, name: str) -> Any:
        """Context manager: a binary stream into a file of the draft, safe on storage when it closes without an error."""
        ...

    def commit(self, step: int, token: str, manifest: bytes, names: Sequence[str]) -> None:
        """Make the draft of these files the checkpoint of its step; an earlier one gives way at that moment and not before."""
        ...

    def discard(self, step: int, token: str) -> None:
        """Remove a draft."""
        ...

    def remove(self, step: int) -> None:
        """Remove a checkpoint."""
        ...

    def clean(self) -> None:
        """Remove what dead runs have left of drafts."""
        ...

    def prove(self) -> None:
        """Write a small file and remove it; OSError if that fails. Better at the start than at the first checkpoint."""
        ...

    def fetched(self, step: int) -> Any:
        """Context manager: a local folder with the checkpoint."""
        ...

    def write_note(self, name: str, data: bytes) -> None:
        """Write a small file beside the checkpoints, at once or not at all."""
        ...

    def read_note(self, name: str) -> bytes:
        """Read it; OSError if there is none."""
        ...


def open_storage(location: str | Path) -> CheckpointStorage:
    """The place of a path or URI.

    Raises:
        InputError: the URI's scheme is unknown or its client is not installed.
    """
    if "://" not in str(location):
        return LocalStorage(Path(location))
    try:
        return RemoteStorage(str(location))
    except (ValueError, ImportError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{location}: cannot be opened ({reason}); install the fsspec client of that scheme, or use a folder"
        ) from None


def latest_step(place: CheckpointStorage) -> int | None:
    """The newest step whose checkpoint verifies; None if there is none. Warns of newer ones that do not."""
    for step in reversed(place.steps()):
        try:
            with place.fetched(step) as folder:
                check_files(folder, read_manifest(folder))
        except InputError as error:
            warnings.warn(f"{error} (passed over)", DamagedCheckpointWarning, stacklevel=2)
            continue
        return step
    return None


def _numbers(names: list[str]) -> list[int]:
    return sorted(int(name[5:]) for name in names if name.startswith("step_") and name[5:].isdecimal())


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
        """See CheckpointStorage."""
        return _numbers([path.parent.name for path in self.root.glob(f"step_*/{MANIFEST}")])

    def file_name(self, rank: int, token: str) -> str:
        """See CheckpointStorage."""
        return file_name(rank)

    def begin(self, step: int, token: str) -> None:
        """See CheckpointStorage."""
        self._draft(step, token).mkdir(parents=True, exist_ok=True)

    @contextmanager
    def write(self, step: int, token: str, name: str) -> Iterator[Any]:
        """See CheckpointStorage."""
        with (self._draft(step, token) / name).open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    def commit(self, step: int, token: str, manifest: bytes, names: Sequence[str]) -> None:
        """See CheckpointStorage.

        Raises:
            CannotWriteError: a rank's file is not there: its host has another disk.
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
        """See CheckpointStorage."""
        shutil.rmtree(self._draft(step, token), ignore_errors=True)

    def remove(self, step: int) -> None:
        """See CheckpointStorage. The manifest goes first: what is left after a crash is no checkpoint."""
        (self.folder(step) / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(self.folder(step), ignore_errors=True)

    def clean(self) -> None:
        """See CheckpointStorage. A checkpoint that had given way to one that never came is put back."""
        for path in self.root.glob(f".step_*{OLD}{PARTIAL}"):
            for step in _numbers([path.name.split(".")[1]]):
                if (path / MANIFEST).is_file() and not self.folder(step).exists():
                    os.replace(path, self.folder(step))
        for path in [*self.root.glob(f".step_*{PARTIAL}"), *self.root.glob(f".*{PARTIAL}")]:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        for path in self.root.glob("step_*"):
            if path.is_dir() and not path.is_symlink() and not (path / MANIFEST).exists():
                shutil.rmtree(path, ignore_errors=True)

    def prove(self) -> None:
        """See CheckpointStorage. A folder that was not there is not left behind."""
        made = [path for path in (self.root, *self.root.parents) if not path.exists()]
        self.root.mkdir(parents=True, exist_ok=True)
        try:
            probe = self.root / f".probe{PARTIAL}"
            probe.write_bytes(b"1")
            probe.unlink()
        finally:
            for path in made:
                path.rmdir()

    @contextmanager
    def fetched(self, step: int) -> Iterator[Path]:
        """See CheckpointStorage."""
        yield self.folder(step)

    def write_note(self, name: str, data: bytes) -> None:
        """See CheckpointStorage."""
        draft = self.root / f".{name}{PARTIAL}"
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, self.root / name)

    def read_note(self, name: str) -> bytes:
        """See CheckpointStorage."""
        return (self.root / name).read_bytes()


class RemoteStorage:
    """A prefix of an fsspec file system. S3 goes through Arrow's client, as the data does: keys and addresses are the same."""

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        if self.uri.startswith("s3://"):
            system, self.root = arrow_file_system(self.uri)
            self.system: Any = ArrowFSWrapper(system)
        else:
            self.system, root = fsspec.core.url_to_fs(self.uri)
            self.root = str(root)

    def _path(self, *names: str) -> str:
        return "/".join((self.root.rstrip("/"), *names))

    def steps(self) -> list[int]:
        """See CheckpointStorage."""
        self.system.invalidate_cache()
        found = self.system.glob(self._path("step_*", MANIFEST))
        return _numbers([str(path).split("/")[-2] for path in found])

    def file_name(self, rank: int, token: str) -> str:
        """See CheckpointStorage. The manifest of an earlier try vouches for that try's files."""
        return file_name(rank, token)

    def begin(self, step: int, token: str) -> None:
        """See CheckpointStorage."""
        self.system.makedirs(self._path(f"step_{step}"), exist_ok=True)

    def write(self, step: int, token: str, name: str) -> Any:
        """See CheckpointStorage."""
        return self._opened(self._path(f"step_{step}", name))

    @contextmanager
    def _opened(self, path: str) -> Iterator["_Counter"]:
        file = self.system.open(path, "wb")
        counter = _Counter(file)
        try:
            yield counter
        finally:
            try:
                file.close()
            except OSError:
                # An object is there whole or not at all, and some servers (moto) answer in words that Arrow takes for a failure
                self.system.invalidate_cache()
                if not self.system.exists(path) or self.system.size(path) != counter.written:
                    raise

    def commit(self, step: int, token: str, manifest: bytes, names: Sequence[str]) -> None:
        """See CheckpointStorage."""
        with self._opened(self._path(f"step_{step}", MANIFEST)) as file:
            file.write(manifest)
        self._remove_files(step, {MANIFEST, *names})

    def discard(self, step: int, token: str) -> None:
        """See CheckpointStorage."""
        names = self._names(step)
        self._remove_files(step, {name for name in names if f".{token}." not in name})

    def _names(self, step: int) -> list[str]:
        self.system.invalidate_cache()
        found = self.system.glob(self._path(f"step_{step}", "*"))
        return [str(path).rsplit("/", 1)[-1] for path in found]

    def _remove_files(self, step: int, kept: set[str]) -> None:
        for name in self._names(step):
            if name not in kept:
                with suppress(FileNotFoundError):
                    self.system.rm_file(self._path(f"step_{step}", name))

    def remove(self, step: int) -> None:
        """See CheckpointStorage. The manifest goes first."""
        with suppress(FileNotFoundError):
            self.system.rm_file(self._path(f"step_{step}", MANIFEST))
        with suppress(FileNotFoundError):
            self.system.rm(self._path(f"step_{step}"), recursive=True)

    def clean(self) -> None:
        """See CheckpointStorage."""
        whole = set(self.steps())
        for path in self.system.glob(self._path("step_*")):
            numbers = _numbers([str(path).rstrip("/").split("/")[-1]])
            if numbers and numbers[0] not in whole:
                self.remove(numbers[0])

    def prove(self) -> None:
        """See CheckpointStorage."""
        self.write_note("probe", b"1")
        self.system.rm_file(self._path("probe"))

    @contextmanager
    def fetched(self, step: int) -> Iterator[Path]:
        """See CheckpointStorage. Copies the files that the manifest names, and no others."""
        with tempfile.TemporaryDirectory(prefix="mbcnet-checkpoint-") as name:
            folder = Path(name)
            try:
                self.system.get_file(self._path(f"step_{step}", MANIFEST), str(folder / MANIFEST))
                for part in read_manifest(folder).parts:
                    self.system.get_file(self._path(f"step_{step}", part.file), str(folder / part.file))
            except OSError as error:
                raise InputError(
                    f"{self.uri}/step_{step}: cannot be read ({error}); use another checkpoint"
                ) from None
            yield folder

    def write_note(self, name: str, data: bytes) -> None:
        """See CheckpointStorage."""
        with self._opened(self._path(name)) as file:
            file.write(data)

    def read_note(self, name: str) -> bytes:
        """See CheckpointStorage."""
        return bytes(self.system.cat_file(self._path(name)))


class _Counter:
    """A stream that knows how much was written into it."""

    def __init__(self, file: Any) -> None:
        self._file, self.written = file, 0

    def write(self, data: Any, /) -> int:
        """Write it."""
        count = int(self._file.write(data))
        self.written += count
        return count


def _sync_folder(path: Path) -> None:
    """Make names in a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
