"""One process at a time in a folder: the file LOCK in it names its owner, who touches it every few seconds and removes it at the end.

    {"machine": "<boot id and process namespace>", "host": "node7", "pid": 4711, "when": 1764400000.0, "what": "train", ...}

The kernel locks the file (flock) for as long as its owner lives. Where it does so on each host for itself, an owner elsewhere is alive
while its LOCK is touched. A dead owner's LOCK is taken over.
"""

import fcntl
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
from typing import TextIO

from data.errors import InputError
from data.schema.parse import parse_dataclass
from data.whole_folder import NO_ROOM
from mbcnet_rec.logs.progress import tell
from mbcnet_rec.runtime.exits import CANNOT_WRITE
from mbcnet_rec.runtime.process import Process, answer_of_first

LOCK = "LOCK"
BEAT_SECONDS = 5.0
SILENT_SECONDS = 30.0  # after which an owner elsewhere counts as dead
POLL_SECONDS = 0.2
ENDING_SECONDS = 0.3  # in which the threads of an owner that was just killed come to their end


@dataclass(frozen=True)
class Owner:
    """A process that has, or had, a folder."""

    machine: str  # on which process ids mean the same
    host: str
    pid: int
    when: float  # Unix time at which it took the folder
    what: str  # it does there
    token: str  # of this one taking

    def __str__(self) -> str:
        age = max(0.0, time.time() - self.when)
        ago = f"{age:.0f} s" if age < 120 else f"{age / 60:.0f} min" if age < 7200 else f"{age / 3600:.0f} h"
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.when))
        return f"`mbcnet {self.what}`, process {self.pid} on host {self.host}, since {since} ({ago})"


def this_process(what: str) -> Owner:
    """This process as an owner."""
    machine = host = socket.gethostname()
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        machine = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return Owner(machine, host, os.getpid(), time.time(), what, uuid.uuid4().hex)


@contextmanager
def locked(folder: Path, what: str, *, silent_seconds: float = SILENT_SECONDS) -> Iterator[None]:
    """Have a folder to oneself, made if need be; on exit LOCK is gone, and an empty folder made here. Nested in the same process it does nothing.

    `what` is the command. InputError if another process is at work there, or no folder can be there; OSError if the disk is full.
    """
    me, path = this_process(what), folder / LOCK
    made: list[Path] = []
    try:
        try:
            made = [each for each in (folder, *folder.parents) if not each.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            file = _take(path, me, silent_seconds)
        except InputError:
            raise
        except (OSError, ValueError) as error:  # a file, a name that is too long, a NUL, a full disk
            if isinstance(error, OSError) and error.errno in NO_ROOM:
                raise
            reason = error.strerror if isinstance(error, OSError) else error
            raise InputError(f"{str(folder)[:200]!r}: no folder can be there ({reason}); choose another one") from None
        if file is None:
            yield
            return
        ended = threading.Event()
        beat = threading.Thread(target=_beat, args=(path, me, ended), name="lock", daemon=True)
        beat.start()
        try:
            yield
        finally:
            ended.set()
            beat.join()
            with file, suppress(OSError):
                if _read(path)[1] == me:
                    path.unlink()
    finally:
        with suppress(OSError, ValueError):  # not empty; or never made
            for each in made:
                each.rmdir()


@contextmanager
def locked_together(process: Process, what: str, folders: Mapping[str, Path]) -> Iterator[None]:
    """`locked` by rank 0 for all ranks, or its error on every rank; `folders`: what names it, such as a key of the config -> the folder."""
    with ExitStack() as held:

        def take() -> None:
            for name, folder in folders.items():
                try:
                    held.enter_context(locked(folder, what))
                except InputError as error:
                    raise InputError(f"{name}: {error}") from None

        answer_of_first(process, take)
        yield


def names_in(folder: Path) -> list[str]:
    """Names of what is in a folder besides its LOCK; none where there is no folder."""
    return [path.name for path in folder.iterdir() if path.name != LOCK] if folder.exists() else []


def _take(path: Path, me: Owner, silent_seconds: float) -> TextIO | None:
    """Write LOCK and return it, open and locked; None where this process has it already; InputError if another process has it."""
    until = time.monotonic() + ENDING_SECONDS
    while True:
        with ExitStack() as opened:
            is_others = path.exists() and not os.access(path, os.W_OK)  # another user's: it is read only
            file = opened.enter_context(path.open("r" if is_others else "a", encoding="utf-8"))
            is_locked = _flock(file)
            text, owner = _read(path)
            try:
                is_there = os.path.samefile(path, file.fileno())
            except FileNotFoundError:
                is_there = False
            if not is_there:  # its owner has removed it meanwhile
                continue
            is_ours = owner is not None and owner.machine == me.machine
            if not is_locked and owner is not None and is_ours and owner.pid == me.pid:
                return None
            if is_locked is False and time.monotonic() > until:
                raise _in_use(path, owner)
            if is_locked is False:
                time.sleep(ENDING_SECONDS / 10)
                continue
            # of an owner on this machine the kernel has just said that it is dead
            if text and not (is_locked and is_ours):
                _await_silence(path, owner, silent_seconds)
            if is_others:
                path.unlink()
                continue
            try:
                file.truncate(0)
                file.write(json.dumps(asdict(me)) + "\n")
                file.flush()
            except OSError:
                path.unlink(missing_ok=True)
                raise
            if text:
                who = owner or "a process"
                tell(f"note: {path}: taken over from {who}, which is no longer there", sys.stderr)
            opened.pop_all()
            return file


def _flock(file: TextIO) -> bool | None:
    """Whether the kernel has locked a file for this process, or another has it; None on a file system without such locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _await_silence(path: Path, owner: Owner | None, silent_seconds: float) -> None:
    """Wait for so long; InputError if LOCK is touched meanwhile."""
    who = owner or "an unknown process"
    tell(f"{path}: of {who}: waiting up to {silent_seconds:g} s for a sign of life", sys.stderr)
    touched, end = path.stat().st_mtime_ns, time.monotonic() + silent_seconds
    while time.monotonic() < end:
        time.sleep(POLL_SECONDS)
        with path.open() as file:  # opened: network file systems then ask their server
            if os.fstat(file.fileno()).st_mtime_ns != touched:
                raise _in_use(path, owner)


def _in_use(path: Path, owner: Owner | None) -> InputError:
    return InputError(
        f"{path.parent}: in use by {owner or 'another process'}; wait until it ends, stop it, or choose another folder"
    )


def _read(path: Path) -> tuple[str, Owner | None]:
    """The text of LOCK, and the owner that it names, which is untrusted input; None where it names none."""
    text = ""
    with suppress(FileNotFoundError), path.open(encoding="utf-8", errors="replace") as file:
        text = file.read(10_000)
    try:
        return text, parse_dataclass(Owner, json.loads(text), str(path))
    except (ValueError, RecursionError):
        return text, None


def _beat(path: Path, me: Owner, ended: threading.Event) -> None:
    """Touch LOCK until the end. A process that slept so long that another one has taken its folder writes no more there."""
    while not ended.wait(BEAT_SECONDS):
        with suppress(OSError):  # removed by hand, or a file system that is away for a moment
            owner = _read(path)[1]
            if owner is not None and owner.token != me.token:
                tell(f"mbcnet: {path.parent}: was taken over by {owner}; this process ends", sys.stderr)
                os._exit(CANNOT_WRITE)
            os.utime(path)
