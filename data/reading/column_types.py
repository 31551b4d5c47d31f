"""Which Arrow types a field's column may have, and which type of ids it then has: what a footer alone can tell."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import pyarrow as pa
from pyarrow import types as pt

from ..errors import InputError  # relative: an exported artifact carries this file
from ..schema import FIT, Feature, Schema
from .ids import is_id, is_text, is_whole, value_type

Accepts = Callable[[pa.DataType], bool]


def check_columns(arrow_schema: pa.Schema, schema: Schema, file: str, *, has_label: bool = True) -> None:
    """Check from a file's footer alone that every column is there with a type its field can take; else InputError."""
    for _, fault in column_faults(arrow_schema, schema, has_label=has_label):
        raise InputError(f"{file}: {fault}")


def column_faults(arrow_schema: pa.Schema, schema: Schema, *, has_label: bool = True) -> Iterator[tuple[str, str]]:
    """All that `check_columns` refuses: the field's source column (or the label's, or the group column), and what is wrong."""
    names = Counter(arrow_schema.names)
    for source, column, owner, role, accepts, types in _wanted(schema, has_label):
        if column not in names:
            missing = f"column {column!r} is missing, which is the schema's {owner}"
            yield source, f"{missing}; add the column to the file, or fix the schema"
        elif names[column] > 1:
            yield (source, f"column {column!r} is there {names[column]} times, {owner} reads one; rename the others")
        elif not accepts(found := arrow_schema.field(column).type):
            yield source, f"column {column!r} is {found}: {role} wants {types}; fix the file or the schema"


def _wanted(schema: Schema, has_label: bool) -> Iterator[tuple[str, str, str, str, Accepts, str]]:
    """For each use of a column: source column, column, who misses it, who wants its type, the type's test and its description."""
    if has_label:
        types = "0 and 1 as integers, floats or booleans"
        yield from ((each, each, "label", "the label", _is_number_or_null, types) for each in schema.labels)
    for feature in schema.features:
        if feature.is_cross:
            continue
        source, owner = feature.source_column, f"field {feature.name!r}"
        yield source, source, owner, f"{feature.kind} {owner}", *_accepted(feature)
        if feature.weights:
            role = f"weights of {owner}"
            yield source, feature.weights, owner, role, _lists_of(_is_number_or_null), "lists of numbers"
    group = schema.group_column
    if has_label and group:
        yield group, group, "group_column", "the group column", _is_group, "values, not lists or structs"
    if has_label and (weight := schema.weight_column):
        yield weight, weight, "weight_column", "the weight column", _is_number_or_null, "numbers"


def _is_group(kind: pa.DataType) -> bool:
    kind = value_type(kind)
    return not (pt.is_nested(kind) or pt.is_interval(kind) or isinstance(kind, pa.BaseExtensionType))


def pinned(schema: Schema, arrow_schemas: Iterable[pa.Schema]) -> Schema:
    """The schema with the type of ids that the training files hold, wherever a field or the group column declares none.

    "text" if a column of the field, or of another one that shares its table, is text in any file, else "integer". "text" too where all
    are null: text takes tomorrow's integers, but integers not its text. As it was where no file has the column, or a vocabulary file tells.
    """
    waiting = [
        each
        for each in schema.features
        if each.is_keyed and not each.type and (each.encoding in ("hash", "zch") or each.vocabulary == FIT)
    ]
    columns = {each.source_column for each in waiting} | {schema.group_column} - {""}
    found: dict[str, set[str]] = {column: set() for column in columns}
    for arrow_schema in arrow_schemas:
        for field in arrow_schema:
            if field.name in found:
                found[field.name].add(id_type(field.type))
    of_table: dict[str, set[str]] = {}
    for each in waiting:
        of_table.setdefault(each.table_name, set()).update(found[each.source_column])
    features = tuple(
        replace(each, type=_type_of(of_table[each.table_name])) if each in waiting else each for each in schema.features
    )
    group_type = schema.group_type or _type_of(found.get(schema.group_column, set()))
    return replace(schema, features=features, group_type=group_type)


def _type_of(found: set[str]) -> str:
    return "" if not found else "text" if "text" in found or found == {""} else "integer"


def id_type(kind: pa.DataType) -> str:
    """The type of the ids of a column, or of its lists: "text", or "integer", floats and decimals among them; empty if it has none."""
    kind = value_type(kind)
    kind = value_type(kind.value_type) if is_list(kind) else kind
    return "text" if is_text(kind) else "integer" if is_id(kind) and not pt.is_null(kind) else ""


def is_number(kind: pa.DataType) -> bool:
    """Whether a type holds numbers, booleans included."""
    kind = value_type(kind)
    return pt.is_integer(kind) or pt.is_floating(kind) or pt.is_boolean(kind) or pt.is_decimal(kind)


def is_list(kind: pa.DataType) -> bool:
    """Whether a type is one of Arrow's lists."""
    is_view = pt.is_list_view(kind) or pt.is_large_list_view(kind)
    return is_view or pt.is_list(kind) or pt.is_large_list(kind) or pt.is_fixed_size_list(kind)


def _is_number_or_null(kind: pa.DataType) -> bool:
    return is_number(kind) or pt.is_null(kind)


def _lists_of(item: Accepts) -> Accepts:
    return lambda kind: pt.is_null(kind) or (is_list(kind) and item(kind.value_type))


def _accepted(feature: Feature) -> tuple[Accepts, str]:
    """The type test of a field's column, and its description."""
    if feature.kind == "numeric":
        return _is_number_or_null, "numbers"
    if feature.kind == "vector" or feature.encoding == "gap":
        return _lists_of(_is_number_or_null), "lists of numbers"
    item, words = (is_whole, "integers") if feature.encoding == "ids" else (is_id, "integers or strings")
    hint = "" if feature.encoding != "ids" else " (strings need encoding = 'vocabulary', 'hash' or 'zch')"
    if feature.kind == "categorical":
        return item, words + hint
    return _lists_of(item), f"lists of {words}{hint}"
