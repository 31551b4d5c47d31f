"""Columns of a case of pipeline_fuzz.py: what their values mean, and the Arrow type that holds them on each day."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import types as pt

# fmt: off
INTEGERS = [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()]
DECIMALS = [pa.decimal128(20, 0), pa.decimal256(40, 0), pa.decimal128(38, 0)]
FLOATS = [pa.float32(), pa.float64()]
TEXTS = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string()), pa.dictionary(pa.int8(), pa.large_string())]
CODES = [pa.dictionary(pa.int16(), pa.int64()), pa.dictionary(pa.int32(), pa.uint8())]
LISTS = [pa.list_, pa.large_list, pa.list_view, pa.large_list_view]
WORDS = ["oslo", "", "null", "nan", "07", "7", "-1", "1.0", "True", "Zürich", "東京", "a b", "x" * 300, "\u00e9", "e\u0301", "👍", "a\x00b", " oslo", "OSLO"]
NAMES = ["user.id", "a/b", "two words", "größe", "価格", "type", "forward", "weight", "training", "T_destination", "buffers", "\ufeffitem",
         "n" * 250, "..", ".hidden", "Item", 'say "hi"', "it's", "tab\there", "a=b", "[x]", "true", "7", "-", "probability", "all", "keys",
         "item.list.element", "%s {0}", "back\\slash", "line\nbreak", "dump_patches", "_modules", "e\u0301", "👍", "name", "rows", "label ",
         "dense", "features", "click_id", "price_7d", "shop type", "a#b", "a:b", "*", "?"]
PLAIN_NAMES = ["item", "shop_id", "city", "price", "tags", "likes", "image", "age", "query", "stock"]
INTEGER_POOLS = [list(range(30)), [0, 1, 2, 3, 5, 8], [-3, -2, -1, 0, 1, 2], [7, 1000, 70_000, 2**31 - 1, 2**31, 2**32 + 1],
                 [2**53 - 1, 2**53 - 2, 2**24 + 1], [2**53 + 1, 2**60 + 1, 2**63 - 1, 0], [-(2**63), -(2**63) + 1, 5],
                 [2**63, 2**64 - 1, 2**64 - 2, 1]]
NUMBER_POOLS = [[0.0, 0.25, 0.5, 1.0], [-3.25, 0.0, 8.5, 1024.0], [1e6, 2e6, 16777216.0, 33554432.0], [0.0, 1.0, 2.0, 50.0], [-0.0, 2.0**-30, 2.0**60]]
NUMBERS = [pa.float16(), pa.decimal128(12, 4), pa.int32(), pa.int64(), pa.uint64(), pa.int8()]
ODD = [(pa.binary(), b"x"), (pa.struct([("a", pa.int64())]), {"a": 1}), (pa.map_(pa.string(), pa.int64()), [("k", 1)]), (pa.null(), None),
       (pa.list_(pa.list_(pa.int64())), [[1]]), (pa.time32("s"), 1), (pa.duration("s"), 5), (pa.date32(), 19000), (pa.timestamp("us", "UTC"), 10**15),
       (pa.binary(2), b"ab"), (pa.binary_view(), b"x"), (pa.list_(pa.binary()), [b"x"]), (pa.list_(pa.struct([("a", pa.int8())])), [{"a": 1}]),
       (pa.list_(pa.null()), [None]), (pa.dictionary(pa.int8(), pa.binary()), b"z")]
FAMILIES = ["integers", "integers", "texts", "numbers", "numbers", "flags", "list", "list", "weighted", "vector", "odd"]
# fmt: on


@dataclass
class Column:
    """One column: `family` says what its values mean, `types` gives its Arrow type on each day."""

    name: str
    family: str  # integers, texts, numbers, vector, weights or odd; of one value or, with is_list, of lists
    pool: list[Any]
    types: list[pa.DataType]
    nulls: float = 0.0
    is_list: bool = False
    nan: bool = False  # missing values of floats are NaN, as pandas writes them
    of: str = ""  # the column that weights belong to

    @property
    def is_mixed(self) -> bool:
        """Whether integers are text on some days."""
        return len({is_text(kind) for kind in self.types if not pt.is_null(kind)}) > 1


def as_arrow(values: list[Any], kind: pa.DataType, nan: bool = False) -> pa.Array:
    """Values as a column of a type; integers become texts, floats or decimals where the type is one."""
    if pt.is_null(kind):
        return pa.nulls(len(values))
    missing = float("nan") if nan and pt.is_floating(kind) else None
    return pa.array([as_type(missing if value is None else value, kind) for value in values], kind)


def as_type(value: Any, kind: pa.DataType) -> Any:
    """A Python value that Arrow takes for a type."""
    if pt.is_null(kind) or value is None:
        return None
    if hasattr(kind, "value_type"):
        is_list = isinstance(value, list)
        return [as_type(v, kind.value_type) for v in value] if is_list else as_type(value, kind.value_type)
    if not isinstance(value, int | float):
        return value
    if pt.is_float16(kind) and abs(value) > 60_000:
        raise OverflowError(f"{value} in float16")
    for test, make in (
        (is_text, str), (pt.is_decimal, lambda v: Decimal(str(v))), (pt.is_float16, np.float16), (pt.is_floating, float),
        (pt.is_boolean, bool), (pt.is_integer, int),
    ):  # fmt: skip
        if test(kind):
            return make(value)
    return value


def is_text(kind: pa.DataType) -> bool:
    """Whether a type, or the items of a list or dictionary, are text."""
    while hasattr(kind, "value_type"):
        kind = kind.value_type
    return pt.is_string(kind) or pt.is_large_string(kind) or pt.is_string_view(kind)


def holds(kind: pa.DataType, pool: list[Any]) -> bool:
    """Whether a type keeps every value as it is; doubles hold ids below 2^53."""
    try:
        back = as_arrow(pool, kind).to_pylist()
    except (pa.ArrowException, OverflowError, ValueError, TypeError):
        return False
    if pt.is_floating(kind) and any(type(each) is int and abs(each) >= 2**53 for each in pool):
        return False
    return all(new in (old, str(old)) for old, new in zip(pool, back, strict=True))


class Columns:
    """Draws the columns of a case."""

    def __init__(self, rng: random.Random, num_days: int, has_odd: bool) -> None:
        self.rng, self.num_days = rng, num_days
        names = [
            plain if rng.random() < 0.6 else odd for plain, odd in zip(PLAIN_NAMES, rng.sample(NAMES, 10), strict=True)
        ]
        self.drawn = [
            self.integers("user_id", INTEGER_POOLS[:6]),
            self.texts(rng.choice(["query", "city_name"]) + "_text"),
        ]
        for name in names[: rng.choice([2, 4, 7])]:
            family = rng.choice(FAMILIES if has_odd else FAMILIES[:-1])
            self.drawn += getattr(self, family)(name) if family in ("weighted",) else [getattr(self, family)(name)]

    def days(self, kinds: list[pa.DataType], pool: list[Any], nulls: bool = True) -> list[pa.DataType]:
        """A type for each day, of those that hold the pool: often one, else changing; rarely one of nothing but missing values."""
        rng, kinds = self.rng, [kind for kind in kinds if holds(kind, pool)]
        found = [rng.choice(kinds)] * self.num_days
        if rng.random() < 0.5:
            found = [rng.choice(kinds) for _ in range(self.num_days)]
        if nulls and rng.random() < 0.1:
            found[rng.randrange(self.num_days)] = pa.null()
        return found

    def integers(self, name: str, pools: Sequence[list[int]] = INTEGER_POOLS) -> Column:
        """Ids: as integers, decimals, doubles, dictionaries, sometimes text."""
        rng = self.rng
        pool, text = rng.choice(pools), TEXTS if rng.random() < 0.25 else []
        kinds = [*INTEGERS, *INTEGERS, *DECIMALS, *FLOATS, *CODES, *text]
        return Column(name, "integers", pool, self.days(kinds, pool), rng.choice([0, 0, 0.2]), nan=rng.random() < 0.5)

    def texts(self, name: str) -> Column:
        """Words, some of which look like something else."""
        pool = self.rng.sample(WORDS, 6)
        return Column(name, "texts", pool, self.days(TEXTS, pool), self.rng.choice([0, 0, 0.2]))

    def numbers(self, name: str) -> Column:
        """Amounts."""
        pool = self.rng.choice(NUMBER_POOLS)
        return Column(name, "numbers", pool, self.days([*FLOATS, *NUMBERS], pool), self.rng.choice([0, 0.2]))

    def flags(self, name: str) -> Column:
        """0 and 1."""
        kinds = self.rng.choice([[pa.bool_()], [pa.int8(), pa.uint8(), pa.float32()]])
        return Column(name, "numbers", [0, 1], self.days(kinds, [0, 1]), self.rng.choice([0, 0.2]))

    def vector(self, name: str) -> Column:
        """Lists of three numbers."""
        rng = self.rng
        pool = [[rng.choice([0.0, 0.5, -1.25, 3.0]) for _ in range(3)] for _ in range(5)]
        kinds = [make(item) for make in LISTS for item in (*FLOATS, pa.float16())]
        kinds += [pa.list_(item, 3) for item in FLOATS]
        return Column(name, "vector", pool, self.days(kinds, pool), rng.choice([0, 0.1]), is_list=True)

    def list(self, name: str) -> Column:
        """Lists of ids or words."""
        rng = self.rng
        inner = self.texts(name) if rng.random() < 0.5 else self.integers(name)
        makes = LISTS if rng.random() < 0.3 else LISTS[:2]
        inner.types = [
            kind if pt.is_null(kind) and rng.random() < 0.5 else rng.choice(makes)(kind) for kind in inner.types
        ]
        inner.is_list = True
        return inner

    def weighted(self, name: str) -> "list[Column]":
        """Lists of ids and of their weights."""
        kinds, pool = [pa.list_(kind) for kind in (*FLOATS, pa.float16(), pa.int8())], [[1.0, 2.0]]
        ids = Column(name, "integers", [1, 2, 3, 5], [pa.list_(pa.int64())] * self.num_days, 0.1, is_list=True)
        weights = Column(f"{name}_weights", "weights", [0.0, 1.0, 2.0], self.days(kinds, pool, nulls=False), of=name)
        return [ids, weights]

    def odd(self, name: str) -> Column:
        """What no kind of field takes."""
        kind, value = self.rng.choice(ODD)
        return Column(name, "odd", [value], [kind] * self.num_days, self.rng.choice([0, 0.3]))
