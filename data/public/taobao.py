"""Taobao's display-ad log (Alimama, 6 to 13 May 2017): impressions, joined with their ads and users.

The behaviour log, which would give histories, is a download of its own and is not read.
"""

import pyarrow as pa
import pyarrow.compute as pc

from data.public.raw_files import Sources, Splits, by_split, join, read_csv, read_csv_whole, with_clock

SAMPLE, ADS, USERS = FILES = ("raw_sample.csv*", "ad_feature.csv*", "user_profile.csv*")
SAMPLE_IDS, AD_IDS = ("user", "time_stamp", "adgroup_id"), ("cate_id", "campaign_id", "customer", "brand")
SAMPLE_TYPES = {**dict.fromkeys(SAMPLE_IDS, pa.int64()), "pid": pa.string(), "clk": pa.int8()}
AD_TYPES = {"adgroup_id": pa.int64(), **dict.fromkeys(AD_IDS, pa.int32()), "price": pa.float64()}
LAST = "new_user_class_level "  # with a space in the published header
USER_COLUMNS = (
    "cms_segid", "cms_group_id", "final_gender_code", "age_level", "pvalue_level", "shopping_level", "occupation", LAST,
)  # fmt: skip
USER_TYPES = {"userid": pa.int64(), **dict.fromkeys(USER_COLUMNS, pa.int32())}
BEIJING_SECONDS = 8 * 3_600  # ahead of UTC
VALID_SECOND, TEST_SECOND = 1_494_518_400, 1_494_604_800  # 12 and 13 May 2017, 00:00 in Beijing


def rows(sources: Sources) -> Splits:
    """Days 1 to 6 train, day 7 validates, day 8 tests, as its publishers' papers hold out the last day."""
    ads = read_csv_whole(sources[ADS][0], AD_TYPES)
    users = read_csv_whole(sources[USERS][0], USER_TYPES)
    users = users.rename_columns([name.strip() for name in users.column_names])
    for piece in read_csv(sources[SAMPLE][0], SAMPLE_TYPES, label="clk"):
        second = piece["time_stamp"]
        piece = join(join(piece, "adgroup_id", ads, "adgroup_id"), "user", users, "userid")
        piece = with_clock(piece, pc.add(second, BEIJING_SECONDS))
        piece = piece.append_column("label", piece["clk"])
        yield from by_split(piece, second.to_numpy(), VALID_SECOND, TEST_SECOND)
