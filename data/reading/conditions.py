"""Conditions as users write them, `NAME OP BOUND` as in SQL, and the days and times that texts and integers stand for.

    ds >= 2024-05-01 and ds < 2024-05-05    ds < last 7    hour = 9, city <> 'new york'    "event time" < '2024-05-05 12:00'    ds IS NOT NULL

`and` and commas join conditions; quotes hold names and bounds with blanks. There is no OR, IN or BETWEEN.
"""

import datetime
import re
from typing import NamedTuple

from data.errors import InputError

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
    """One condition, as written and taken apart; `last`: N of `last N`, or 0."""

    text: str
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
                "= != < <= > >=; a name or bound with blanks needs quotes; for OR, IN or LIKE name files by globs in place of conditions, for BETWEEN write >= and <="
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
        found.append(Condition(text, name, operator, bounds[0] if bounds else "", last))
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
