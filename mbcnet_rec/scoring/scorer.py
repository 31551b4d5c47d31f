"""Parquet rows in, logits out, over all ranks: what `mbcnet evaluate` and `mbcnet predict` share.

Files are cut into pieces at row groups, whatever the world size; a rank scores whole pieces, in order. Sharded lookups are collective, so
every rank takes the same number of steps: who is done early goes on with empty batches. A faulty row ends its own piece only, and is
raised on every rank when all other pieces are done.

Shapes: B rows of one rank's batch, K branches.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch.distributed as dist

from data.errors import InputError
from data.reading.column_types import check_columns
from data.reading.columns import Columns
from data.reading.config import StreamOptions
from data.reading.encode import Encoder, Place
from data.reading.files import prove, read_contents
from data.reading.keys import first_line
from data.reading.selection import Selection
from data.reading.storage import DAMAGE, DataFile, open_parquet
from data.schema import Schema
from data.stream.batch import Batch, gather
from mbcnet_rec.runtime.process import Process
from mbcnet_rec.training.built import Built
from mbcnet_rec.training.pipeline import evaluate_batches

PIECE_ROWS = 262_144  # a piece ends with the row group that reaches them


class Piece(NamedTuple):
    """Neighbouring row groups of one file, which one rank scores."""

    file: int  # place in the list of files
    number: int  # of the piece in its file
    row_groups: tuple[tuple[int, int], ...]  # index and rows of each

    @property
    def num_rows(self) -> int:
        """Rows in the file, kept or not."""
        return sum(rows for _, rows in self.row_groups)

    def num_steps(self, batch_rows: int) -> int:
        """Batches that `Reader.read` makes of it."""
        return sum(-(-rows // batch_rows) for _, rows in self.row_groups)


class Scored(NamedTuple):
    """Rows of one batch of one piece, in the file's order."""

    piece: Piece
    rows: pa.RecordBatch  # the extra columns
    columns: Columns
    logits: np.ndarray  # (n, 1 + K) float32, fused first


@dataclass(frozen=True)
class Reader:
    """Reads pieces as encoded rows.

    Attributes:
        files: all of them.
        encoder: of the schema; without labels a column of zeros stands in.
        has_labels: whether the label column is read.
        extra: columns to pass through, besides those that the schema reads.
        selection: which rows to keep; None: all.
    """

    files: Sequence[DataFile]
    encoder: Encoder
    has_labels: bool
    extra: tuple[str, ...] = ()
    selection: Selection | None = None

    def read(self, piece: Piece, batch_rows: int) -> Iterator[tuple[pa.RecordBatch, Columns]]:
        """Yield at most `batch_rows` kept rows at a time: the extra columns, and the encoded ones.

        Raises:
            InputError: a value is faulty, or the file is damaged.
        """
        schema = self.encoder.schema
        columns = [name for name in schema.columns if self.has_labels or name != schema.label]
        with self._naming_damage(piece):
            for rows, place in self._kept(piece, batch_rows, columns):
                extra = rows.select(list(self.extra))
                if not self.has_labels:
                    if schema.label in rows.schema.names:
                        rows = rows.drop_columns([schema.label])
                    rows = rows.append_column(schema.label, pa.array(np.zeros(rows.num_rows, np.int8)))
                yield extra, self.encoder.encode(rows, place)

    def read_extra(self, piece: Piece, batch_rows: int) -> Iterator[pa.RecordBatch]:
        """Yield the extra columns of the kept rows only, nothing encoded.

        Raises:
            InputError: the file is damaged.
        """
        sampled = self.selection is not None and self.selection.samples
        with self._naming_damage(piece):
            for rows, _ in self._kept(piece, batch_rows, [self.encoder.schema.label] if sampled else []):
                yield rows.select(list(self.extra))

    def _kept(
        self, piece: Piece, batch_rows: int, columns: Sequence[str]
    ) -> Iterator[tuple[pa.RecordBatch, Place]]:
        """Kept rows of a piece, with these columns and the extra ones, and where they stand."""
        file, time_column = self.files[piece.file], self.encoder.schema.time_column
        timed = self.selection is not None and self.selection.conditions and time_column
        names = list(dict.fromkeys([*columns, *([time_column] if timed else []), *self.extra]))
        with open_parquet(file) as parquet:
            for row_group, _ in piece.row_groups:
                first_row = 0
                batches = parquet.iter_batches(
                    batch_rows, row_groups=[row_group], columns=names, use_threads=False
                )
                for rows in _of_exact_size(batches, batch_rows):
                    place = Place(str(file), row_group, first_row)
                    first_row += rows.num_rows
                    if self.selection is not None and self.selection.filters:
                        kept = self.selection.mask(rows, file, place)
                        rows = rows.filter(pa.array(kept))
                        place = replace(place, rows=place.first_row + np.flatnonzero(kept))
                    yield rows, place

    @contextmanager
    def _naming_damage(self, piece: Piece) -> Iterator[None]:
        """Turn what Arrow says of a damaged file into a fault of that file."""
        try:
            yield
        except DAMAGE as error:
            raise InputError(
                f"{self.files[piece.file]}: cannot be decoded ({first_line(error)}); the file is damaged: write it again"
            ) from None


