"""Measure what a schema leaves to "fit", on the training split only: vocabularies, mean and std, boundaries.

One pass over the files, in record batches; nulls are ignored. Fields that share a table share one
vocabulary, counted over all of them. With min_count = 1 every training value has a row of its own, so row 1
(out of vocabulary) is looked up in validation and serving but never trained: use min_count = 2 or more
where new values are to be expected.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data.errors import InputError
from data.profile.check import unreadable
from data.profile.scan import LARGEST_FLOAT32, EvenSample, Progress, naming, unheard
from data.reading.column_types import check_columns, is_list, pinned
from data.reading.columns import Place
from data.reading.files import column_sets
from data.reading.fingerprint import mark_files
from data.reading.ids import decoded, list_offsets, read_ids
from data.reading.row_groups import stored_rows
from data.reading.storage import DAMAGE, LIST_ATTEMPTS, DataFile, open_parquet
from data.schema import Feature, Schema, format_schema, load_schema, parse_schema, schema_to_toml
from data.schema.feature import FIRST_VOCABULARY_ROW, FIT, VOCABULARY_FOLDER
from data.whole_folder import whole_folder

# Beside the vocabularies: the sightings of values that have no row yet (value, count, and the growth that has seen it last), and what was counted
WAITING, GROWTH = f"{VOCABULARY_FOLDER}/waiting", f"{VOCABULARY_FOLDER}/growth.json"

BATCH_ROWS = 65_536
MAX_SAMPLE = 2_000_000  # numbers of a field that quantiles are taken of

Say = Callable[[str], object]  # takes one line for the user


@dataclass
class Counts:
    """How often each value of a field occurs; `kind`: the type of none at all; `limit`: distinct values held before they are merged."""

    field: str
    kind: pa.DataType
    limit: int = 1_000_000
    pending: list[pa.Table] = dataclasses.field(default_factory=list)
    pending_rows: int = 0
    merged_rows: int = 0

    def add(self, values: pa.Array) -> None:
        """Count ids (integers or text); nulls are ignored."""
        counted = decoded(values).drop_null().value_counts()
        found = counted.field(0)
        if pa.types.is_integer(found.type):
            found = found.cast(pa.uint64() if len(found) and pc.max(found).as_py() >= 2**63 else pa.int64())
        self.pending.append(pa.table({"value": found, "count": counted.field(1)}))
        self.pending_rows += len(found)
        # As much new as old: the work then grows with the values and not with the values times the number of merges.
        if self.pending_rows > max(self.limit, self.merged_rows):
            self.pending = [self.merged()]
            self.pending_rows, self.merged_rows = 0, self.pending[0].num_rows

    def merged(self) -> pa.Table:
        """All values so far with their counts; InputError if no type of integers holds them all."""
        if any(table["value"].type == pa.uint64() for table in self.pending):  # Arrow joins it with no other
            number = pa.schema([("value", pa.uint64()), ("count", pa.int64())])
            try:
                self.pending = [table.cast(number) for table in self.pending]
            except pa.ArrowInvalid:
                raise InputError(
                    f"field {self.field!r}: some ids are below 0 and some are 2^63 or more, which no type of integers holds: "
                    'set type = "text" for the field'
                ) from None
        nothing = pa.table({"value": pa.array([], self.kind), "count": pa.array([], pa.int64())})
        table = pa.concat_tables(self.pending or [nothing], promote_options="permissive")
        return table.group_by("value").aggregate([("count", "sum")]).rename_columns({"count_sum": "count"})

    def vocabulary(self, min_count: int) -> pa.Array:
        """Values seen at least `min_count` times, the most frequent first, equal ones by value."""
        return often(self.merged(), min_count)


def often(counted: pa.Table, min_count: int) -> pa.Array:
    """The values of a table of values and counts that occur at least `min_count` times, the most frequent first, equal ones by value."""
    table = counted.filter(pc.field("count") >= min_count)
    return table.sort_by([("count", "descending"), ("value", "ascending")])["value"].combine_chunks()


@dataclass
class Moments:
    """Running mean and variance (Chan, Golub and LeVeque, 1979)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, column: pa.Array) -> None:
        """Take in the finite numbers of a column."""
        numbers = finite(column)
        if not len(numbers):
            return
        count, mean = len(numbers), float(numbers.mean())
        gap, total = mean - self.mean, self.count + count
        self.squares += float(((numbers - mean) ** 2).sum()) + gap * gap * self.count * count / total
        self.mean += gap * count / total
        self.count = total

    def std(self) -> float:
        """Standard deviation so far."""
        return float(np.sqrt(self.squares / self.count)) if self.count else 0.0

    def entry(self, feature: Feature, say: Say) -> dict[str, Any]:
        """The keys of the schema that a fit sets."""
        std = self.std()
        if not self.count:
            say(f"field {feature.name!r}: no number in training, so mean is set to 0 and std to 1: remove it")
            std = 1.0
        elif not std > 1e-12 * max(1.0, abs(self.mean)):
            std = 1.0  # (x - mean) / 1 is 0 for a constant: harmless, and no division by 0
            say(
                f"field {feature.name!r}: constant in training ({self.mean:g}), so std is set to 1; it carries nothing: remove it"
            )
        measured = {"mean": self.mean, "std": std}
        return {key: value for key, value in measured.items() if getattr(feature, key) == FIT}


