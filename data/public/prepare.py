"""Public data sets -> Parquet splits and a fitted schema.

    OUT/{train,valid,test}/part-00000.parquet  OUT/schema.toml  OUT/vocabulary/*.parquet  OUT/prepared.json

Only the columns that the shipped schema reads are kept, with those derived here. Downloads are streamed; samples that are Parquet
already are small and read whole.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from data.errors import InputError
from data.profile.fit import fit_schema
from data.profile.units import Progress, naming, unheard
from data.public import click_logs, movielens
from data.public.raw_files import Sources, Splits, digest, find_sources
from data.reading.columns import Place
from data.reading.numbers import read_labels
from data.schema import Schema, format_schema, load_schema
from data.whole_folder import earlier_summary, whole_folder

SCHEMA_FOLDER = Path(__file__).parents[1] / "schemas"
SUMMARY = "prepared.json"
SPLIT, SPLITS = "@split", ("train", "valid", "test")
SMALL_ROW_GROUP = 8_192
LARGE_ROW_GROUP = 65_536


@dataclass(frozen=True)
class DataSet:
    """Where a data set's rows come from."""

    files: tuple[str, ...]  # patterns, see data.public.raw_files.find_sources
    rows: Callable[[Sources], Splits]  # split by split or mixed, each split's rows in order
    row_group_rows: int = SMALL_ROW_GROUP


