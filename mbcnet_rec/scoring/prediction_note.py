"""What is in a prediction's folder, and what may be added to it.

    OUT/_predict.json    {"format": 3, "weights": ..., "columns": [...]}

The footer of a file of scores says that too, and of which source its rows are: {..., "from": ..., "rows": ..., "bytes": ..., "end": ...,
"changed": ...}. Only a file that says what is asked for counts as done. So nothing is removed before what replaces it is there, and a mixture
of two predictions is never taken for one.
"""

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from glob import has_magic
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data.errors import InputError
from data.reading.fingerprint import mark_files
from data.reading.storage import LIST_ATTEMPTS, DataFile, RemoteFile, file_system, local_path, path_parts, retried
from mbcnet_rec.runtime.lock import LOCK, names_in

REQUEST, CHUNKS = "_predict.json", "_pieces"
MARK = b"mbcnet_prediction"  # in the footer of each file
WAY_OUT = "choose another --out, or replace the whole prediction with --overwrite"
Facts = dict[str, Any]  # that fix the content of a file of scores


def relative_names(files: Sequence[DataFile], asked: Sequence[str] = ()) -> list[str]:
    """Where each file's rows go in the output folder: its path below the folder that all files and all `asked` paths share.

    So a folder that grows by a day gives yesterday's files the names of yesterday. InputError if two files would go to one place.
    """
    paths = [_parts(file) for file in files]
    bases = [_parts(local_path(text) or RemoteFile(text)) for text in asked]
    bases = [tuple(itertools.takewhile(lambda part: not has_magic(part), base)) for base in bases]
    above = [base for base in bases if any(parts[: len(base)] == base for parts in paths)]
    folders = [*above, *(parts[:-1] for parts in paths)]
    levels = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*folders, strict=False))
    shared = sum(1 for _ in levels)
    names: dict[str, DataFile] = {}
    for file, parts in zip(files, paths, strict=True):
        kept = [part for part in parts[shared:] if part != os.sep]
        name = "/".join(kept)
        if kept[0] in (REQUEST, CHUNKS, LOCK) or {"", ".", ".."} & set(kept):
            raise InputError(
                f"{file}: its scores cannot be written to a file {name!r} of --out; rename it, or name a folder above it"
            )
        if name in names:
            raise InputError(
                f"{file} and {names[name]}: the scores of both would be {name!r} in --out; predict each into an --out of its own"
            )
        names[name] = file
    return list(names)


def _parts(file: DataFile) -> tuple[str, ...]:
    return Path(os.path.abspath(file)).parts if isinstance(file, Path) else path_parts(file)


def describe(names: Sequence[str], files: Sequence[DataFile], rows: Sequence[int], note: Facts) -> dict[str, Facts]:
    """What is asked for: name of an output -> what fixes its content."""
    facts = zip(names, files, rows, mark_files(files), strict=True)
    return {
        name: note | _source_of(file) | {"rows": count, "bytes": mark.size, "end": mark.sha256}
        for name, file, count, mark in facts
    }


def _source_of(file: DataFile) -> dict[str, Any]:
    """Which file it is, and when it was last changed, in nanoseconds."""
    if isinstance(file, Path):
        return {"from": os.path.realpath(file), "changed": file.stat().st_mtime_ns}
    system, path = file_system(file)
    info = retried(lambda: system.get_file_info(path), file, LIST_ATTEMPTS)
    return {"from": file, "changed": info.mtime_ns}


def footer_of(path: Path) -> tuple[int, Facts]:
    """How many rows a file of scores has, and what its footer says of them; (-1, {}) of a file that is none, or not whole."""
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError, pa.ArrowException):  # it is untrusted input
        footer = pq.read_metadata(path)
        facts = json.loads(footer.metadata[MARK])
        return footer.num_rows, facts | {"from": str(facts["from"])}
    return -1, {}


def what_is_replaced(out: Path, asked: Mapping[str, Facts], overwrite: bool) -> tuple[list[str], list[str]]:
    """Names of scores in the folder that the asked ones leave no room for; and sources that have changed since they were scored.

    InputError if the folder holds something else, other weights or columns, or scores of other files in the same places.
    """
    held, pieces = {}, {}
    ours = {key: next(iter(asked.values()))[key] for key in ("weights", "columns")}
    if set(names_in(out)) - {f".{REQUEST}.partial"}:
        note = _read_note(out)
        if note["weights"] != ours["weights"] and not overwrite:
            raise InputError(f"{out}: holds a prediction with other weights; {WAY_OUT}")
        if note["columns"] != ours["columns"] and not overwrite:
            shown, wanted = (", ".join(each["columns"]) for each in (note, ours))
            raise InputError(f"{out}: holds a prediction with other columns ({shown}; wanted {wanted}); {WAY_OUT}")
        for path in out.rglob("*"):
            facts, place = footer_of(path)[1], path.relative_to(out)
            if facts and place.parts[0] == CHUNKS:
                pieces[place.parent.relative_to(CHUNKS).as_posix()] = facts
            elif facts:
                held[place.as_posix()] = facts
    replaced = {name for name, facts in held.items() if overwrite or not ours.items() <= facts.items()}
    _refuse_other_sources(out, {name: held[name]["from"] for name in held.keys() - replaced}, asked)
    changed = []
    for name, facts in asked.items():
        before = held.get(name) or pieces.get(name) or facts
        if before != facts and before.items() >= (ours | {"from": facts["from"]}).items():
            changed.append(facts["from"])
    return sorted(replaced - asked.keys()), changed


def _read_note(out: Path) -> Facts:
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        note = json.loads((out / REQUEST).read_text(encoding="utf-8"))
        if note["format"] == 3 and note["weights"] and all(isinstance(each, str) for each in note["columns"]):
            return note
    raise InputError(f"{out}: holds something that is not a prediction of this version; choose another --out")


def _refuse_other_sources(out: Path, before: Mapping[str, str], asked: Mapping[str, Facts]) -> None:
    """Raise InputError where scores would replace those of another file, or stand there twice. `before`: name -> source."""
    folded = str.casefold if (out / LOCK.lower()).exists() else str  # a disk may take two names for one
    sources = {folded(name): source for name, source in before.items()}
    places = {source: name for name, source in before.items()}
    for name, facts in asked.items():
        source = facts["from"]
        other = sources.setdefault(folded(name), source)
        if other != source:
            raise InputError(f"{out / name}: holds the scores of {other}, not of {source}; {WAY_OUT}")
        if places.get(source, name) != name:
            raise InputError(
                f"{source}: its scores are in {out / places[source]} already, and would be in {out / name} too, since --data names other "
                f"folders now; {WAY_OUT}"
            )
