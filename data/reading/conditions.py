"""Conditions as users write them, `NAME OP BOUND` as in SQL, the days and times that texts and integers stand for, and the files that are kept.

    ds >= 2024-05-01 and ds < 2024-05-05    ds < last 7    hour = 9, city <> 'new york'    "event time" < '2024-05-05 12:00'    ds IS NOT NULL

`and` and commas join conditions; quotes hold names and bounds with blanks. There is no OR, IN or BETWEEN. Conditions on the keys of partition
folders, such as `ds` in `ds=2024-05-01/`, choose files: the values of a key are days or times, numbers, or texts, what all of them can be read as.
Hive's null partition meets no condition.
"""

import datetime
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, NamedTuple
from urllib.parse import unquote

from data.errors import InputError
from data.reading.storage import DataFile, FileList, path_parts
from data.schema import Schema

TERM = re.compile(
    r"""\s*(?:"(?P<quoted>[^"]+)"|`(?P<ticked>[^`]+)`|(?P<name>[^\s<>=!'"`(),;]+))
    \s*(?P<operator>(?P<null>\bis\s+(?:not\s+)?null\b)|<=|>=|<>|==|!=|=|<|>)
    \s*(?(null)|(?:'(?P<single>[^']*)'|"(?P<double>[^"]*)"|(?P<last>last\s+[^\s,]+)|(?P<time>\d{4}-\d+-\d+\ \d+:[^\s,]+)|(?P<plain>[^\s<>=!'"`(),;]+)))
    \s*(?P<end>$|,|\band\b)""",
    re.VERBOSE | re.IGNORECASE,
)
INSTANT = re.compile(
    r"(?P<year>\d{4})-(?P<month>\d{1,2})-(?P<day>\d{1,2})"
    r"(?:(?P<sep>[T _-])(?P<hour>\d{1,2})(?::(?P<minute>\d{2})(?::(?P<second>\d{2})(?:\.(?P<fraction>\d{1,9}))?)?)?"
    r" ?(?:Z|(?P<sign>[+-])(?P<hours>\d{2}):?(?P<minutes>\d{2}))?)?",
    re.ASCII,
)
COMPACT = re.compile(
    r"(?P<year>(?:19|2[01])\d{2})(?P<month>\d{2})(?P<day>\d{2})"
    r"(?:[T _-]?(?P<hour>\d{2})(?::?(?P<minute>\d{2}))?(?::?(?P<second>\d{2}))?)?",
    re.ASCII,
)
INTEGER = re.compile(r"-?\d{1,39}", re.ASCII)
NANOSECONDS = 10**9
HOUR, DAY = 3_600 * NANOSECONDS, 86_400 * NANOSECONDS
EPOCH, SECOND = datetime.datetime(1970, 1, 1), datetime.timedelta(seconds=1)
IS_NULL, IS_NOT_NULL = "is null", "is not null"
HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
HIVE_NULLS = {HIVE_NULL, ""}  # an empty value is written as null too
NUMBER = re.compile(r"-?\d+(\.\d+)?", re.ASCII)
# integers that are written as days or times: digits -> name and nanoseconds of one
WRITTEN = {
    8: ("days written yyyymmdd", DAY),
    10: ("hours written yyyymmddhh", HOUR),
    12: ("minutes written yyyymmddhhmm", HOUR // 60),
    14: ("seconds written yyyymmddhhmmss", NANOSECONDS),
}
# integers since 1970: the number of digits tells the unit (from 1973 until the year 5138)
UNITS = (("seconds", 10**11, NANOSECONDS), ("milliseconds", 10**14, 10**6), ("microseconds", 10**17, 10**3))


class Condition(NamedTuple):
    """One condition: the entry of `where` that it stands in, its own words there, and its parts; `last`: N of `last N`, or 0."""

    text: str
    own: str
    name: str
    operator: str
    bound: str
    last: int


class Instant(NamedTuple):
    """Nanoseconds since 1970 in UTC, and how many of them a text names: a DAY, an HOUR or one."""

    nanoseconds: int
    length: int


def parse_conditions(text: str) -> list[Condition]:
    """Take one entry of `where` apart; InputError if it is not made of conditions NAME OP BOUND."""
    found, position, end = [], 0, ","
    while end:
        match = TERM.match(text, position)
        if not match:
            raise InputError(
                f"where = {text!r}: wanted NAME OP BOUND, for example 'ds < last 7', joined by 'and' or commas; OP is one of "
                "= != < <= > >=; a name or bound with blanks needs quotes; for OR, IN or LIKE name files by globs in place of conditions, "
                "for BETWEEN write >= and <="
            )
        part = match.groupdict()
        name = part["quoted"] or part["ticked"] or part["name"]
        operator = " ".join(part["operator"].lower().split())
        bounds = [part[key] for key in ("single", "double", "last", "time", "plain") if part[key] is not None]
        number = re.fullmatch(r"last\s+0*([1-9]\d*)", part["last"] or "", re.IGNORECASE)
        says_nothing = (part["plain"] or "").lower() in ("last", "null") or (part["last"] and not number)
        if bounds == [""] or says_nothing:
            raise InputError(
                f"where = {text!r}: the bound {bounds[0]!r} says nothing; write a value, a day such as 2024-05-25, `last N` with N of 1 or "
                f"more, or {name} IS NULL"
            )
        last = int(number.group(1)) if number else 0
        own = text[position : match.start("end")].strip()
        found.append(Condition(text, own, name, operator, bounds[0] if bounds else "", last))
        position, end = match.end(), part["end"]
    return found


def read_instant(text: str) -> Instant | None:
    """The day or time that a text names, in UTC unless it names an offset: 2024-05-25, 2024-5-25, 20240525, 2024-05-25T12:00:30.5Z.

    Whole hours are written 2024-05-25-12 or 2024052512. None if it names none, or one that no calendar has.
    """
    match = COMPACT.fullmatch(text) or INSTANT.fullmatch(text)
    if not match:
        return None
    part = match.groupdict(default="")
    keys = ("year", "month", "day", "hour", "minute", "second")
    try:
        year, month, day, hour, minute, second = (int(part[key] or 0) for key in keys)
        seconds = (datetime.datetime(year, month, day, hour, minute, second) - EPOCH) // SECOND
    except ValueError:
        return None
    if part.get("sign"):
        seconds -= int(f"{part['sign']}1") * (int(part["hours"]) * 3600 + int(part["minutes"]) * 60)
    nanoseconds = seconds * NANOSECONDS + int(part.get("fraction", "").ljust(9, "0"))
    is_hour = part["hour"] and not part["minute"] and part.get("sep") not in ("T", " ")
    length = DAY if not part["hour"] else HOUR if is_hour else 1
    return Instant(nanoseconds, length)


class Form(NamedTuple):
    """What integers look like: a name, empty for no time, the nanoseconds of one, and the digits of those that are written as days or times."""

    name: str
    step: int
    digits: int

    def first_from(self, nanoseconds: int) -> int:
        """The first integer of this form that stands for no earlier instant."""
        whole = -(-nanoseconds // self.step)
        if not self.digits:
            return whole
        when = EPOCH + datetime.timedelta(seconds=whole * self.step // NANOSECONDS)
        return int(f"{when.year:04}{when:%m%d%H%M%S}"[: self.digits])


def form_of(number: int) -> Form:
    """What one integer looks like: a day such as 20240525, an hour such as 2024052512, one of UNITS since 1970, or nothing."""
    number = min(abs(number), 10**19)  # of more digits only folders are
    text = str(number)
    if read_instant(text):
        return Form(*WRITTEN[len(text)], len(text))
    if number < 10**8:
        return Form("", 0, 0)
    return next((Form(name, step, 0) for name, limit, step in UNITS if number < limit), Form("nanoseconds", 1, 0))


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
    return FileList(kept, files.others, files.versions) if isinstance(files, FileList) else FileList(kept)


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
    one_form = "a bound of one form with them (all days, all numbers, or texts with digits in the same places)"
    return "" if fits else f"{one_form}; write it so, rename folders, or name them by globs"
