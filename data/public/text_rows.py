"""Rows of CSV and JSON lines, compressed or not, by Arrow's readers: a block at a time, typed, and what cannot be read set aside.

A block ends with a record, so each is read by itself. Where Arrow refuses a block, its records are halved until the faulty ones stand alone:
a log without faults costs nothing more, and each fault some ten reads of a part of a block.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json

from data.errors import InputError, first_line
from data.public.raw_files import BLOCK_BYTES, NULLS
from data.reading.column_types import is_list
from data.reading.storage import DataFile, open_bytes

FIRST_BYTES = 1 << 20  # of each file that its types are taken from
SHOWN = 1_000  # letters of a rejected value that are kept
LONGEST_RECORD = 64  # lines, of a quoted value
TEXT_ENDINGS = {".csv": "csv", ".tsv": "csv", ".txt": "csv", ".json": "json", ".jsonl": "json", ".ndjson": "json"}
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".zstd": "zstd", ".lz4": "lz4"}
MARK = b"\xef\xbb\xbf"  # UTF-8's, at the beginning of a file
Make = Callable[[pa.Table], pa.Table]  # may raise FaultyValueError


class Form(NamedTuple):
    """How CSV is written."""

    delimiter: str = ""  # empty: a tab in .tsv, else a comma
    names: tuple[str, ...] = ()  # of the columns of files without a header
    list_separator: str = "|"


class Reject(NamedTuple):
    """A record that was left out."""

    file: str
    line: int  # its first, from 1
    column: str  # empty: the record as a whole
    value: str
    reason: str


class FaultyValueError(pa.ArrowInvalid):
    """What is wrong with a value of some rows; of one row it is that row's."""

    def __init__(self, column: str, value: object, reason: str) -> None:
        super().__init__(f"column {column!r}: {value!r}: {reason}")
        self.column, self.value, self.reason = column, str(value), reason


