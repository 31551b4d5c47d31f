"""Requests of plain Python values, all fields of a kind read at once: a small request spends its time between fields, not in them.

What is read is what the encoder would read field by field. Where one value is not plainly right nothing is read: the encoder, which
names values and repairs them, then sees all of them. An exported artifact carries this file.

Shapes: n rows, F fields of a kind, D dense columns.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np

from ..schema import MISSING_ROW, Feature, Schema  # relative: an exported artifact carries this file
from .columns import ABSENT, Ragged
from .numbers import LARGEST, limits_of, signed_log

TRANSFORMS = ("identity", "log1p", "standardise", "bucketise")
NONE = type(None)
SEQUENCES, INTEGERS, NUMBERS = {list, tuple}, {int}, {int, float}


class Plain(NamedTuple):
    """What was read of a request; the fields, places and columns are those of PlainRows."""

    num_rows: int
    fields: frozenset[str]
    single_places: Sequence[int]
    other_singles: Sequence[int]  # places of fields that are not read
    single_ids: np.ndarray  # (F, n) int64, ABSENT where missing
    absent: set[str]  # fields that hold an ABSENT
    dense_columns: Sequence[int]
    dense: np.ndarray  # (n, D)
    lists: dict[str, Ragged]


class NotPlain(Exception):
    """The encoder must look at the values itself."""


class PlainRows:
    """Reads, of a fitted schema's fields, ids that are rows of their tables, numbers, and lists of these.

    `num_embeddings`: field -> rows of its table.
    """

    def __init__(self, schema: Schema, num_embeddings: Mapping[str, int]) -> None:
        combined = {name for each in schema.features for name in each.of}

        def of(*kinds: str) -> list[Feature]:
            fields = [each for each in schema.features if each.kind in kinds and each.name not in combined]
            return [each for each in fields if each.encoding == "ids" and each.transform in TRANSFORMS]

        self.ids, self.vectors = of("categorical"), of("vector")
        self.lists = [*of("weighted_multi_valued"), *of("multi_valued")]
        by_transform = {name: [each for each in of("numeric") if each.transform == name] for name in TRANSFORMS}
        self.buckets, self.logs = by_transform["bucketise"], by_transform["log1p"]
        self.scaled = [*by_transform["identity"], *by_transform["standardise"]]
        self.numbers = [*self.buckets, *self.logs, *self.scaled]
        fields = [*self.ids, *self.numbers, *self.lists, *self.vectors]
        self.fields = frozenset(each.name for each in fields)
        self.weights = [each.weights for each in self.lists if each.weights]
        self.columns = [*(each.source_column for each in fields), *self.weights]

        place = {each.name: at for at, each in enumerate(schema.sparse)}  # those of one id stand first
        self.single_places = [place[each.name] for each in (*self.ids, *self.buckets)]
        singles = (each.name for each in schema.sparse if each.is_single)
        self.other_singles = [place[name] for name in singles if name not in self.fields]
        stops = np.cumsum([each.dense_width for each in schema.dense], dtype=np.int64).tolist()
        columns = {each.name: range(at - each.dense_width, at) for each, at in zip(schema.dense, stops, strict=True)}
        self.dense_columns = [at for each in (*self.logs, *self.scaled, *self.vectors) for at in columns[each.name]]
        self.id_limits = np.asarray([[num_embeddings[each.name]] for each in self.ids], np.int64).reshape(-1, 1)
        self.list_limits = np.asarray([num_embeddings[each.name] for each in self.lists], np.int64)
        self.widths = np.asarray([[each.width] for each in self.vectors], np.int64).reshape(-1, 1)
        self.low, self.high = np.asarray([limits_of(each) for each in self.numbers]).reshape(-1, 2, 1).swapaxes(0, 1)
        most = max((len(each.boundaries) for each in self.buckets), default=0)
        self.boundaries = np.full((most, len(self.buckets), 1), np.inf)
        for at, each in enumerate(self.buckets):
            self.boundaries[: len(each.boundaries), at, 0] = each.boundaries
        of_scaled = [(each.mean, each.std) if each.transform == "standardise" else (0, 1) for each in self.scaled]
        self.means, self.deviations = np.asarray(of_scaled, np.float64).reshape(-1, 2, 1).swapaxes(0, 1)

    def read(self, rows: Mapping[str, Any]) -> Plain | None:
        """Read these fields of columns; None where a column or a value is not plain, which says nothing against it."""
        try:
            columns = [rows[name] for name in self.columns]
            if not {*map(type, columns)} <= SEQUENCES:
                exact = (isinstance(each, np.ndarray) and each.dtype != np.float32 for each in columns)
                columns = [each.tolist() if is_exact else each for each, is_exact in zip(columns, exact, strict=True)]
            return self._read(columns)
        except (NotPlain, KeyError, OverflowError):
            return None

    def _read(self, columns: Sequence[Any]) -> Plain:
        lengths = {*map(len, columns)} if {*map(type, columns)} <= SEQUENCES else set()
        if len(lengths) != 1 or not (num_rows := lengths.pop()):
            raise NotPlain
        left = iter(columns)
        ids, absent = self._ids(islice(left, len(self.ids)), num_rows)
        buckets, dense = self._numbers(islice(left, len(self.numbers)), num_rows)
        lists, vectors, weights = (
            _flat(islice(left, len(own)), num_rows) for own in (self.lists, self.vectors, self.weights)
        )
        values = _array(vectors[0], NUMBERS, np.float64)
        if (vectors[1] != self.widths).any() or not (np.abs(values) <= LARGEST).all():
            raise NotPlain
        cut = np.split(values, num_rows * self.widths.cumsum())[:-1]  # field by field
        return Plain(
            num_rows,
            self.fields,
            self.single_places,
            self.other_singles,
            np.concatenate([ids, buckets]),
            absent,
            self.dense_columns,
            np.concatenate([dense.T, *(each.reshape(num_rows, -1) for each in cut)], axis=1),
            self._lists(lists, weights),
        )

    def _ids(self, columns: Iterable[Sequence[Any]], num_rows: int) -> tuple[np.ndarray, set[str]]:
        """Ids, (F, n), and the names of the fields that lack some."""
        values = list(chain.from_iterable(columns))
        kinds = {*map(type, values)}
        if not kinds <= INTEGERS | {NONE}:
            raise NotPlain
        ids = np.array(values if NONE not in kinds else [each or 0 for each in values], np.int64).reshape(-1, num_rows)
        if ((ids < 0) | (ids >= self.id_limits)).any():
            raise NotPlain
        if NONE not in kinds:
            return ids, set()
        missing = np.fromiter((each is None for each in values), bool, len(values)).reshape(ids.shape)
        ids[missing] = ABSENT
        return ids, {self.ids[at].name for at in np.flatnonzero(missing.any(axis=1))}

    def _numbers(self, columns: Iterable[Sequence[Any]], num_rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of bucketised numbers, (F, n), and the other numbers after their transforms, (F, n)."""
        values = list(chain.from_iterable(columns))
        numbers = _array(values, NUMBERS | {NONE}, np.float64).reshape(-1, num_rows)  # None becomes NaN
        missing = np.isnan(numbers)
        if missing.any():
            if missing.sum() != values.count(None):
                raise NotPlain
            numbers[missing] = 0
        if not ((numbers >= self.low) & (numbers <= self.high)).all():
            raise NotPlain
        first, second = len(self.buckets), len(self.buckets) + len(self.logs)
        rows = 1 + (numbers[:first] >= self.boundaries).sum(axis=0)
        dense = np.concatenate([signed_log(numbers[first:second]), (numbers[second:] - self.means) / self.deviations])
        rows[missing[:first]], dense[missing[first:]] = MISSING_ROW, 0
        return rows, dense

    def _lists(self, lists: tuple[list[Any], np.ndarray], weights: tuple[list[Any], np.ndarray]) -> dict[str, Ragged]:
        """Lists and weights of fields, each as values one after the other and lengths, (F, n)."""
        ids, lengths = _array(lists[0], INTEGERS, np.int64), lists[1]
        counts = lengths.sum(axis=1)
        if ((ids < 0) | (ids >= np.repeat(self.list_limits, counts))).any():
            raise NotPlain
        of_weights = _array(weights[0], NUMBERS, np.float64)
        if (weights[1] != lengths[: len(self.weights)]).any() or not (np.abs(of_weights) <= LARGEST).all():
            raise NotPlain
        stops, floats = counts.cumsum(), of_weights.astype(np.float32)
        found = {}
        for at, (feature, count, stop) in enumerate(zip(self.lists, counts, stops, strict=True)):
            own = slice(stop - count, stop)
            found[feature.name] = Ragged(ids[own], lengths[at], floats[own] if feature.weights else None)
        return found


def _array(values: list[Any], kinds: set[type], dtype: type) -> np.ndarray:
    if not {*map(type, values)} <= kinds:
        raise NotPlain
    return np.array(values, dtype)


def _flat(columns: Iterable[Sequence[Any]], num_rows: int) -> tuple[list[Any], np.ndarray]:
    """The values of columns of lists, one after the other, and the lists' lengths, (F, n). A missing list is empty."""
    lists = [() if each is None else each for each in chain.from_iterable(columns)]
    if not {*map(type, lists)} <= SEQUENCES:
        raise NotPlain
    return list(chain.from_iterable(lists)), np.fromiter(map(len, lists), np.int64, len(lists)).reshape(-1, num_rows)
