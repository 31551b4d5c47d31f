"""MovieLens from GroupLens' own files: the csv releases (latest, latest-small, 20M, 25M, 32M).

A rating of four stars or more is the label. Splits follow the clock over all users, so ratings are sorted in memory
(32 bytes each); titles, genres and tags are joined piece by piece.
"""

import re
from bisect import bisect_left, insort

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data.errors import InputError
from data.public.raw_files import Sources, Splits, by_position, join, read_csv_whole, with_clock

LIKED = 4.0
MAX_TAGS = 20
MAX_HISTORY = 30
PIECE_ROWS = 65_536
WORD = re.compile(r"[^\W_]+")  # letters of any alphabet, and digits
YEAR_IN_TITLE = r"\((?P<year>\d{4})\)\s*$"
STRINGS = pa.list_(pa.string())

FILES = ("ratings.csv*", "movies.csv*", "tags.csv*")
RATING_TYPES = {"userId": pa.int64(), "movieId": pa.int64(), "rating": pa.float32(), "timestamp": pa.int64()}
MOVIE_TYPES = {"movieId": pa.int64(), "title": pa.string(), "genres": pa.string()}
TAG_TYPES = {"movieId": pa.int64(), "tag": pa.string(), "timestamp": pa.int64()}

History = dict[int, list[tuple[int, str]]]  # movie -> (moment, tag), oldest first
Rated = dict[int, list[tuple[int, int, int]]]  # user -> (moment, movie, whether it was liked), oldest first


def rows(sources: Sources) -> Splits:
    """Sorted by (timestamp, user, movie), the first 80 % of the ratings train, the next 10 % validate, the rest test."""
    types = (RATING_TYPES, MOVIE_TYPES, TAG_TYPES)
    ratings, movies, tags = (read_csv_whole(sources[name][0], of) for name, of in zip(FILES, types, strict=True))
    history = tag_history(tags.rename_columns(["movie_id", "tag", "timestamp"]))
    ratings = ratings.rename_columns(["user_id", "movie_id", "rating", "timestamp"])
    if ratings["rating"].null_count:
        row = pc.index(ratings["rating"].is_null(), True).as_py()
        of = f"user {ratings['user_id'][row]}, film {ratings['movie_id'][row]}"
        raise InputError(f"ratings: row {row} ({of}) has no rating, which the label is made of: fix or remove the line")
    ratings = ratings.append_column("label", pc.greater_equal(ratings["rating"], LIKED).cast(pa.int8()))
    genres = [[] if each in (None, "(no genres listed)") else each.split("|") for each in movies["genres"].to_pylist()]
    year = pc.struct_field(pc.extract_regex(movies["title"], YEAR_IN_TITLE), "year").cast(pa.int32())
    movies = movies.drop_columns(["genres"]).append_column("year", year)
    movies = movies.append_column("genres", pa.array(genres, STRINGS))
    order = np.lexsort([ratings[name].to_numpy() for name in ("movie_id", "user_id", "timestamp")])
    size = len(order)
    pieces = (ratings.take(pa.array(order[start : start + PIECE_ROWS])) for start in range(0, size, PIECE_ROWS))
    for split, piece in by_position(pieces, size * 8 // 10, size * 9 // 10):
        piece = join(piece, "movie_id", movies, "movieId")
        known = pc.coalesce(piece["genres"], pa.scalar([], STRINGS))
        yield split, derive(piece.set_column(piece.column_names.index("genres"), "genres", known), history)


def tag_history(tags: pa.Table) -> History:
    """Movie -> (moment, tag), oldest first, of a table with timestamp, movie_id and tag."""
    columns = [tags[column].to_pylist() for column in ("timestamp", "movie_id", "tag")]
    history: History = {}
    for moment, movie, tag in sorted(each for each in zip(*columns, strict=True) if each[2] is not None):
        history.setdefault(movie, []).append((moment, tag.strip().lower()))
    return history


def derive(table: pa.Table, history: History) -> pa.Table:
    """Add hour, weekday, title's words and tags_before: the latest distinct ones of the film strictly before the rating, oldest first."""
    moments, movies, titles = (table[column].to_pylist() for column in ("timestamp", "movie_id", "title"))
    words = {title: WORD.findall(re.sub(YEAR_IN_TITLE, "", title or "").lower()) for title in set(titles)}
    tags = []
    for movie, moment in zip(movies, moments, strict=True):
        distinct = dict.fromkeys(tag for given, tag in history.get(movie, ()) if given < moment)
        tags.append(list(distinct)[-MAX_TAGS:])
    table = with_clock(table, table["timestamp"], "rated_hour", "rated_weekday")
    table = table.append_column("title_words", pa.array([words[title] for title in titles], STRINGS))
    return table.append_column("tags_before", pa.array(tags, STRINGS))


def with_history(table: pa.Table, rated: Rated) -> pa.Table:
    """Add history, history_liked and history_age: what the user had rated strictly before each rating, the newest last.

    Rows are in order of time; `rated` holds those of the calls before, and takes these. Ages are in seconds.
    """
    columns = [table[name].to_pylist() for name in ("timestamp", "user_id", "movie_id", "label")]
    found = []
    for moment, user, movie, label in zip(*columns, strict=True):
        own = rated.setdefault(user, [])
        before = bisect_left(own, (moment,))
        found.append([(seen, liked, moment - then) for then, seen, liked in own[max(0, before - MAX_HISTORY) : before]])
        insort(own, (moment, movie, label))
    for place, name in enumerate(("history", "history_liked", "history_age")):
        values = [[event[place] for event in events] for events in found]
        table = table.append_column(name, pa.array(values, pa.list_(pa.int64())))
    return table
