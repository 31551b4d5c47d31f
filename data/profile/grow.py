"""A fitted schema after another day's files: values that have been seen often enough get a row, values long unseen lose theirs, no row moves.

    vocabulary/TABLE.parquet          value (null: a free row), since, seen: the growths that gave the row away, and that have seen its value last
    vocabulary/waiting/TABLE.parquet  value, count, seen: values without a row
    vocabulary/growth.json            day: the growths so far, files: the marks of all that was counted, tables: what the last one has changed,
                                      waiting: of a fit, the names in waiting/ (a table without rare values has none yet)

One process counts each file once, whoever trains on it: the rows depend on the files alone.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import types as pt

from data.engine import HERE
from data.errors import InputError, first_line
from data.profile.fit import GROWTH, WAITING, measure, write_rows
from data.profile.units import Progress, Work, results_folder, unheard
from data.profile.values import BY_COUNT, merged
from data.reading.column_types import check_columns
from data.reading.files import column_sets
from data.reading.fingerprint import mark_files
from data.reading.keys import SINCE, read_vocabularies
from data.reading.storage import LIST_ATTEMPTS, DataFile
from data.schema import Feature, Schema, format_schema, parse_schema, schema_to_toml
from data.schema.feature import FIRST_VOCABULARY_ROW, FIT, VOCABULARY_FOLDER
from data.whole_folder import whole_folder

SEEN = "seen"
Changes = dict[str, int]  # rows, admitted, expired, free, waiting


def read_growth(folder: Path) -> dict[str, Any]:
    """What growth.json of a fitted schema's folder says; of a schema without, that it has never grown. InputError if it is damaged."""
    nothing = {"day": 0, "files": [], "tables": {}, "waiting": []}
    if not (folder / GROWTH).is_file():
        return nothing
    try:
        found = nothing | json.loads((folder / GROWTH).read_text(encoding="utf-8"))
        found["day"] = int(found["day"])
    except (ValueError, TypeError):
        raise InputError(f"{folder / GROWTH}: is damaged; bring the fitted folder back") from None
    return found


def grow_fitted(
    schema: Schema, files: Sequence[DataFile], out: Path, progress: Progress = unheard
) -> dict[str, Changes]:
    """Count files, which nobody has counted before, and write the grown schema to OUT, which may be the folder that the schema is in.

    Returns what has changed of each table with a vocabulary, and nothing where all files were counted before. InputError if only some were,
    a file is damaged, `out` holds something else, the schema is not fitted, or its vocabularies are not beside it.
    """
    schema.require_fitted()
    state, marks = read_growth(schema.folder), mark_files(files)
    counted = {tuple(mark[1:]) for mark in state["files"]}
    twice = [mark for mark in marks if tuple(mark[1:]) in counted]
    if len(twice) == len(marks):
        return {}
    if twice:
        raise InputError(
            f"{twice[0][0]}: was counted before ({len(twice)} of {len(files)} files, by size and SHA-256); name the new files"
        )
    held = {path.name for path in out.iterdir()} if out.is_dir() else {""} if out.exists() else set()
    if held and (held - {"schema.toml", VOCABULARY_FOLDER} or out.resolve() != schema.folder.resolve()):
        raise InputError(f"{out}: holds something else than the fit that grows; name a new folder by --out")
    for arrow_schema, file in column_sets(files, LIST_ATTEMPTS).items():
        check_columns(arrow_schema, schema, str(file), has_label=False)
    values = read_vocabularies(schema)
    fields = [
        dataclasses.replace(each, type="integer" if pt.is_integer(values[each.vocabulary].type) else "text")
        for each in schema.features
        if each.vocabulary
    ]
    if not fields:
        raise InputError(
            f"schema {schema.name!r}: no field has a vocabulary, so nothing grows; a hash or zch table needs no growth"
        )
    top, changes, day = schema_to_toml(schema.standing_alone()), {}, state["day"] + 1
    with whole_folder(out) as folder:
        for table, found in _counted(schema, fields, files, folder, progress).items():
            users = [each for each in fields if each.table_name == table]
            name, path = schema.own_vocabularies[users[0].name], schema.folder / users[0].vocabulary
            waiting = schema.folder / WAITING / Path(name).name
            rows = {"value": values[users[0].vocabulary]} | {name: given_rows(path, name) for name in (SINCE, SEEN)}
            there = state["day"] or waiting.name in state["waiting"] or waiting.is_file()  # a growth always writes it
            sightings = _read(waiting) if there else None
            grown, left, changes[table] = _grown(pa.table(rows), sightings, found, users, day)
            write_rows(folder / name, [grown])
            write_rows(folder / WAITING / Path(name).name, [left])
            sizes = top["tables"][table] if users[0].table else top["fields"][users[0].name]
            sizes["num_embeddings"] = max(sizes["num_embeddings"], changes[table]["rows"])
        grown_files = {"day": day, "files": [*state["files"], *marks], "tables": changes}
        (folder / GROWTH).write_text(json.dumps(grown_files), encoding="utf-8")
        header = f"Fitted by mbcnet schema fit, and grown {day} times."
        text = format_schema(parse_schema(top, f"growth of schema {schema.name!r}", folder), header)
        (folder / "schema.toml").write_text(text, encoding="utf-8")
    return changes


