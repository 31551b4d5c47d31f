"""One process at a time in a folder: the file LOCK in it names its owner, who touches it every few seconds and removes it at the end.

    {"machine": "<boot id and process namespace>", "host": "node7", "pid": 4711, "started": "8123", "when": 1764400000.0, "what": "train", ...}

An owner on this machine is asked for by its process id and start time; one elsewhere is alive while its LOCK is touched. A dead owner's
LOCK is taken over.
"""

import errno
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.errors import InputError
from mbcnet_rec.logs.progress import tell
from mbcnet_rec.runtime.exits import CANNOT_WRITE, CannotWriteError
from mbcnet_rec.runtime.process import Process, first_decides

LOCK = "LOCK"
BEAT_SECONDS = 5.0
SILENT_SECONDS = 30.0  # after which an owner elsewhere counts as dead
SETTLE_SECONDS = 0.3  # of two processes that take over at once the later one has it
POLL_SECONDS = 0.2
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


@dataclass(frozen=True)
class Owner:
    """A process that has, or had, a folder."""

    machine: str  # on which process ids mean the same
    host: str
    pid: int
    started: str  # start time of the process, in the kernel's words
    when: float  # Unix time at which it took the folder
    what: str  # it does there
    token: str  # of this one taking
    folder: str  # the real path of what it has

    def is_alive(self) -> bool:
        """Whether this process runs; only for one of this machine."""
        with suppress(OSError, IndexError):
            state, *rest = (
                Path(f"/proc/{self.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            )
            return state not in "ZX" and rest[18] == self.started
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # another user's
            return True
        return True

    def __str__(self) -> str:
        age = max(0.0, time.time() - self.when)
        ago = f"{age:.0f} s" if age < 120 else f"{age / 60:.0f} min" if age < 7200 else f"{age / 3600:.0f} h"
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.when))
        return f"`mbcnet {self.what}`, process {self.pid} on host {self.host}, since {since} ({ago})"


def this_process(folder: Path, what: str) -> Owner:
    """This process as the owner of a folder."""
    machine = started = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        machine = f"{boot} {os.readlink('/proc/self/ns/pid')}"
        started = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    host = socket.gethostname()
    return Owner(
        machine or host,
        host,
        os.getpid(),
        started,
        time.time(),
        what,
        uuid.uuid4().hex,
        os.path.realpath(folder),
    )


