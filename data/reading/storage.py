"""Opens files on a disk and behind a URI, with retries: the one door to storage, for data and for checkpoints.

A URI is served by Arrow's own client (s3://, gs://, abfs://, hdfs://), which lists a whole bucket in a few requests and reads
without Python's lock, and by fsspec's where Arrow has none (memory://, ...). S3 takes its keys from where every AWS tool does,
and another server's address from AWS_ENDPOINT_URL.
"""

import logging
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import lru_cache, partial, reduce
from glob import has_magic
from itertools import accumulate, takewhile
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote

import fsspec
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from data.errors import InputError, first_line

T = TypeVar("T")
LIST_ATTEMPTS = 5
THREADS = 8  # that read footers: small reads, which mostly wait
FIRST_PAUSE_SECONDS = 0.2
LONGEST_PAUSE_SECONDS = 10.0
CURE = "check the storage service and the network, or raise data.attempts"
DAMAGED = "the file is damaged or of another kind: write it again or remove it"
CONNECT_SECONDS, REQUEST_SECONDS = 5.0, 30.0
# What Arrow raises on damaged files: names that are not UTF-8 and inconsistent counts are not always ArrowExceptions.
DAMAGE = (OSError, pa.ArrowException, UnicodeError, IndexError, OverflowError)
ENDINGS = (".parquet", ".parq", ".pq")
MAGIC = b"PAR1"
Patterns = set[tuple[str, ...]]  # each by the parts of it that are left
WHOLE: Patterns = {(), ("**",)}  # of a pattern that has matched all
log = logging.getLogger(__name__)


class RemoteFile(str):
    """The URI of a file."""

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.rsplit("/", 1)[-1]


DataFile = Path | RemoteFile


class FileList(list[DataFile]):
    """Parquet files; `others`: the files beside them that are none by their names; `versions`: of the tables that they are from."""

    def __init__(
        self, files: Iterable[DataFile], others: Sequence[DataFile] = (), versions: Sequence[int] = ()
    ) -> None:
        super().__init__(files)
        self.others, self.versions = others, versions


def is_uri(text: str) -> bool:
    """Whether a path names another machine's file."""
    return "://" in text


def path_parts(file: DataFile) -> tuple[str, ...]:
    """The folders and the name of a file."""
    return file.parts if isinstance(file, Path) else tuple(file.split("://", 1)[1].split("/"))


def is_hidden(name: str) -> bool:
    """Whether a name marks what is not data, as Spark says: it begins with . or _, but for a partition folder such as _day=1."""
    return name.startswith(".") or (name.startswith("_") and "=" not in name)


def local_path(text: str) -> Path | None:
    """The path of this machine that a text names, also as file://; None where it is another machine's."""
    if text.startswith("file://"):
        return Path(unquote(text.removeprefix("file://").removeprefix("localhost")))
    return None if is_uri(text) else Path(os.path.expanduser(text))


class Listed(NamedTuple):
    """A file that a path leads to, and what two names of one file share."""

    file: DataFile
    identity: object
    is_data: bool  # Parquet, or named by itself or by a pattern with an ending, whatever it is then called


def list_files(text: str) -> list[Listed]:
    """List what a path or URI of a file, a folder or a glob names, with all below a folder; links are followed.

    Leading parts by whose very name something is there are no patterns; hidden names want a part that is hidden itself.
    InputError if a folder or a link cannot be read.
    """
    path = local_path(text)
    listed = retried(lambda: _list_remote(text), text, LIST_ATTEMPTS) if path is None else _list_local(path.parts)
    are_parquet = for_each_file([each.file for each in listed], _is_parquet, "cannot be read", LIST_ATTEMPTS)
    both = zip(listed, are_parquet, strict=True)
    return [each._replace(is_data=each.is_data or is_parquet) for each, is_parquet in both]


