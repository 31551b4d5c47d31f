"""Paths that a user gives, and folders and files of results that appear under their names only when they are complete."""

import ctypes
import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data.errors import InputError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Give a folder beside `out` to write to; rename it at the end, or remove it after a failure. What `out` held is replaced."""
    draft = out.with_name(f"{out.name}.partial-{os.getpid()}")
    earlier = out.with_name(f".{out.name}.earlier-{os.getpid()}")
    try:
        draft.mkdir(parents=True)
        yield draft
        if _exchange(draft, out):
            os.replace(draft, earlier)
        else:
            if out.exists():  # removing it takes longer than a rename
                os.replace(out, earlier)
            os.replace(draft, out)
        shutil.rmtree(earlier, ignore_errors=True)
    except OSError as error:
        error.filename = error.filename or str(out)  # for the message
        raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change places at once, so that neither is ever missing; False if one is, or the system or its file system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def earlier_summary(out: Path, summary: str, what: str) -> dict[str, Any] | None:
    """Read the JSON file `summary` of an earlier result in `out`; None if `out` is free; InputError if something is there that is no `what`."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        found = json.loads((out / summary).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, Mapping):
        raise InputError(f"{out}: exists and holds no {what}; choose another folder, or remove it yourself")
    return dict(found)


def write_whole(path: Path, text: str) -> None:
    """Replace a file's content at once or not at all; where it cannot be written an OSError, and the file is as it was."""
    draft = path.with_name(f".{path.name}.partial")
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        error.filename = str(path)  # for the message
        raise


def home_path(text: str, source: str) -> str:
    """Replace `~` or `~user`, but no variable, by the home folder, in configs, --set and arguments; InputError if nobody knows that folder."""
    if not text.startswith("~") or os.path.lexists(text):
        return text
    found = os.path.expanduser(text)
    if found == text:
        raise InputError(
            f"{source} = {text!r}: nobody knows the home folder of {text.partition('/')[0]}; write the path in full, or ./{text} for a name "
            "that begins with ~"
        )
    return found