def _of_exact_size(batches: Iterable[pa.RecordBatch], batch_rows: int) -> Iterator[pa.RecordBatch]:
    """Batches of `batch_rows` rows, the last one of what is left: Arrow may make smaller ones than it was asked for."""
    parts: list[pa.RecordBatch] = []
    held = 0
    for rows in batches:
        parts.append(rows)
        held += rows.num_rows
        while held >= batch_rows:
            joined = pa.concat_batches(parts) if len(parts) > 1 else parts[0]
            yield joined.slice(0, batch_rows)
            parts, held = [joined.slice(batch_rows)], held - batch_rows
    if held:
        yield pa.concat_batches(parts)


class LabelledRows(NamedTuple):
    """Rows of a split, ready to be read piece by piece. num_rows: kept."""

    reader: Reader
    pieces: list[Piece]
    num_rows: int


def labelled_rows(
    files: Sequence[DataFile],
    schema: Schema,
    options: StreamOptions,
    extra: Sequence[str],
    *,
    warn: bool = False,
) -> LabelledRows:
    """Read all footers, and cut into pieces what the options keep of the files.

    Args:
        files: at least one.
        schema: what the columns must be.
        options: which rows to keep.
        extra: columns to pass through.
        warn: whether to warn once of pages without checksums.

    Raises:
        InputError: a file is no Parquet file, a column is missing or of a wrong type, or no row is left.
    """
    selection = Selection(options, schema, files)
    row_groups = read_contents(files, schema, selection, warn=warn).row_groups
    pieces = pieces_of_groups((group.file, group.index, group.stored_rows) for group in row_groups)
    reader = Reader(files, Encoder(schema), has_labels=True, extra=tuple(extra), selection=selection)
    return LabelledRows(reader, pieces, sum(group.num_rows for group in row_groups))


def unlabelled_pieces(files: Sequence[DataFile], schema: Schema) -> list[Piece]:
    """Read all footers, check the columns but the label, and cut files into pieces. A file without rows is one piece of none.

    Raises:
        InputError: a file is no Parquet file, or a column is missing or of a wrong type.
    """
    groups: list[tuple[int, int, int]] = []
    for number, file in enumerate(files):
        try:
            with open_parquet(file, pre_buffer=True) as parquet:
                arrow_schema = parquet.schema_arrow
                if schema.label in arrow_schema.names:
                    arrow_schema = arrow_schema.remove(arrow_schema.names.index(schema.label))
                check_columns(arrow_schema.append(pa.field(schema.label, pa.int8())), schema, str(file))
                wanted = [name for name in schema.columns if name != schema.label]
                prove(parquet, range(parquet.num_row_groups), wanted)
                sizes = [
                    parquet.metadata.row_group(index).num_rows for index in range(parquet.num_row_groups)
                ]
        except DAMAGE as error:
            raise InputError(
                f"{file}: not a readable Parquet file ({first_line(error)}); write it again or remove it"
            ) from None
        groups += [(number, index, rows) for index, rows in enumerate(sizes)] or [(number, 0, 0)]
    return pieces_of_groups(groups)


