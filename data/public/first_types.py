"""The files of a log that is to be converted, and the types of its columns: by what each file begins with, a schema, and the user."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types as pt

from data.errors import InputError
from data.profile.scan import joined_type, plain_type
from data.public.text_rows import Form, TextFile, kind_of
from data.reading import storage
from data.reading.column_types import is_list
from data.reading.conditions import HIVE_NULLS, partition_of
from data.reading.fingerprint import FileMark
from data.reading.snapshots import is_snapshot, open_snapshot
from data.schema import Schema

WHOLE, ZEROS = r"^-?[0-9]+$", r"^[+-]?0[0-9xX]"  # 007 and 0x1F are ids as text
GUESSES = (pa.float64(), pa.bool_(), pa.date32(), pa.timestamp("us"), pa.timestamp("us", "UTC"))


class Source(NamedTuple):
    """A file to convert."""

    file: storage.DataFile
    kind: str  # csv, json or parquet
    # of an Iceberg table: a column's number, by which files of other names have it
    field_ids: Mapping[str, bytes] | None = None
    schema: pa.Schema | None = None  # of the table that it is a part of
    mark: FileMark = FileMark("", 0, "")


def find_sources(inputs: Sequence[str]) -> list[Source]:
    """List the files that paths, globs, URIs and tables name, sorted by name within each; InputError if one names no file that could be converted."""
    found: dict[Any, Source] = {}
    for text in inputs:
        if is_snapshot(text):
            snapshot = open_snapshot(text)
            plain = snapshot.schema.remove_metadata()
            own: dict[Any, Source] = {
                (snapshot.name, file): Source(file, "parquet", snapshot.field_ids, plain) for file in snapshot.files
            }
        else:
            kinds = [(each, _kind_of(each.file, each.is_data)) for each in storage.list_files(text)]
            own = {each.identity: Source(each.file, kind) for each, kind in kinds if kind}
        if not own:
            raise InputError(
                f"{text}: no CSV, JSON lines or Parquet file there (.csv, .tsv, .jsonl, .json, .parquet, also .gz, .bz2, .zst); check the path"
            )
        for identity in sorted(own, key=lambda each: str(own[each].file)):
            found.setdefault(identity, own[identity])
    return list(found.values())


def _kind_of(file: storage.DataFile, is_named: bool) -> str:
    if file.name.lower().endswith(storage.ENDINGS):
        return "parquet"
    kind = kind_of(file)
    if not kind and is_named:  # by itself, whatever it is called
        kind = "parquet" if storage.read_bytes(file, 0, len(storage.MAGIC)) == storage.MAGIC else "csv"
    return kind


def types_of(
    sources: Sequence[Source],
    schema: Schema | None,
    given: Mapping[str, str],
    form: Form,
    without: Collection[str] = (),
) -> pa.Schema:
    """Each column's type, in the files' order; InputError if a file cannot be read, or the user names a column or type that is not there.

    What the user gives comes first, then what the schema's fields want, then a type that holds what the files begin with. A folder
    `column=value` makes a column too if no file has it, unless its name is in `without`.
    """
    files = [source.file for source in sources]
    firsts = storage.for_each_file(
        files, lambda number, _: _first_types(sources[number], form), "cannot be read", storage.LIST_ATTEMPTS
    )
    types: dict[str, pa.DataType] = {}
    for field in (field for first in firsts for own in first for field in own):
        types[field.name] = _joined(types.get(field.name, pa.null()), field.type)
    folders: dict[str, pa.DataType] = {}
    for name, value in (pair for file in files for pair in partition_of(file).items() if pair[0] not in without):
        kind = pa.null() if value in HIVE_NULLS else _type_of(pa.chunked_array([[value]]))
        folders[name] = _joined(folders.get(name, pa.null()), kind)
    types |= {name: kind for name, kind in folders.items() if name not in types}
    types = {name: pa.string() if pt.is_null(kind) else kind for name, kind in types.items()}
    for column, kind in _wanted(schema, types).items() if schema else ():
        types[column] = kind
    for column, name in given.items():
        if column not in types:
            raise InputError(f"--type {column}={name}: no such column; the files have {', '.join(types)}")
        types[column] = _named(column, name)
    return pa.schema(list(types.items()))


def _first_types(source: Source, form: Form) -> list[pa.Schema]:
    if source.schema is not None:
        return [source.schema]
    if source.kind == "parquet":
        with storage.open_parquet(source.file) as parquet:
            return [parquet.schema_arrow.remove_metadata()]
    text = TextFile(source.file, form)
    tables = list(text.tables(None, lambda _: None))
    if source.kind == "csv":
        names = [pa.schema([(name, pa.null()) for name in text.names])]
        return names + [pa.schema([(name, _type_of(table[name])) for name in table.column_names]) for table in tables]
    types: dict[str, pa.DataType] = {}
    # more than one where types do not go together: the more frequent counts
    for table in sorted(tables, key=len, reverse=True):
        for name in table.column_names:
            known, kind = types.get(name, pa.null()), _exact(table[name])
            joined = _joined(known, kind)
            types[name] = joined if known in (pa.null(), kind) or joined != pa.string() else known
    return [pa.schema(list(types.items()))]


def _exact(column: pa.ChunkedArray) -> pa.DataType:
    """The type of a JSON column; ids of 64 bits are no doubles, which Arrow makes of those of 2^63 or more."""
    if column.type == pa.list_(pa.float64()) and (item := _exact(pc.list_flatten(column))) == pa.uint64():
        return pa.list_(item)
    if column.type == pa.float64() and len(numbers := column.drop_null()):
        is_id = pc.and_(pc.equal(pc.floor(numbers), numbers), pc.greater_equal(numbers, 0))
        if pc.all(is_id).as_py() and 2**63 <= pc.max(numbers).as_py() <= 2**64:
            return pa.uint64()
    return column.type


def _type_of(texts: pa.ChunkedArray) -> pa.DataType:
    """The first type that takes all texts without a loss."""
    texts = texts.drop_null()
    if not len(texts):
        return pa.null()
    if pc.any(pc.match_substring_regex(texts, ZEROS)).as_py():
        return pa.string()
    is_whole = pc.all(pc.match_substring_regex(texts, WHOLE)).as_py()
    for kind in (pa.int64(), pa.uint64()) if is_whole else GUESSES:
        try:
            texts.cast(kind)
        except pa.ArrowInvalid:
            continue
        return kind
    return pa.string()


def _joined(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """A type for the values of both: text where no other is."""
    if one == other:
        return one
    if pa.uint64() in (one, other) and pt.is_integer(one) and pt.is_integer(other):
        return pa.uint64()
    plain = plain_type(one), plain_type(other)
    if None not in plain and (found := joined_type(*plain)) is not None:
        return found
    try:
        both = [pa.schema([("x", kind)]) for kind in (one, other)]
        return pa.unify_schemas(both, promote_options="permissive").field(0).type
    except pa.ArrowException:
        return pa.string()


def _wanted(schema: Schema, types: Mapping[str, pa.DataType]) -> dict[str, pa.DataType]:
    """The types that a schema's fields want of their columns, where it tells and the files' own are not of the kind."""
    wanted: dict[str, pa.DataType] = {}
    for feature in (each for each in schema.features if each.source_column in types):
        found = types[feature.source_column]
        item = found.value_type if is_list(found) else found
        if not feature.is_keyed:
            item = pa.float64()
        elif feature.type == "text":
            item = pa.string()
        elif (feature.type == "integer" or feature.encoding == "ids") and not pt.is_integer(item):
            item = pa.int64()
        has_lists = feature.kind in ("multi_valued", "weighted_multi_valued", "sequence", "vector")
        wanted[feature.source_column] = pa.list_(item) if has_lists else item
        if feature.weights in types:
            wanted[feature.weights] = pa.list_(pa.float64())
    return wanted


def _named(column: str, name: str) -> pa.DataType:
    try:
        if name.startswith("list<") and name.endswith(">"):
            return pa.list_(_named(column, name[5:-1]))
        return pa.type_for_alias(name)
    except ValueError:
        raise InputError(
            f"--type {column}={name}: no such type; use int64, uint64, double, string, bool, date32, timestamp[us] or list<...> of one"
        ) from None
