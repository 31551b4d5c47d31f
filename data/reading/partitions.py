"""Which files a stream keeps: conditions on the keys of partition folders, such as `ds` in `ds=2024-05-01/`.

The values of a key are days or times, numbers, or texts: what all of them can be read as. Hive's null partition meets no condition.
"""

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any
from urllib.parse import unquote

from data.errors import InputError
from data.reading.conditions import IS_NOT_NULL, IS_NULL, Condition, form_of, parse_conditions, read_instant
from data.reading.storage import DataFile, FileList, path_parts
from data.schema import Schema

HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
HIVE_NULLS = {HIVE_NULL, ""}  # an empty value is written as null too
NUMBER = re.compile(r"-?\d+(\.\d+)?", re.ASCII)


def partition_of(file: DataFile) -> dict[str, str]:
    """The `key=value` folders on the way to a file, with what Hive and Spark write as %XX decoded."""
    pairs = (part.split("=", 1) for part in path_parts(file)[:-1] if "=" in part)
    return {unquote(key): unquote(value) for key, value in pairs}


def select_files(files: Sequence[DataFile], where: Sequence[str], schema: Schema) -> FileList:
    """Keep the files whose partitions meet the conditions; InputError if one is malformed, fits no folder, or leaves no file."""
    kept = list(files)
    partitions = {file: partition_of(file) for file in files}
    for condition in (each for text in where for each in parse_conditions(text)):
        if condition.name == schema.time_column:
            continue
        missing = [file for file in files if condition.name not in partitions[file]]
        if missing:
            known = sorted({key for values in partitions.values() for key in values})
            known += [schema.time_column] if schema.time_column else []
            raise InputError(
                f"where = {condition.text!r}: {missing[0]} lies in no folder {condition.name}=..., and it is not the schema's "
                f"time_column; known here: {', '.join(known) or 'nothing'}"
            )
        met = _values_met(condition, {partitions[file][condition.name] for file in files})
        kept = [file for file in kept if partitions[file][condition.name] in met]
    if not kept:
        raise InputError(
            f"where = {list(where)}: none of {len(files)} files is left, from {files[0]} to {files[-1]}; change the conditions"
        )
    return FileList(kept, files.others if isinstance(files, FileList) else ())


def _values_met(condition: Condition, values: set[str]) -> set[str]:
    """Which of a partition's values meet a condition; a null meets IS NULL only."""
    known = sorted(values - HIVE_NULLS)
    if condition.operator in (IS_NULL, IS_NOT_NULL):
        return values & HIVE_NULLS if condition.operator == IS_NULL else set(known)
    if not known:
        return set()
    read = next(read for read in (_time, _number, _text) if all(map(read, known)))
    ends = {value: end for value in known if (end := read(value))}
    if condition.last:
        ordered = sorted(set(ends.values()))
        if condition.last > len(ordered):
            raise InputError(
                f"where = {condition.text!r}: the files have {len(ordered)} values of {condition.name}; lower the number"
            )
        bound = ordered[-condition.last]
    else:
        bound = read(condition.bound)
    if wanted := _unfit(condition, read, ends, bound):
        such = ", ".join(f"{condition.name}={value}" for value in known[:2])
        raise InputError(f"where = {condition.text!r}: folders such as {such} want {wanted}; got {condition.bound!r}")
    assert bound is not None
    first, last = bound
    is_in = {
        "<": lambda begin: begin < first,
        "<=": lambda begin: begin < last or begin == first,
        ">": lambda begin: begin >= last and begin != first,
        ">=": lambda begin: begin >= first,
    }.get(condition.operator, lambda begin: begin == first or first <= begin < last)
    negated = condition.operator in ("!=", "<>")
    return {value for value, (begin, _) in ends.items() if is_in(begin) != negated}


Ends = tuple[Any, Any]  # where a value begins and, if it is longer than a point, ends


def _time(text: str) -> Ends | None:
    instant = read_instant(text)
    return instant and (instant.nanoseconds, instant.nanoseconds + instant.length)


def _number(text: str) -> Ends | None:
    return (Decimal(text), Decimal(text)) if NUMBER.fullmatch(text) else None


def _text(text: str) -> Ends:
    return text, text


def _unfit(condition: Condition, read: object, ends: Mapping[str, Ends], bound: Ends | None) -> str:
    """What folders want in place of a bound, in words; an empty string if they compare with it."""
    first, last = bound or (None, None)
    if read is _time:
        cuts = {"<": [first], ">=": [first], "<=": [last], ">": [last]}.get(condition.operator, [first, last])
        if bound is None:
            return "a day such as 2024-05-25"
        is_equal = condition.operator in ("=", "==", "!=", "<>")
        within = (end for end in ends.values() if not (is_equal and end[0] == first))
        cut = any(begin < each < end for begin, end in within for each in cuts)
        return "a day such as 2024-05-25, for rows of one folder lie on both sides of the bound" if cut else ""
    if read is _number:
        if bound is None:
            return "a number"
        forms = {form_of(int(begin)) for begin, _ in ends.values()}
        return "a number of the same form" if first and form_of(int(first)) not in forms else ""
    # texts compare letter by letter, which says nothing where digits stand in other places: 2024-6 and 2024-05, v9 and v10
    shapes, own = {re.sub(r"\d", "0", value) for value in ends}, re.sub(r"\d", "0", condition.bound)
    if condition.last or condition.operator in ("<", "<=", ">", ">="):
        shapes |= set() if condition.last else {own}
        fits = len(shapes) == 1 or not any("0" in shape for shape in shapes)
    else:
        fits = "0" not in own or own in shapes
    return (
        ""
        if fits
        else "a bound of one form with them (all days, all numbers, or texts with digits in the same places); write it so, rename folders, or name them by globs"
    )
