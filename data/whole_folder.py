"""A folder of results that appears under its name only when it is complete."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data.errors import InputError


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Give a folder beside `out` to write to; rename it at the end, or remove it after a failure. What `out` held is replaced."""
    draft = out.with_name(f"{out.name}.partial-{os.getpid()}")
    try:
        draft.mkdir(parents=True)
        yield draft
        if out.exists():
            shutil.rmtree(out)
        os.replace(draft, out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def earlier_summary(out: Path, summary: str, what: str) -> dict[str, Any] | None:
    """Read the JSON file `summary` of an earlier result in the folder `out`; None if `out` is free to be written.

    Raises:
        InputError: something is there that is no `what`.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        found = json.loads((out / summary).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, Mapping):
        raise InputError(f"{out}: exists and holds no {what}; choose another folder, or remove it yourself")
    return dict(found)
