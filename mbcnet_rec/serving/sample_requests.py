"""Requests to time a model with: drawn from a schema, or cut from a Parquet file. Columns of plain Python values."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.errors import InputError
from data.schema import Feature, Schema
from sharding.plan.constraints import ShardingConfig
from sharding.search.candidates import pooling_factor

NUM_REQUESTS = 8  # different ones, in turn: the same one again would find all its rows in the cache
Requests = list[dict[str, list[Any]]]


def draw_requests(schema: Schema, vocabularies: Mapping[str, pa.Array], rows: int) -> Requests:
    """Draw requests: ids evenly over each table, which is the worst for caches; lists of the schema's mean length."""
    rng = np.random.default_rng(rows)
    return [
        {
            column: values
            for feature in schema.features
            for column, values in _draw(feature, schema, vocabularies, rows, rng).items()
        }
        for _ in range(NUM_REQUESTS)
    ]


def _draw(
    feature: Feature, schema: Schema, vocabularies: Mapping[str, pa.Array], rows: int, rng: np.random.Generator
) -> dict[str, list[Any]]:
    if feature.kind == "numeric":
        return {feature.source_column: rng.gamma(2.0, 10.0, rows).tolist()}
    if feature.kind == "vector":
        return {feature.source_column: rng.normal(size=(rows, feature.width)).tolist()}
    known = vocabularies[feature.vocabulary].to_pylist() if feature.encoding == "vocabulary" else None
    limit = len(known) if known is not None else schema.table_of[feature.name].num_embeddings

    def values(count: int) -> list[Any]:
        ids = rng.integers(0, max(limit, 1), count).tolist()
        return [known[place] for place in ids] if known else ids

    if feature.kind == "categorical":
        return {feature.source_column: values(rows)}
    lengths = rng.poisson(pooling_factor(feature, ShardingConfig()), rows)
    drawn = {feature.source_column: [values(length) for length in lengths]}
    if feature.is_weighted:
        drawn[feature.weights] = [rng.random(length).tolist() for length in lengths]
    return drawn


def read_requests(path: str, columns: Sequence[str], rows: int) -> Requests:
    """Cut the first rows of a Parquet file into requests of so many rows and those of the columns that it has; again where it ends.

    Raises:
        InputError: it cannot be read, or holds fewer rows than one request.
    """
    try:
        with pq.ParquetFile(path) as file:
            known = [name for name in columns if name in file.schema_arrow.names]
            table = next(file.iter_batches(rows * NUM_REQUESTS, columns=known), None)
    except (OSError, ValueError) as error:
        raise InputError(f"--data {path}: not a readable Parquet file ({error}); choose another one") from None
    if table is None or table.num_rows < rows:
        found = 0 if table is None else table.num_rows
        raise InputError(f"--data {path}: {found} rows; wanted at least {rows}, as --rows asks: choose a longer file")
    starts = [number * rows % (table.num_rows - rows + 1) for number in range(NUM_REQUESTS)]
    return [table.slice(start, rows).to_pydict() for start in starts]