def pieces_of_groups(groups: Iterable[tuple[int, int, int]]) -> list[Piece]:
    """Cut row groups, given as (file, index, rows) in order, into pieces of about PIECE_ROWS; rows 0 stand for no row group."""
    pieces: list[Piece] = []
    for file, index, rows in groups:
        own = ((index, rows),) if rows else ()
        last = pieces[-1] if pieces and pieces[-1].file == file else None
        if last is not None and last.num_rows < PIECE_ROWS:
            pieces[-1] = last._replace(row_groups=last.row_groups + own)
        else:
            pieces.append(Piece(file, last.number + 1 if last is not None else 0, own))
    return pieces


def deal(pieces: Sequence[Piece], world_size: int) -> list[list[Piece]]:
    """Give each rank its pieces: the largest first, each to the rank with the fewest rows; then in file order."""
    dealt: list[list[Piece]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for piece in sorted(pieces, key=lambda piece: -piece.num_rows):
        rank = loads.index(min(loads))
        dealt[rank].append(piece)
        loads[rank] += piece.num_rows
    return [sorted(own) for own in dealt]


class Scorer:
    """Runs a sharded model over pieces. Every rank calls `score` together, each with its own pieces.

    Args:
        built: the model.
        process: this rank.
        reader: of the files.
        batch_rows: rows of one rank's batch.
        autocast: context of the forward pass.
    """

    def __init__(
        self,
        built: Built,
        process: Process,
        reader: Reader,
        batch_rows: int,
        autocast: Callable[[], Any],
    ) -> None:
        self.built, self.process, self.reader = built, process, reader
        self.batch_rows, self.autocast = batch_rows, autocast
        self._read: deque[tuple[Piece, pa.RecordBatch, Columns] | Piece | None] = deque()
        self._faults: list[str] = []

    def score(
        self, dealt: Sequence[Sequence[Piece]], progress: Callable[[int], Any] = lambda rows: None
    ) -> Iterator[Scored | Piece]:
        """Yield the scored batches of each own piece in order, and after the last of a piece the piece itself.

        A piece with a faulty row is cut short, and not followed by itself.

        Args:
            dealt: the pieces of each rank, equal on all ranks.
            progress: called with the number of own rows that a step scored.

        Raises:
            InputError: on every rank, after the last step, if a row of any rank was faulty.
        """
        self._faults.clear()
        steps = max(sum(piece.num_steps(self.batch_rows) for piece in pieces) for pieces in dealt)
        batches = self._batches(dealt[self.process.rank], steps)
        for outputs in evaluate_batches(self.built.model, self.built.optimizer, batches, self.autocast):
            read = self._read.popleft()
            while isinstance(read, Piece):
                yield read
                read = self._read.popleft()
            if read is not None:
                piece, extra, columns = read
                logits = outputs.logits[: columns.num_rows].float().cpu().numpy()
                progress(columns.num_rows)
                yield Scored(piece, extra, columns, logits)
        while self._read:
            read = self._read.popleft()
            if isinstance(read, Piece):
                yield read
        refuse_faults(self._faults, self.process)

    def _batches(self, pieces: Sequence[Piece], steps: int) -> Iterator[Batch]:
        """Batches of the own pieces, then empty ones up to `steps`. Runs in the pipeline's loading thread."""
        made = 0
        for piece in pieces:
            try:
                for extra, columns in self.reader.read(piece, self.batch_rows):
                    self._read.append((piece, extra, columns))
                    made += 1
                    yield self._batch(columns)
            except InputError as error:
                self._faults.append(str(error))
            else:
                self._read.append(piece)
        nothing = self.reader.encoder.encode_all([])
        for _ in range(steps - made):
            self._read.append(None)
            yield self._batch(nothing)

    def _batch(self, columns: Columns) -> Batch:
        return gather([(columns, 0, columns.num_rows)], self.batch_rows, self.reader.encoder.schema)


def refuse_faults(faults: Sequence[str], process: Process) -> None:
    """Raise the faults of all ranks on every rank.

    Raises:
        InputError: naming the first one, and how many more there are.
    """
    everyone: list[list[str]] = [list(faults)]
    if process.world_size > 1:
        everyone = [[] for _ in range(process.world_size)]
        dist.all_gather_object(everyone, list(faults))
    found = [fault for each in everyone for fault in each]
    if found:
        more = f" (and faults in {len(found) - 1} more places)" if len(found) > 1 else ""
        raise InputError(found[0] + more)
