"""Avazu's click log (2014): ten days of hours, twelve columns of context, site, app and device, and eight without a meaning."""

import numpy as np
import pyarrow as pa

from data.public.raw_files import Sources, Splits, by_split, hex_to_int, read_csv, weekday_of

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
VALID_DAY, TEST_DAY = 141029, 141030  # YYMMDD; the log runs from 141021 to 141030


def rows(sources: Sources) -> Splits:
    """Eight days train, 29 October validates, 30 October tests. Adds hour_of_day and weekday (Monday is 0)."""
    (path,) = sources[FILES[0]]
    for piece in read_csv(path, TYPES):
        piece = hex_to_int(path, piece, HEX)
        hour = piece["hour"].to_numpy()  # YYMMDDHH
        day = hour // 100
        piece = piece.append_column("hour_of_day", pa.array(hour % 100))
        piece = piece.append_column("weekday", weekday_of(20_000_000 + day))
        yield from by_split(piece, np.searchsorted([VALID_DAY, TEST_DAY], day, side="right"))
