"""A log whose every value follows from the number of its row, so that a row put together wrongly shows."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data.schema import Schema, parse_schema

IDS = 10_000
TABLE = {"num_embeddings": IDS, "embedding_dim": 4}
FIELDS = {
    "row": {"kind": "categorical"} | TABLE,
    "word": {"kind": "categorical", "encoding": "hash"} | TABLE,
    "tags": {"kind": "multi_valued"} | TABLE,
    "liked": {"kind": "weighted_multi_valued", "weights": "liked_weights"} | TABLE,
    "price": {"kind": "numeric"},
}


def make_schema(**fields) -> Schema:
    table = {"name": "t", "label": "click", "group_column": "row", "fields": FIELDS | fields}
    return parse_schema(table, "schema.toml", Path())


def rows_table(first: int, count: int) -> pa.Table:
    numbers = range(first, first + count)
    return pa.table(
        {
            "click": pa.array([int(number % 3 == 0) for number in numbers], pa.int8()),
            "row": pa.array(numbers, pa.int64()),
            "word": pa.array([f"w{number % 211}" * 9 for number in numbers], pa.string()),
            "tags": pa.array([list(range(n, n + n % 4)) for n in numbers], pa.list_(pa.int32())),
            "liked": pa.array([[n] * (n % 3) for n in numbers], pa.list_(pa.int64())),
            "liked_weights": pa.array([[0.5 * n] * (n % 3) for n in numbers], pa.list_(pa.float32())),
            "price": pa.array([0.25 * number for number in numbers], pa.float64()),
        }
    )


def write_rows(path: Path, count: int, first: int = 0, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"row_group_size": 7, "write_page_checksum": True} | options
    pq.write_table(rows_table(first, count), path, **options)
    return path


def write_log(folder: Path, file_rows, row_group_rows: int = 7) -> list[Path]:
    starts = [sum(file_rows[:number]) for number in range(len(file_rows))]
    return [
        write_rows(folder / f"part-{number}.parquet", rows, first, row_group_size=row_group_rows)
        for number, (rows, first) in enumerate(zip(file_rows, starts, strict=True))
    ]


def rows_of(batch) -> list[int]:
    """The numbers of a batch's real rows, once all of their values have been checked against the number."""
    real = int((batch.weights > 0).sum())
    assert (batch.weights[:real] > 0).all() and (batch.weights[real:] == 0).all()
    sparse, weighted = batch.sparse_features, batch.weighted_features
    rows = sparse["row"].values().tolist()
    padding = [0] * (len(batch.labels) - real)
    assert len(rows) == real and sparse["row"].lengths().tolist() == [1] * real + padding
    tags = [tag for row in rows for tag in range(row, row + row % 4)]
    assert sparse["tags"].values().tolist() == tags
    assert sparse["tags"].lengths()[:real].tolist() == [row % 4 for row in rows]
    liked = [row for row in rows for _ in range(row % 3)]
    assert weighted["liked"].values().tolist() == liked
    assert weighted["liked"].weights().tolist() == [0.5 * row for row in liked]
    assert batch.dense_features[:real, 0].tolist() == [0.25 * row for row in rows]
    assert batch.labels[:real].tolist() == [float(row % 3 == 0) for row in rows]
    assert len(batch.group_ids) == len(batch.labels)
    assert len(set(batch.group_ids[:real].tolist())) == len(set(rows))
    return rows
