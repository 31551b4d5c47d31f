"""Measure what a schema leaves to "fit", on the training split only: vocabularies, mean and std, boundaries.

One pass over the files, in record batches; nulls are ignored. Fields that share a table share one
vocabulary, counted over all of them. With min_count = 1 every training value has a row of its own, so row 1
(out of vocabulary) is looked up in validation and serving but never trained: use min_count = 2 or more
where new values are to be expected.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data.errors import InputError
from data.reading.storage import DataFile, open_parquet
from data.schema import (
    FIRST_VOCABULARY_ROW,
    FIT,
    Feature,
    Schema,
    format_schema,
    load_schema,
    parse_schema,
    schema_to_toml,
)

VOCABULARY_FOLDER = "vocabulary"
BATCH_ROWS = 65_536
MAX_PENDING = 1_000_000  # distinct values held before they are merged
MAX_SAMPLE = 2_000_000  # numbers held for quantiles


@dataclass
class _Counts:
    """How often each value occurs."""

    pending: list[pa.Table] = field(default_factory=list)
    pending_rows: int = 0
    merged_rows: int = 0

    def add(self, values: pa.Array) -> None:
        counted = values.drop_null().value_counts()
        self.pending.append(pa.table({"value": counted.field(0), "count": counted.field(1)}))
        self.pending_rows += len(counted)
        # As much new as old: the work then grows with the values and not with the values times the number of merges.
        if self.pending_rows > max(MAX_PENDING, self.merged_rows):
            self.pending = [self.merged()]
            self.pending_rows, self.merged_rows = 0, self.pending[0].num_rows

    def merged(self) -> pa.Table:
        total = (
            pa.concat_tables(self.pending, promote_options="permissive")
            .group_by("value")
            .aggregate([("count", "sum")])
        )
        return total.rename_columns({"count_sum": "count"})

    def vocabulary(self, min_count: int) -> pa.Array:
        """Values seen at least `min_count` times, the most frequent first, equal ones by value."""
        table = self.merged()
        table = table.filter(pc.field("count") >= min_count)
        return table.sort_by([("count", "descending"), ("value", "ascending")])["value"].combine_chunks()


@dataclass
class _Moments:
    """Running mean and variance (Chan, Golub and LeVeque, 1979)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, numbers: np.ndarray) -> None:
        if not len(numbers):
            return
        count, mean = len(numbers), float(numbers.mean())
        gap, total = mean - self.mean, self.count + count
        self.squares += float(((numbers - mean) ** 2).sum()) + gap * gap * self.count * count / total
        self.mean += gap * count / total
        self.count = total

    def std(self) -> float:
        return float(np.sqrt(self.squares / self.count)) if self.count else 0.0


@dataclass
class _Sample:
    """Every k-th number; k doubles when the sample grows too large. Bounded, the same on every run."""

    parts: list[np.ndarray] = field(default_factory=list)
    stride: int = 1
    seen: int = 0

    def add(self, numbers: np.ndarray) -> None:
        self.parts.append(numbers[(-self.seen) % self.stride :: self.stride])
        self.seen += len(numbers)
        if sum(map(len, self.parts)) > MAX_SAMPLE:
            self.parts = [np.concatenate(self.parts)[::2]]
            self.stride *= 2

    def boundaries(self, num_buckets: int) -> list[float]:
        """Unique quantiles, at most num_buckets - 1, each one a value that occurs.

        The smallest value is no boundary, unless it is the only one: the bucket below it would stay empty.
        """
        numbers = np.concatenate(self.parts) if self.parts else np.zeros(0)
        if not len(numbers):
            return [0.0]
        levels = np.arange(1, num_buckets) / num_buckets
        found = np.unique(np.quantile(numbers, levels, method="inverted_cdf"))
        above = found[found > numbers.min()]
        return [float(value) for value in (above if len(above) else [numbers.min()])]


def fit_schema(
    schema: Schema,
    files: Iterable[DataFile | str],
    out_folder: str | Path,
    report: Callable[[str], None] | None = None,
    progress: Callable[[int], object] | None = None,
) -> Schema:
    """Replace every "fit" of a schema by what the files say.

    Writes OUT/vocabulary/<table>.parquet, one column `value` in row order.

    Args:
        schema: with any number of "fit".
        files: Parquet files of the training split.
        out_folder: where schema.toml will stand; vocabulary paths are relative to it.
        report: called with one line for each field whose fit says little (a constant, an empty column).
        progress: called with the number of rows read so far.

    Raises:
        InputError: no file, or a column is missing.
    """
    out_folder = Path(out_folder)
    waiting = [feature for feature in schema.features if not feature.is_fitted]
    sources = [Path(file) if isinstance(file, str) else file for file in files]
    if waiting and not sources:
        raise InputError(
            f"schema {schema.name!r}: no training file to fit {waiting[0].name!r} on; name at least one"
        )
    counts = {feature.table_name: _Counts() for feature in waiting if feature.vocabulary == FIT}
    moments = {feature.name: _Moments() for feature in waiting if FIT in (feature.mean, feature.std)}
    samples = {feature.name: _Sample() for feature in waiting if feature.boundaries == FIT}
    done = 0
    for file in sources if waiting else ():
        for rows in _record_batches(file, waiting):
            done += rows.num_rows
            for feature in waiting:
                column = rows.column(feature.source_column)
                if feature.vocabulary == FIT:
                    counts[feature.table_name].add(_plain(column, feature))
                else:
                    (samples if feature.boundaries == FIT else moments)[feature.name].add(_finite(column))
            if progress:
                progress(done)
    say = report or (lambda line: None)
    top = schema_to_toml(schema)
    for feature in waiting:
        entry = top["fields"][feature.name]
        if feature.vocabulary == FIT:
            min_count = min(each.min_count for each in waiting if each.table_name == feature.table_name)
            values = counts[feature.table_name].vocabulary(min_count)
            rows_of_table = top["tables"][feature.table] if feature.table else entry
            rows_of_table["num_embeddings"] = len(values) + FIRST_VOCABULARY_ROW
            entry["vocabulary"] = _write_vocabulary(values, feature.table_name, out_folder)
            if not len(values):
                say(f"field {feature.name!r}: no value occurs {min_count} times: all are out of vocabulary")
        elif feature.boundaries == FIT:
            entry |= _fit_boundaries(samples[feature.name], feature, say)
        else:
            entry |= _fit_moments(moments[feature.name], feature, say)
    return parse_schema(top, f"fit of schema {schema.name!r}", out_folder)