def prepare(name: str, src: str | Path, out: str | Path, *, progress: Progress = unheard) -> Path:
    """Write one of DATA_SETS from `src` as this project reads it, unless `out` was made of the same files and schema; return `out`.

    InputError if the name is not known, a file or column is missing, a split is empty, or `out` holds something else.
    """
    if name not in DATA_SETS:
        raise InputError(f"data set {name!r} is not known; use one of: {', '.join(sorted(DATA_SETS))}")
    data_set, src, out = DATA_SETS[name], Path(src), Path(out)
    schema = load_schema(SCHEMA_FOLDER / f"{name}.toml")
    sources = find_sources(name, src, data_set.files)
    digests = {path.name: digest(path) for files in sources.values() for path in files}
    request = {"name": name, "schema": schema.fingerprint(), "sources": digests}
    earlier = earlier_summary(out, SUMMARY, "prepared data set")
    if earlier is not None:
        if {key: earlier.get(key) for key in request} == request:
            return out
        raise InputError(f"{out}: was prepared from other files or with another schema; remove it or choose another")
    with whole_folder(out) as folder:
        counts = write_splits(folder, schema, data_set.rows(sources), data_set.row_group_rows, progress)
        notes: list[str] = []
        fitted = fit_schema(schema, sorted((folder / "train").glob("*.parquet")), folder, notes.append)
        header = f"Fitted on the training split by mbcnet data prepare {name}."
        (folder / "schema.toml").write_text(format_schema(fitted, header), encoding="utf-8")
        summary = request | {"splits": counts, "notes": notes}
        (folder / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return out


def _read(path: Path) -> pa.Table:
    with naming(path):
        return pq.read_table(path)


def _three_files(sources: Sources) -> Splits:
    for split in SPLITS:
        yield split, _read(sources[f"{split}.parquet"][0])


def _aliexpress(sources: Sources) -> Splits:
    """Every fifth search of the training file validates: whole searches, whose rows have one label, spread over a file sorted by label."""
    train = _read(sources["train.parquet"][0])
    require_columns("aliexpress", train, ("search_id",))
    searches = train["search_id"].to_pylist()
    order = {search: number for number, search in enumerate(dict.fromkeys(searches))}
    is_valid = pa.array([order[search] % 5 == 4 for search in searches], pa.bool_())
    yield "train", train.filter(pc.invert(is_valid))
    yield "valid", train.filter(is_valid)
    yield "test", _read(sources["test.parquet"][0])


def _slots(sources: Sources) -> Splits:
    """One file of ten rows, which exercises width, not quality: rows 4 and 5 validate, 8 and 9 test, both labels each; six train."""
    table = _read(sources["all.parquet"][0])
    yield "train", pa.concat_tables([table.slice(0, 4), table.slice(6, 2)])
    yield "valid", table.slice(4, 2)
    yield "test", table.slice(8)


def _movielens(sources: Sources) -> Splits:
    tags = _read(sources["tags.parquet"][0])
    require_columns("movielens", tags, ("timestamp", "movie_id", "tag"))
    history = movielens.tag_history(tags)
    for split, table in _three_files(sources):
        require_columns("movielens", table, ("timestamp", "movie_id", "title"))
        yield split, movielens.derive(table, history)


def _movielens_history(sources: Sources) -> Splits:
    """Train, validation and test rows follow each other in time, so a history of the later ones holds the earlier ones' labels."""
    rated: movielens.Rated = {}
    for split, table in _movielens(sources):
        require_columns("movielens_history", table, ("user_id", "label"))
        yield split, movielens.with_history(table, rated)


_THREE_FILES = tuple(f"{split}.parquet" for split in SPLITS)

DATA_SETS = {
    **dict.fromkeys(("adult", "criteo", "taobao_ad", "ali_ccp", "ali_ccp_tasks"), DataSet(_THREE_FILES, _three_files)),
    "movielens": DataSet((*_THREE_FILES, "tags.parquet"), _movielens),
    "movielens_history": DataSet((*_THREE_FILES, "tags.parquet"), _movielens_history),
    "aliexpress": DataSet(("train.parquet", "test.parquet"), _aliexpress),
    "slots": DataSet(("all.parquet",), _slots),
    "criteo_kaggle": DataSet(tuple(click_logs.CRITEO["kaggle_files"]), click_logs.kaggle_rows, LARGE_ROW_GROUP),
    "criteo_1tb": DataSet(tuple(click_logs.CRITEO["terabyte_files"]), click_logs.terabyte_rows, LARGE_ROW_GROUP),
    "avazu": DataSet(tuple(click_logs.AVAZU["files"]), click_logs.avazu_rows, LARGE_ROW_GROUP),
    "movielens_latest": DataSet(movielens.FILES, movielens.rows),
    "taobao_ad_raw": DataSet(tuple(click_logs.TAOBAO["files"]), click_logs.taobao_rows, LARGE_ROW_GROUP),
}


def write_splits(
    folder: Path, schema: Schema, splits: Splits, row_group_rows: int, progress: Progress, file_rows: int = 8_000_000
) -> dict[str, Any]:
    """Write the schema's columns and time as FOLDER/{train,valid,test}/part-00000.parquet, ...; return each split's rows and label rate.

    About a row group of each split waits in memory. InputError if a column is missing, a label is not 0 or 1, or a split has no rows.
    """
    columns = list(dict.fromkeys(name for name in (*schema.columns, schema.time_column) if name))
    rows, ones = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)

    def checked() -> Iterator[pa.RecordBatch]:
        for split, piece in splits:
            require_columns(schema.name, piece, columns)
            piece = piece.select(columns)
            for name in schema.labels:
                start = rows[split]
                for labels in piece[name].chunks:
                    place = Place(f"data set {schema.name!r}, {split} split", None, start)
                    found = read_labels(labels, name, place, nulls=bool(schema.tasks))
                    ones[split] += int(np.nansum(found)) if name == schema.label else 0
                    start += len(labels)
            rows[split] += len(piece)
            progress(sum(rows.values()))
            yield from piece.append_column(SPLIT, pa.repeat(split, len(piece))).to_batches()

    batches = checked()
    form = ds.ParquetFileFormat()
    if first := next(batches, None):
        ds.write_dataset(
            chain([first], batches), folder, schema=first.schema, format=form, basename_template="part-{i}.parquet",
            file_options=form.make_write_options(compression="zstd", write_page_checksum=True),
            partitioning=ds.partitioning(pa.schema([(SPLIT, pa.string())])), existing_data_behavior="overwrite_or_ignore",
            min_rows_per_group=row_group_rows, max_rows_per_group=row_group_rows,
            max_rows_per_file=max(file_rows // row_group_rows, 1) * row_group_rows, use_threads=False, preserve_order=True,
        )  # fmt: skip
    for path in folder.glob("*/part-*.parquet"):
        path.rename(path.with_stem(f"part-{int(path.stem[5:]):05d}"))
    if empty := [split for split, count in rows.items() if not count]:
        total = f"{sum(rows.values()):,}"
        raise InputError(
            f"data set {schema.name!r}: the {empty[0]} split got no rows of {total}; check that --src holds all of it"
        )
    return {split: {"rows": count, "label_rate": ones[split] / count} for split, count in rows.items()}


def require_columns(name: str, rows: pa.Table, columns: Sequence[str]) -> None:
    """Check that a data set's file has the columns that it should have; InputError if it lacks one."""
    for column in columns:
        if column not in rows.column_names:
            raise InputError(f"data set {name!r}: column {column!r} is missing; check that --src holds this data set")
