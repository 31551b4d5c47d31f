"""A run's own copy of its schema and vocabularies: written when the run begins, read by all that reads the run.

    RUN/schema.toml  vocabulary/ (with the sightings of ids that have no row yet)  synthetic.json (of generated data)

Every checkpoint has these files, too, as they were for its rows, and is read with them where those in the run folder are others.
Checkpoints of earlier versions have their SHA-256 alone, so there a copy which was changed is refused; the files of the day before
may lie in RUN/schema_before/.
"""

import atexit
import hashlib
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types as pt

from data.errors import InputError
from data.profile.fit import GROWTH, WAITING
from data.profile.grow import given_rows, read_growth
from data.reading.keys import read_vocabularies
from data.schema import Feature, Schema, format_schema, load_schema
from data.schema.feature import FIRST_VOCABULARY_ROW, VOCABULARY_FOLDER
from mbcnet_rec.checkpoints.manifest import Manifest, check_file, sha256_of
from mbcnet_rec.checkpoints.run_folder import storage_of, train_config_of
from mbcnet_rec.checkpoints.storage import CheckpointStorage

SCHEMA, SYNTHETIC, BEFORE = "schema.toml", "synthetic.json", "schema_before"
COPIED = (SCHEMA, VOCABULARY_FOLDER, SYNTHETIC, BEFORE)  # names in a run folder
HEADER = "Of this run: what its rows mean. Its checkpoints have the SHA-256 of this file and of the vocabularies."  # as earlier versions wrote


class OtherCopyWarning(UserWarning):
    """The run folder has other files than a checkpoint, which is read with its own."""


def schema_text(schema: Schema) -> str:
    """What RUN/schema.toml says."""
    return format_schema(schema.standing_alone(), HEADER)


def file_sums(schema: Schema) -> dict[str, str]:
    """Name in a run folder -> SHA-256, of what a run with this schema keeps; InputError if a vocabulary cannot be read."""
    text = hashlib.sha256(schema_text(schema).encode()).hexdigest()
    return {SCHEMA: text} | {name: sha256_of(path) for name, path in _sources(schema).items()}


def _sources(schema: Schema) -> dict[str, Path]:
    """Name in a run folder -> the file that is copied there."""
    found = {
        schema.own_vocabularies[feature.name]: schema.folder / feature.vocabulary
        for feature in schema.features
        if feature.vocabulary
    }
    waiting = (f"{WAITING}/{Path(name).name}" for name in dict.fromkeys(found))
    return found | {name: path for name in (*waiting, GROWTH, SYNTHETIC) if (path := schema.folder / name).is_file()}


def write_copy(schema: Schema, folder: Path, sums: Mapping[str, str]) -> None:
    """Copy a schema whose `file_sums` were taken before it was read; InputError if a file has changed since, OSError if it cannot be written."""
    folder.mkdir(exist_ok=True)
    (folder / SCHEMA).write_text(schema_text(schema), encoding="utf-8")
    if not _first_changed(schema.folder, {SCHEMA: sums[SCHEMA]}):  # a run's own, which another version may have written
        shutil.copyfile(schema.folder / SCHEMA, folder / SCHEMA)
    for name, source in _sources(schema).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / name)
    for name, sha256 in sums.items():
        if sha256_of(folder / name) != sha256:
            raise InputError(
                f"{schema.folder}: {name} has changed while this run was starting; start again when it is whole"
            )


def saved_run(manifest: Manifest, where: object) -> dict[str, Any]:
    """The facts about its run that the checkpoint at `where` stores; InputError if they are missing or malformed."""
    run = manifest.extra.get("run", {})
    parts = ("column_shards", "zch_buckets", "config", "versions", "files")
    if isinstance(run, dict) and all(isinstance(run.get(key, {}), dict) for key in parts):
        counts = [*run.get("column_shards", {}).values(), *run.get("zch_buckets", {}).values()]
        files, held = run.get("files", {}), {name: sha256 for name, (_, sha256) in manifest.copies.items()}
        if all(type(count) is int for count in counts) and _are_copied(files) and held in ({}, files):
            return run
    raise InputError(f"{where}: does not say which run wrote it; use another checkpoint")


def own_schema(folder: Path, storage: CheckpointStorage, step: int | None) -> Schema | None:
    """The schema of a run's checkpoint, from the run folder where its files are the same; None without one, or of versions without a copy.

    Its own copy lies in a folder that goes with this process. InputError if a file is missing or damaged, or the folder's is another.
    """
    if step is None:
        return None
    manifest = storage.manifest(step)
    if not (files := saved_run(manifest, folder).get("files")):
        return None
    changed = _first_changed(folder, files)
    if not changed:
        return load_schema(folder / SCHEMA)
    if manifest.copies:
        note = f"{changed}: is not that of the checkpoint of step {step}, whose own is read"
        warnings.warn(note, OtherCopyWarning, stacklevel=2)
        return load_schema(_fetched_copy(storage, step, manifest) / SCHEMA)
    if not _first_changed(folder / BEFORE, files):
        return load_schema(folder / BEFORE / SCHEMA)
    raise InputError(
        f"{changed}: changed since the run was trained (its SHA-256 is not that in the checkpoint), or gone; bring the file back"
    )


