"""Measure what a schema leaves to "fit", on the training split only: vocabularies, mean and std, boundaries.

Each unit of the files (data/profile/units.py) is read once, by whichever process; nulls are ignored. Fields that share a table share one
vocabulary, counted over all of them. With min_count = 1 every training value has a row of its own, so row 1
(out of vocabulary) is looked up in validation and serving but never trained: use min_count = 2 or more
where new values are to be expected.
"""

import json
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial, reduce
from operator import or_
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.engine import run_tasks, write_result
from data.errors import InputError
from data.profile import units, values
from data.reading.column_types import check_columns, is_list, pinned
from data.reading.columns import Place
from data.reading.files import column_sets
from data.reading.fingerprint import mark_files
from data.reading.ids import decoded, list_offsets, read_ids, value_type
from data.reading.storage import LIST_ATTEMPTS, DataFile
from data.schema import Feature, Schema, format_schema, load_schema, parse_schema, schema_to_toml
from data.schema.feature import FIRST_VOCABULARY_ROW, FIT, VOCABULARY_FOLDER
from data.whole_folder import whole_folder

# Beside the vocabularies: the sightings of values that have no row yet (value, count, and the growth that has seen it last), and what was counted
WAITING, GROWTH = f"{VOCABULARY_FOLDER}/waiting", f"{VOCABULARY_FOLDER}/growth.json"
MAX_SAMPLE, MAX_SAMPLES = 2**20, 2**24  # numbers of a field, and of all fields, that quantiles are taken of

Say = Callable[[str], object]  # takes one line for the user


class Moments(NamedTuple):
    """Count, mean and sum of squared differences from it (Chan, Golub and LeVeque, 1979)."""

    count: float = 0
    mean: float = 0.0
    squares: float = 0.0

    def __or__(self, other: "Moments") -> "Moments":
        count, gap = self.count + other.count, other.mean - self.mean
        if not self.count or not other.count:
            return self if self.count else other
        squares = self.squares + other.squares + gap * gap * self.count * other.count / count
        return Moments(count, self.mean + gap * other.count / count, squares)

    @classmethod
    def of(cls, numbers: np.ndarray) -> "Moments":
        """Of some numbers."""
        mean = float(numbers.mean()) if len(numbers) else 0.0
        return cls(len(numbers), mean, float(((numbers - mean) ** 2).sum()))


def boundaries_of(numbers: np.ndarray, num_buckets: int) -> list[float]:
    """Unique quantiles that occur, at most num_buckets - 1, without the smallest value unless it is the only one: no bucket stays empty."""
    if not len(numbers):
        return [0.0]
    levels = np.arange(1, num_buckets) / num_buckets
    found = np.unique(np.quantile(numbers, levels, method="inverted_cdf"))
    above = found[found > numbers.min()]
    return [float(value) for value in (above if len(above) else [numbers.min()])]


def narrow_float(kinds: Iterable[pa.DataType]) -> type[np.floating[Any]] | None:
    """The float type of 16 or 32 bits that a column's numbers are rounded to, of its types in all files; None: none is so narrow."""
    found = {value_type(kind) for kind in kinds} - {pa.null()}
    if found == {pa.float16()}:
        return np.float16
    return np.float32 if found & {pa.float16(), pa.float32()} else None


def _standard(feature: Feature, moments: Moments, say: Say) -> dict[str, Any]:
    """The keys of the schema that a fit sets for a field to standardise."""
    std = float(np.sqrt(moments.squares / moments.count)) if moments.count else 0.0
    if not moments.count:
        say(f"field {feature.name!r}: no number in training, so mean is set to 0 and std to 1: remove it")
        std = 1.0
    elif not std > 1e-12 * max(1.0, abs(moments.mean)):
        std = 1.0  # (x - mean) / 1 is 0 for a constant: harmless, and no division by 0
        say(
            f"field {feature.name!r}: constant in training ({moments.mean:g}), so std is set to 1; it carries nothing: remove it"
        )
    measured = {"mean": moments.mean, "std": std}
    return {key: value for key, value in measured.items() if getattr(feature, key) == FIT}


