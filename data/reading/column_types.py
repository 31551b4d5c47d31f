"""Which Arrow types a field's column may have: what a footer alone can tell."""

from collections.abc import Callable, Iterator

import pyarrow as pa
from pyarrow import types as pt

from ..errors import InputError  # relative: an exported artifact carries this file
from ..schema import Feature, Schema

Accepts = Callable[[pa.DataType], bool]


def check_columns(arrow_schema: pa.Schema, schema: Schema, file: str, *, has_label: bool = True) -> None:
    """Check from a file's footer alone that every column is there with a type its field can take.

    Raises:
        InputError: naming the file, the column, its type and the type wanted.
    """
    for _, fault in column_faults(arrow_schema, schema, has_label=has_label):
        raise InputError(f"{file}: {fault}")


def column_faults(
    arrow_schema: pa.Schema, schema: Schema, *, has_label: bool = True
) -> Iterator[tuple[str, str]]:
    """All that `check_columns` refuses: the field's source column (or the label's, or the group column), and what is wrong."""
    names = set(arrow_schema.names)
    for source, column, owner, role, accepts, types in _wanted(schema, has_label):
        if column not in names:
            missing = f"column {column!r} is missing, which is the schema's {owner}"
            yield source, f"{missing}; add the column to the file, or fix the schema"
        elif not accepts(found := arrow_schema.field(column).type):
            yield source, f"column {column!r} is {found}: {role} wants {types}; fix the file or the schema"


def _wanted(schema: Schema, has_label: bool) -> Iterator[tuple[str, str, str, str, Accepts, str]]:
    """For each use of a column: source column, column, who misses it, who wants its type, the type's test and its description."""
    if has_label:
        types = "0 and 1 as integers, floats or booleans"
        yield schema.label, schema.label, "label", "the label", is_number, types
    for feature in schema.features:
        source, owner = feature.source_column, f"field {feature.name!r}"
        yield source, source, owner, f"{feature.kind} {owner}", *_accepted(feature)
        if feature.weights:
            role = f"weights of {feature.name!r}"
            yield source, feature.weights, owner, role, _is_number_list, "lists of numbers"
    group = schema.group_column
    if has_label and group not in ("", *schema.field_columns):
        yield group, group, "group_column", "", lambda kind: True, ""


def is_number(kind: pa.DataType) -> bool:
    """Whether a type holds numbers, booleans included."""
    return pt.is_integer(kind) or pt.is_floating(kind) or pt.is_boolean(kind) or pt.is_decimal(kind)


def is_key(kind: pa.DataType) -> bool:
    """Whether a type can be an id."""
    kind = kind.value_type if pt.is_dictionary(kind) else kind
    return pt.is_integer(kind) or pt.is_string(kind) or pt.is_large_string(kind)


def is_list(kind: pa.DataType) -> bool:
    """Whether a type is one of Arrow's lists."""
    return pt.is_list(kind) or pt.is_large_list(kind) or pt.is_fixed_size_list(kind)


def _is_number_list(kind: pa.DataType) -> bool:
    return is_list(kind) and is_number(kind.value_type)


def _accepted(feature: Feature) -> tuple[Accepts, str]:
    """The type test of a field's column, and its description."""
    if feature.kind == "numeric":
        return is_number, "numbers"
    if feature.kind == "vector":
        return _is_number_list, "lists of numbers"
    item, words = (
        (pt.is_integer, "integers") if feature.encoding == "ids" else (is_key, "integers or strings")
    )
    hint = "" if feature.encoding != "ids" else " (strings need encoding = 'vocabulary', 'hash' or 'zch')"
    if feature.kind == "categorical":
        return item, words + hint
    return lambda kind: is_list(kind) and item(kind.value_type), f"lists of {words}{hint}"