def _list_local(parts: tuple[str, ...]) -> list[Listed]:
    try:
        fixed = sum(takewhile(bool, map(os.path.lexists, accumulate(parts, os.path.join))))
        found = list(_below(os.path.join("", *parts[:fixed]), {parts[fixed:]}, ()))
    except OSError as error:
        raise InputError(
            f"{error.filename}: cannot be read ({error.strerror}); fix or remove it, or name other paths"
        ) from None
    return [Listed(Path(name), own, is_whole and _names_files(parts)) for name, own, is_whole in found]


def _below(path: str, patterns: Patterns, above: tuple[object, ...]) -> Iterator[tuple[str, object, bool]]:
    """Each file that patterns name at and below a path, with its identity, and whether a pattern ends with its name.

    `above`: the identities of the folders on the way, which a link may lead back to.
    """
    found = os.stat(path or ".")  # a link that leads nowhere is named
    identity = (found.st_dev, found.st_ino) if found.st_ino else os.path.realpath(path)
    if not stat.S_ISDIR(found.st_mode):
        if patterns & WHOLE:
            yield path, identity, () in patterns
    elif identity not in above:
        for name in sorted(os.listdir(path or ".")):
            if left := _after(patterns, name):
                yield from _below(os.path.join(path, name), left, (*above, identity))


def _after(patterns: Patterns, name: str) -> Patterns:
    """What is left of patterns, part by part, when they have matched a name; one that has ended takes all below."""
    left: Patterns = set()
    for pattern in patterns:
        part, rest = (pattern[0], pattern[1:]) if pattern else ("**", ())
        if part == "**" and rest:
            left |= _after({rest}, name)
        if (part == name or fnmatchcase(name, part)) and (is_hidden(part) or not is_hidden(name)):
            left.add((part, *rest) if part == "**" else rest)
    return left


def _names_files(parts: Sequence[str]) -> bool:
    return bool(parts) and ("." in parts[-1] or not has_magic(parts[-1]))


def _list_remote(uri: str) -> list[Listed]:
    system, path = file_system(uri)
    parts = path.rstrip("/").split("/")

    def is_there(count: int) -> bool:
        name = "/".join(parts[: count + 1])
        return not has_magic(parts[count]) or system.get_file_info(name).type != pafs.FileType.NotFound

    fixed = sum(takewhile(bool, map(is_there, range(len(parts)))))
    base = "/".join(parts[:fixed])
    prefix = uri[: uri.index(path)] if path in uri else uri.partition("://")[0] + "://"
    if system.get_file_info(base).type == pafs.FileType.File:
        return [] if parts[fixed:] else [Listed(RemoteFile(uri), (system.type_name, base), True)]
    listed = []
    for item in system.get_file_info(pafs.FileSelector(base, recursive=True, allow_not_found=True)):
        left = reduce(_after, item.path.removeprefix(base).lstrip("/").split("/"), {tuple(parts[fixed:])})
        if item.type == pafs.FileType.File and left & WHOLE:
            name = prefix + item.path
            identity = (system.type_name, item.path)  # memory://x is memory:///x
            listed.append(Listed(RemoteFile(name), identity, () in left and _names_files(parts)))
    return listed


def open_parquet(file: DataFile, *, read_dictionary: Sequence[str] = (), pre_buffer: bool = False) -> pq.ParquetFile:
    """Open a Parquet file with page checksums verified.

    `read_dictionary` names string columns to read as dictionary codes. `pre_buffer` joins the reads of neighbouring columns; always so
    for remote files, where each read is a request.
    """
    return pq.ParquetFile(
        file if isinstance(file, Path) else _opened(file),
        read_dictionary=list(read_dictionary),
        pre_buffer=pre_buffer or isinstance(file, RemoteFile),
        page_checksum_verification=True,
        coerce_int96_timestamp_unit="us",  # nanoseconds of 64 bits end in the year 2262: 9999-12-31 would become another day
    )


def read_bytes(file: DataFile, start: int, size: int) -> bytes:
    """Read at most `size` bytes from `start` on."""
    with open_bytes(file) as source:
        return source.read_at(size, start)


