"""Which Arrow types a field's column may have: what a footer alone can tell."""

import pyarrow as pa
from pyarrow import types as pt

from ..errors import InputError  # relative: an exported artifact carries this file
from ..schema import Feature, Schema


def check_columns(arrow_schema: pa.Schema, schema: Schema, file: str, *, has_label: bool = True) -> None:
    """Check from a file's footer alone that every column is there with a type its field can take.

    Raises:
        InputError: naming the file, the column, its type and the type wanted.
    """
    names = set(arrow_schema.names)
    wanted = schema.columns if has_label else schema.field_columns
    for column in wanted:
        if column not in names:
            users = [
                feature.name
                for feature in schema.features
                if column in (feature.source_column, feature.weights)
            ]
            role = "label" if column == schema.label else f"field {users[0]!r}" if users else "group_column"
            raise InputError(
                f"{file}: column {column!r} is missing, which is the schema's {role}; "
                "add the column to the file, or fix the schema"
            )
    if has_label:
        label_types = "0 and 1 as integers, floats or booleans"
        _check_type(arrow_schema, schema.label, _is_number, label_types, file, "the label")
    for feature in schema.features:
        accepts, wanted = _accepted(feature)
        role = f"{feature.kind} field {feature.name!r}"
        _check_type(arrow_schema, feature.source_column, accepts, wanted, file, role)
        if feature.weights:
            role = f"weights of {feature.name!r}"
            _check_type(arrow_schema, feature.weights, _is_number_list, "lists of numbers", file, role)


def _check_type(arrow_schema: pa.Schema, column: str, accepts, wanted: str, file: str, role: str) -> None:  # noqa: ANN001
    found = arrow_schema.field(column).type
    if not accepts(found):
        raise InputError(
            f"{file}: column {column!r} is {found}: {role} wants {wanted}; fix the file or the schema"
        )


def _is_number(kind: pa.DataType) -> bool:
    return pt.is_integer(kind) or pt.is_floating(kind) or pt.is_boolean(kind) or pt.is_decimal(kind)


def _is_key(kind: pa.DataType) -> bool:
    kind = kind.value_type if pt.is_dictionary(kind) else kind
    return pt.is_integer(kind) or pt.is_string(kind) or pt.is_large_string(kind)


def _is_list(kind: pa.DataType) -> bool:
    return pt.is_list(kind) or pt.is_large_list(kind) or pt.is_fixed_size_list(kind)


def _is_number_list(kind: pa.DataType) -> bool:
    return _is_list(kind) and _is_number(kind.value_type)


def _accepted(feature: Feature):  # noqa: ANN202
    """The type test of a field's column, and its description."""
    if feature.kind == "numeric":
        return _is_number, "numbers"
    if feature.kind == "vector":
        return _is_number_list, "lists of numbers"
    item, words = (
        (pt.is_integer, "integers") if feature.encoding == "ids" else (_is_key, "integers or strings")
    )
    hint = "" if feature.encoding != "ids" else " (strings need encoding = 'vocabulary', 'hash' or 'zch')"
    if feature.kind == "categorical":
        return item, words + hint
    return lambda kind: _is_list(kind) and item(kind.value_type), f"lists of {words}{hint}"
