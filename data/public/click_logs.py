"""Three click logs from their publishers' own files: Criteo's two releases, Avazu's, and Taobao's display ads.

Criteo (Kaggle, and days of 1 TB): 13 counts I1..I13 and 26 hashed ids C1..C26 in tab-separated lines without a header, in order of time; it
has no time column, so splits go by line. Avazu (2014): ten days of hours, twelve columns of context, site, app and device, and eight without
a meaning. Taobao (Alimama, 6 to 13 May 2017): impressions, joined with their ads and users; the behaviour log is not read.
"""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from data.errors import InputError
from data.public import raw_files as raw
from data.public.raw_files import Sources, Splits

CRITEO_COUNTS = tuple(f"I{number}" for number in range(1, 14))
CRITEO_IDS = tuple(f"C{number}" for number in range(1, 27))
CRITEO_TYPES = {
    "label": pa.int8(),
    **dict.fromkeys(CRITEO_COUNTS, pa.int32()),
    **dict.fromkeys(CRITEO_IDS, pa.string()),
}

KAGGLE_FILES = ("train.txt|train.txt.gz|train.tsv|dac/train.txt",)
TERABYTE_FILES = ("day_[0-9]*",)

AVAZU_FILES = ("train.gz|train.csv|train.csv.gz|train",)
AVAZU_HEX = (
    "site_id", "site_domain", "site_category", "app_id", "app_domain", "app_category",
    "device_id", "device_ip", "device_model",
)  # fmt: skip
AVAZU_NUMBERS = ("C1", "banner_pos", "device_type", "device_conn_type", *(f"C{number}" for number in range(14, 22)))
AVAZU_TYPES = {
    "click": pa.int8(),
    **dict.fromkeys(("hour", *AVAZU_NUMBERS), pa.int32()),
    **dict.fromkeys(AVAZU_HEX, pa.string()),
}
AVAZU_VALID, AVAZU_TEST = 14102900, 14103000  # YYMMDDHH; the log runs from 14102100 to 14103023

SAMPLE, ADS, USERS = TAOBAO_FILES = ("raw_sample.csv*", "ad_feature.csv*", "user_profile.csv*")
SAMPLE_IDS, AD_IDS = ("user", "time_stamp", "adgroup_id"), ("cate_id", "campaign_id", "customer", "brand")
SAMPLE_TYPES = {**dict.fromkeys(SAMPLE_IDS, pa.int64()), "pid": pa.string(), "clk": pa.int8()}
AD_TYPES = {"adgroup_id": pa.int64(), **dict.fromkeys(AD_IDS, pa.int32()), "price": pa.float64()}
LAST = "new_user_class_level "  # with a space in the published header
USER_COLUMNS = (
    "cms_segid", "cms_group_id", "final_gender_code", "age_level", "pvalue_level", "shopping_level", "occupation", LAST,
)  # fmt: skip
USER_TYPES = {"userid": pa.int64(), **dict.fromkeys(USER_COLUMNS, pa.int32())}
BEIJING_SECONDS = 8 * 3_600  # ahead of UTC
TAOBAO_VALID, TAOBAO_TEST = 1_494_518_400, 1_494_604_800  # 12 and 13 May 2017, 00:00 in Beijing


def kaggle_rows(sources: Sources) -> Splits:
    """Seven days in order: the first six train, the halves of the last validate and test, cut by line."""
    (path,) = sources[KAGGLE_FILES[0]]
    lines = raw.count_lines(path)
    yield from raw.by_position(_criteo(path), lines * 12 // 14, lines * 13 // 14)


def terabyte_rows(sources: Sources) -> Splits:
    """Days in order: all but the last train, the halves of the last validate and test, cut by line; InputError if a day is missing."""
    days = {_day_of(path): path for path in sources[TERABYTE_FILES[0]]}
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
    (path,) = sources[AVAZU_FILES[0]]
    for piece in raw.read_csv(path, AVAZU_TYPES, label="click"):
        piece = raw.hex_to_int(path, piece, AVAZU_HEX)
        hour = piece["hour"]
        moments = pc.strptime(hour.cast(pa.string()), format="%y%m%d%H", unit="s", error_is_null=True)
        piece = raw.with_clock(piece, moments, "hour_of_day")
        yield from raw.by_split(piece, hour.to_numpy(), AVAZU_VALID, AVAZU_TEST)


def taobao_rows(sources: Sources) -> Splits:
    """Days 1 to 6 train, day 7 validates, day 8 tests, as its publishers' papers hold out the last day."""
    ads = raw.read_csv_whole(sources[ADS][0], AD_TYPES)
    users = raw.read_csv_whole(sources[USERS][0], USER_TYPES)
    users = users.rename_columns([name.strip() for name in users.column_names])
    for piece in raw.read_csv(sources[SAMPLE][0], SAMPLE_TYPES, label="clk"):
        second = piece["time_stamp"]
        piece = raw.join(raw.join(piece, "adgroup_id", ads, "adgroup_id"), "user", users, "userid")
        piece = raw.with_clock(piece, pc.add(second, BEIJING_SECONDS))
        piece = piece.append_column("label", piece["clk"])
        yield from raw.by_split(piece, second.to_numpy(), TAOBAO_VALID, TAOBAO_TEST)
