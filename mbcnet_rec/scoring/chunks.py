"""Files -> chunks of row groups -> scored rows, whatever the world size: what `mbcnet evaluate` and `mbcnet predict` share.

A rank scores whole chunks, in order. Every rank takes the same number of steps: one that finishes early sends empty batches. A faulty
row ends its own chunk only, and is raised on every rank when all other chunks are done.

Shapes: n rows of one batch, K branches.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from data.errors import InputError
from data.reading.column_types import check_columns
from data.reading.columns import Columns
from data.reading.config import StreamOptions
from data.reading.decode import RowReader
from data.reading.encode import Encoder
from data.reading.files import NOT_PARQUET, RowGroup, read_contents
from data.reading.row_groups import prove
from data.reading.selection import Selection
from data.reading.storage import DataFile, for_each_file, open_parquet
from data.schema import Schema
from data.stream.batch import Batch, gather
from mbcnet_rec.logs.progress import RowBar
from mbcnet_rec.runtime.process import Process, agreed
from mbcnet_rec.scoring.scorer import Scorer

CHUNK_ROWS = 262_144  # a chunk ends with the row group that reaches them


class Chunk(NamedTuple):
    """Neighbouring row groups of one file, which one rank scores."""

    file: int  # index in the list of files
    number: int  # of the chunk in its file
    row_groups: tuple[RowGroup, ...]

    @property
    def num_rows(self) -> int:
        """Kept rows."""
        return sum(group.num_rows for group in self.row_groups)


class ScoredRows(NamedTuple):
    """Rows of one batch of one chunk, in the file's order."""

    chunk: Chunk
    rows: pa.RecordBatch  # the extra columns
    logits: np.ndarray  # (n, 1 + K) float32, fused first
    labels: np.ndarray  # (n,) float32
    group_ids: np.ndarray | None  # (n,) int64


def labelled_rows(
    files: Sequence[DataFile], schema: Schema, options: StreamOptions, extra: Sequence[str]
) -> tuple[RowReader, list[Chunk]]:
    """Chunks of what the options keep of the files, with `extra` columns; InputError if a file or column is faulty, or no row is left."""
    selection = Selection(options, schema, files)
    row_groups = read_contents(files, schema, selection).row_groups
    return RowReader(files, Encoder(schema), selection, extra=extra), chunks_of(row_groups)


def unlabelled_rows(files: Sequence[DataFile], schema: Schema, attempts: int) -> tuple[list[RowGroup], list[pa.Schema]]:
    """Read all footers and check all fields' columns: the row groups (of a file without rows one, empty) and each file's columns.

    InputError if a file is not a Parquet file, or a column is missing or of a wrong type.
    """

    def inspect(number: int, file: DataFile) -> tuple[list[RowGroup], pa.Schema]:
        with open_parquet(file, pre_buffer=True) as parquet:
            check_columns(parquet.schema_arrow, schema, str(file), has_label=False)
            indices = range(parquet.num_row_groups)
            prove(parquet, indices, schema.field_columns)
            sizes = [parquet.metadata.row_group(index).num_rows for index in indices]
            groups = [RowGroup(number, index, rows, rows) for index, rows in enumerate(sizes or [0])]
            return groups, parquet.schema_arrow

    inspected = for_each_file(files, inspect, NOT_PARQUET, attempts)
    return [group for groups, _ in inspected for group in groups], [columns for _, columns in inspected]


def chunks_of(row_groups: Sequence[RowGroup], chunk_rows: int = CHUNK_ROWS) -> list[Chunk]:
    """Cut row groups, file after file, into chunks of about `chunk_rows`."""
    chunks: list[Chunk] = []
    for group in row_groups:
        own = (group,) if group.stored_rows else ()
        last = chunks[-1] if chunks and chunks[-1].file == group.file else None
        if last is not None and last.num_rows < chunk_rows:
            chunks[-1] = last._replace(row_groups=last.row_groups + own)
        else:
            chunks.append(Chunk(group.file, last.number + 1 if last is not None else 0, own))
    return chunks


def deal(chunks: Sequence[Chunk], world_size: int) -> list[list[Chunk]]:
    """Give each rank its chunks: the largest first, each to the rank with the fewest rows; then in file order."""
    dealt: list[list[Chunk]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for chunk in sorted(chunks, key=lambda chunk: -chunk.num_rows):
        rank = loads.index(min(loads))
        dealt[rank].append(chunk)
        loads[rank] += chunk.num_rows
    return [sorted(own) for own in dealt]


def score_chunks(
    scorer: Scorer,
    reader: RowReader,
    dealt: Sequence[Sequence[Chunk]],
    process: Process,
    batch_rows: int,
    *,
    title: str = "",
) -> Generator[ScoredRows, None, None]:
    """Yield this rank's scored batches of `batch_rows` rows in order; all ranks' chunks are `dealt`. With a title, rank 0 shows a bar.

    InputError on every rank, after the last step, if any rank's row was faulty or its score is no number: its chunk was cut short.
    """
    faults: list[str] = []
    steps = max(sum(-(-part.stored_rows // batch_rows) for chunk in own for part in chunk.row_groups) for own in dealt)

    def batches() -> Iterator[tuple[Batch, tuple[Chunk, RowGroup, int, pa.RecordBatch, Columns] | None]]:
        schema, made = reader.encoder.schema, 0
        for chunk in dealt[process.rank]:
            try:
                for group in chunk.row_groups:
                    first_row = 0
                    for columns, extra in reader.scan(group, batch_rows):
                        made += 1
                        batch = gather([(columns, 0, columns.num_rows)], batch_rows, schema)
                        yield batch, (chunk, group, first_row, extra, columns)
                        first_row += columns.num_rows
            except InputError as error:
                faults.append(str(error))
        empty = reader.encoder.encode_all([])
        for _ in range(steps - made):
            yield gather([(empty, 0, 0)], batch_rows, schema), None

    total = sum(chunk.num_rows for chunks in dealt for chunk in chunks)
    with (
        RowBar(title, total, shown=process.is_first and bool(title)) as bar,
        closing(scorer.score(batches())) as scored,
    ):
        for each in scored:
            if each.note is not None:
                chunk, group, first_row, extra, columns = each.note
                bar.update(min(columns.num_rows * len(dealt), total - bar.n))
                try:
                    require_finite(each.logits, reader.name(group), first_row)
                except InputError as error:
                    faults.append(str(error))
                    continue
                yield ScoredRows(chunk, extra, each.logits, each.labels, columns.group_ids)
    with agreed(process):
        if faults:
            more = f" (and faults in {len(faults) - 1} more chunks)" if len(faults) > 1 else ""
            raise InputError(faults[0] + more)


def require_finite(logits: np.ndarray, place: str, first_row: int) -> None:
    """Raise InputError where a logit of (n, 1 + K) is not a number, in rows from `first_row` on of a row group."""
    bad = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if len(bad):
        raise InputError(
            f"{place}, kept row {first_row + int(bad[0])}: its score is not a number; a value is far beyond those of training, or the run's "
            "weights are not finite: fix the row, or train again with a lower rate"
        )
