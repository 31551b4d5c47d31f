"""Criteo's two releases: 13 counts I1..I13 and 26 hashed ids C1..C26 in tab-separated lines without a header, in order of time.

Neither release has a time column, so splits go by line.
"""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from data.errors import InputError
from data.public.raw_files import Sources, Splits, by_position, count_lines, hex_to_int, read_csv

COUNTS = tuple(f"I{number}" for number in range(1, 14))
IDS = tuple(f"C{number}" for number in range(1, 27))
TYPES = {"label": pa.int8(), **{name: pa.int32() for name in COUNTS}, **{name: pa.string() for name in IDS}}

KAGGLE_FILES = ("train.txt|train.txt.gz|train.tsv|dac/train.txt",)
TERABYTE_FILES = ("day_[0-9]*",)


def kaggle_rows(sources: Sources) -> Splits:
    """Seven days in order: the first six train, the halves of the last validate and test, cut by line."""
    (path,) = sources[KAGGLE_FILES[0]]
    lines = count_lines(path)
    yield from by_position(_read(path), lines * 12 // 14, lines * 13 // 14)


def terabyte_rows(sources: Sources) -> Splits:
    """Days in order: all but the last train, the halves of the last validate and test, cut by line; InputError if a day is missing."""
    days = {_day_of(path): path for path in sources[TERABYTE_FILES[0]]}
    first, last = min(days), max(days)
    missing = [day for day in range(first, last) if day not in days]
    if first == last or missing:
        wanted = f"day_{missing[0]}" if missing else "at least two days"
        raise InputError(f"{days[last].parent}: holds day_{first} to day_{last}: wanted {wanted} too; fetch it")
    for day in range(first, last):
        for rows in _read(days[day]):
            yield "train", rows
    yield from by_position(_read(days[last]), 0, count_lines(days[last]) // 2)


def _day_of(path: Path) -> int:
    number = path.name.removeprefix("day_").split(".")[0]
    if not number.isdigit():
        raise InputError(f"{path}: wanted names such as day_0 or day_0.gz; rename or remove it")
    return int(number)


def _read(path: Path) -> Iterator[pa.Table]:
    for rows in read_csv(path, TYPES, delimiter="\t", has_header=False, label="label"):
        yield hex_to_int(path, rows, IDS)
