"""Conditions as users write them, `NAME OP BOUND` as in SQL, and the days and times that texts and integers stand for.

    ds >= 2024-05-01 and ds < 2024-05-05      ds < last 7      hour = 9, city <> 'new york'      "event time" < '2024-05-05 12:00'

`and` and commas join conditions; quotes hold names and bounds with blanks. There is no OR, IN or BETWEEN.
"""

import datetime
import re
from typing import NamedTuple

from data.errors import InputError

TERM = re.compile(
    r"""\s*(?:"(?P<quoted>[^"]+)"|`(?P<ticked>[^`]+)`|(?P<name>[^\s<>=!'"`(),;]+))
    \s*(?P<operator><=|>=|<>|==|!=|=|<|>)
    \s*(?:'(?P<single>[^']*)'|"(?P<double>[^"]*)"|(?P<last>last\s+[^\s,]+)|(?P<time>\d{4}-\d+-\d+\ \d+:[^\s,]+)|(?P<plain>[^\s<>=!'"`(),;]+))
    \s*(?P<end>$|,|\band\b)""",
    re.VERBOSE | re.IGNORECASE,
)
INSTANT = re.compile(
    r"(\d{4})-(\d{1,2})-(\d{1,2})"
    r"(?:[T ](\d{1,2})(?::(\d{2})(?::(\d{2})(?:\.(\d{1,9}))?)?)? ?(?:(Z)|([+-])(\d{2}):?(\d{2}))?)?"
)
INTEGER = re.compile(r"-?\d+", re.ASCII)
NANOSECONDS = 10**9
DAY = 86_400 * NANOSECONDS
EPOCH = datetime.date(1970, 1, 1)
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
    """Nanoseconds since 1970 in UTC, and whether a text named a day and no time of day."""

    nanoseconds: int
    is_day: bool


def parse_conditions(text: str) -> list[Condition]:
    """Take one entry of `where` apart.

    Raises:
        InputError: it is not made of conditions NAME OP BOUND.
    """
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
        bounds = [part[key] for key in ("single", "double", "last", "time", "plain") if part[key] is not None]
        number = re.fullmatch(r"last\s+0*([1-9]\d*)", part["last"] or "", re.IGNORECASE)
        if (part["last"] and not number) or bounds[0] == "" or (part["plain"] or "").lower() == "last":
            raise InputError(
                f"where = {text!r}: the bound {bounds[0]!r} says nothing; write a value, a day such as 2024-05-25, or `last N` with N "
                "of 1 or more"
            )
        found.append(
            Condition(text, name, part["operator"], bounds[0], int(number.group(1)) if number else 0)
        )
        position, end = match.end(), part["end"]
    return found


def read_instant(text: str) -> Instant | None:
    """The day or time that a text names, in UTC unless it names an offset: 2024-05-25, 2024-5-25, 20240525, 2024-05-25T12:00:30.5Z.

    None if it names none, or one that no calendar has.
    """
    day = _compact_day(text)
    if day is not None:
        return Instant((day - EPOCH).days * DAY, is_day=True)
    match = INSTANT.fullmatch(text)
    if not match:
        return None
    year, month, day_of_month, hour, minute, second, fraction, _, sign, hours, minutes = match.groups()
    try:
        date = datetime.date(int(year), int(month), int(day_of_month))
        time = datetime.time(int(hour or 0), int(minute or 0), int(second or 0))
    except ValueError:
        return None
    seconds = time.hour * 3600 + time.minute * 60 + time.second
    if sign:
        seconds -= int(f"{sign}1") * (int(hours) * 3600 + int(minutes) * 60)
    nanoseconds = int((fraction or "").ljust(9, "0"))
    return Instant((date - EPOCH).days * DAY + seconds * NANOSECONDS + nanoseconds, is_day=hour is None)


def _compact_day(text: str) -> datetime.date | None:
    """The day that eight digits name."""
    if len(text) != 8 or not text.isdecimal() or not "1900" <= text[:4] <= "2199":
        return None
    try:
        return datetime.date(int(text[:4]), int(text[4:6]), int(text[6:]))
    except ValueError:
        return None


def compact_day(nanoseconds: int) -> int:
    """The day of an instant as an integer such as 20240525."""
    return int((EPOCH + datetime.timedelta(days=nanoseconds // DAY)).strftime("%Y%m%d"))


def form_of(number: int) -> str:
    """What an integer instant looks like: a day such as 20240525, one of UNITS since 1970, digits such as 2024052512, or "" for none."""
    text = str(abs(number))
    if _compact_day(text):
        return "days written yyyymmdd"
    if len(text) in (10, 12, 14) and _compact_day(text[:8]):
        pairs = [int(text[at : at + 2]) for at in range(8, len(text), 2)]
        if all(pair < most for pair, most in zip(pairs, (24, 60, 60), strict=False)):
            return f"{len(text)} digits that begin with a day"
    if abs(number) < 10**8:
        return ""
    return next((name for name, limit, _ in UNITS if abs(number) < limit), "nanoseconds")


def unit_of(form: str) -> int:
    """Nanoseconds of one unit of integers of a form; 0 for those that do not count time."""
    return 1 if form == "nanoseconds" else next((unit for name, _, unit in UNITS if name == form), 0)
