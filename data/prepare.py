"""Public data sets -> Parquet splits and a fitted schema.

    OUT/{train,valid,test}/part-00000.parquet  OUT/schema.toml  OUT/vocabulary/*.parquet  OUT/prepared.json

Only the columns that the shipped schema reads are kept, with those derived here. Everything is written
beside OUT and renamed at the end. The tables are read whole: these data sets are small.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data.errors import InputError
from data.fit import fit_schema
from data.schema import Schema, format_schema, load_schema

SPLITS = ("train", "valid", "test")
SCHEMA_FOLDER = Path(__file__).parent / "schemas"
SUMMARY = "prepared.json"
ROW_GROUP_ROWS = 8_192
MAX_TAGS = 20
SECONDS_PER_HOUR = 3_600
SECONDS_PER_DAY = 86_400
THURSDAY = 3  # 1970-01-01, Monday being 0
WORD = re.compile(r"[^\W_]+")  # letters of any alphabet, and digits
YEAR_IN_TITLE = re.compile(r"\(\d{4}\)\s*$")

Tables = dict[str, pa.Table]


@dataclass(frozen=True)
class _DataSet:
    """Where a data set's rows come from; `derive` turns file name -> table into split -> table."""

    files: tuple[str, ...]
    derive: Callable[[Tables], Tables]