def write_fitted(
    schema: Schema,
    files: Sequence[DataFile],
    out: str | Path,
    *,
    force: bool = False,
    report: Callable[[str], None] | None = None,
    progress: Callable[[int], object] | None = None,
) -> Schema:
    """Fit a schema and write OUT/schema.toml and OUT/vocabulary, whole or not at all.

    Vocabularies that the schema names already are copied, so that OUT stands alone.

    Args:
        schema: with any number of "fit".
        files: Parquet files of the training split.
        out: a folder that is absent or empty, or holds an earlier fit.
        force: replace an earlier fit.
        report: see `fit_schema`.
        progress: see `fit_schema`.

    Raises:
        InputError: see `fit_schema`; or `out` holds something.
    """
    out = Path(out)
    held = {path.name for path in out.iterdir()} if out.is_dir() else {""} if out.exists() else set()
    if held and not (force and held <= {"schema.toml", VOCABULARY_FOLDER}):
        mend = (
            "pass --force to replace it"
            if held <= {"schema.toml", VOCABULARY_FOLDER}
            else "choose another folder"
        )
        raise InputError(f"{out}: exists already; {mend}")
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        fitted = fit_schema(_with_own_vocabularies(schema, partial), files, partial, report, progress)
        header = f"Fitted on {len(files)} training file(s) by mbcnet schema fit."
        (partial / "schema.toml").write_text(format_schema(fitted, header), encoding="utf-8")
        if out.exists():
            shutil.rmtree(out)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return load_schema(out / "schema.toml")


def _with_own_vocabularies(schema: Schema, folder: Path) -> Schema:
    """Copy the vocabulary files that a schema names into `folder`, and name them there."""
    top = schema_to_toml(schema)
    for feature in schema.features:
        if feature.vocabulary not in ("", FIT):
            relative = f"{VOCABULARY_FOLDER}/{feature.table_name}.parquet"
            (folder / VOCABULARY_FOLDER).mkdir(exist_ok=True)
            try:
                shutil.copyfile(schema.folder / feature.vocabulary, folder / relative)
            except OSError as error:
                raise InputError(
                    f"{schema.folder / feature.vocabulary}: the vocabulary of field {feature.name!r} cannot be copied "
                    f"({error.strerror}); mend the path in the schema"
                ) from None
            top["fields"][feature.name]["vocabulary"] = relative
    return parse_schema(top, f"schema {schema.name!r}", folder)


def _record_batches(file: DataFile, features: list[Feature]) -> Iterable[pa.RecordBatch]:
    try:
        parquet = open_parquet(file)
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"{file}: cannot be read as Parquet ({str(error).splitlines()[0]}); mend or remove the file"
        ) from None
    with parquet:
        for feature in features:
            if feature.source_column not in parquet.schema_arrow.names:
                raise InputError(
                    f"{file}: column {feature.source_column!r} is missing, which field {feature.name!r} "
                    "is fitted on; add the column to the file, or mend the schema"
                )
        names = list(dict.fromkeys(feature.source_column for feature in features))
        yield from parquet.iter_batches(BATCH_ROWS, columns=names)


def _plain(column: pa.Array, feature: Feature) -> pa.Array:
    """The ids of a column: lists flattened, dictionaries decoded."""
    values = column if feature.is_single else column.flatten()
    return values.cast(values.type.value_type) if pa.types.is_dictionary(values.type) else values


def _finite(column: pa.Array) -> np.ndarray:
    numbers = column.drop_null().cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    return numbers[np.isfinite(numbers)]


def _write_vocabulary(values: pa.Array, name: str, out_folder: Path) -> str:
    relative = f"{VOCABULARY_FOLDER}/{name}.parquet"
    path = out_folder / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"value": values}), path, compression="zstd", write_page_checksum=True)
    return relative


def _fit_boundaries(sample: _Sample, feature: Feature, say: Callable[[str], None]) -> dict[str, Any]:
    boundaries = sample.boundaries(feature.num_buckets)
    if len(boundaries) == 1:
        say(
            f"field {feature.name!r}: its quantiles give one boundary only, {boundaries[0]:g}; "
            "raise num_buckets or remove the field"
        )
    return {"boundaries": boundaries, "num_embeddings": len(boundaries) + FIRST_VOCABULARY_ROW}


def _fit_moments(moments: _Moments, feature: Feature, say: Callable[[str], None]) -> dict[str, Any]:
    std = moments.std()
    if not std > 1e-12 * max(1.0, abs(moments.mean)):
        std = 1.0  # (x - mean) / 1 is 0 for a constant: harmless, and no division by 0
        say(
            f"field {feature.name!r}: constant in training ({moments.mean:g}), so std is set to 1; "
            "it carries nothing: remove it"
        )
    mean = moments.mean if feature.mean == FIT else feature.mean
    return {"mean": mean, "std": std if feature.std == FIT else feature.std}
