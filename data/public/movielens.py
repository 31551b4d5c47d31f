"""MovieLens from GroupLens' own files: the csv releases (latest, latest-small, 20M, 25M, 32M) and 1M with its users.

A rating of four stars or more is the label. Splits follow the clock over all users, so ratings are sorted in memory
(32 bytes each); titles, genres and tags are joined piece by piece.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from data.errors import InputError
from data.public.raw_files import Sources, Splits, read_csv_whole, read_lines

RATING_COLUMNS = ("user_id", "movie_id", "rating", "timestamp")
LIKED = 4.0
MAX_TAGS = 20
PIECE_ROWS = 65_536
SECONDS_PER_HOUR = 3_600
SECONDS_PER_DAY = 86_400
THURSDAY = 3  # 1970-01-01, Monday being 0
WORD = re.compile(r"[^\W_]+")  # letters of any alphabet, and digits
YEAR_IN_TITLE = re.compile(r"\((\d{4})\)\s*$")

RATINGS, MOVIES, TAGS = LATEST_FILES = ("ratings.csv*", "movies.csv*", "tags.csv*")
RATINGS_1M, MOVIES_1M, USERS_1M = FILES_1M = ("ratings.dat", "movies.dat", "users.dat")

History = dict[int, list[tuple[int, str]]]  # movie -> (moment, tag), oldest first
Movies = dict[int, tuple[str, int | None, list[str]]]  # movie -> title, year, genres


def latest_rows(sources: Sources) -> Splits:
    """The first 80 % of the ratings in time train, the next 10 % validate, the rest test."""
    ratings = read_csv_whole(
        sources[RATINGS][0],
        {"userId": pa.int64(), "movieId": pa.int64(), "rating": pa.float32(), "timestamp": pa.int64()},
    ).rename_columns(list(RATING_COLUMNS))
    table = read_csv_whole(
        sources[MOVIES][0], {"movieId": pa.int64(), "title": pa.string(), "genres": pa.string()}
    )
    movies = _movies(zip(*(table[name].to_pylist() for name in table.column_names), strict=True))
    tags = read_csv_whole(
        sources[TAGS][0], {"movieId": pa.int64(), "tag": pa.string(), "timestamp": pa.int64()}
    )
    history = tag_history(tags.rename_columns(["movie_id", "tag", "timestamp"]))
    for split, piece in _in_time(ratings):
        yield split, derive(_with_movies(piece, movies), history)


def rows_1m(sources: Sources) -> Splits:
    """As `latest_rows`; no tags, but each user's gender, age band, occupation and zip code."""
    kinds = (np.int64, np.int64, np.float32, np.int64)
    columns = zip(*_dat(sources[RATINGS_1M][0], 4), strict=True)
    ratings = pa.table(
        [np.array(column, kind) for column, kind in zip(columns, kinds, strict=True)], list(RATING_COLUMNS)
    )
    movies = _movies((int(movie), title, genres) for movie, title, genres in _dat(sources[MOVIES_1M][0], 3))
    users = {int(user): rest for user, *rest in _dat(sources[USERS_1M][0], 5)}
    for split, piece in _in_time(ratings):
        piece = derive(_with_movies(piece, movies), {})
        known = [users.get(user, [None] * 4) for user in piece["user_id"].to_pylist()]
        for place, name in enumerate(("gender", "age", "occupation", "zip_code")):
            piece = piece.append_column(name, pa.array([each[place] for each in known], pa.string()))
        yield split, piece


def _dat(path: Path, width: int) -> Iterator[list[str]]:
    """Lines of values between "::", in Latin-1."""
    for number, line in enumerate(read_lines(path), start=1):
        values = line.decode("latin-1").rstrip("\r\n").split("::")
        if len(values) != width:
            raise InputError(
                f"{path}: line {number}: wanted {width} values between '::', found {len(values)}; fetch the file again"
            )
        yield values


def _movies(lines: Iterator[tuple[int, str, str]]) -> Movies:
    movies: Movies = {}
    for movie, title, genres in lines:
        year = YEAR_IN_TITLE.search(title or "")
        listed = [] if genres in (None, "", "(no genres listed)") else genres.split("|")
        movies[movie] = (title, int(year[1]) if year else None, listed)
    return movies


def _in_time(ratings: pa.Table) -> Splits:
    """Sort by (timestamp, user, movie), add the label, and cut into splits and pieces."""
    keys = [ratings[name].to_numpy() for name in ("movie_id", "user_id", "timestamp")]
    order = np.lexsort(keys)
    label = (ratings["rating"].to_numpy() >= LIKED).astype(np.int8)
    ratings = ratings.append_column("label", pa.array(label))
    bounds = [0, len(order) * 8 // 10, len(order) * 9 // 10, len(order)]
    for split, first, last in zip(("train", "valid", "test"), bounds, bounds[1:], strict=False):
        for start in range(first, last, PIECE_ROWS):
            yield split, ratings.take(pa.array(order[start : min(last, start + PIECE_ROWS)]))


def _with_movies(ratings: pa.Table, movies: Movies) -> pa.Table:
    found = [movies.get(movie, (None, None, [])) for movie in ratings["movie_id"].to_pylist()]
    titles, years, genres = zip(*found, strict=True)
    ratings = ratings.append_column("title", pa.array(titles, pa.string()))
    ratings = ratings.append_column("year", pa.array(years, pa.int32()))
    return ratings.append_column("genres", pa.array(genres, pa.list_(pa.string())))


def tag_history(tags: pa.Table) -> History:
    """Movie -> (moment, tag), oldest first, of a table with timestamp, movie_id and tag."""
    columns = [tags[column].to_pylist() for column in ("timestamp", "movie_id", "tag")]
    history: History = {}
    for moment, movie, tag in sorted(each for each in zip(*columns, strict=True) if each[2] is not None):
        history.setdefault(movie, []).append((moment, tag.strip().lower()))
    return history


def derive(table: pa.Table, history: History) -> pa.Table:
    """Add rated_hour, rated_weekday, title_words and tags_before to rows with timestamp, movie_id and title."""
    moments, movies, titles = (table[column].to_pylist() for column in ("timestamp", "movie_id", "title"))
    hour = [second % SECONDS_PER_DAY // SECONDS_PER_HOUR for second in moments]
    weekday = [(second // SECONDS_PER_DAY + THURSDAY) % 7 for second in moments]
    words_of = {title: WORD.findall(YEAR_IN_TITLE.sub("", title or "").lower()) for title in set(titles)}
    words = [words_of[title] for title in titles]
    tags = [
        _tags_before(history.get(movie, []), moment) for movie, moment in zip(movies, moments, strict=True)
    ]
    strings = pa.list_(pa.string())
    for column, values, kind in (
        ("rated_hour", hour, pa.int32()),
        ("rated_weekday", weekday, pa.int32()),
        ("title_words", words, strings),
        ("tags_before", tags, strings),
    ):
        table = table.append_column(column, pa.array(values, kind))
    return table


def _tags_before(history: list[tuple[int, str]], moment: int) -> list[str]:
    """The latest distinct tags that a movie had strictly before a moment, oldest first."""
    distinct = dict.fromkeys(tag for given, tag in history if given < moment)
    return list(distinct)[-MAX_TAGS:]
