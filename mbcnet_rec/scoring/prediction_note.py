"""The note in a prediction's folder: the weights, the columns, and of which source each file's rows are; and what may be added to it.

    OUT/_predict.json    {"format": 2, "token": ..., "weights": ..., "columns": [...], "whole": true, "obsolete": [],
                          "files": {"ds=1/part-0.parquet": {"from": ..., "rows": ..., "bytes": ..., "end": ..., "changed": ...}}}

A file of scores carries a mark of all that in its footer: only one with the right mark counts as done. So nothing is removed before what
replaces it is there, and a mixture of two predictions is never taken for one.
"""

import hashlib
import itertools
import json
import os
import unicodedata
import uuid
from collections.abc import Mapping, Sequence
from glob import has_magic
from pathlib import Path, PurePosixPath
from typing import Any

from data.errors import InputError
from data.reading.fingerprint import mark_files
from data.reading.storage import LIST_ATTEMPTS, DataFile, RemoteFile, file_system, local_path, path_parts, retried
from mbcnet_rec.runtime.lock import LOCK, names_in

REQUEST, CHUNKS = "_predict.json", "_pieces"
WAY_OUT = "choose another --out, or replace the whole prediction with --overwrite"
Note = dict[str, Any]


def relative_names(files: Sequence[DataFile], asked: Sequence[str] = ()) -> list[str]:
    """Where each file's rows go in the output folder: its path below the folder that all files share, and all paths that were `asked` for.

    So a folder that grows by a day gives yesterday's files the names of yesterday.

    Raises:
        InputError: two files would go to one place, or a path is none for a file.
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


def describe(
    names: Sequence[str], files: Sequence[DataFile], rows: Sequence[int], columns: Sequence[str], weights: str
) -> Note:
    """The note of a prediction that is asked for: what fixes its output."""
    facts = zip(names, files, rows, mark_files(files), strict=True)
    entries = {
        name: source_of(file) | {"rows": count, "bytes": mark.size, "end": mark.sha256}
        for name, file, count, mark in facts
    }
    return {"format": 2, "weights": weights, "columns": list(columns), "files": entries}


def source_of(file: DataFile) -> dict[str, Any]:
    """Which file it is, and when it was last changed, in nanoseconds."""
    if isinstance(file, Path):
        return {"from": os.path.realpath(file), "changed": file.stat().st_mtime_ns}
    system, path = file_system(file.uri)
    info = retried(lambda: system.get_file_info(path), file.uri, LIST_ATTEMPTS)
    return {"from": file.uri, "changed": info.mtime_ns}


def join_notes(out: Path, asked: Note, overwrite: bool) -> Note:
    """What the note will be: `asked`, with what the folder holds already. Nothing is written.

    Raises:
        InputError: the folder holds something else, other weights or columns, or scores of other files in the same places.
    """
    fresh = asked | {"token": uuid.uuid4().hex, "obsolete": [], "whole": False}
    if not set(names_in(out)) - {f".{REQUEST}.partial"}:
        _refuse_other_sources(out, {}, asked["files"])
        return fresh
    before = read_note(out / REQUEST)
    if before is None:
        raise InputError(f"{out}: holds something that is not a prediction; choose another --out")
    kept = {"token": before["token"], "obsolete": before["obsolete"]}
    if overwrite:
        _refuse_other_sources(out, {}, asked["files"])
        left = {*before["files"], *before["obsolete"]} - asked["files"].keys()
        # one that was cut short continues
        goes_on = not before["whole"] and all(before[key] == asked[key] for key in ("weights", "columns"))
        return fresh | (kept if goes_on else {}) | {"obsolete": sorted(left)}
    if before["weights"] != asked["weights"]:
        raise InputError(f"{out}: holds a prediction with other weights; {WAY_OUT}")
    if before["columns"] != asked["columns"]:
        held, wanted = (", ".join(note["columns"]) for note in (before, asked))
        raise InputError(f"{out}: holds a prediction with other columns ({held}; wanted {wanted}); {WAY_OUT}")
    _refuse_other_sources(out, before["files"], asked["files"])
    return fresh | kept | {"files": before["files"] | asked["files"]}


def _refuse_other_sources(out: Path, before: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raise InputError where scores would replace those of another file, or stand there twice."""
    ignores_case = (out / LOCK.lower()).exists()

    def key(name: object) -> str:
        return unicodedata.normalize("NFC", str(name)).casefold() if ignores_case else str(name)

    files: dict[str, str] = {}  # place -> the source whose scores are there
    folders: dict[str, str] = {}  # folder -> the source of a file in it
    names: dict[str, str] = {}  # source -> place
    for name, entry in [*before.items(), *asked.items()]:
        source, parents = _real(entry["from"]), [key(each) for each in PurePosixPath(name).parents][:-1]
        places = [files.get(key(name)), folders.get(key(name)), *map(files.get, parents)]
        other = next((each for each in places if each not in (None, source)), None)
        if name in asked and other:
            raise InputError(f"{out / name}: holds the scores of {other}, not of {source}; {WAY_OUT}")
        if name in asked and names.get(source, name) != name:
            raise InputError(
                f"{source}: its scores are in {out / names[source]} already, and would be in {out / name} too, since --data names other "
                f"folders now; {WAY_OUT}"
            )
        files[key(name)], names[source] = source, name
        folders |= dict.fromkeys(parents, source)


def changed_sources(before: Note | None, note: Note) -> list[str]:
    """Sources that have changed since their rows were scored."""
    held = before["files"] if before is not None else {}
    facts = ("rows", "bytes", "end", "changed")
    return [
        entry["from"]
        for name, entry in note["files"].items()
        if name in held
        and _real(held[name]["from"]) == entry["from"]
        and any(held[name].get(fact, entry[fact]) != entry[fact] for fact in facts)
    ]


def mark_of(note: Note, name: str) -> str:
    """What a file of scores has in its footer: a hash of all that fixes its content."""
    fixed = [note["token"], note["weights"], note["columns"], note["files"][name]]
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def read_note(path: Path) -> Note | None:
    """The note that an earlier prediction left, or None. It is untrusted input: no name leads out of its folder."""
    try:
        note = {"token": "", "obsolete": [], "whole": False} | json.loads(path.read_text(encoding="utf-8"))
        if note["format"] == 1:  # no marks yet, and the columns with their types
            note |= {"columns": [each.partition(": ")[0] for each in note["columns"]]}
        texts = [note["token"], note["weights"], *note["columns"], *note["obsolete"]]
        texts += [entry["from"] for entry in note["files"].values()]
        parts = [PurePosixPath(name).parts for name in (*note["files"], *note["obsolete"])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    leads_out = any(not each or {"/", "..", REQUEST, CHUNKS} & set(each) for each in parts)
    return None if leads_out or not all(isinstance(each, str) for each in texts) else note


def _real(source: str) -> str:
    path = local_path(source)
    return source if path is None else os.path.realpath(path)
