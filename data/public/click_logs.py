"""Three click logs from their publishers' own files: Criteo's two releases, Avazu's, and Taobao's display ads.

Criteo (Kaggle, and days of 1 TB): 13 counts I1..I13 and 26 hashed ids C1..C26 in tab-separated lines without a header, in order of time; it
has no time column, so splits go by line. Avazu (2014): ten days of hours, twelve columns of context, site, app and device, and eight without
a meaning. Taobao (Alimama, 6 to 13 May 2017): impressions, joined with their ads and users; the behaviour log is not read.
"""

import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from data.errors import InputError
from data.public import raw_files as raw
from data.public.raw_files import Sources, Splits


def _types(names: Mapping[str, str]) -> dict[str, pa.DataType]:
    return {column: pa.type_for_alias(name) for column, name in names.items()}


_SETS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
CRITEO, AVAZU, TAOBAO = (_SETS[name] for name in ("criteo", "avazu", "taobao"))
CRITEO_IDS = [f"C{number}" for number in range(1, 27)]
COUNTS = dict.fromkeys((f"I{number}" for number in range(1, 14)), "int32")
CRITEO_TYPES = _types({"label": "int8", **COUNTS, **dict.fromkeys(CRITEO_IDS, "string")})
AVAZU_TYPES = _types(
    {"click": "int8", **dict.fromkeys(AVAZU["numbers"], "int32"), **dict.fromkeys(AVAZU["hex"], "string")}
)
BEIJING_SECONDS = 8 * 3_600  # ahead of UTC


def kaggle_rows(sources: Sources) -> Splits:
    """Seven days in order: the first six train, the halves of the last validate and test, cut by line."""
    (path,) = sources[CRITEO["kaggle_files"][0]]
    lines = raw.count_lines(path)
    yield from raw.by_position(_criteo(path), lines * 12 // 14, lines * 13 // 14)


def terabyte_rows(sources: Sources) -> Splits:
    """Days in order: all but the last train, the halves of the last validate and test, cut by line; InputError if a day is missing."""
    days = {_day_of(path): path for path in sources[CRITEO["terabyte_files"][0]]}
    first, last = min(days), max(days)
    missing = [day for day in range(first, last) if day not in days]
    if first == last or missing:
        wanted = f"day_{missing[0]}" if missing else "at least two days"
        raise InputError(f"{days[last].parent}: holds day_{first} to day_{last}: wanted {wanted} too; fetch it")
    for day in range(first, last):
        for rows in _criteo(days[day]):
            yield "train", rows
    yield from raw.by_position(_criteo(days[last]), 0, raw.count_lines(days[last]) // 2)


def _day_of(path: Path) -> int:
    number = path.name.removeprefix("day_").split(".")[0]
    if not number.isdigit():
        raise InputError(f"{path}: wanted names such as day_0 or day_0.gz; rename or remove it")
    return int(number)


def _criteo(path: Path) -> Iterator[pa.Table]:
    for rows in raw.read_csv(path, CRITEO_TYPES, delimiter="\t", has_header=False, label="label"):
        yield raw.hex_to_int(path, rows, CRITEO_IDS)


def avazu_rows(sources: Sources) -> Splits:
    """Eight days train, 29 October validates, 30 October tests. Adds hour_of_day and weekday (Monday is 0)."""
    (path,) = sources[AVAZU["files"][0]]
    for piece in raw.read_csv(path, AVAZU_TYPES, label="click"):
        piece = raw.hex_to_int(path, piece, AVAZU["hex"])
        hour = piece["hour"]
        moments = pc.strptime(hour.cast(pa.string()), format="%y%m%d%H", unit="s", error_is_null=True)
        piece = raw.with_clock(piece, moments, "hour_of_day")
        yield from raw.by_split(piece, hour.to_numpy(), AVAZU["valid"], AVAZU["test"])


def taobao_rows(sources: Sources) -> Splits:
    """Days 1 to 6 train, day 7 validates, day 8 tests, as its publishers' papers hold out the last day."""
    (samples,), (ads,), (users,) = (sources[name] for name in TAOBAO["files"])
    ads = raw.read_csv_whole(ads, _types(TAOBAO["ads"]))
    users = raw.read_csv_whole(users, _types(TAOBAO["users"]))
    users = users.rename_columns([name.strip() for name in users.column_names])
    for piece in raw.read_csv(samples, _types(TAOBAO["samples"]), label="clk"):
        second = piece["time_stamp"]
        piece = raw.join(raw.join(piece, "adgroup_id", ads, "adgroup_id"), "user", users, "userid")
        piece = raw.with_clock(piece, pc.add(second, BEIJING_SECONDS))
        piece = piece.append_column("label", piece["clk"])
        yield from raw.by_split(piece, second.to_numpy(), TAOBAO["valid"], TAOBAO["test"])