def _buckets(feature: Feature, numbers: np.ndarray, narrow: type[np.floating[Any]] | None, say: Say) -> dict[str, Any]:
    """The keys of the schema that a fit sets for a field in buckets; `narrow` as of `narrow_float`."""
    numbers = numbers if narrow is None else numbers.astype(narrow).astype(np.float64)
    boundaries = boundaries_of(numbers, feature.num_buckets)
    if len(boundaries) == 1:
        say(
            f"field {feature.name!r}: its quantiles give one boundary only, {boundaries[0]:g}; "
            "raise num_buckets or remove the field"
        )
    if narrow is not None and len(numbers):
        # halfway to the next smaller number of the type: a decimal of JSON or CSV falls with the float that it is rounded to
        below = np.nextafter(np.asarray(boundaries, narrow), np.finfo(narrow).min).astype(np.float64)
        boundaries = ((boundaries + below) / 2).tolist()
    return {"boundaries": boundaries, "num_embeddings": len(boundaries) + FIRST_VOCABULARY_ROW}


def finite(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """The finite numbers of a column, float64; those beyond float32, which training refuses, are none."""
    numbers = column.drop_null().cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    return numbers[np.abs(numbers) <= units.LARGEST_FLOAT32]


class CountUnit(NamedTuple):
    """A task: what the fields that wait for a fit hold in a unit, written to `path`."""

    path: Path
    unit: units.Unit
    waiting: tuple[Feature, ...]
    tables: tuple[str, ...]  # the table of each field that waits


def count_unit(task: CountUnit) -> None:
    """Count the values and measure the numbers of a unit; InputError if a file is damaged or was changed, or a value is no id."""
    limit = min(MAX_SAMPLE, MAX_SAMPLES // max(1, len(task.waiting)))
    samples = {each.name: units.RowSample(limit) for each in task.waiting if each.boundaries == FIT}
    moments = {each.name: Moments() for each in task.waiting if each.vocabulary != FIT and each.boundaries != FIT}
    with write_result(task.path) as draft, values.result_writer(draft) as writer:
        write = partial(values.write_row, writer)
        counts = values.Counts(write)
        for place, first_row, rows in units.batches_of(task.unit, [each.source_column for each in task.waiting]):
            hashes = units.row_hashes(first_row, rows.num_rows) if samples else np.zeros(0, np.uint64)
            for feature, table in zip(task.waiting, task.tables, strict=True):
                column = rows.column(feature.source_column)
                if feature.vocabulary == FIT:
                    counts.add(table, _ids(column, feature, place))
                elif feature.name in moments:
                    moments[feature.name] |= Moments.of(finite(decoded(column)))
                else:
                    column = decoded(column).cast(pa.float64(), safe=False)
                    numbers = column.fill_null(np.nan).to_numpy(zero_copy_only=False)
                    good = np.abs(numbers) <= units.LARGEST_FLOAT32
                    samples[feature.name].add(hashes[good], pa.table({"number": numbers[good]}))
        counts.write()
        for name, found in moments.items():
            write(name, moments=np.asarray(found, np.float64))
        for name, sample in samples.items():
            if sample.parts:
                numbers = sample.rows()["number"].chunk(0)
                write(name, hashes=sample.hashes, numbers=numbers)


class Measured(NamedTuple):
    """What a fit has read: results of the units, in the files' order, and of the merges, in the tables' order."""

    units: list[Path]
    merges: list[Path]
    min_count: dict[str, int]  # by table


def measure(waiting: Sequence[Feature], files: Sequence[DataFile], folder: Path, work: units.Work) -> Measured:
    """Count and merge; the results lie in `folder`."""
    cut = units.units_of(files)
    if not cut:
        raise InputError(
            f"{files[0]} and {len(files) - 1} more files hold no rows: nothing to fit {waiting[0].name!r} on; name the training files"
        )
    paths = [folder / f"unit-{unit.key()}.arrow" for unit in cut]
    tables = tuple(each.table_name for each in waiting)
    tasks = {path: CountUnit(path, unit, tuple(waiting), tables) for path, unit in zip(paths, cut, strict=True)}
    done = 0
    for path in run_tasks(work.engine, count_unit, tasks):
        done += tasks[path].unit.rows
        work.progress(done)
    shares, unsigned = values.shares_of(paths)
    counted = [each for each in waiting if each.vocabulary == FIT]
    field = {each.table_name: each.name for each in reversed(counted)}
    min_count = {name: min(each.min_count for each in counted if each.table_name == name) for name in field}
    key = units.Unit(tuple(span for unit in cut for span in unit.spans)).key()
    merges = [folder / f"merge-{key}-{number}.arrow" for number in range(len(shares))]
    jobs = {
        path: values.Merge(path, own, tuple(paths), unsigned, min_count, field)
        for path, own in zip(merges, shares, strict=True)
    }
    for _ in run_tasks(work.engine, values.merge, jobs, last=True):
        pass
    return Measured(paths, merges, min_count)


def fit_schema(
    schema: Schema, files: Sequence[DataFile], out: Path, report: Say = units.unheard, work: units.Work = units.ALONE
) -> Schema:
    """Replace every "fit" of a schema by what the files say; InputError if there is no file or row, one is damaged, or a column is missing.

    OUT stands alone: it gets vocabulary/<table>.parquet, one column `value` in row order, and those that the schema names already. Of torchrun's
    ranks only the first writes. `report` is told each field whose fit says little (a constant, an empty column).
    """
    columns = column_sets(files, LIST_ATTEMPTS)
    for arrow_schema, file in columns.items():
        check_columns(arrow_schema, schema, str(file), has_label=False)
    schema = pinned(schema, columns)
    top, paths = schema_to_toml(schema), schema.own_vocabularies
    if work.engine.is_first:
        _copy_vocabularies(schema, top, out)
    waiting = [feature for feature in schema.features if not feature.is_fitted]
    if not waiting:
        return parse_schema(top, f"fit of schema {schema.name!r}", out)
    if not files:
        raise InputError(f"schema {schema.name!r}: no training file to fit {waiting[0].name!r} on; name at least one")
    with units.results_folder(work.place or out / "fit", work.engine, schema_to_toml(schema)) as folder:
        found = measure(waiting, files, folder, work)
        if work.engine.is_first:
            _write_fit(found, waiting, columns, top, paths, out, report)
    return parse_schema(top, f"fit of schema {schema.name!r}", out) if work.engine.is_first else schema


def _write_fit(
    found: Measured,
    waiting: Sequence[Feature],
    columns: Collection[pa.Schema],
    top: dict[str, Any],
    paths: Mapping[str, str],
    out: Path,
    report: Say,
) -> None:
    """Set the keys that were measured in a schema file's entries, and write the vocabularies. `columns`: of the files."""
    measured: dict[str, list[dict[str, pa.Array]]] = {}
    for path in found.units:
        for owner, row in values.read_rows(path):
            measured.setdefault(owner, []).append(row)
    known = values.merged(found.merges)
    for feature in waiting:
        entry, rows = top["fields"][feature.name], measured.get(feature.name, [])
        if feature.boundaries == FIT:
            sample = units.RowSample(min(MAX_SAMPLE, MAX_SAMPLES // len(waiting)))
            for row in rows:
                if "hashes" in row:
                    sample.add(row["hashes"].to_numpy(), pa.table({"number": row["numbers"]}))
            numbers = sample.rows()["number"].to_numpy() if sample.parts else np.zeros(0)
            narrow = narrow_float(each.field(feature.source_column).type for each in columns)
            entry |= _buckets(feature, numbers, narrow, report)
        elif feature.vocabulary != FIT:
            moments = [Moments(*row["moments"].to_pylist()) for row in rows if "moments" in row]
            entry |= _standard(feature, reduce(or_, moments), report)
        else:
            entry["vocabulary"], min_count = paths[feature.name], found.min_count[feature.table_name]
            tables = known.get(feature.table_name, [])
            kind = tables[0]["value"].type if tables else pa.int64() if feature.type != "text" else pa.string()
            kind = pa.string() if pa.types.is_large_string(kind) else kind
            runs: tuple[list[pa.Table], list[pa.Table]] = ([], [])
            for table in tables:
                runs[table["count"][0].as_py() < min_count].append(table)
            size = write_rows(
                out / paths[feature.name],
                (each.select(["value"]) for each in values.in_order(runs[0], values.BY_COUNT, kind)),
                kind,
            )
            if runs[1]:
                unseen = pa.scalar(0, pa.int32())
                rare = (
                    each.append_column("seen", pa.repeat(unseen, len(each)))
                    for each in values.in_order(runs[1], values.BY_VALUE, kind)
                )
                write_rows(out / WAITING / Path(paths[feature.name]).name, rare, kind)
            sizes = top["tables"][feature.table] if feature.table else entry
            sizes["num_embeddings"] = size + FIRST_VOCABULARY_ROW
            if not size:
                report(f"field {feature.name!r}: no value occurs {min_count} times: all are out of vocabulary")


def write_rows(path: Path, tables: Iterable[pa.Table], kind: pa.DataType | None = None) -> int:
    """Write the row groups of a vocabulary's file, and its folder; return the number of rows. `kind`: of the values where there are none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    first = next(tables := iter(tables), pa.table({"value": pa.array([], kind)}))
    rows = len(first)
    with pq.ParquetWriter(
        path, first.schema, compression="zstd", use_dictionary=False, write_page_checksum=True
    ) as writer:
        writer.write_table(first)
        for table in tables:
            writer.write_table(table)
            rows += len(table)
    return rows


def write_fitted(
    schema: Schema,
    files: Sequence[DataFile],
    out: str | Path,
    *,
    force: bool = False,
    report: Say = units.unheard,
    work: units.Work = units.ALONE,
) -> Schema:
    """Fit a schema and write OUT/schema.toml and OUT/vocabulary, whole or not at all; see `fit_schema`.

    InputError as there, or if `out` holds something other than an earlier fit that `force` allows to replace.
    """
    out = Path(out)
    held = {path.name for path in out.iterdir()} if out.is_dir() else {""} if out.exists() else set()
    is_earlier_fit = held <= {"schema.toml", VOCABULARY_FOLDER}
    if held and not (force and is_earlier_fit):
        fix = "pass --force to replace it" if is_earlier_fit else "choose another folder"
        raise InputError(f"{out}: exists already; {fix}")
    if held and schema.folder.resolve() == out.resolve():
        raise InputError(f"{out}: holds the schema that is fitted, which would be replaced; choose another folder")
    work = work._replace(place=out)
    if not work.engine.is_first:
        return fit_schema(schema, files, out, report, work)
    with whole_folder(out) as folder:
        fitted = fit_schema(schema, files, folder, report, work)
        header = f"Fitted on {len(files)} training file(s) by mbcnet schema fit."
        (folder / "schema.toml").write_text(format_schema(fitted, header), encoding="utf-8")
        if (folder / VOCABULARY_FOLDER).is_dir():
            waiting = sorted(path.name for path in (folder / WAITING).glob("*"))
            begun = {"day": 0, "files": mark_files(files), "tables": {}, "waiting": waiting}
            (folder / GROWTH).write_text(json.dumps(begun), encoding="utf-8")
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
