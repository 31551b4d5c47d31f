"""Where checkpoints lie: a folder on a disk, or a prefix behind a URI (s3://, gs://, memory://) by fsspec.

On a disk a checkpoint is written to a hidden folder and appears by one rename. Object stores have no rename: there the
manifest, which is one object, is written last, and a prefix without one is no checkpoint.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import fsspec

from data.errors import InputError
from mbcnet_rec.training.manifest import MANIFEST, check_files, read_manifest

PARTIAL = ".partial"


class Place(Protocol):
    """What a saver and a reader ask of storage. A draft is a checkpoint that is being written."""

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending; whether they verify is not asked."""
        ...

    def begin(self, step: int, token: str) -> None:
        """Make room for a draft."""
        ...

    def write(self, step: int, token: str, name: str) -> Any:
        """Context manager: a binary stream into a file of the draft, safe on storage when it closes without an error."""
        ...

    def commit(self, step: int, token: str, manifest: bytes) -> None:
        """Make the draft the checkpoint of its step."""
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

    def fetched(self, step: int) -> Any:
        """Context manager: a local folder with the checkpoint."""
        ...

    def write_note(self, name: str, data: bytes) -> None:
        """Write a small file beside the checkpoints, at once or not at all."""
        ...

    def read_note(self, name: str) -> bytes:
        """Read it; OSError if there is none."""
        ...


def open_place(location: str | Path) -> Place:
    """The place of a path or URI.

    Raises:
        InputError: the URI's scheme is unknown or its client is not installed.
    """
    if "://" not in str(location):
        return LocalPlace(Path(location))
    try:
        return RemotePlace(str(location))
    except (ValueError, ImportError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{location}: cannot be opened ({reason}); install the fsspec client of that scheme, or use a folder"
        ) from None


def latest_step(place: Place) -> int | None:
    """The newest step whose checkpoint verifies; None if there is none."""
    for step in reversed(place.steps()):
        try:
            with place.fetched(step) as folder:
                check_files(folder, read_manifest(folder))
        except InputError:
            continue
        return step
    return None


def _numbers(names: list[str]) -> list[int]:
    return sorted(int(name[5:]) for name in names if name.startswith("step_") and name[5:].isdecimal())


class LocalPlace:
    """A folder on a disk that every rank sees."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.root / f"step_{step}"

    def _draft(self, step: int, token: str) -> Path:
        return self.root / f".step_{step}.{token}{PARTIAL}"

    def steps(self) -> list[int]:
        """See Place."""
        return _numbers([path.parent.name for path in self.root.glob(f"step_*/{MANIFEST}")])

    def begin(self, step: int, token: str) -> None:
        """See Place. Every rank may call it."""
        self._draft(step, token).mkdir(parents=True, exist_ok=True)

    @contextmanager
    def write(self, step: int, token: str, name: str) -> Iterator[Any]:
        """See Place."""
        with (self._draft(step, token) / name).open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    def commit(self, step: int, token: str, manifest: bytes) -> None:
        """See Place. A checkpoint of the same step gives way."""
        draft, final = self._draft(step, token), self.folder(step)
        with self.write(step, token, MANIFEST) as file:
            file.write(manifest)
        _sync_folder(draft)
        old = self._draft(step, f"{token}.old")
        if final.exists():
            os.replace(final, old)
        os.replace(draft, final)
        _sync_folder(self.root)
        shutil.rmtree(old, ignore_errors=True)

    def discard(self, step: int, token: str) -> None:
        """See Place."""
        shutil.rmtree(self._draft(step, token), ignore_errors=True)

    def remove(self, step: int) -> None:
        """See Place. The manifest goes first: what is left after a crash is no checkpoint."""
        (self.folder(step) / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(self.folder(step), ignore_errors=True)

    def clean(self) -> None:
        """See Place."""
        for path in [*self.root.glob(f".step_*{PARTIAL}"), *self.root.glob(f".*{PARTIAL}")]:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        for path in self.root.glob("step_*"):
            if path.is_dir() and not path.is_symlink() and not (path / MANIFEST).exists():
                shutil.rmtree(path, ignore_errors=True)

    @contextmanager
    def fetched(self, step: int) -> Iterator[Path]:
        """See Place."""
        yield self.folder(step)

    def write_note(self, name: str, data: bytes) -> None:
        """See Place."""
        draft = self.root / f".{name}{PARTIAL}"
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, self.root / name)

    def read_note(self, name: str) -> bytes:
        """See Place."""
        return (self.root / name).read_bytes()


class RemotePlace:
    """A prefix of an fsspec file system. Files of a draft carry its final name; the manifest makes them a checkpoint."""

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        self.system, root = fsspec.core.url_to_fs(self.uri)
        self.root = str(root)

    def _path(self, *names: str) -> str:
        return "/".join((self.root.rstrip("/"), *names))

    def steps(self) -> list[int]:
        """See Place."""
        self.system.invalidate_cache()
        found = self.system.glob(self._path("step_*", MANIFEST))
        return _numbers([str(path).split("/")[-2] for path in found])

    def begin(self, step: int, token: str) -> None:
        """See Place. A manifest of an earlier try would vouch for files that are about to change."""
        manifest = self._path(f"step_{step}", MANIFEST)
        if self.system.exists(manifest):
            with suppress(FileNotFoundError):
                self.system.rm_file(manifest)
        self.system.makedirs(self._path(f"step_{step}"), exist_ok=True)

    @contextmanager
    def write(self, step: int, token: str, name: str) -> Iterator[Any]:
        """See Place."""
        with self.system.open(self._path(f"step_{step}", name), "wb") as file:
            yield file

    def commit(self, step: int, token: str, manifest: bytes) -> None:
        """See Place."""
        self.system.pipe_file(self._path(f"step_{step}", MANIFEST), manifest)

    def discard(self, step: int, token: str) -> None:
        """See Place."""
        self.remove(step)

    def remove(self, step: int) -> None:
        """See Place. The manifest goes first."""
        with suppress(FileNotFoundError):
            self.system.rm_file(self._path(f"step_{step}", MANIFEST))
        with suppress(FileNotFoundError):
            self.system.rm(self._path(f"step_{step}"), recursive=True)

    def clean(self) -> None:
        """See Place."""
        whole = set(self.steps())
        for path in self.system.glob(self._path("step_*")):
            numbers = _numbers([str(path).rstrip("/").split("/")[-1]])
            if numbers and numbers[0] not in whole:
                self.remove(numbers[0])

    @contextmanager
    def fetched(self, step: int) -> Iterator[Path]:
        """See Place. Copies the files that the manifest names, and no others."""
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
        """See Place."""
        self.system.pipe_file(self._path(name), data)

    def read_note(self, name: str) -> bytes:
        """See Place."""
        return bytes(self.system.cat_file(self._path(name)))


def _sync_folder(path: Path) -> None:
    """Make names in a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
