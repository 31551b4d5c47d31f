"""A run's own copy of its schema and vocabularies: written when the run begins, read by all that reads the run.

    RUN/schema.toml  vocabulary/ (with the sightings of ids that have no row yet)  synthetic.json (of generated data)
    RUN/schema_before/  the same of the day before, of a run whose vocabularies have grown with its days

Every checkpoint has the SHA-256 of these files, so that a copy which was changed is refused and not read as the run's.
"""

import hashlib
import shutil
from collections.abc import Mapping, Sequence
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
from mbcnet_rec.checkpoints.manifest import sha256_of

SCHEMA, SYNTHETIC, BEFORE = "schema.toml", "synthetic.json", "schema_before"
COPIED = (SCHEMA, VOCABULARY_FOLDER, SYNTHETIC, BEFORE)  # names in a run folder
HEADER = "Of this run: what its rows mean. Its checkpoints have the SHA-256 of this file and of the vocabularies."


def schema_text(schema: Schema) -> str:
    """What RUN/schema.toml says."""
    return format_schema(schema.standing_alone(), HEADER)


def file_sums(schema: Schema) -> dict[str, str]:
    """Name in a run folder -> SHA-256, of what a run with this schema keeps.

    Raises:
        InputError: a vocabulary cannot be read.
    """
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
    """Write the copy of a schema whose `file_sums` were taken before it was read.

    Raises:
        InputError: a file has changed since.
        OSError: the copy cannot be written.
    """
    folder.mkdir(exist_ok=True)
    (folder / SCHEMA).write_text(schema_text(schema), encoding="utf-8")
    for name, source in _sources(schema).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / name)
    for name, sha256 in sums.items():
        if sha256_of(folder / name) != sha256:
            raise InputError(
                f"{schema.folder}: {name} has changed while this run was starting; start again when it is whole"
            )


def own_schema(folder: Path, run: Mapping[str, Any]) -> Schema | None:
    """The schema of the run in `folder`, where a checkpoint's facts (see `describe_run`) name the files of its copy; None without.

    Raises:
        InputError: a file of the copy is missing, or another than the checkpoint's.
    """
    files = run.get("files")
    if not files:
        return None
    changed = None
    # the day before's: another day has begun with grown vocabularies, and has no checkpoint yet
    for place in (folder, folder / BEFORE) if (folder / BEFORE).is_dir() else (folder,):
        other = next((place / name for name, sha256 in files.items() if sha256_of(place / name) != sha256), None)
        if other is None:
            return load_schema(place / SCHEMA)
        changed = changed or other
    raise InputError(
        f"{changed}: changed since the run was trained (its SHA-256 is not that in the checkpoint); bring the file back"
    )


def are_copied(files: Mapping[str, Any]) -> bool:
    """Whether these may be what `file_sums` has given; the names and values are untrusted input."""
    paths = [PurePosixPath(name).parts for name in files]
    inside = all(parts[:1] in [(name,) for name in COPIED] and ".." not in parts for parts in paths)
    return inside and all(isinstance(sha256, str) for sha256 in files.values())


def other_ids(before: Schema, now: Schema) -> dict[str, str]:
    """Tables of both schemas whose rows belong to other values: table -> why. A vocabulary that has only grown keeps its rows.

    Raises:
        InputError: a vocabulary cannot be read.
    """
    values = [read_vocabularies(schema) for schema in (before, now)]
    names = {table.name for table in before.tables} & {table.name for table in now.tables}
    reasons = {name: _difference((before, now), name, values) for name in sorted(names)}
    return {name: why for name, why in reasons.items() if why}


def rows_begun_anew(before: Schema, now: Schema) -> dict[str, np.ndarray] | None:
    """Field with a vocabulary -> rows that have become another value's, or nobody's; None where the one schema is no growth of the other.

    Raises:
        InputError: a vocabulary cannot be read.
    """
    known, values = (read_vocabularies(each) for each in (before, now))
    day, found = read_growth(before.folder)["day"], {}
    for old, new in zip(before.features, now.features, strict=True):
        if not new.vocabulary:
            continue
        had, has = known[old.vocabulary], values[new.vocabulary]
        if len(has) < len(had) or pt.is_integer(has.type) != pt.is_integer(had.type):
            return None
        try:
            had, has = had.cast(has.type), has[: len(had)]
        except pa.ArrowInvalid:
            return None
        both_free = pc.and_(had.is_null(), has.is_null())
        places = np.flatnonzero(
            ~pc.or_(both_free, pc.fill_null(pc.equal(had, has), False)).to_numpy(zero_copy_only=False)
        )
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
        return "" if _begins_with(new, known) else "another vocabulary"
    return ""


def _begins_with(values: pa.Array, first: pa.Array) -> bool:
    if pt.is_integer(values.type) != pt.is_integer(first.type):
        return False
    try:  # integers of another width are the same values
        return values[: len(first)].cast(first.type).equals(first)
    except pa.ArrowInvalid:
        return False


def _encoding(feature: Feature) -> str:
    if feature.is_cross:
        return f"cross of {' x '.join(feature.of)}"
    return feature.transform if feature.is_bucketised else feature.encoding