def newest_schema(folder: Path) -> Schema:
    """The schema of the newest checkpoint of the run in a folder; where there is none, that which lies there. InputError as `own_schema`."""
    train = train_config_of(folder)
    storage = train and storage_of(train, folder)
    own = storage and own_schema(folder, storage, max(storage.steps(), default=None))
    return own or load_schema(folder / SCHEMA)


def _first_changed(folder: Path, files: Mapping[str, str]) -> Path | None:
    """The first of these files that is not there with this sum."""
    paths = ((folder / name, sha256) for name, sha256 in files.items())
    return next((path for path, sha256 in paths if not path.is_file() or sha256_of(path) != sha256), None)


def _fetched_copy(storage: CheckpointStorage, step: int, manifest: Manifest) -> Path:
    """The files of a checkpoint's copy at their names, in a folder that goes with this process."""
    place = Path(tempfile.mkdtemp(prefix="mbcnet-schema-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    with storage.fetched(step, tensors=False) as saved:
        for name, (file, sha256) in manifest.copies.items():
            check_file(saved / file, sha256, name)
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(saved / file, place / name)
    return place


def _are_copied(files: Mapping[str, Any]) -> bool:
    """Whether these may be what `file_sums` has given; the names and values are untrusted input."""
    paths = [PurePosixPath(name).parts for name in files]
    inside = all(parts[:1] in [(name,) for name in COPIED] and ".." not in parts for parts in paths)
    return inside and all(isinstance(sha256, str) for sha256 in files.values())


def other_ids(before: Schema, now: Schema) -> dict[str, str]:
    """Tables of both schemas whose rows belong to other values, not only to more, and why; InputError if a vocabulary cannot be read."""
    values = [read_vocabularies(schema) for schema in (before, now)]
    names = {table.name for table in before.tables} & {table.name for table in now.tables}
    reasons = {name: _difference((before, now), name, values) for name in sorted(names)}
    return {name: why for name, why in reasons.items() if why}


def rows_begun_anew(before: Schema, now: Schema) -> dict[str, np.ndarray] | None:
    """Field -> rows of its vocabulary that are another value's or nobody's now; None if this is no growth. InputError if one cannot be read."""
    known, values = (read_vocabularies(each) for each in (before, now))
    day, found = read_growth(before.folder)["day"], {}
    for old, new in zip(before.features, now.features, strict=True):
        if not new.vocabulary:
            continue
        has = values[new.vocabulary]
        had = _of_type(known[old.vocabulary], has.type)
        if had is None or len(has) < len(had):
            return None
        has = has[: len(had)]
        both_free = pc.and_(had.is_null(), has.is_null())
        is_same = pc.or_(both_free, pc.fill_null(pc.equal(had, has), False))
        places = np.flatnonzero(~is_same.to_numpy(zero_copy_only=False))
        if len(places) and not (given_rows(now.folder / new.vocabulary)[places] > day).all():
            return None
        found[new.name] = places + FIRST_VOCABULARY_ROW
    return found


def _difference(schemas: Sequence[Schema], table: str, vocabularies: Sequence[Mapping[str, pa.Array]]) -> str:
    """Why the rows of a table are of other values in the second schema than in the first, or an empty string."""
    fields = [[each for each in schema.features if each.is_sparse and each.table_name == table] for schema in schemas]
    first, other = (of_table[0] for of_table in fields)
    if _encoding(first) != _encoding(other):
        return f"encoding {_encoding(first)} -> {_encoding(other)}"
    types = [{each.type for each in of_table} for of_table in fields]
    if "" not in types[0] | types[1] and types[0] != types[1]:
        return f"ids are {'/'.join(sorted(types[0]))} there, {'/'.join(sorted(types[1]))} here"
    if first.is_bucketised:
        return "" if first.boundaries == other.boundaries else "other boundaries"
    if first.is_cross:  # a number's buckets, or text in place of integers, are other values
        whole = [{each.name: each for each in schema.features} for schema in schemas]
        for name in first.of:
            (was, now) = (fields[name] for fields in whole)
            if was.boundaries != now.boundaries or (was.type and now.type and was.type != now.type):
                return f"field {name!r}, which it combines, has other boundaries or ids of another type"
    modulo = first.is_hashed or "modulo" in (first.on_invalid, other.on_invalid)
    rows = [schema.table_of[of_table[0].name].num_embeddings for schema, of_table in zip(schemas, fields, strict=True)]
    if modulo and rows[0] != rows[1]:
        return f"num_embeddings {rows[0]:,} -> {rows[1]:,}, which divides the ids"
    if first.vocabulary and other.vocabulary:
        known, new = vocabularies[0][first.vocabulary], vocabularies[1][other.vocabulary]
        begins = _of_type(new[: len(known)], known.type)
        return "" if begins is not None and begins.equals(known) else "another vocabulary"
    return ""


def _of_type(values: pa.Array, kind: pa.DataType) -> pa.Array | None:
    """Values of a vocabulary as another one's type; None where they can be none of its: integers of another width are the same values."""
    with suppress(pa.ArrowInvalid):
        return values.cast(kind) if pt.is_integer(values.type) == pt.is_integer(kind) else None
    return None


def _encoding(feature: Feature) -> str:
    if feature.is_cross:
        return f"cross of {' x '.join(feature.of)}"
    return feature.transform if feature.is_bucketised else feature.encoding