@contextmanager
def locked(folder: Path, what: str, *, silent_seconds: float = SILENT_SECONDS) -> Iterator[None]:
    """Have a folder to oneself, which is made if need be; on exit LOCK is gone, and the folder too if it was made here and is empty.

    Nested in a lock of the same process and folder it does nothing. `what` is the command.

    Raises:
        InputError: another process is at work there, or no folder can be there.
        CannotWriteError: the disk is full.
    """
    made: list[Path] = []
    try:
        try:
            me = this_process(folder, what)
            made = [each for each in (folder, *folder.parents) if not each.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            is_nested = not _take(folder / LOCK, me, silent_seconds)
        except (OSError, ValueError) as error:  # a file, a name that is too long, a NUL, a full disk
            reason = error.strerror if isinstance(error, OSError) else error
            if isinstance(error, OSError) and error.errno in NO_ROOM:
                raise CannotWriteError(
                    f"{folder}: cannot be written ({reason}); free space, then start again"
                ) from None
            raise InputError(
                f"{str(folder)[:200]!r}: no folder can be there ({reason}); choose another one"
            ) from None
        if is_nested:
            yield
            return
        ended = threading.Event()
        beat = threading.Thread(target=_beat, args=(folder / LOCK, me, ended), name="lock", daemon=True)
        beat.start()
        try:
            yield
        finally:
            ended.set()
            beat.join()
            if _is(folder / LOCK, me):
                (folder / LOCK).unlink(missing_ok=True)
    finally:
        with suppress(OSError, ValueError):  # not empty; or never made
            for each in made:
                each.rmdir()


@contextmanager
def locked_together(process: Process, what: str, folders: Mapping[str, Path]) -> Iterator[None]:
    """`locked` for all ranks: rank 0 has the folders, and why it cannot have them is raised on every rank.

    `folders`: what names it, such as a key of the config -> the folder.
    """
    with ExitStack() as held:
        with first_decides(process):
            for name, folder in folders.items() if process.is_first else ():
                try:
                    held.enter_context(locked(folder, what))
                except InputError as error:
                    raise InputError(f"{name}: {error}") from None
        yield


def names_in(folder: Path) -> list[str]:
    """Names of what is in a folder besides its LOCK and drafts of it; none where there is no folder."""
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return [name for name in names if name != LOCK and not name.startswith(f".{LOCK}.")]


def _take(path: Path, me: Owner, silent_seconds: float) -> bool:
    """Write LOCK; False where this process has it already.

    Raises:
        InputError: another process has it.
    """
    seen: tuple[str, int] | None = None
    since = 0.0
    while not _create(path, me):
        found = _look(path)
        if found is None:  # removed meanwhile
            continue
        owner = _parse(found[0])
        if owner is not None and owner.machine == me.machine:
            if (owner.pid, owner.started) == (me.pid, me.started):
                return False
            is_dead = not owner.is_alive() or _is_copy(path, owner)
            beats = not is_dead
        else:
            if seen is None or found[0] != seen[0]:
                seen, since = found, time.monotonic()
                who = owner or "an unknown process"
                tell(f"{path}: of {who}: waiting up to {silent_seconds:g} s for a sign of life", sys.stderr)
            is_dead, beats = time.monotonic() - since > silent_seconds, found != seen
        if beats:
            raise InputError(
                f"{path.parent}: in use by {owner or 'another process'}; wait until it ends, stop it, or choose another folder"
            )
        if is_dead and _take_over(path, me, found):
            tell(
                f"note: {path}: taken over from {owner or 'a process'}, which is no longer there", sys.stderr
            )
            return True
        time.sleep(POLL_SECONDS)
    return True


def _is_copy(path: Path, owner: Owner) -> bool:
    """Whether somebody has copied a folder, LOCK and all, whose owner is at work in the original."""
    original = Path(owner.folder) / LOCK
    with suppress(OSError):
        return not original.samefile(path) and _is(original, owner)
    return False


def _create(path: Path, me: Owner) -> bool:
    """Write LOCK if there is none."""
    try:
        file = path.open("x", encoding="utf-8")
    except FileExistsError:
        return False
    try:
        with file:
            file.write(json.dumps(asdict(me)) + "\n")
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return True


def _take_over(path: Path, me: Owner, dead: tuple[str, int]) -> bool:
    """Replace a dead owner's LOCK; False if another process was faster."""
    draft = path.with_name(f".{LOCK}.{me.token}.partial")
    try:
        draft.write_text(json.dumps(asdict(me)) + "\n", encoding="utf-8")
        if _look(path) != dead:
            return False
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    time.sleep(SETTLE_SECONDS)
    return _is(path, me)


def _look(path: Path) -> tuple[str, int] | None:
    """The text of LOCK, and when it was last touched; None if there is none. It is opened: network file systems then ask their server."""
    try:
        with path.open(errors="replace") as file:
            return file.read(10_000), os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _parse(text: str) -> Owner | None:
    """The owner that LOCK names, which is untrusted input; None where it does not."""
    try:
        values: dict[str, Any] = json.loads(text)
        owner = Owner(**values)
        kinds = {name: type(value) for name, value in asdict(owner).items()}
    except (ValueError, TypeError, RecursionError):
        return None
    wanted = dict.fromkeys(kinds, str) | {"pid": int, "when": float}
    return owner if kinds == wanted and owner.pid > 0 else None


def _is(path: Path, me: Owner) -> bool:
    with suppress(OSError):
        found = _look(path)
        return found is not None and _parse(found[0]) == me
    return False


def _beat(path: Path, me: Owner, ended: threading.Event) -> None:
    """Touch LOCK until the end. A process that slept so long that another one has taken its folder writes no more there."""
    while not ended.wait(BEAT_SECONDS):
        with suppress(OSError):  # removed by hand, or a file system that is away for a moment
            found = _look(path)
            owner = _parse(found[0]) if found else None
            if owner is not None and owner.token != me.token:
                tell(f"mbcnet: {path.parent}: was taken over by {owner}; this process ends", sys.stderr)
                os._exit(CANNOT_WRITE)
            os.utime(path)