def read_tail(file: DataFile, size: int) -> tuple[int, bytes]:
    """The bytes that a file has, and its last `size` ones, or all."""
    with open_bytes(file) as source:
        whole = source.size()
        start = max(0, whole - size)
        return whole, source.read_at(whole - start, start)


def open_bytes(file: DataFile) -> pa.NativeFile:
    """Open any file to read bytes."""
    return pa.OSFile(str(file)) if isinstance(file, Path) else _opened(file)


def _opened(file: RemoteFile) -> pa.NativeFile:
    system, path = file_system(file)
    return system.open_input_file(path)


def retried(action: Callable[[], T], what: str, attempts: int, cure: str = CURE, problem: str = "") -> T:
    """Run `action` until it succeeds, with pauses that double, at most `attempts` times.

    Raises:
        InputError: naming `what`, the problem, the last cause and the cure. Missing files and permissions are not retried.
    """
    pause = FIRST_PAUSE_SECONDS
    for attempt in range(1, attempts + 1):
        try:
            return action()
        except (FileNotFoundError, PermissionError) as error:
            raise InputError(
                f"{what}: cannot be read ({first_line(error)}); check the path and the permissions"
            ) from None
        except DAMAGE as error:
            if attempt == attempts:
                problem = problem or f"gave up after {attempts} attempts"
                raise InputError(f"{what}: {problem} ({first_line(error)}); {cure}") from None
            log.warning("%s: attempt %d of %d failed (%s)", what, attempt, attempts, first_line(error))
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
    raise AssertionError("attempts is 1 or more")


def _is_parquet(_: int, file: DataFile) -> bool:
    if "." in file.name or (isinstance(file, Path) and not file.is_file()):
        return file.name.lower().endswith(ENDINGS)
    return read_bytes(file, 0, len(MAGIC)) == MAGIC


def for_each_file(
    files: Sequence[DataFile], action: Callable[[int, DataFile], T], problem: str, attempts: int
) -> list[T]:
    """Run an action with each file and its number, in threads; see `read_or_name`."""

    def run(number: int, file: DataFile) -> T:
        return read_or_name(partial(action, number, file), file, str(file), problem, attempts)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(run, range(len(files)), files))


def read_or_name(read: Callable[[], T], file: DataFile, name: str, problem: str, attempts: int) -> T:
    """Run a read, of a remote file again if it fails; where the file is damaged an InputError begins with `name` and `problem`."""
    return retried(read, name, attempts) if isinstance(file, RemoteFile) else retried(read, name, 1, DAMAGED, problem)


def file_system(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a URI and the path in it; InputError if no client for the URI's scheme is known or installed."""
    if uri.startswith("s3://"):
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or ""
        return _s3(endpoint, region, CONNECT_SECONDS, REQUEST_SECONDS), uri.removeprefix("s3://").rstrip("/")
    with suppress(pa.ArrowInvalid):  # a scheme that Arrow does not know
        return pafs.FileSystem.from_uri(uri)
    try:
        system, path = fsspec.core.url_to_fs(uri, use_listings_cache=False)
    except (ValueError, ImportError) as error:
        raise InputError(
            f"{uri}: cannot be opened ({first_line(error)}); install the fsspec client of that scheme, or use a folder"
        ) from None
    return pafs.PyFileSystem(pafs.FSSpecHandler(system)), path


@lru_cache(maxsize=8)
def _s3(endpoint: str, region: str, connect_seconds: float, request_seconds: float) -> pafs.FileSystem:
    options: dict[str, Any] = {"region": region} if region else {}
    if endpoint:
        scheme, _, address = endpoint.rpartition("://")
        options |= {"endpoint_override": address.rstrip("/"), "scheme": scheme or "https"}
    return pafs.S3FileSystem(
        connect_timeout=connect_seconds,
        request_timeout=request_seconds,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=2),
        allow_delayed_open=True,  # a small file is written by one request instead of three
        **options,
    )
