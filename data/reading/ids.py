"""Id columns of every type that is taken -> integers or text: an id is the same whatever type its column has that day.

Floats that hold whole numbers are the integers (pandas makes doubles of ids with missing values), and NaN is missing. Only numbers up to
which the float type holds every integer are taken: above, an id could be its neighbour.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types as pt

from ..errors import InputError  # relative: an exported artifact carries this file
from .columns import Place, offsets_of

CANONICAL = r"\A(0|-?[1-9][0-9]{0,19})\z"
# of floats, by their bits: below 2 to this power every integer has its own
WHOLE_BITS = {16: 11, 32: 24, 64: 53}
# the ids, and where a value is none (null there); None: all are ids
Converted = tuple[pa.Array, np.ndarray | None]


def read_ids(column: pa.Array, owner: str, wanted: str, place: Place, offsets: np.ndarray | None = None) -> pa.Array:
    """`as_ids` of `owner`, a field or the group column; an InputError names the first bad row. `offsets`: of the lists that hold the values."""
    ids, bad = as_ids(column, wanted)
    if bad is None:
        return ids
    first = int(bad.argmax())
    found = column[first].as_py()
    if is_text(value_type(column.type)):
        words = f"{str(found)[:80]!r}: wanted an integer of 64 bits in plain digits, as its ids are in training"
        fix = "fix the file, or train anew on ids that are text"
    else:
        words = f"{found}: wanted an id, an integer of 64 bits (as a float, a whole number that its type holds exactly)"
        fix = "write the column as integers or text"
    raise InputError(f"{place.row(first, offsets)}, {owner} = {words}; {fix}")


def as_ids(column: pa.Array, wanted: str) -> Converted:
    """Turn a column of ids into integers or text: as `wanted`, "integer" or "text", says, or else as it is. Dictionaries may stay."""
    kind = column.type
    if pt.is_dictionary(kind):
        values, bad = as_ids(column.dictionary, wanted)
        if values is column.dictionary and not values.null_count:
            return column, None
        codes = codes_of(column)
        taken = values.take(pa.array(codes, mask=~is_valid(column)))
        if bad is not None:
            bad = bad[codes] & is_valid(column)
        return taken, bad if bad is not None and bad.any() else None
    if is_text(kind):
        text = column.cast(pa.large_string()) if pt.is_string_view(kind) else column
        return _integers_of_text(text) if wanted == "integer" else (text, None)
    numbers, bad = _integers(column)
    return (numbers.cast(pa.string()) if wanted == "text" else numbers), bad


def value_type(kind: pa.DataType) -> pa.DataType:
    """The type of one value: of a dictionary's, its values'."""
    return kind.value_type if pt.is_dictionary(kind) else kind


def is_key(kind: pa.DataType) -> bool:
    """Whether a type is that of ids: integers or text."""
    kind = value_type(kind)
    return pt.is_integer(kind) or is_text(kind)


def is_id(kind: pa.DataType) -> bool:
    """Whether a field of ids takes a type: floats and decimals are looked at value by value, and null is nothing but missing ids."""
    return is_key(kind) or is_whole(kind)


def is_whole(kind: pa.DataType) -> bool:
    """Whether a type may hold ids that are integers."""
    kind = value_type(kind)
    whole = pt.is_integer(kind) or pt.is_floating(kind) or pt.is_null(kind)
    return whole or (pt.is_decimal(kind) and kind.scale <= 0)


def is_text(kind: pa.DataType) -> bool:
    """Whether a type holds text."""
    return pt.is_string(kind) or pt.is_large_string(kind) or pt.is_string_view(kind)


def decoded(column: pa.Array) -> pa.Array:
    """The values of a dictionary column; any other as it is."""
    if not pt.is_dictionary(column.type):
        return column
    codes_of(column)  # checks them
    return column.dictionary_decode()


def integers_of(values: Sequence[int | None]) -> Converted:
    """Python's integers as int64 or, where one is above its range, uint64."""
    present = [value for value in values if value is not None]
    is_unsigned = max(present, default=0) >= 2**63 and min(present) >= 0
    low, high, kind = (0, 2**64, pa.uint64()) if is_unsigned else (-(2**63), 2**63, pa.int64())
    bad = np.asarray([value is not None and not low <= value < high for value in values], bool)
    if not bad.any():
        return pa.array(values, kind), None
    taken = [None if is_bad else value for value, is_bad in zip(values, bad, strict=True)]
    return pa.array(taken, kind), bad


def _integers(column: pa.Array) -> Converted:
    kind = column.type
    if pt.is_integer(kind):
        return column, None
    if pt.is_null(kind):
        return column.cast(pa.int64()), None
    if pt.is_decimal(kind):
        try:
            return column.cast(pa.int64()), None
        except pa.ArrowInvalid:  # beyond int64
            return integers_of([None if value is None else int(value) for value in column.to_pylist()])
    valid = is_valid(column)
    numbers = pc.fill_null(column.cast(pa.float64()), 0.0).to_numpy(zero_copy_only=False)
    missing = ~valid | np.isnan(numbers)
    limit = 2.0 ** WHOLE_BITS[kind.bit_width]
    bad = ~missing & ~((np.abs(numbers) < limit) & (np.floor(numbers) == numbers))
    absent = missing | bad
    ids = pa.array(np.where(absent, 0.0, numbers).astype(np.int64), mask=absent)
    return ids, bad if bad.any() else None


def _integers_of_text(column: pa.Array) -> Converted:
    good = pc.fill_null(pc.match_substring_regex(column, CANONICAL), False)
    numbers = column if pc.all(good, min_count=0).as_py() else pc.if_else(good, column, None)
    try:
        ids, beyond = numbers.cast(pa.int64()), None
    except pa.ArrowInvalid:  # beyond int64
        ids, beyond = integers_of([None if value is None else int(value) for value in numbers.to_pylist()])
    bad = is_valid(column) & ~good.to_numpy(zero_copy_only=False)
    bad = bad if beyond is None else bad | beyond
    return ids, bad if bad.any() else None


def integers(column: pa.Array) -> np.ndarray:
    """An integer column as NumPy, with 0 for nulls."""
    return (pc.fill_null(column, 0) if column.null_count else column).to_numpy(zero_copy_only=False)


def is_valid(column: pa.Array) -> np.ndarray:
    """Where a column is not null, (n,) bool."""
    return column.is_valid().to_numpy(zero_copy_only=False)


def codes_of(encoded: pa.DictionaryArray) -> np.ndarray:
    """Checked codes of a dictionary column, 0 for nulls."""
    codes = integers(encoded.indices)
    # Arrow does not check the codes that it reads: in a damaged file they can point behind the dictionary.
    if codes.size and not 0 <= codes.min() <= codes.max() < max(1, len(encoded.dictionary)):
        raise pa.ArrowInvalid("a dictionary code without a value")
    return codes


def as_lists(column: pa.Array) -> pa.Array:
    """A column of lists; one of type null holds null lists only."""
    return column.cast(pa.list_(pa.null())) if pt.is_null(column.type) else column


def list_offsets(column: pa.Array) -> np.ndarray:
    """(n + 1,) int32 or int64, from 0: where each row's values lie in `column.flatten()`."""
    if column.null_count == 0 and (pt.is_list(column.type) or pt.is_large_list(column.type)):
        offsets = column.offsets.to_numpy()
        return offsets if offsets[0] == 0 else offsets - offsets[0]
    return offsets_of(integers(pc.list_value_length(column)))
