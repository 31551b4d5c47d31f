"""A checkpoint's manifest: which files it has, their SHA-256, and which shard of which logical tensor lies where.

    {"sha256": "<of the body's text>", "body": {"format": 2, "world_size": 2, "extra": {...}, "files": [...], "copies": {...}}}

Everything read here is untrusted input: it is parsed as JSON, checked in full, and names no path outside its folder.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from data.errors import InputError

MANIFEST = "manifest.json"
FORMAT = 2
LARGEST_MANIFEST = 1 << 30
MOST_DIMENSIONS = 8
_SHELL = re.compile(rb'\{"sha256": "([0-9a-f]{64})", "body": (.*)\}\n', re.DOTALL)
_FILE = re.compile(r"(rank_\d{5})(\.[0-9a-f-]{1,64})?\.safetensors")
_COPY = re.compile(r"copy_\d{5}\.[0-9a-f-]{1,64}\.(json|parquet|toml)")
LONGEST_NAME = 1000


class ShardEntry(NamedTuple):
    """A shard of a logical tensor: the tensor's name, where the shard begins in it, and the tensor's shape."""

    name: str
    offsets: tuple[int, ...]
    global_shape: tuple[int, ...]


class RankFile(NamedTuple):
    """The file of a rank; shard i describes its tensor named str(i)."""

    name: str
    sha256: str
    shards: tuple[ShardEntry, ...]


Copies = dict[str, tuple[str, str]]  # name in the run folder -> name in the checkpoint, SHA-256


class Manifest(NamedTuple):
    """A whole checkpoint, written by `world_size` ranks with a file each."""

    world_size: int
    extra: dict[str, Any]  # JSON values of the trainer
    files: tuple[RankFile, ...]
    copies: Copies  # of files of the run folder; none in checkpoints of earlier versions


def manifest_bytes(world_size: int, extra: dict[str, Any], files: list[dict[str, Any]], copies: Copies) -> bytes:
    """The manifest of files that have been written: {"file": name, "sha256": ..., "pieces": [ShardEntry, ...]} each."""
    parts = {"world_size": world_size, "extra": extra, "files": files, "copies": copies}
    body = json.dumps({"format": FORMAT} | parts)
    return f'{{"sha256": "{hashlib.sha256(body.encode()).hexdigest()}", "body": {body}}}\n'.encode()


def read_checkpoint(folder: Path, *, hashed: bool = True) -> Manifest:
    """Read a manifest, and check that every file is there and, with `hashed`, unchanged; InputError if it is not so."""
    manifest = read_manifest(folder)
    for file in manifest.files:
        check_file(folder / file.name, file.sha256 if hashed else "")
    for name, (file, sha256) in manifest.copies.items():
        check_file(folder / file, sha256 if hashed else "", name)
    return manifest


def check_file(path: Path, sha256: str, copy_of: str = "") -> None:
    """Refuse a file of a checkpoint that is missing, a link, or of another sum (not asked where that is empty); InputError."""
    _refuse_link(path)
    what = f"{path}{copy_of and f' ({copy_of})'}"
    if not path.is_file():
        raise InputError(f"{what}: missing; the checkpoint is not whole: use another checkpoint")
    if sha256 and sha256_of(path) != sha256:
        raise InputError(f"{what}: changed since it was written (SHA-256 differs); use another checkpoint")


def read_manifest(folder: Path) -> Manifest:
    """Read and check a manifest alone; InputError if there is none, or it is damaged, of another format, or not to be trusted."""
    path = folder / MANIFEST
    try:
        _refuse_link(path)
        if path.stat().st_size > LARGEST_MANIFEST:
            raise InputError(f"{path}: {path.stat().st_size:,} bytes, more than any manifest; use another checkpoint")
        text = path.read_bytes()
    except OSError as error:
        raise InputError(f"{folder}: not a checkpoint ({error.strerror}: {MANIFEST}); choose another folder") from None
    shell = _SHELL.fullmatch(text)
    if shell is None or hashlib.sha256(shell[2]).hexdigest().encode() != shell[1]:
        raise InputError(f"{path}: changed since it was written, or no manifest; use another checkpoint")
    try:
        return _parse(json.loads(shell[2]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: {error}; use another checkpoint") from None


def _parse(body: dict[str, Any]) -> Manifest:
    if body["format"] != FORMAT:
        raise ValueError(f"format = {body['format']!r}, this version reads {FORMAT}")
    world_size, extra, files = body["world_size"], body["extra"], body["files"]
    if type(world_size) is not int or not isinstance(extra, dict) or len(files) != world_size:
        raise ValueError("world_size, extra and files do not fit together")
    copies = {name: (file, sha256) for name, (file, sha256) in body.get("copies", {}).items()}
    if not all(
        name.isprintable() and _COPY.fullmatch(file) and type(sha256) is str for name, (file, sha256) in copies.items()
    ):
        raise ValueError("copies: wanted the name of a file of the run, that of its copy, and a SHA-256 each")
    files = tuple(_rank_file(entry) for entry in files)
    if [file.name.split(".")[0] for file in files] != [f"rank_{rank:05d}" for rank in range(world_size)]:
        raise ValueError("wanted the files of ranks 0 to world_size - 1, each once")
    return Manifest(world_size, extra, files, copies)


def file_name(rank: int, token: str = "") -> str:
    """The file that a rank writes; `token`, hex digits and dashes, tells tries apart."""
    return f"rank_{rank:05d}{token and f'.{token}'}.safetensors"


def is_file_name(name: str) -> bool:
    """Whether a run may have written a file of that name."""
    return _FILE.fullmatch(name) is not None or _COPY.fullmatch(name) is not None


def _rank_file(entry: dict[str, Any]) -> RankFile:
    if not isinstance(entry["file"], str) or not _FILE.fullmatch(entry["file"]):
        raise ValueError(f"file {entry['file']!r}: wanted a name such as {file_name(0)}")
    if not isinstance(entry["sha256"], str):
        raise ValueError(f"file {entry['file']!r} has no sha256")
    return RankFile(entry["file"], entry["sha256"], tuple(_shard(shard) for shard in entry["pieces"]))


def _shard(values: list[Any]) -> ShardEntry:
    name, offsets, shape = values
    numbers = [*offsets, *shape]
    if not isinstance(name, str) or len(offsets) != len(shape) or len(shape) > MOST_DIMENSIONS:
        raise ValueError(f"shard {str(name)[:80]!r} is not described by name, offsets and shape")
    if not name.isprintable() or len(name) > LONGEST_NAME:  # it may come to a terminal
        raise ValueError(f"shard {name[:80]!r} has no plain name of at most {LONGEST_NAME} characters")
    if any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError(f"shard {name[:80]!r} has a size that is not a natural number")
    return ShardEntry(name, tuple(offsets), tuple(shape))


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise InputError(f"{path}: is a symbolic link; a checkpoint has none: use another checkpoint")


def sha256_of(path: Path) -> str:
    """The sum of a file's bytes; InputError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); bring the file back") from None
