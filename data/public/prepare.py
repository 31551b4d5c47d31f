"""Public data sets -> Parquet splits and a fitted schema.

    OUT/{train,valid,test}/part-00000.parquet  OUT/schema.toml  OUT/vocabulary/*.parquet  OUT/prepared.json

Only the columns that the shipped schema reads are kept, with those derived here. Downloads are streamed; samples that are Parquet
already are small and read whole.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data.errors import InputError
from data.profile.fit import fit_schema
from data.profile.scan import Progress, naming, unheard
from data.public import click_logs, movielens
from data.public.raw_files import Sources, Splits, digest, find_sources
from data.reading.columns import Place
from data.reading.numbers import read_labels
from data.schema import Schema, format_schema, load_schema
from data.whole_folder import earlier_summary, whole_folder

SCHEMA_FOLDER = Path(__file__).parents[1] / "schemas"
SUMMARY = "prepared.json"
SPLITS: tuple[str, ...] = ("train", "valid", "test")
SMALL_ROW_GROUP = 8_192
LARGE_ROW_GROUP = 65_536


@dataclass(frozen=True)
class DataSet:
    """Where a data set's rows come from."""

    files: tuple[str, ...]  # patterns, see data.public.raw_files.find_sources
    rows: Callable[[Sources], Splits]  # split by split or mixed, each split's rows in order
    row_group_rows: int = SMALL_ROW_GROUP


def prepare(name: str, src: str | Path, out: str | Path, *, progress: Progress = unheard) -> Path:
    """Write one of DATA_SETS, whose files lie in `src`, as this project reads it, and return `out`.

    If `out` was prepared from the same files and schema already, nothing is written. `progress` is told the number of rows so far.
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
        with SplitWriter(folder, schema, data_set.row_group_rows) as writer:
            for split, rows in data_set.rows(sources):
                progress(writer.write(split, rows))
            counts = writer.finish()
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
    """AliExpress' sample has no validation file: every fifth search of the training file becomes it.

    Whole searches, because the rows of one search have one label; spread over the file, because it is
    sorted by label.
    """
    train = _read(sources["train.parquet"][0])
    require_columns("aliexpress", train, ("search_id",))
    searches = train["search_id"].to_pylist()
    order = {search: number for number, search in enumerate(dict.fromkeys(searches))}
    is_valid = pa.array([order[search] % 5 == 4 for search in searches], pa.bool_())
    yield "train", train.filter(pc.invert(is_valid))
    yield "valid", train.filter(is_valid)
    yield "test", _read(sources["test.parquet"][0])


def _slots(sources: Sources) -> Splits:
    """The slots sample is one file of ten rows, which exercises width, not quality.

    Rows 4 and 5 validate and rows 8 and 9 test, so that each split has both labels; the other six train.
    """
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


_THREE_FILES = tuple(f"{split}.parquet" for split in SPLITS)

DATA_SETS = {
    **dict.fromkeys(("adult", "criteo", "taobao_ad", "ali_ccp"), DataSet(_THREE_FILES, _three_files)),
    "movielens": DataSet((*_THREE_FILES, "tags.parquet"), _movielens),
    "aliexpress": DataSet(("train.parquet", "test.parquet"), _aliexpress),
    "slots": DataSet(("all.parquet",), _slots),
    "criteo_kaggle": DataSet(click_logs.KAGGLE_FILES, click_logs.kaggle_rows, LARGE_ROW_GROUP),
    "criteo_1tb": DataSet(click_logs.TERABYTE_FILES, click_logs.terabyte_rows, LARGE_ROW_GROUP),
    "avazu": DataSet(click_logs.AVAZU_FILES, click_logs.avazu_rows, LARGE_ROW_GROUP),
    "movielens_latest": DataSet(movielens.FILES, movielens.rows),
    "taobao_ad_raw": DataSet(click_logs.TAOBAO_FILES, click_logs.taobao_rows, LARGE_ROW_GROUP),
}


class SplitWriter(ExitStack):
    """Writes FOLDER/{train,valid,test}/part-00000.parquet, ... with page checksums; leaving it closes the files.

    Of the rows the schema's columns are kept, and its time column. No more than `row_group_rows` of each split wait in memory, and one
    piece; `file_rows` are the rows of a file.
    """

    def __init__(self, folder: Path, schema: Schema, row_group_rows: int, file_rows: int = 8_000_000) -> None:
        super().__init__()
        self.folder, self.schema, self.row_group_rows = folder, schema, row_group_rows
        self.columns = list(dict.fromkeys(name for name in (*schema.columns, schema.time_column) if name))
        self.file_rows = max(file_rows // row_group_rows, 1) * row_group_rows
        self.waiting: dict[str, pa.Table] = {}
        self.writers: dict[str, pq.ParquetWriter] = {}
        self.rows, self.written, self.ones = (dict.fromkeys(SPLITS, 0) for _ in range(3))

    def write(self, split: str, rows: pa.Table) -> int:
        """Append rows to a split; return the rows of all splits so far; InputError if a column is missing, or a label is not 0 or 1."""
        require_columns(self.schema.name, rows, self.columns)
        rows = rows.select(self.columns)
        place = Place(f"data set {self.schema.name!r}, {split} split", None, self.rows[split])
        for labels in rows[self.schema.label].chunks:
            read_labels(labels, self.schema.label, place)
            place = replace(place, first_row=place.first_row + len(labels))
        self.rows[split] += rows.num_rows
        self.ones[split] += pc.sum(rows[self.schema.label]).as_py() or 0
        waiting = [self.waiting[split]] if split in self.waiting else []
        self.waiting[split] = pa.concat_tables([*waiting, rows])
        self._flush(split, self.row_group_rows)
        return sum(self.rows.values())

    def _flush(self, split: str, least: int) -> None:
        """Write row groups while at least so many rows wait."""
        while len(rows := self.waiting[split]) >= least:
            part, self.waiting[split] = rows.slice(0, self.row_group_rows), rows.slice(self.row_group_rows)
            number, rest = divmod(self.written[split], self.file_rows)
            if rest == 0:
                if split in self.writers:
                    self.writers[split].close()
                path = self.folder / split / f"part-{number:05d}.parquet"
                path.parent.mkdir(exist_ok=True)
                writer = pq.ParquetWriter(path, rows.schema, compression="zstd", write_page_checksum=True)
                self.writers[split] = self.enter_context(writer)
            self.writers[split].write_table(part, row_group_size=self.row_group_rows)
            self.written[split] += len(part)

    def finish(self) -> dict[str, Any]:
        """Write what waits. Returns rows and label rate of each split; InputError if a split has no rows."""
        for split, rows in self.rows.items():
            if not rows:
                total = f"{sum(self.rows.values()):,}"
                raise InputError(
                    f"data set {self.schema.name!r}: the {split} split got no rows of {total}; check that --src holds all of it"
                )
            self._flush(split, 1)
        return {split: {"rows": rows, "label_rate": self.ones[split] / rows} for split, rows in self.rows.items()}


def require_columns(name: str, rows: pa.Table, columns: Sequence[str]) -> None:
    """Check that a data set's file has the columns that it should have; InputError if it lacks one."""
    for column in columns:
        if column not in rows.column_names:
            raise InputError(f"data set {name!r}: column {column!r} is missing; check that --src holds this data set")
