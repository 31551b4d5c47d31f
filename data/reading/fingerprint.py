"""What tells the files of a split from others: name, size and a SHA-256 of both ends of each, of which the last holds the footer.

The footer has the sizes, offsets and statistics of every column chunk, so it changes with nearly every change of the rows; files up to
1 MiB are read whole. Folders do not count: the same files elsewhere, or named by another path, are the same data.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from data.reading.storage import LIST_ATTEMPTS, MAGIC, DataFile, for_each_file, read_bytes, read_tail

END_BYTES = 65_536
WHOLE_BYTES = 1 << 20  # up to which a file is read whole
MAGIC_BYTES = 8  # the footer's length, 4 bytes little-endian, and PAR1
CHUNK_BYTES = 1 << 24
SHOWN = 3


class FileMark(NamedTuple):
    """One file: its name without folders, its bytes, and the SHA-256 of its ends."""

    name: str
    size: int
    sha256: str


def mark_files(files: Sequence[DataFile], attempts: int = LIST_ATTEMPTS, *, contents: bool = False) -> list[FileMark]:
    """The marks of files, in their order; one to three reads a file. With `contents` all of a file is read, and its SHA-256 is of all.

    Raises:
        InputError: a file cannot be read.
    """
    mark = _mark_contents if contents else _mark
    return for_each_file(files, lambda _, file: mark(file), "cannot be read", attempts)


def _mark(file: DataFile) -> FileMark:
    size, tail = read_tail(file, END_BYTES)
    footer = int.from_bytes(tail[-MAGIC_BYTES:-4], "little") + MAGIC_BYTES if tail.endswith(MAGIC) else 0
    wanted = size if size <= WHOLE_BYTES else footer
    if END_BYTES < wanted <= size:
        size, tail = read_tail(file, wanted)
    head = read_bytes(file, 0, END_BYTES) if size > WHOLE_BYTES else b""
    return FileMark(file.name, size, hashlib.sha256(head + tail).hexdigest())


def _mark_contents(file: DataFile) -> FileMark:
    size, digest = 0, hashlib.sha256()
    while chunk := read_bytes(file, size, CHUNK_BYTES):
        size += len(chunk)
        digest.update(chunk)
    return FileMark(file.name, size, digest.hexdigest())


def fingerprint(marks: Iterable[FileMark]) -> str:
    """SHA-256 of the marks of a split's files, in their order, as 64 hex digits."""
    return hashlib.sha256(json.dumps(list(marks)).encode()).hexdigest()


def mark_differences(before: Iterable[FileMark], now: Iterable[FileMark]) -> str:
    """In what two lists of files differ, in words; an empty string if in nothing."""
    before, now = [FileMark(*mark) for mark in before], [FileMark(*mark) for mark in now]
    old, new = Counter(before), Counter(now)
    gone, added = (old - new), (new - old)
    changed = Counter(mark.name for mark in gone) & Counter(mark.name for mark in added)
    found = {
        "changed": list(changed.elements()),
        "no longer there": list((Counter(mark.name for mark in gone) - changed).elements()),
        "new": list((Counter(mark.name for mark in added) - changed).elements()),
    }
    phrases = [
        f"{len(names)} {what} ({', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''})"
        for what, names in found.items()
        if names
    ]
    return ", ".join(phrases) or ("in another order" if before != now else "")
