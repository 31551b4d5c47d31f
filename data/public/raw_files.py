"""Files as people download them: found, opened and read in pieces, with faults named."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from data.errors import InputError, first_line
from data.profile.units import naming

Sources = Mapping[str, list[Path]]  # a data set's file pattern -> the files found for it
Splits = Iterator[tuple[str, pa.Table]]  # split, rows; a split's rows in order

BLOCK_BYTES = 16 * 2**20
WHOLE_DIGEST_BYTES = 256 * 2**20
NULLS: dict[str, Any] = {"null_values": ["", "NULL", "null", "nan", "NaN"]}
NULLS |= {"strings_can_be_null": True, "quoted_strings_can_be_null": True}


def find_sources(name: str, src: Path, patterns: Sequence[str]) -> Sources:
    """Find files by patterns: globs, or alternatives separated by "|", of which the first that is there counts; InputError if one finds nothing."""
    found: dict[str, list[Path]] = {}
    for pattern in patterns:
        candidates = (sorted(path for path in src.glob(part) if path.is_file()) for part in pattern.split("|"))
        files = next(filter(None, candidates), [])
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


def count_lines(path: Path) -> int:
    """Number of lines, the last one with or without its line end, decompressing what its name says is compressed."""
    count, last = 0, b"\n"
    with naming(path, "cannot be read", "fetch it again"), pa.input_stream(str(path), compression="detect") as file:
        while block := file.read(BLOCK_BYTES):
            count += block.count(b"\n")
            last = block[-1:]
    return count + (last != b"\n")


def read_csv(
    path: Path, types: Mapping[str, pa.DataType], *, delimiter: str = ",", has_header: bool = True, label: str = ""
) -> Iterator[pa.Table]:
    """Read a delimited file, compressed or not, in pieces of about 16 MB; InputError if it, a column, a value or a `label` of 0 and 1 is faulty.

    `types` are those of the columns wanted, or without a header of all columns in order. Only values between commas may be quoted.
    """
    reading = pa_csv.ReadOptions(block_size=BLOCK_BYTES, column_names=None if has_header else list(types))
    converting = pa_csv.ConvertOptions(column_types=dict(types), include_columns=list(types), **NULLS)
    parsing = pa_csv.ParseOptions(delimiter=delimiter, quote_char='"' if delimiter == "," else False)
    try:
        with pa_csv.open_csv(path, reading, parsing, converting) as reader:
            line = 1 + has_header
            for batch in reader:
                if batch.num_rows:
                    if label:
                        _check_label(path, batch.column(label), label, line)
                    yield pa.Table.from_batches([batch])
                line += batch.num_rows
    except (OSError, KeyError, pa.ArrowException) as error:
        raise InputError(
            f"{path}: {first_line(error)}; wanted columns {', '.join(list(types)[:6])}{', ...' if len(types) > 6 else ''}: "
            "check that this is the data set's own file, or fetch it again"
        ) from None


def _check_label(path: Path, column: pa.Array, name: str, line: int) -> None:
    is_good = pc.fill_null(pc.is_in(column, pa.array([0, 1], column.type)), False)
    if not pc.all(is_good).as_py():
        row = pc.index(is_good, False).as_py()
        value = column[row].as_py()
        found = "is empty" if value is None else f"= {value}"
        raise InputError(
            f"{path}: line {line + row}: {name} {found}: wanted 0 or 1; fix or remove the line, or fetch the file again"
        )


def read_csv_whole(path: Path, types: Mapping[str, pa.DataType], **options: Any) -> pa.Table:
    """Read a file that is held in memory; see `read_csv`."""
    empty = pa.schema(list(types.items())).empty_table()
    return pa.concat_tables([empty, *read_csv(path, types, **options)]).combine_chunks()


def hex_to_int(path: Path, rows: pa.Table, names: Sequence[str]) -> pa.Table:
    """Turn columns of up to eight hexadecimal digits into int64, hashed ten times as fast; InputError if a value is no such number."""
    for name in names:
        try:
            numbers = pc.binary_join_element_wise("0x", rows[name], "").cast(pa.uint32()).cast(pa.int64())
        except pa.ArrowInvalid as error:
            raise InputError(f"{path}: column {name}: wanted 8 hexadecimal digits ({error}); fetch it again") from None
        rows = rows.set_column(rows.column_names.index(name), name, numbers)
    return rows


def with_clock(rows: pa.Table, moments: pa.ChunkedArray, hour: str = "hour", weekday: str = "weekday") -> pa.Table:
    """Append hour and weekday (Monday is 0), int32, of moments in seconds."""
    clock = moments.cast(pa.timestamp("s"))
    for name, part in ((hour, pc.hour(clock)), (weekday, pc.day_of_week(clock))):
        rows = rows.append_column(name, part.cast(pa.int32()))
    return rows


def join(rows: pa.Table, column: str, table: pa.Table, key: str) -> pa.Table:
    """Append a side table's other columns to rows where `column` is its `key`, of a repeated key the first; nulls where it lacks that key."""
    found = table.drop_columns([key]).take(pc.index_in(rows[column], table[key]))
    for name in found.column_names:
        rows = rows.append_column(name, found[name])
    return rows


def by_split(rows: pa.Table, key: np.ndarray, valid: int, test: int) -> Splits:
    """Split rows by a number (n,) for each: below `valid` they train, below `test` they validate, from there on they test."""
    split = np.searchsorted([valid, test], key, side="right")
    for number, name in enumerate(("train", "valid", "test")):
        chosen = split == number
        if chosen.all():
            yield name, rows
        elif chosen.any():
            yield name, rows.filter(pa.array(chosen))


def by_position(pieces: Iterable[pa.Table], valid: int, test: int) -> Splits:
    """Split rows as `by_split` does, by their position."""
    start = 0
    for rows in pieces:
        yield from by_split(rows, np.arange(start, start + len(rows)), valid, test)
        start += len(rows)
