"""Opens files on a disk and behind a URI, with retries: the one door to storage, for data and for checkpoints.

A URI is served by Arrow's own client (s3://, gs://, abfs://, hdfs://), which lists a whole bucket in a few requests and reads
without Python's lock, and by fsspec's where Arrow has none (memory://, ...). S3 takes its keys from where every AWS tool does,
and another server's address from AWS_ENDPOINT_URL.
"""

import glob
import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from data.errors import InputError, first_line

T = TypeVar("T")
LIST_ATTEMPTS = 5
FIRST_PAUSE_SECONDS = 0.2
LONGEST_PAUSE_SECONDS = 10.0
CURE = "check the storage service and the network, or raise data.attempts"
CONNECT_SECONDS, REQUEST_SECONDS = 5.0, 30.0
# What Arrow raises on damaged files: names that are not UTF-8 and inconsistent counts are not always ArrowExceptions.
DAMAGE = (OSError, pa.ArrowException, UnicodeError, IndexError, OverflowError)
ENDINGS = (".parquet", ".parq", ".pq")
MAGIC = b"PAR1"
log = logging.getLogger(__name__)


@dataclass(frozen=True, order=True)
class RemoteFile:
    """A file behind a URI."""

    uri: str

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.uri.rsplit("/", 1)[-1]

    def __str__(self) -> str:
        return self.uri


DataFile = Path | RemoteFile


def is_uri(text: str) -> bool:
    """Whether a path names another machine's file."""
    return "://" in text


def path_parts(file: DataFile) -> tuple[str, ...]:
    """The folders and the name of a file."""
    return file.parts if isinstance(file, Path) else tuple(file.uri.split("://", 1)[1].split("/"))


def is_hidden(name: str) -> bool:
    """Whether a name marks what is not data, as Spark says: it begins with . or _, but for a partition folder such as _day=1."""
    return name.startswith(".") or (name.startswith("_") and "=" not in name)


def list_local(text: str) -> list[Path]:
    """List the Parquet files that a file, a folder or a glob names; links are followed, hidden names below it are passed over.

    A file without an ending is taken if it begins as Parquet files do (Hive writes 000000_0).

    Raises:
        InputError: a folder or a link cannot be read, or a path cannot exist.
    """
    try:
        path = Path(text).expanduser()
        if path.is_dir():
            return _walk(str(path), ())
        if path.exists():
            return [path]
        named = set(path.parts)  # a wildcard does not match what is hidden
        found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        found = [
            each for each in found if not any(is_hidden(part) for part in each.parts if part not in named)
        ]
        return [file for each in found for file in (_walk(str(each), ()) if each.is_dir() else [each])]
    except (OSError, RuntimeError, ValueError) as error:
        where = getattr(error, "filename", None) or text
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(
            f"{where}: cannot be read ({reason}); fix or remove it, or name other paths"
        ) from None


def _walk(folder: str, above: tuple[tuple[int, int], ...]) -> list[Path]:
    """The Parquet files at and below a folder. `above`: device and inode of the folders on the way, which a link may lead back to."""
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:
        return []
    files = []
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if is_hidden(entry.name):
                continue
            if entry.is_symlink():
                os.stat(entry.path)  # one that leads nowhere is named
            if entry.is_dir():
                files += _walk(entry.path, (*above, here))
            elif entry.name.lower().endswith(ENDINGS):
                files.append(Path(entry.path))
            elif "." not in entry.name and entry.is_file():
                with open(entry.path, "rb") as file:
                    if file.read(len(MAGIC)) == MAGIC:
                        files.append(Path(entry.path))
    return files


def list_remote(uri: str) -> list[RemoteFile]:
    """List the Parquet files at and below a URI, sorted; hidden names below it are passed over.

    Raises:
        InputError: it cannot be listed.
    """

    def find() -> list[RemoteFile]:
        system, path = file_system(uri)
        info = system.get_file_info(path)
        if info.type == pafs.FileType.File:
            return [RemoteFile(uri)]
        found = system.get_file_info(pafs.FileSelector(path, recursive=True, allow_not_found=True))
        paths = [item.path for item in found if item.type == pafs.FileType.File]
        prefix = uri[: uri.index(path)] if path in uri else uri.partition("://")[0] + "://"
        below = len(path.rstrip("/")) + 1
        seen = [each for each in paths if not any(map(is_hidden, each[below:].split("/")))]
        return sorted(RemoteFile(prefix + each) for each in seen if each.lower().endswith(ENDINGS))

    return retried(find, uri, LIST_ATTEMPTS)


def open_parquet(
    file: DataFile, *, read_dictionary: Sequence[str] = (), pre_buffer: bool = False
) -> pq.ParquetFile:
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
    with _source(file) as source:
        return source.read_at(size, start)


def read_tail(file: DataFile, size: int) -> tuple[int, bytes]:
    """The bytes that a file has, and its last `size` ones, or all."""
    with _source(file) as source:
        whole = source.size()
        start = max(0, whole - size)
        return whole, source.read_at(whole - start, start)


def _source(file: DataFile) -> pa.NativeFile:
    return pa.OSFile(str(file)) if isinstance(file, Path) else _opened(file)


def _opened(file: RemoteFile) -> pa.NativeFile:
    system, path = file_system(file.uri)
    return system.open_input_file(path)


def retried(action: Callable[[], T], what: str, attempts: int, cure: str = CURE) -> T:
    """Run `action` until it succeeds, with pauses that double, at most `attempts` times.

    Raises:
        InputError: naming `what`, the last cause and the cure. Missing files and permissions are not retried.
    """
    pause = FIRST_PAUSE_SECONDS
    for attempt in range(1, attempts + 1):
        try:
            return action()
        except (FileNotFoundError, PermissionError) as error:
            raise InputError(f"{what}: {first_line(error)}; check the path and the permissions") from None
        except DAMAGE as error:
            if attempt == attempts:
                raise InputError(
                    f"{what}: gave up after {attempts} attempts ({first_line(error)}); {cure}"
                ) from None
            log.warning("%s: attempt %d of %d failed (%s)", what, attempt, attempts, first_line(error))
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
    raise AssertionError("attempts is 1 or more")


def file_system(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a URI and the path in it.

    Raises:
        InputError: no client for the URI's scheme is known or installed.
    """
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
