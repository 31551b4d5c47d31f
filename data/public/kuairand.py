"""KuaiRand (Kuaishou, 8 April to 8 May 2022), any of Pure, 1K and 27K: video impressions of the usual policy, with users and videos.

The log of randomly shown videos is not read: it is another distribution, meant for other questions.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data.public.raw_files import (
    Lookup,
    Sources,
    Splits,
    by_split,
    read_csv,
    read_csv_whole,
    replace_column,
    weekday_of,
)

EARLY, LATE, USERS, VIDEOS = FILES = (
    "log_standard_4_08_to_4_21*.csv*",
    "log_standard_4_22_to_5_08*.csv*",
    "user_features*.csv*",
    "video_features_basic*.csv*",
)
LOG_TYPES = {
    "user_id": pa.int64(),
    "video_id": pa.int64(),
    "date": pa.int32(),
    "hourmin": pa.int32(),
    "time_ms": pa.int64(),
    "is_click": pa.int8(),
    "tab": pa.int32(),
}
USER_WORDS = (
    "user_active_degree", "follow_user_num_range", "fans_user_num_range", "friend_user_num_range", "register_days_range",
)  # fmt: skip
USER_FLAGS = ("is_lowactive_period", "is_live_streamer", "is_video_author")
ONE_HOT = tuple(f"onehot_feat{number}" for number in range(18))
USER_TYPES = {
    "user_id": pa.int64(),
    **{name: pa.string() for name in USER_WORDS},
    **{name: pa.float64() for name in (*USER_FLAGS, *ONE_HOT)},
}
VIDEO_TYPES = {
    "video_id": pa.int64(),
    "author_id": pa.int64(),
    "video_type": pa.string(),
    "upload_type": pa.string(),
    "video_duration": pa.float64(),
    "music_id": pa.float64(),
    "music_type": pa.float64(),
    "tag": pa.string(),
}
VALID_DATE, TEST_DATE = 20220501, 20220502  # the last seven days test, the day before them validates


def rows(sources: Sources) -> Splits:
    """8 to 30 April train, 1 May validates, the last seven days test."""
    users = read_csv_whole(sources[USERS][0], USER_TYPES)
    videos = pa.concat_tables(
        [read_csv_whole(path, VIDEO_TYPES) for path in sources[VIDEOS]]
    ).combine_chunks()
    for name in (*USER_FLAGS, *ONE_HOT):  # ids written as 3.0, because some are missing
        users = replace_column(users, name, users[name].cast(pa.int32()))
    for name in ("music_id", "music_type"):
        videos = replace_column(videos, name, videos[name].cast(pa.int64()))
    videos = replace_column(videos, "tags", pc.split_pattern(videos["tag"], ",")).drop_columns(["tag"])
    by_user, by_video = Lookup(users, "user_id"), Lookup(videos, "video_id")
    for piece in (rows for path in (*sources[EARLY], *sources[LATE]) for rows in read_csv(path, LOG_TYPES)):
        date = piece["date"].to_numpy()
        piece = by_video.join(by_user.join(piece, "user_id"), "video_id")
        piece = piece.append_column("hour", pc.divide(piece["hourmin"], 100))
        piece = piece.append_column("weekday", weekday_of(date))
        piece = piece.append_column("label", piece["is_click"])
        yield from by_split(piece, np.searchsorted([VALID_DATE, TEST_DATE], date, side="right"))