def _counted(
    schema: Schema, fields: Sequence[Feature], files: Sequence[DataFile], folder: Path, progress: Progress
) -> dict[str, pa.Table]:
    """How often each value of a table occurs in the files, by table."""
    waiting = [dataclasses.replace(each, vocabulary=FIT) for each in fields]
    nothing = {each.table_name: pa.string() if each.type == "text" else pa.int64() for each in fields}
    with results_folder(folder / "fit", HERE) as results:
        found = merged(measure(waiting, files, results, Work(progress=progress)).merges)
    counts = {}
    for name, kind in nothing.items():
        runs = found.get(name) or [pa.table({"value": pa.array([], kind), "count": pa.array([], pa.int64())})]
        kind = runs[0]["value"].type if kind != pa.string() else kind
        counts[name] = pa.concat_tables(runs).cast(pa.schema([("value", kind), ("count", pa.int64())]))
    return counts


def growth_lines(changes: Mapping[str, Changes]) -> list[str]:
    """What a growth has made of each table's rows, in words."""
    return [
        f"table {name}: {', '.join(f'{count:,} {what}' for what, count in each.items())}"
        for name, each in changes.items()
    ]


def _read(path: Path) -> pa.Table:
    try:
        return pq.read_table(path, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"{path}: cannot be read ({first_line(error)}); bring it back, or grow what the run has: mbcnet schema fit --grow RUN"
        ) from None


def given_rows(path: Path, column: str = SINCE) -> np.ndarray:
    """The growth that gave each row of a vocabulary's file to its value, or to nobody; 0: the fit itself. Or another of its notes."""
    kept = _read(path)
    return kept[column].to_numpy() if column in kept.column_names else np.zeros(len(kept), np.int32)


def _grown(
    known: pa.Table, sightings: pa.Table | None, found: pa.Table, users: Sequence[Feature], day: int
) -> tuple[pa.Table, pa.Table, Changes]:
    """A vocabulary and the values that wait for a row, after a day with the counts `found`."""
    waiting: pa.Table = found[:0].append_column(SEEN, pa.array([], pa.int32())) if sightings is None else sightings
    values, waits, today = _of_one_type([known["value"], waiting["value"], found["value"]], users[0])
    is_known = pc.is_in(today, values)
    since, seen = (known[name].to_numpy().copy() for name in (SINCE, SEEN))
    seen[pc.is_in(values, today.filter(is_known)).to_numpy(zero_copy_only=False)] = day
    kept_for = [each.expire_after for each in users]
    oldest = day - max(kept_for) if all(kept_for) else -1  # the last growth that is too long ago
    expired = values.is_valid().to_numpy(zero_copy_only=False) & (seen <= oldest)
    values, since[expired] = pc.if_else(pa.array(expired), pa.scalar(None, values.type), values), day

    new = found.set_column(0, "value", today).filter(pc.invert(is_known))
    new = new.append_column(SEEN, pa.array(np.full(len(new), day, np.int32)))
    waiting = pa.concat_tables([waiting.set_column(0, "value", waits), new]).group_by("value")
    waiting = waiting.aggregate([("count", "sum"), (SEEN, "max")]).rename_columns(["value", "count", SEEN])
    often = waiting.filter(pc.field("count") >= min(each.min_count for each in users))
    admitted = often.sort_by(BY_COUNT)["value"].combine_chunks()
    waiting = waiting.filter((pc.field("count") < min(each.min_count for each in users)) & (pc.field(SEEN) > oldest))

    free = np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[: len(admitted)]
    mask = np.zeros(len(values), bool)
    mask[free], since[free], seen[free] = True, day, day
    values = pc.replace_with_mask(values, pa.array(mask), admitted[: len(free)])
    added = len(admitted) - len(free)
    values = pa.concat_arrays([values, admitted[len(free) :]])
    notes = {name: np.append(old, np.full(added, day, np.int32)) for name, old in ((SINCE, since), (SEEN, seen))}
    changes = {
        "rows": len(values) + FIRST_VOCABULARY_ROW,
        "admitted": len(admitted),
        "expired": int(expired.sum()),
        "free": values.null_count,
        "waiting": len(waiting),
    }
    return pa.table({"value": values, **notes}), waiting.sort_by("value"), changes


def _of_one_type(columns: Sequence[pa.ChunkedArray], field: Feature) -> list[pa.Array]:
    kinds = [each.type for each in columns]
    kind = kinds[0] if field.type == "text" else pa.uint64() if pa.uint64() in kinds else pa.int64()
    try:
        return [each.cast(kind).combine_chunks() for each in columns]
    except pa.ArrowInvalid:
        raise InputError(
            f"field {field.name!r}: some ids are below 0 and some are 2^63 or more, which no type of integers holds: fit anew with "
            'type = "text" for the field'
        ) from None
