"""Arrow types made plain: what a column holds, whatever way its file stores it, and what the same column of several files holds together."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types as pt

from data.reading.column_types import is_list, is_number
from data.reading.ids import is_text

ANY_INTEGER = pa.decimal128(38, 0)  # as databases write unsigned ids: of 20 digits
LARGEST_EXACT_DIGITS = 18  # of decimals without a fraction: int64 holds them all


def plain_type(kind: pa.DataType) -> pa.DataType | None:
    """The type without dictionaries and views; decimals are int64, ANY_INTEGER or doubles. None: neither a field nor a role takes it."""
    if pt.is_dictionary(kind):
        return plain_type(kind.value_type)
    if pt.is_string_view(kind):
        return pa.string()
    if pt.is_decimal(kind):
        if kind.scale or kind.precision > ANY_INTEGER.precision:
            return pa.float64()
        return pa.int64() if kind.precision <= LARGEST_EXACT_DIGITS else ANY_INTEGER
    if is_list(kind):
        item = plain_type(kind.value_type)
        is_empty = pt.is_fixed_size_list(kind) and not kind.list_size  # Arrow cannot read these back
        if is_empty or item is None or is_list(item) or pt.is_temporal(item):
            return None
        if pt.is_fixed_size_list(kind):
            return pa.list_(item, kind.list_size)
        is_large = pt.is_large_list(kind) or pt.is_large_list_view(kind)
        return pa.large_list(item) if is_large else pa.list_(item)
    if is_number(kind) or is_text(kind) or pt.is_null(kind) or pt.is_timestamp(kind) or pt.is_date(kind):
        return kind
    return None


def joined_type(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """A plain type that holds the values of two, or None: integers beside text are text, any other numbers together are doubles."""
    if one == other or pt.is_null(other):
        return one
    if pt.is_null(one):
        return other
    if is_list(one) and is_list(other):
        item = joined_type(one.value_type, other.value_type)
        is_large = pt.is_large_list(one) or pt.is_large_list(other)
        return None if item is None else pa.large_list(item) if is_large else pa.list_(item)
    if any(map(is_text, both := (one, other))) and all(is_text(kind) or _is_whole(kind) for kind in both):
        return pa.large_string() if pt.is_large_string(one) or pt.is_large_string(other) else pa.string()
    if is_number(one) and is_number(other):
        if all(pt.is_boolean(kind) or (pt.is_integer(kind) and kind != pa.uint64()) for kind in both):
            return pa.int64()
        return ANY_INTEGER if all(map(_is_whole, both)) else pa.float64()
    if pt.is_timestamp(one) and pt.is_timestamp(other):
        return pa.timestamp("us", one.tz)
    return None


def as_plain(column: pa.Array, kind: pa.DataType) -> pa.Array:
    """The column as a plain type that holds its values.

    Raises:
        pa.ArrowException: a value cannot become one.
    """
    if column.type == kind:
        return column
    if pt.is_list_view(column.type) or pt.is_large_list_view(column.type):
        # pyarrow 26 casts a view of lists to lists with an offset too few
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]))
        column = pa.LargeListArray.from_arrays(offsets, column.flatten(), mask=column.is_null())
    return column.cast(kind, safe=False)


def _is_whole(kind: pa.DataType) -> bool:
    return pt.is_integer(kind) or kind == ANY_INTEGER
