"""Frappe, an app-usage log with context: lines "label index:1 index:1 ..." of ten fields, split by its publishers.

A line names one index for each field, in this order; indices of all fields count on from field to field.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from data.errors import InputError
from data.public.raw_files import Sources, Splits, read_lines

FIELDS = ("user", "item", "daytime", "weekday", "isweekend", "homework", "cost", "weather", "country", "city")
FILES = (
    "frappe.train.libfm|train.libfm|train.libsvm",
    "frappe.validation.libfm|validation.libfm|valid.libfm|valid.libsvm",
    "frappe.test.libfm|test.libfm|test.libsvm",
)
PIECE_LINES = 50_000


def rows(sources: Sources) -> Splits:
    """The publishers' own split, 7 : 2 : 1 by file."""
    for split, pattern in zip(("train", "valid", "test"), FILES, strict=True):
        for piece in _pieces(sources[pattern][0]):
            yield split, piece


def _pieces(path: Path) -> Iterator[pa.Table]:
    lines: list[bytes] = []
    number = 0
    for line in read_lines(path):
        lines.append(line)
        if len(lines) == PIECE_LINES:
            yield _parse(path, number, lines)
            number, lines = number + len(lines), []
    if lines:
        yield _parse(path, number, lines)


def _parse(path: Path, first: int, lines: list[bytes]) -> pa.Table:
    values = np.empty((len(lines), len(FIELDS)), np.int32)
    labels = np.empty(len(lines), np.int8)
    for row, line in enumerate(lines):
        label, *parts = line.split()
        try:
            labels[row] = float(label) > 0  # the files say 1 and -1, or 1 and 0
            values[row] = [int(part.partition(b":")[0]) for part in parts]
        except ValueError:
            raise InputError(
                f"{path}: line {first + row + 1}: wanted 'label index:1 ...' of {len(FIELDS)} fields, found "
                f"{len(parts)} of them; fetch the file again"
            ) from None
    columns = {"label": labels} | {name: values[:, column] for column, name in enumerate(FIELDS)}
    return pa.table(columns)
