"""Which files a stream keeps: conditions on the keys of partition folders, such as `ds` in `ds=2024-05-01/`.

The values of a key are days or times, numbers, or texts: what all of them can be read as. Hive's null partition meets no condition.
"""

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any
from urllib.parse import unquote

from data.errors import InputError
from data.reading.conditions import DAY, Condition, Instant, form_of, parse_conditions, read_instant
from data.reading.storage import DataFile, path_parts
from data.schema import Schema

HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
HIVE_NULLS = {HIVE_NULL, ""}  # an empty value is written as null too
NUMBER = re.compile(r"-?\d+(\.\d+)?", re.ASCII)


def partition_of(file: DataFile) -> dict[str, str]:
    """The `key=value` folders on the way to a file, with what Hive and Spark write as %XX decoded."""
    pairs = (part.split("=", 1) for part in path_parts(file)[:-1] if "=" in part)
    return {unquote(key): unquote(value) for key, value in pairs}


def select_files(files: Sequence[DataFile], where: Sequence[str], schema: Schema) -> list[DataFile]:
    """Keep the files whose partitions meet the conditions.

    Raises:
        InputError: a condition is malformed, names nothing known, cannot be compared with the folders, or leaves no file.
    """
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
            f"where = {list(where)}: none of {len(files)} files is left; the first is {files[0]}; change the conditions"
        )
    return kept


def _values_met(condition: Condition, values: set[str]) -> set[str]:
    """Which of a partition's values meet a condition; Hive's null meets none."""
    known = sorted(values - HIVE_NULLS)
    instants = {value: instant for value in known if (instant := read_instant(value))}
    numbers = {value: Decimal(value) for value in known if NUMBER.fullmatch(value)}
    if len(instants) == len(known):
        ends = {value: _ends(instant) for value, instant in instants.items()}
        return _met(condition, ends, _instant_bound(condition, ends))
    if len(numbers) == len(known):
        points = {value: (number, number) for value, number in numbers.items()}
        return _met(condition, points, _number_bound(condition, list(numbers.values())))
    texts = {value: (value, value) for value in known}
    return _met(condition, texts, _text_bound(condition, known))


def _met(condition: Condition, ends: dict[str, tuple[Any, Any]], bound: tuple[Any, Any]) -> set[str]:
    """The values that meet a condition, each by where it begins; with `last N` the bound is the N-th last value."""
    if condition.last:
        ordered = sorted(set(ends.values()))
        if condition.last > len(ordered):
            raise InputError(
                f"where = {condition.text!r}: the files have {len(ordered)} values of {condition.name}; lower the number"
            )
        bound = ordered[-condition.last]
    first, last = bound
    is_in = {
        "<": lambda begin: begin < first,
        "<=": lambda begin: begin < last or begin == first,
        ">": lambda begin: begin >= last and begin != first,
        ">=": lambda begin: begin >= first,
    }.get(condition.operator, lambda begin: begin == first or first <= begin < last)
    negated = condition.operator in ("!=", "<>")
    return {value for value, (begin, _) in ends.items() if is_in(begin) != negated}


def _ends(instant: Instant) -> tuple[int, int]:
    """Where the day or the nanosecond of an instant begins and ends."""
    return instant.nanoseconds, instant.nanoseconds + (DAY if instant.is_day else 1)


def _refused(condition: Condition, example: str, wanted: str) -> InputError:
    return InputError(
        f"where = {condition.text!r}: folders such as {condition.name}={example} want {wanted}; got {condition.bound!r}"
    )


def _instant_bound(condition: Condition, ends: dict[str, tuple[int, int]]) -> tuple[int, int]:
    instant = read_instant(condition.bound)
    example = next(iter(ends), HIVE_NULL)
    if condition.last:
        return 0, 0
    if instant is None:
        raise _refused(condition, example, "a day such as 2024-05-25")
    first, last = _ends(instant)
    cuts = {"<": (first,), ">=": (first,), "<=": (last,), ">": (last,)}.get(condition.operator, (first, last))
    if any(begin < cut < end for begin, end in ends.values() for cut in cuts):
        raise _refused(
            condition,
            example,
            "a day such as 2024-05-25, for rows of one folder lie on both sides of the bound",
        )
    return first, last


def _number_bound(condition: Condition, known: list[Decimal]) -> tuple[Decimal, Decimal]:
    if condition.last:
        return Decimal(), Decimal()
    if not NUMBER.fullmatch(condition.bound):
        raise _refused(condition, str(known[0]), "a number")
    number = Decimal(condition.bound)
    if number and form_of(int(number)) not in {form_of(int(each)) for each in known}:
        raise _refused(condition, str(known[0]), "a number of the same form")
    return number, number


def _text_bound(condition: Condition, known: list[str]) -> tuple[str, str]:
    """Texts compare letter by letter, which says nothing where digits stand in other places: 2024-6 and 2024-05, v9 and v10."""
    shapes, own = {re.sub(r"\d", "0", value) for value in known}, re.sub(r"\d", "0", condition.bound)
    if condition.last or condition.operator in ("<", "<=", ">", ">="):
        shapes |= set() if condition.last else {own}
        fits = len(shapes) == 1 or not any("0" in shape for shape in shapes)
    else:
        fits = "0" not in own or own in shapes
    if not fits:
        such = ", ".join(f"{condition.name}={value}" for value in known[:2])
        raise InputError(
            f"where = {condition.text!r}: folders such as {such} cannot be ordered by or compared with {condition.bound!r}: write folders and "
            "bound in one form (all days, all integers, or texts with digits in the same places)"
        )
    return condition.bound, condition.bound