def prepare(
    name: str, src: str | Path, out: str | Path, *, progress: Callable[[int], object] | None = None
) -> Path:
    """Write a public data set as this project reads it, and return `out`.

    If `out` was prepared from the same files and schema already, nothing is written.

    Args:
        name: one of DATA_SETS.
        src: folder with the data set's files.
        out: folder to write.
        progress: called with the number of rows written so far.

    Raises:
        InputError: unknown name, missing or unreadable file, missing column, or `out` holds something else.
    """
    if name not in DATA_SETS:
        raise InputError(f"data set {name!r} is not known; use one of: {', '.join(sorted(DATA_SETS))}")
    data_set, src, out = DATA_SETS[name], Path(src), Path(out)
    schema = load_schema(SCHEMA_FOLDER / f"{name}.toml")
    tables = {file: _read(name, src, file) for file in data_set.files}
    sources = {file: hashlib.sha256((src / file).read_bytes()).hexdigest() for file in data_set.files}
    request = {"name": name, "schema": schema.fingerprint(), "sources": sources}
    if _is_there(out, request):
        return out
    splits = {split: _select(table, schema, name) for split, table in data_set.derive(tables).items()}
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        counts = _write_splits(splits, partial, schema.label, progress or (lambda done: None))
        notes: list[str] = []
        fitted = fit_schema(schema, [partial / "train" / "part-00000.parquet"], partial, notes.append)
        header = f"Fitted on the training split by mbcnet data prepare {name}."
        (partial / "schema.toml").write_text(format_schema(fitted, header), encoding="utf-8")
        summary = request | {"splits": counts, "notes": notes}
        (partial / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        if out.exists():  # an empty folder, see _is_there
            out.rmdir()
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _is_there(out: Path, request: dict[str, Any]) -> bool:
    """Whether `out` holds the result already; False if it is free.

    Raises:
        InputError: it holds something else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        summary = json.loads((out / SUMMARY).read_text(encoding="utf-8"))
        same = all(summary[key] == value for key, value in request.items())
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"{out}: exists and was not written by data prepare; choose another folder, or remove it"
        ) from None
    if not same:
        raise InputError(
            f"{out}: was prepared from other files or with another schema; remove it or choose another folder"
        )
    return True


def _read(name: str, src: Path, file: str) -> pa.Table:
    path = src / file
    if not path.is_file():
        wanted = ", ".join(DATA_SETS[name].files)
        raise InputError(
            f"{path}: no such file; data set {name!r} needs {wanted}: pass their folder as --src"
        )
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"{path}: cannot be read as Parquet ({str(error).splitlines()[0]}); fetch it again"
        ) from None


def _select(table: pa.Table, schema: Schema, name: str) -> pa.Table:
    """Keep what the schema reads, and the time column."""
    columns = list(schema.columns)
    if schema.time_column and schema.time_column not in columns:
        columns.append(schema.time_column)
    for column in columns:
        _column(table, column, name)
    return table.select(columns)


def _column(table: pa.Table, column: str, name: str) -> pa.ChunkedArray:
    if column not in table.column_names:
        raise InputError(
            f"data set {name!r}: column {column!r} is missing; check that --src holds this data set"
        )
    return table[column]


def _write_splits(
    splits: Tables, folder: Path, label: str, progress: Callable[[int], object]
) -> dict[str, Any]:
    done, counts = 0, {}
    for split in SPLITS:
        table = splits[split]
        path = folder / split / "part-00000.parquet"
        path.parent.mkdir()
        pq.write_table(
            table, path, row_group_size=ROW_GROUP_ROWS, compression="zstd", write_page_checksum=True
        )
        counts[split] = {
            "rows": table.num_rows,
            "label_rate": float(table[label].to_numpy().mean()),
        }
        done += table.num_rows
        progress(done)
    return counts


def _as_they_are(tables: Tables) -> Tables:
    return {Path(file).stem: table for file, table in tables.items()}


def _without_valid(tables: Tables) -> Tables:
    """AliExpress' sample has no validation file: every fifth search of the training file becomes it.

    Whole searches, because the rows of one search have one label; spread over the file, because it is
    sorted by label.
    """
    train = tables["train.parquet"]
    searches = _column(train, "search_id", "aliexpress").to_pylist()
    order = {search: place for place, search in enumerate(dict.fromkeys(searches))}
    is_valid = [order[search] % 5 == 4 for search in searches]
    is_train = [not valid for valid in is_valid]
    return {
        "train": train.filter(pa.array(is_train, pa.bool_())),
        "valid": train.filter(pa.array(is_valid, pa.bool_())),
        "test": tables["test.parquet"],
    }


def _ten_rows(tables: Tables) -> Tables:
    """The slots sample is one file of ten rows, which exercises width, not quality.

    Rows 4 and 5 validate and rows 8 and 9 test, so that each split has both labels; the other six train.
    """
    table = tables["all.parquet"]
    return {
        "train": pa.concat_tables([table.slice(0, 4), table.slice(6, 2)]),
        "valid": table.slice(4, 2),
        "test": table.slice(8),
    }


def _movielens(tables: Tables) -> Tables:
    history = _tag_history(tables["tags.parquet"])
    return {split: _derive_movielens(tables[f"{split}.parquet"], history) for split in SPLITS}


def _tag_history(tags: pa.Table) -> dict[int, list[tuple[int, str]]]:
    """Movie -> (moment, tag), oldest first."""
    columns = [_column(tags, column, "movielens").to_pylist() for column in ("timestamp", "movie_id", "tag")]
    history: dict[int, list[tuple[int, str]]] = {}
    for moment, movie, tag in sorted(zip(*columns, strict=True)):
        history.setdefault(movie, []).append((moment, tag.strip().lower()))
    return history


def _derive_movielens(table: pa.Table, history: dict[int, list[tuple[int, str]]]) -> pa.Table:
    timestamp, movie, title = (
        _column(table, column, "movielens") for column in ("timestamp", "movie_id", "title")
    )
    hour = [second % SECONDS_PER_DAY // SECONDS_PER_HOUR for second in timestamp.to_pylist()]
    weekday = [(second // SECONDS_PER_DAY + THURSDAY) % 7 for second in timestamp.to_pylist()]
    words = [WORD.findall(YEAR_IN_TITLE.sub("", text or "").lower()) for text in title.to_pylist()]
    tags = [
        _tags_before(history.get(each, []), moment)
        for each, moment in zip(movie.to_pylist(), timestamp.to_pylist(), strict=True)
    ]
    strings = pa.list_(pa.string())
    for column, values, kind in (
        ("rated_hour", hour, pa.int32()),
        ("rated_weekday", weekday, pa.int32()),
        ("title_words", words, strings),
        ("tags_before", tags, strings),
    ):
        table = table.append_column(column, pa.array(values, kind))
    return table


def _tags_before(history: list[tuple[int, str]], moment: int) -> list[str]:
    """The latest distinct tags that a movie had strictly before a moment, oldest first."""
    distinct = dict.fromkeys(tag for given, tag in history if given < moment)
    return list(distinct)[-MAX_TAGS:]


_THREE_FILES = tuple(f"{split}.parquet" for split in SPLITS)

DATA_SETS = {
    "adult": _DataSet(_THREE_FILES, _as_they_are),
    "criteo": _DataSet(_THREE_FILES, _as_they_are),
    "movielens": _DataSet((*_THREE_FILES, "tags.parquet"), _movielens),
    "taobao_ad": _DataSet(_THREE_FILES, _as_they_are),
    "aliexpress": _DataSet(("train.parquet", "test.parquet"), _without_valid),
    "ali_ccp": _DataSet(_THREE_FILES, _as_they_are),
    "slots": _DataSet(("all.parquet",), _ten_rows),
}