class Quantiles:
    """Boundaries of buckets, from an even sample."""

    def __init__(self) -> None:
        self.sample = EvenSample(MAX_SAMPLE)

    def add(self, column: pa.Array) -> None:
        """Take in the finite numbers of a column."""
        self.sample.add(pa.table({"number": finite(column)}))

    def boundaries(self, num_buckets: int) -> list[float]:
        """Unique quantiles, at most num_buckets - 1, each one a value that occurs.

        The smallest value is no boundary, unless it is the only one: the bucket below it would stay empty.
        """
        if not self.sample.seen:
            return [0.0]
        numbers = self.sample.rows()["number"].to_numpy()
        levels = np.arange(1, num_buckets) / num_buckets
        found = np.unique(np.quantile(numbers, levels, method="inverted_cdf"))
        above = found[found > numbers.min()]
        return [float(value) for value in (above if len(above) else [numbers.min()])]

    def entry(self, feature: Feature, say: Say) -> dict[str, Any]:
        """The keys of the schema that a fit sets."""
        boundaries = self.boundaries(feature.num_buckets)
        if len(boundaries) == 1:
            say(
                f"field {feature.name!r}: its quantiles give one boundary only, {boundaries[0]:g}; "
                "raise num_buckets or remove the field"
            )
        return {"boundaries": boundaries, "num_embeddings": len(boundaries) + FIRST_VOCABULARY_ROW}


