"""Taobao's display-ad log (Alimama, 6 to 13 May 2017): impressions, joined with their ads and users.

The behaviour log, which would give histories, is a download of its own and is not read.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data.public.raw_files import Lookup, Sources, Splits, by_split, read_csv, read_csv_whole

SAMPLE, ADS, USERS = FILES = ("raw_sample.csv*", "ad_feature.csv*", "user_profile.csv*")
SAMPLE_TYPES = {
    "user": pa.int64(),
    "time_stamp": pa.int64(),
    "adgroup_id": pa.int64(),
    "pid": pa.string(),
    "clk": pa.int8(),
}
AD_TYPES = {
    "adgroup_id": pa.int64(),
    "cate_id": pa.int32(),
    "campaign_id": pa.int32(),
    "customer": pa.int32(),
    "brand": pa.int32(),
    "price": pa.float64(),
}
LAST = "new_user_class_level "  # with a space in the published header
USER_COLUMNS = (
    "cms_segid", "cms_group_id", "final_gender_code", "age_level", "pvalue_level", "shopping_level", "occupation", LAST,
)  # fmt: skip
USER_TYPES = {"userid": pa.int64(), **dict.fromkeys(USER_COLUMNS, pa.int32())}
FIRST_SECOND = 1_494_000_000  # 6 May 2017, 00:00 in Beijing, where days begin
SECONDS_PER_DAY = 86_400
SATURDAY = 5  # 6 May 2017, Monday being 0
VALID_DAY, TEST_DAY = 6, 7


def rows(sources: Sources) -> Splits:
    """Days 1 to 6 train, day 7 validates, day 8 tests, as its publishers' papers hold out the last day."""
    ads = Lookup(read_csv_whole(sources[ADS][0], AD_TYPES), "adgroup_id")
    users = read_csv_whole(sources[USERS][0], USER_TYPES)
    profiles = Lookup(users.rename_columns([name.strip() for name in users.column_names]), "userid")
    for piece in read_csv(sources[SAMPLE][0], SAMPLE_TYPES):
        second = piece["time_stamp"].to_numpy() - FIRST_SECOND
        day = second // SECONDS_PER_DAY
        piece = profiles.join(ads.join(piece, "adgroup_id"), "user")
        piece = piece.append_column("hour", pa.array((second % SECONDS_PER_DAY // 3600).astype(np.int32)))
        piece = piece.append_column("weekday", pa.array(((day + SATURDAY) % 7).astype(np.int32)))
        piece = piece.append_column("label", pc.cast(piece["clk"], pa.int8()))
        yield from by_split(piece, np.searchsorted([VALID_DAY, TEST_DAY], day, side="right"))
