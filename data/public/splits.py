"""Rows on their way into split files: buffered to even row groups, several files for a large split, counted."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data.errors import InputError
from data.reading.columns import Place
from data.reading.numbers import read_labels
from data.schema import Schema

SPLITS: tuple[str, ...] = ("train", "valid", "test")


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
        """Append rows to a split; return the rows of all splits so far.

        Raises:
            InputError: a column is missing, or a label is not 0 or 1.
        """
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
        """Write what waits. Returns rows and label rate of each split.

        Raises:
            InputError: a split has no rows.
        """
        for split, rows in self.rows.items():
            if not rows:
                total = f"{sum(self.rows.values()):,}"
                raise InputError(
                    f"data set {self.schema.name!r}: the {split} split got no rows of {total}; check that --src holds all of it"
                )
            self._flush(split, 1)
        return {split: {"rows": rows, "label_rate": self.ones[split] / rows} for split, rows in self.rows.items()}


def require_columns(name: str, rows: pa.Table, columns: Sequence[str]) -> None:
    """Check that a data set's file has the columns that it should have.

    Raises:
        InputError: it lacks one.
    """
    for column in columns:
        if column not in rows.column_names:
            raise InputError(f"data set {name!r}: column {column!r} is missing; check that --src holds this data set")