def finite(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """The finite numbers of a column, float64; those beyond float32, which training refuses, are none."""
    numbers = column.drop_null().cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    return numbers[np.abs(numbers) <= LARGEST_FLOAT32]


def fit_schema(
    schema: Schema, files: Sequence[DataFile], out: Path, report: Say = unheard, progress: Progress = unheard
) -> Schema:
    """Replace every "fit" of a schema by what the files say.

    Writes OUT/vocabulary/<table>.parquet, one column `value` in row order, and copies there the vocabularies that the schema names
    already, so that OUT stands alone. `report` gets a line for each field whose fit says little (a constant, an empty column),
    `progress` the number of rows read so far.

    Raises:
        InputError: no file or no row, a file is damaged, or a column is missing.
    """
    columns = column_sets(files, LIST_ATTEMPTS)
    for arrow_schema, file in columns.items():
        check_columns(arrow_schema, schema, str(file), has_label=False)
    schema = pinned(schema, columns)
    top, paths = schema_to_toml(schema), schema.own_vocabularies
    _copy_vocabularies(schema, top, out)
    waiting = [feature for feature in schema.features if not feature.is_fitted]
    if waiting and not files:
        raise InputError(f"schema {schema.name!r}: no training file to fit {waiting[0].name!r} on; name at least one")
    counts = {
        each.table_name: Counts(each.name, pa.string() if each.type == "text" else pa.int64())
        for each in waiting
        if each.vocabulary == FIT
    }
    numbers = {
        feature.name: Quantiles() if feature.boundaries == FIT else Moments()
        for feature in waiting
        if feature.vocabulary != FIT
    }
    done = measure(waiting, files, numbers, counts, progress)
    if waiting and not done:
        raise InputError(
            f"{files[0]} and {len(files) - 1} more files hold no rows: nothing to fit {waiting[0].name!r} on; name the training files"
        )
    for feature in waiting:
        entry = top["fields"][feature.name]
        if feature.name in numbers:
            entry |= numbers[feature.name].entry(feature, report)
            continue
        min_count = min(each.min_count for each in waiting if each.table_name == feature.table_name)
        counted = counts[feature.table_name].merged()
        values = often(counted, min_count)
        sizes = top["tables"][feature.table] if feature.table else entry
        sizes["num_embeddings"] = len(values) + FIRST_VOCABULARY_ROW
        entry["vocabulary"] = paths[feature.name]
        write_rows(out / entry["vocabulary"], pa.table({"value": values}))
        if len(values) < len(counted):
            rare = counted.filter(pc.field("count") < min_count).sort_by("value")
            rare = rare.append_column("seen", pa.array(np.zeros(len(rare), np.int32)))
            write_rows(out / WAITING / Path(paths[feature.name]).name, rare)
        if not len(values):
            report(f"field {feature.name!r}: no value occurs {min_count} times: all are out of vocabulary")
    return parse_schema(top, f"fit of schema {schema.name!r}", out)


def measure(
    fields: Sequence[Feature],
    files: Sequence[DataFile],
    numbers: Mapping[str, Moments | Quantiles],
    counts: Mapping[str, Counts],
    progress: Progress,
) -> int:
    """Read the files' rows into each field's numbers, or else into the counts of its table; return how many there were."""
    done = 0
    for file in files if fields else ():
        for place, rows in record_batches(file, [feature.source_column for feature in fields]):
            done += rows.num_rows
            for feature in fields:
                column = rows.column(feature.source_column)
                if feature.name in numbers:
                    numbers[feature.name].add(decoded(column))
                else:
                    counts[feature.table_name].add(_ids(column, feature, place))
            progress(done)
    return done


def write_rows(path: Path, table: pa.Table) -> None:
    """Write a vocabulary's file, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, compression="zstd", write_page_checksum=True)


def write_fitted(
    schema: Schema,
    files: Sequence[DataFile],
    out: str | Path,
    *,
    force: bool = False,
    report: Say = unheard,
    progress: Progress = unheard,
) -> Schema:
    """Fit a schema and write OUT/schema.toml and OUT/vocabulary, whole or not at all; see `fit_schema`.

    Raises:
        InputError: see `fit_schema`; or `out` holds something, other than an earlier fit that `force` allows to replace.
    """
    out = Path(out)
    held = {path.name for path in out.iterdir()} if out.is_dir() else {""} if out.exists() else set()
    is_earlier_fit = held <= {"schema.toml", VOCABULARY_FOLDER}
    if held and not (force and is_earlier_fit):
        fix = "pass --force to replace it" if is_earlier_fit else "choose another folder"
        raise InputError(f"{out}: exists already; {fix}")
    if held and schema.folder.resolve() == out.resolve():
        raise InputError(f"{out}: holds the schema that is fitted, which would be replaced; choose another folder")
    with whole_folder(out) as folder:
        fitted = fit_schema(schema, files, folder, report, progress)
        header = f"Fitted on {len(files)} training file(s) by mbcnet schema fit."
        (folder / "schema.toml").write_text(format_schema(fitted, header), encoding="utf-8")
        if (folder / VOCABULARY_FOLDER).is_dir():
            (folder / GROWTH).write_text(json.dumps({"day": 0, "files": mark_files(files), "tables": {}}))
    return load_schema(out / "schema.toml")


def _copy_vocabularies(schema: Schema, top: dict[str, Any], folder: Path) -> None:
    """Copy the vocabulary files that a schema names into `folder`, and name them there."""
    paths = schema.own_vocabularies
    for feature in schema.features:
        if feature.vocabulary in ("", FIT):
            continue
        source, target = schema.folder / feature.vocabulary, folder / paths[feature.name]
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(source, target)
        except OSError as error:
            raise InputError(
                f"{source}: the vocabulary of field {feature.name!r} cannot be copied ({error.strerror}); fix the path in the schema"
            ) from None
        top["fields"][feature.name]["vocabulary"] = paths[feature.name]


def _ids(column: pa.Array, feature: Feature, place: Place) -> pa.Array:
    """The ids of a column, as training takes them."""
    offsets = list_offsets(column) if is_list(column.type) else None
    items = column if offsets is None else column.flatten()
    return read_ids(items, f"field {feature.name!r}", feature.type, place, offsets)


def record_batches(file: DataFile, columns: Iterable[str]) -> Iterator[tuple[Place, pa.RecordBatch]]:
    """Some columns, in pieces of a row group: nested columns of many are more than Arrow can join."""
    names = list(dict.fromkeys(columns))
    with naming(file), open_parquet(file, pre_buffer=True) as parquet:
        for group in range(parquet.num_row_groups):
            start = 0
            try:
                for rows in stored_rows(parquet, group, names, BATCH_ROWS):
                    yield Place(str(file), group, start), rows
                    start += rows.num_rows
            except DAMAGE:
                column, message = next(unreadable(file, group, names))
                raise InputError(f"{Place(str(file), group)}, column {column!r} {message}") from None
