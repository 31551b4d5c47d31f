"""Avazu's click log (2014): ten days of hours, twelve columns of context, site, app and device, and eight without a meaning."""

import pyarrow as pa
import pyarrow.compute as pc

from data.public.raw_files import Sources, Splits, by_split, hex_to_int, read_csv, with_clock

FILES = ("train.gz|train.csv|train.csv.gz|train",)
HEX = (
    "site_id", "site_domain", "site_category", "app_id", "app_domain", "app_category",
    "device_id", "device_ip", "device_model",
)  # fmt: skip
NUMBERS = ("C1", "banner_pos", "device_type", "device_conn_type", *(f"C{number}" for number in range(14, 22)))
TYPES = {
    "click": pa.int8(),
    "hour": pa.int32(),
    **{name: pa.int32() for name in NUMBERS},
    **{name: pa.string() for name in HEX},
}
VALID_HOUR, TEST_HOUR = 14102900, 14103000  # YYMMDDHH; the log runs from 14102100 to 14103023


def rows(sources: Sources) -> Splits:
    """Eight days train, 29 October validates, 30 October tests. Adds hour_of_day and weekday (Monday is 0)."""
    (path,) = sources[FILES[0]]
    for piece in read_csv(path, TYPES, label="click"):
        piece = hex_to_int(path, piece, HEX)
        hour = piece["hour"]
        moments = pc.strptime(hour.cast(pa.string()), format="%y%m%d%H", unit="s", error_is_null=True)
        piece = with_clock(piece, moments, "hour_of_day")
        yield from by_split(piece, hour.to_numpy(), VALID_HOUR, TEST_HOUR)