class TextFile:
    """One file."""

    def __init__(self, file: DataFile, form: Form) -> None:
        self.file, self.form = file, form
        name = file.name.lower()
        self.compression = next((kind for ending, kind in COMPRESSIONS.items() if name.endswith(ending)), "")
        self.is_csv = kind_of(file) != "json"
        self.delimiter = form.delimiter or ("\t" if ".tsv" in name else ",")
        self.has_quotes = (
            self.is_csv and self.delimiter != "\t"
        )  # between tabs Hive, MySQL and awk write a quote as a letter
        self.names = list(form.names)

    def tables(
        self, types: pa.Schema | None, reject: Callable[[Reject], object], make: Make = lambda table: table
    ) -> Iterator[pa.Table]:
        """Yield rows as `make` takes them, of `types`, or Arrow's choice for the first block; InputError if unpacking fails, or there is no header."""
        for line, block in self._blocks(FIRST_BYTES if types is None else BLOCK_BYTES):
            yield from self._readable([(line, block)], types, reject, make)
            if types is None:
                return

    def _blocks(self, size: int) -> Iterator[tuple[int, bytes]]:
        """Whole records, and the line that they begin with."""
        held, line = b"", 1
        try:
            with open_bytes(self.file) as raw:
                source = pa.CompressedInputStream(raw, self.compression) if self.compression else raw
                while piece := source.read(size):
                    held = held + piece if held else bytes(piece).removeprefix(MARK)
                    cut = self._end_of_record(held)
                    if self.is_csv and not self.names and cut:
                        start = held.index(b"\n") + 1
                        self.names, held, line, cut = self._header(held[:start]), held[start:], 2, cut - start
                    if cut:
                        yield line, held[:cut]
                        line, held = line + held.count(b"\n", 0, cut), held[cut:]
        except (OSError, pa.ArrowException) as error:
            raise InputError(
                f"{self.file}: line {line}: cannot be read ({first_line(error)}); fetch or write it again"
            ) from None
        if held and self.is_csv and not self.names:
            self._header(held)
        elif held:
            yield line, held

    def _header(self, line: bytes) -> list[str]:
        try:
            names = self._read_csv(line, None, header=True).column_names
        except pa.ArrowException as error:
            fault = f"{self.file}: line 1 is no header ({first_line(error)}); fix it, or pass --names"
            raise InputError(fault) from None
        if repeated := [name for name in names if names.count(name) > 1 or not name]:
            raise InputError(
                f"{self.file}: the header names {repeated[0]!r} {names.count(repeated[0])} times; name each column once, or pass --names"
            )
        return names

    def _end_of_record(self, block: bytes) -> int:
        """Where the last record ends that is whole: at a line's end outside of quotes."""
        last = end = block.rfind(b"\n") + 1
        quotes = block.count(b'"', 0, end) if self.has_quotes else 0
        while quotes % 2 and end:
            before = block.rfind(b"\n", 0, end - 1) + 1
            quotes -= block.count(b'"', before, end)
            end = before
        return end or last  # a quote that nothing closes is a letter like any other

    def _records(self, block: bytes) -> list[tuple[int, bytes]]:
        """The records of a block, and of each the number of its first line in the block."""
        lines = block.replace(b"\r\n", b"\n").splitlines(keepends=True)
        found, start = [], 0
        while start < len(lines):
            quotes, stop = lines[start].count(b'"') if self.has_quotes else 0, start + 1
            while quotes % 2 and stop < min(len(lines), start + LONGEST_RECORD):
                quotes, stop = quotes + lines[stop].count(b'"'), stop + 1
            stop = start + 1 if quotes % 2 else stop
            if record := b"".join(lines[start:stop]).strip(b"\r\n"):
                found.append((start, record + b"\n"))
            start = stop
        return found

    def _readable(
        self, records: list[tuple[int, bytes]], types: pa.Schema | None, reject: Callable[[Reject], object], make: Make
    ) -> Iterator[pa.Table]:
        """The tables of records, in their order, without those that cannot be read. One alone may be a block of many."""
        block = b"".join(record for _, record in records)
        try:
            table = self._read(block, types)
            if self.has_quotes and (len(table) != block.count(b"\n") or block.count(b'"') % 2):
                self._check_quotes(block, len(table), types)
            table = make(table)
        except pa.ArrowException as error:
            if len(records) == 1:
                line = records[0][0]
                records = [(line + offset, record) for offset, record in self._records(block)]
            if len(records) > 1:
                for half in (records[: len(records) // 2], records[len(records) // 2 :]):
                    yield from self._readable(half, types, reject, make)
            elif records:
                reject(self._reason(*records[0], types, error))
        else:
            yield table

    def _check_quotes(self, block: bytes, rows: int, types: pa.Schema | None) -> None:
        """Raise pa.ArrowInvalid if a quote that nothing closes has taken what follows it into its value."""
        records = [record for _, record in self._records(block)]
        if len(records) != rows or any(len(self._read(last * 2, types)) != 2 for last in records[-1:]):
            raise pa.ArrowInvalid("a quote is not closed")

    def _read(self, block: bytes, types: pa.Schema | None) -> pa.Table:
        if self.is_csv:
            return self._read_csv(block, types)
        reading = pa_json.ReadOptions(use_threads=False, block_size=len(block) + 1)
        return pa_json.read_json(pa.BufferReader(block), reading, pa_json.ParseOptions(explicit_schema=types))

    def _read_csv(self, block: bytes, types: pa.Schema | None, header: bool = False) -> pa.Table:
        lists = [field for field in types or () if is_list(field.type) and field.name in self.names]
        kinds = dict.fromkeys(self.names, pa.string())
        if types is not None:
            kinds = dict(zip(types.names, types.types, strict=True))
        names = None if header else self.names
        table = pa_csv.read_csv(
            pa.BufferReader(block),
            pa_csv.ReadOptions(use_threads=False, block_size=len(block) + 1, column_names=names),
            pa_csv.ParseOptions(
                delimiter=self.delimiter,
                newlines_in_values=self.has_quotes,
                quote_char='"' if self.has_quotes else False,
            ),
            pa_csv.ConvertOptions(column_types=kinds | {field.name: pa.string() for field in lists}, **NULLS),
        )
        for field in lists:
            place = table.column_names.index(field.name)
            parts = pc.split_pattern(table.column(place), self.form.list_separator)
            table = table.set_column(place, field, parts.cast(field.type))
        return table

    def _reason(self, line: int, record: bytes, types: pa.Schema | None, error: pa.ArrowException) -> Reject:
        """Find the column of a record that cannot be read."""
        text = record.decode(errors="replace").rstrip("\n")
        found = FaultyValueError("", text, _why(error))
        if isinstance(error, FaultyValueError):
            found = error
        elif types is not None:
            found = next(self._faulty_values(record, types), found)
        return Reject(str(self.file), line, found.column, found.value[:SHOWN], found.reason)

    def _faulty_values(self, record: bytes, types: pa.Schema) -> Iterator[FaultyValueError]:
        """Each value of a record that alone cannot be read as its column's type; none where the record is no record."""
        values: Any = {}
        with suppress(ValueError, IndexError):  # pa.ArrowInvalid is a ValueError
            own = pa.schema([(name, pa.binary()) for name in self.names])
            values = self._read_csv(record, own).to_pylist()[0] if self.is_csv else json.loads(record)
        for name, value in values.items() if isinstance(values, dict) else ():
            if name in types.names and value is not None:
                text = value.decode(errors="replace") if isinstance(value, bytes) else json.dumps(value)
                alone = record if self.is_csv else json.dumps({name: value}).encode()
                try:
                    self._read(alone, pa.schema([types.field(name)]))
                except pa.ArrowException as error:
                    yield FaultyValueError(name, text, _why(error))


def _why(error: pa.ArrowException) -> str:
    return re.sub(r"(In CSV column|Row) #\d+: ", "", first_line(error))  # of a record that was read alone


def kind_of(file: DataFile) -> str:
    """What a file's name says that it is: csv, json, or nothing of these."""
    endings = (f".{each}" for each in file.name.lower().split(".")[:0:-1])
    return next((TEXT_ENDINGS[each] for each in endings if each in TEXT_ENDINGS), "")
