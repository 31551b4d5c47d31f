"""Files as people download them: found, opened and read in pieces, with faults named."""

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from data.errors import InputError, first_line

Sources = Mapping[str, list[Path]]  # a data set's file pattern -> the files found for it
Splits = Iterator[tuple[str, pa.Table]]  # split, rows; a split's rows in order

BLOCK_BYTES = 16 * 2**20
WHOLE_DIGEST_BYTES = 256 * 2**20
NULLS = ("", "NULL", "null", "nan", "NaN")


def find_sources(name: str, src: Path, patterns: Sequence[str]) -> Sources:
    """Find a data set's files in a folder or its subfolder `data`.

    Args:
        name: of the data set, for messages.
        src: the folder.
        patterns: globs; alternatives of one file are parted by "|", the first that is there counts.

    Raises:
        InputError: a pattern finds nothing.
    """
    found: dict[str, list[Path]] = {}
    for pattern in patterns:
        candidates = [
            sorted(path for path in folder.glob(part) if path.is_file())
            for part in pattern.split("|")
            for folder in (src, src / "data")
        ]
        files = next((each for each in candidates if each), [])
        if not files:
            wanted = ", ".join(each.replace("|", " or ") for each in patterns)
            first = pattern.split("|")[0]
            raise InputError(
                f"{src / first}: no such file; data set {name!r} needs {wanted}: pass their folder as --src"
            )
        found[pattern] = files
    return found


def digest(path: Path) -> str:
    """SHA-256 of a file; of a large one, of its size and its first and last parts."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        if size <= WHOLE_DIGEST_BYTES:
            return hashlib.file_digest(file, "sha256").hexdigest()
        hasher = hashlib.sha256(str(size).encode())
        hasher.update(file.read(WHOLE_DIGEST_BYTES // 4))
        file.seek(size - WHOLE_DIGEST_BYTES // 4)
        hasher.update(file.read())
    return f"ends:{hasher.hexdigest()}"


@contextmanager
def _readable(path: Path) -> Iterator[BinaryIO]:
    """Open a file, decompressing what its name says is compressed; name it if it cannot be read."""
    try:
        with io.BufferedReader(pa.input_stream(str(path), compression="detect")) as file:  # type: ignore[arg-type]
            yield file
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: cannot be read ({first_line(error)}); fetch it again") from None


def count_lines(path: Path) -> int:
    """Number of lines, the last one with or without its line end."""
    count, last = 0, b"\n"
    with _readable(path) as file:
        while block := file.read(BLOCK_BYTES):
            count += block.count(b"\n")
            last = block[-1:]
    return count + (last != b"\n")


def read_lines(path: Path) -> Iterator[bytes]:
    """Lines of a file, with their ends.

    Raises:
        InputError: the file cannot be read.
    """
    with _readable(path) as file:
        yield from file


def read_csv(
    path: Path, types: Mapping[str, pa.DataType], *, delimiter: str = ",", has_header: bool = True
) -> Iterator[pa.Table]:
    """Read a delimited file in pieces of about 16 MB.

    Args:
        path: the file; .gz and the like are decompressed.
        types: the columns wanted, and their types; without a header all columns, in the file's order.
        delimiter: between two values.
        has_header: whether the first line names the columns.

    Raises:
        InputError: the file cannot be read, a column is missing, or a value is not of its type.
    """
    reading = pa_csv.ReadOptions(block_size=BLOCK_BYTES, column_names=None if has_header else list(types))
    converting = pa_csv.ConvertOptions(
        column_types=dict(types),
        include_columns=list(types),
        null_values=list(NULLS),
        strings_can_be_null=True,
        quoted_strings_can_be_null=True,
    )
    parsing = pa_csv.ParseOptions(delimiter=delimiter, quote_char=False if delimiter == "\t" else '"')
    try:
        with pa_csv.open_csv(path, reading, parsing, converting) as reader:
            for batch in reader:
                if batch.num_rows:
                    yield pa.Table.from_batches([batch])
    except (OSError, KeyError, pa.ArrowException) as error:
        raise InputError(
            f"{path}: {first_line(error)}; wanted columns {', '.join(list(types)[:6])}{', ...' if len(types) > 6 else ''}: "
            "check that this is the data set's own file, or fetch it again"
        ) from None


def read_csv_whole(path: Path, types: Mapping[str, pa.DataType]) -> pa.Table:
    """Read a side table, which is held in memory; see `read_csv`."""
    pieces = list(read_csv(path, types))
    return (
        pa.concat_tables(pieces).combine_chunks() if pieces else pa.schema(list(types.items())).empty_table()
    )


def hex_to_int(path: Path, rows: pa.Table, names: Sequence[str]) -> pa.Table:
    """Turn columns of up to eight hexadecimal digits into int64: half the bytes of the text, and hashed ten times as fast.

    Raises:
        InputError: a value is not hexadecimal.
    """
    for name in names:
        try:
            numbers = pc.binary_join_element_wise("0x", rows[name], "").cast(pa.uint32()).cast(pa.int64())
        except pa.ArrowInvalid as error:
            raise InputError(
                f"{path}: column {name}: wanted 8 hexadecimal digits ({error}); fetch it again"
            ) from None
        rows = replace_column(rows, name, numbers)
    return rows


def weekday_of(dates: np.ndarray) -> pa.Array:
    """Weekdays (n,) int32, Monday being 0, of dates (n,) written as YYYYMMDD."""
    months = np.datetime64("0000-01", "M") + (dates // 10_000 * 12 + dates // 100 % 100 - 1)
    days = months.astype("datetime64[D]") + (dates % 100 - 1)
    return pa.array(((days.astype(np.int64) + 3) % 7).astype(np.int32))  # 1970-01-01 was a Thursday


def replace_column(table: pa.Table, name: str, values: pa.ChunkedArray | pa.Array) -> pa.Table:
    """Put new values in a column's place, or behind the others."""
    index = table.column_names.index(name) if name in table.column_names else -1
    return table.append_column(name, values) if index < 0 else table.set_column(index, name, values)


class Lookup:
    """A side table by its integer key: rows for keys, nulls for keys that it lacks. Of a repeated key the last row counts."""

    def __init__(self, table: pa.Table, key: str) -> None:
        keys = table[key].to_numpy()
        order = np.argsort(keys, kind="stable")
        last = np.ones(len(order), bool)
        last[:-1] = keys[order][1:] != keys[order][:-1]
        self.keys = keys[order][last]
        self.table = table.drop_columns([key]).take(pa.array(order[last]))

    def join(self, rows: pa.Table, column: str) -> pa.Table:
        """Append the side table's columns to rows, found by `column`."""
        wanted = pc.fill_null(rows[column], -1).to_numpy()
        places, known = np.zeros(len(wanted), np.int64), np.zeros(len(wanted), bool)
        if len(self.keys):
            places = np.searchsorted(self.keys, wanted).clip(max=len(self.keys) - 1)
            known = self.keys[places] == wanted
        found = self.table.take(pa.array(places, mask=~known))
        for name in found.column_names:
            rows = rows.append_column(name, found[name])
        return rows


def by_split(rows: pa.Table, split: np.ndarray, names: Sequence[str] = ("train", "valid", "test")) -> Splits:
    """Part rows by a number (n,) for each: 0 train, 1 valid, 2 test."""
    for number, name in enumerate(names):
        chosen = split == number
        if chosen.all():
            yield name, rows
        elif chosen.any():
            yield name, rows.filter(pa.array(chosen))
