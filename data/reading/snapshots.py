"""One version of a Delta or Iceberg table as the Parquet files that it consists of: `delta://TABLE@VERSION`, `iceberg://METADATA.json@SNAPSHOT`.

The files of a version never change, so a run that names one reads the same rows after the table has moved on. Without a version the newest
counts. `delta://TABLE@VERSION/ds=2024-05-01` names the files below a folder of it.
"""

import importlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from data.errors import InputError, first_line
from data.reading.storage import DataFile, RemoteFile, local_path

TABLE = re.compile(r"(?P<kind>delta|iceberg)://(?P<place>.+?)(?:@(?P<version>\d+)(?:/(?P<below>.*))?)?")
FIELD_ID = b"PARQUET:field_id"


class Snapshot(NamedTuple):
    """The files of a version."""

    name: str  # with the version
    version: int
    files: list[DataFile]
    schema: pa.Schema

    @property
    def field_ids(self) -> dict[str, bytes]:
        """The number by which Iceberg's files have each column, whatever they call it; none in a Delta table."""
        return {field.name: field.metadata[FIELD_ID] for field in self.schema if FIELD_ID in (field.metadata or {})}


def is_snapshot(text: str) -> bool:
    """Whether a path names a table of these formats."""
    return TABLE.fullmatch(text) is not None


def open_snapshot(text: str) -> Snapshot:
    """Find the files of a version.

    Raises:
        InputError: the library is not installed, there is no such table or version, or its files alone do not tell its rows.
    """
    part = TABLE.fullmatch(text)
    assert part is not None
    kind, place = part["kind"], part["place"]
    version = None if part["version"] is None else int(part["version"])
    library = {"delta": "deltalake", "iceberg": "pyiceberg"}[kind]
    try:
        importlib.import_module(library)
    except ImportError:
        raise InputError(f'{text}: {library} is not installed; pip install "mbcnet-rec[{kind}]"') from None
    try:
        found = (_delta if kind == "delta" else _iceberg)(text, place, version)
    except InputError:
        raise
    except Exception as error:  # their classes have no common one
        raise InputError(
            f"{text}: cannot be read as a version of a {kind.title()} table ({first_line(error)}); check the path and the version"
        ) from None
    pinned = f"{kind}://{place}@{found.version}"
    if part["below"]:
        folder = f"/{part['below'].strip('/')}/"
        found = found._replace(files=[file for file in found.files if folder in str(file)])
        pinned += folder.rstrip("/")
    if not found.files:
        raise InputError(f"{text}: no Parquet file there; check the version and the folder")
    return found._replace(name=pinned, files=sorted(found.files, key=str))


def pinned_paths(paths: Sequence[str], before: Sequence[str] = ()) -> tuple[str, ...]:
    """Paths with the version of each table: as in the paths of `before`, or else the newest."""
    return tuple(
        next((each for each in map(str, before) if each.startswith(f"{path}@")), None) or open_snapshot(path).name
        if (part := TABLE.fullmatch(path)) and part["version"] is None
        else path
        for path in paths
    )


def _delta(text: str, place: str, version: int | None) -> Snapshot:
    deltalake = importlib.import_module("deltalake")
    insecure = os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")
    path = local_path(place)
    table = deltalake.DeltaTable(
        str(path or place), version=version, storage_options={"allow_http": "true"} if insecure else None
    )
    if table.metadata().configuration.get("delta.columnMapping.mode", "none") != "none":
        raise InputError(
            f"{text}: maps its columns to other names in its files (delta.columnMapping.mode), which is not read; write the table anew without it"
        )
    try:
        has_deleted = "deletionVectors" in (table.protocol().reader_features or ()) and any(
            batch.num_rows for batch in table.deletion_vectors()
        )
    except deltalake.exceptions.DeltaError:
        has_deleted = True
    if has_deleted:
        raise InputError(
            f"{text}: has rows that are deleted by deletion vectors and still lie in its files; run REORG TABLE ... APPLY (PURGE) on it and name "
            "the version that comes of it"
        )
    return Snapshot("", table.version(), _files(table.file_uris()), pa.schema(table.schema().to_arrow()))


def _iceberg(text: str, place: str, version: int | None) -> Snapshot:
    if place.endswith(".json"):
        table = importlib.import_module("pyiceberg.table").StaticTable.from_metadata(place)
    else:
        catalog, _, name = place.partition("/")
        table = importlib.import_module("pyiceberg.catalog").load_catalog(catalog).load_table(name)
    newest: Any = table.current_snapshot()
    if newest is None:
        raise InputError(f"{text}: has no snapshot, so no rows; write some")
    scan = table.scan(snapshot_id=newest.snapshot_id if version is None else version)
    tasks = list(scan.plan_files())
    if any(task.delete_files for task in tasks):
        raise InputError(
            f"{text}: has rows that are deleted by delete files and still lie in its data files; compact the table (rewrite_data_files) and "
            "name the snapshot that comes of it"
        )
    arrow = importlib.import_module("pyiceberg.io.pyarrow").schema_to_pyarrow(scan.projection())
    return Snapshot("", scan.snapshot().snapshot_id, _files(task.file.file_path for task in tasks), arrow)


def _files(uris: Any) -> list[DataFile]:
    return [RemoteFile(uri) if (path := local_path(uri)) is None else Path(path) for uri in uris]
