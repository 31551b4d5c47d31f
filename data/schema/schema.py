"""Schema: which columns a log has, what each means, which table each looks up, and the EFGC groups.

A schema is one TOML file, one line a field:

    name = "shop"
    label = "click"
    [fields]
    user_id = { kind = "categorical", num_embeddings = 10000, embedding_dim = 16 }
    tags    = { kind = "multi_valued", num_embeddings = 500, embedding_dim = 8, pooling = "mean" }
    price   = { kind = "numeric", transform = "log1p" }
    image   = { kind = "vector", width = 64 }
    [groups]
    taste = ["user_id", "tags", "image"]

docs/data.md has tables of what a missing value (null) means for each kind of field, and of the types that a column may have.
A vocabulary of V values has V + 2 rows: row 0 missing, row 1 out of vocabulary, row 2 + i the i-th value.
"""

import dataclasses
import hashlib
import json
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from ..errors import InputError  # relative: an exported artifact carries this file
from .feature import FIT, VOCABULARY_FOLDER, Eviction, Feature, IdType, feature_problem, rows_problem
from .names import RESERVED_GROUPS, file_stems, is_module_name, name_problem
from .parse import parse_dataclass, read_toml, to_toml_value, unknown_key
from .sequences import check_sequences, lengths_of
from .transforms import checked_transforms

HINTS = ("pooling_factor", "cardinality", "type")  # what a plan does not depend on


@dataclass(frozen=True)
class Zch:
    """How a table gives rows to unbounded ids: the eviction, eviction_interval and zch_buckets of its fields, see Feature."""

    eviction: Eviction
    eviction_interval: int
    buckets: int


@dataclass(frozen=True)
class Table:
    """One embedding table: rows, width, pooling, the fields that look it up, and `zch` if it gives rows to unbounded ids.

    `positions`: the most rows that a row of the log looks up, where a sequence is among the fields, so that the table does not pool; else 0.
    """

    name: str
    num_embeddings: int
    embedding_dim: int
    pooling: Literal["sum", "mean"]
    feature_names: tuple[str, ...]
    weighted: bool
    zch: Zch | None = None
    positions: int = 0


@dataclass(frozen=True)
class Schema:
    """A log's fields, tables and groups."""

    name: str  # of the data set
    label: str  # column of 0 and 1; of several the first
    features: tuple[Feature, ...]  # in the file's order
    tables: tuple[Table, ...]  # in order of first use
    # EFGC groups, Eq. 2: name -> names of fields. A field may be in many groups and is looked up once.
    groups: dict[str, tuple[str, ...]]
    group_column: str = ""  # whose values group rows for GAUC; empty if none
    time_column: str = ""  # that orders rows; empty if none
    group_type: IdType = ""  # what the ids of the group column are, as a field's `type`
    # of numbers above 0 by which training weighs each row's loss; empty if none. Metrics count each row once
    weight_column: str = ""
    folder: Path = Path()  # where relative vocabulary paths start
    transforms: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)  # of others: name -> its entry
    tasks: tuple[str, ...] = ()  # label columns where there are several, `label` first; each is a task of its own

    @property
    def labels(self) -> tuple[str, ...]:
        """Every label column."""
        return self.tasks or (self.label,)

    @cached_property
    def sparse(self) -> tuple[Feature, ...]:
        """Unweighted fields with a table, in the key order of `Batch.sparse_features`: single-valued, then lists."""
        sparse = [feature for feature in self.features if feature.is_sparse and not feature.is_weighted]
        return tuple(sorted(sparse, key=lambda feature: not feature.is_single))

    @cached_property
    def weighted(self) -> tuple[Feature, ...]:
        """Weighted multi-valued fields, in the key order of `Batch.weighted_features`."""
        return tuple(feature for feature in self.features if feature.is_weighted)

    @cached_property
    def dense(self) -> tuple[Feature, ...]:
        """Fields that enter as numbers, in the column order of `Batch.dense_features`."""
        return tuple(feature for feature in self.features if not feature.is_sparse)

    @cached_property
    def table_of(self) -> dict[str, Table]:
        """Field name -> its table."""
        return {name: table for table in self.tables for name in table.feature_names}

    @property
    def width(self) -> int:
        """N, the width of all fields together: sum of embedding dims plus dense columns, projected where the schema says so."""
        return sum(table.embedding_dim * len(table.feature_names) for table in self.tables) + sum(
            feature.model_width for feature in self.dense
        )

    @property
    def columns(self) -> tuple[str, ...]:
        """Every Parquet column that training reads, without repeats."""
        names = (*self.labels, *self.field_columns, self.group_column, self.weight_column)
        return tuple(dict.fromkeys(name for name in names if name))

    @property
    def field_columns(self) -> tuple[str, ...]:
        """Every Parquet column that a field reads, without repeats: what serving reads."""
        names = (name for feature in self.features for name in (feature.source_column, feature.weights))
        return tuple(dict.fromkeys(name for name in names if name))

    def require_fitted(self) -> None:
        """Raise InputError if a field still waits for a fit."""
        for feature in self.features:
            if not feature.is_fitted:
                raise InputError(
                    f"schema {self.name!r}: field {feature.name!r} still says 'fit'; run `mbcnet schema fit` on the training "
                    "files (or `mbcnet data prepare`), which writes a fitted schema.toml, and train with that one"
                )

    def require_one_label(self, what: str) -> None:
        """Raise InputError where there are several labels; `what` takes one."""
        if self.tasks:
            found = ", ".join(self.tasks)
            raise InputError(f"{what}: takes one label, and schema {self.name!r} has {found}; use one of one label")

    @cached_property
    def own_vocabularies(self) -> dict[str, str]:
        """Field with a table -> where its vocabulary lies in a folder that stands alone: as a fit writes it, and a run keeps it."""
        stems = file_stems(table.name for table in self.tables)
        return {name: f"{VOCABULARY_FOLDER}/{stems[table.name]}.parquet" for name, table in self.table_of.items()}

    def standing_alone(self) -> "Schema":
        """The same with every vocabulary at its place in a folder that has the schema and all its vocabularies."""
        kept = [each for each in self.features if each.vocabulary not in ("", FIT)]
        own = {each.name: self.own_vocabularies[each.name] for each in kept}
        features = (dataclasses.replace(each, vocabulary=own.get(each.name, each.vocabulary)) for each in self.features)
        return dataclasses.replace(self, features=tuple(features))

    def fingerprint(self) -> str:
        """Twelve hex digits that change whenever fields, tables or groups change; hints, folders and types of ids, on which no plan depends, do not count."""
        top = schema_to_toml(self.standing_alone())
        top.pop("group_type", None)
        for entry in top["fields"].values():
            for key in HINTS:
                entry.pop(key, None)
        for name, entry in self.transforms.items():  # the file's text counts, not its place
            top["transforms"][name] = {key: str(value).rpartition("#")[2] for key, value in entry.items()}
        text = json.dumps(top, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class _SharedTable:
    """The [tables] entry of a schema file: a table that several fields share. A fit sets 0 rows."""

    embedding_dim: int
    num_embeddings: int = 0


@dataclass(frozen=True)
class _SchemaTop:
    """A schema file's top level, as written, without its fields."""

    name: str
    label: str = ""
    labels: tuple[str, ...] = ()
    groups: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    tables: dict[str, _SharedTable] = dataclasses.field(default_factory=dict)
    group_column: str = ""
    time_column: str = ""
    group_type: IdType = ""
    weight_column: str = ""
    transforms: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)


def load_schema(path: str | Path) -> Schema:
    """Read and check a schema file; InputError, naming file, field, value, what was wanted and how to fix it."""
    path = Path(path)
    return parse_schema(read_toml(path), str(path), path.parent)


def parse_schema(table: dict[str, Any], source: str, folder: Path) -> Schema:
    """Turn a parsed schema file into a checked Schema. `source` names it in messages."""
    raw_fields = table.get("fields")
    if not isinstance(raw_fields, dict) or not raw_fields:
        raise InputError(f'{source}: [fields] is missing or empty; list each column, e.g. age = {{ kind = "numeric" }}')
    top = parse_dataclass(_SchemaTop, {key: value for key, value in table.items() if key != "fields"}, source)
    labels = _labels_of(top, source)
    features = [_parse_feature(name, entry, top, labels, source) for name, entry in raw_fields.items()]
    _check_names(raw_fields, top, labels, source)
    _check_crosses(features, source)
    _check_groups(top.groups, raw_fields, source)
    check_sequences(features, source)
    own: dict[str, Any] = {"transforms": checked_transforms(top.transforms, features, source, folder)}
    tables = _build_tables(features, top.tables, source)
    own |= {"features": tuple(features), "tables": tables, "folder": folder, "label": labels[0]}
    top_level = {key: value for key, value in vars(top).items() if key != "labels"}
    return Schema(**top_level | own, tasks=labels if len(labels) > 1 else ())


def _labels_of(top: _SchemaTop, source: str) -> tuple[str, ...]:
    """The label columns that `label` or `labels` names."""
    if bool(top.label) == bool(top.labels):
        said = "both label and labels" if top.label else "label = ''"
        raise InputError(
            f"{source}: {said}: wanted the column of 0 and 1, or labels = [...] of several; name one of the two"
        )
    labels = top.labels or (top.label,)
    bad = [each for each in top.labels if not each or "/" in each or top.labels.count(each) > 1]
    if bad:
        raise InputError(f"{source}: labels: {bad[0]!r}: wanted column names without '/', each once; change the list")
    return labels


def _parse_feature(name: str, entry: Any, top: _SchemaTop, labels: tuple[str, ...], source: str) -> Feature:
    where = f"{source}: fields.{name}"
    if not isinstance(entry, dict):
        raise InputError(f'{where} = {entry!r}: wanted a table such as {{ kind = "categorical" }}')
    if "name" in entry:  # the dataclass has it, the file says it by the key
        raise InputError(unknown_key(f"{where}.name", "name", ["column"]))
    feature = parse_dataclass(Feature, {"name": name, **entry}, source, f"fields.{name}")
    problem = feature_problem(feature, labels, top.tables)
    if problem:
        raise InputError(f"{where}.{problem}")
    return feature


def _check_names(fields: Iterable[str], top: _SchemaTop, labels: tuple[str, ...], source: str) -> None:
    for name in fields:
        if problem := name_problem(name):
            raise InputError(f"{source}: {name!r}: {problem}; rename the field and give its column by `column`")
    for section, names in (("tables", top.tables), ("groups", top.groups)):
        for name in names:
            if problem := name_problem(name):
                raise InputError(f"{source}: {section}: {name!r}: {problem}; rename it")
    for name in top.tables:
        if not is_module_name(name):
            raise InputError(
                f"{source}: tables: {name!r}: wanted a name without '.' that torch's modules do not use themselves; rename the table, "
                "here and in its fields' `table`"
            )
    for key in ("group_column", "time_column", "weight_column"):
        if getattr(top, key) in labels:
            raise InputError(f"{source}: {key} = {getattr(top, key)!r}: this is the label; name another column")
    if top.group_type and not top.group_column:
        raise InputError(f"{source}: group_type = {top.group_type!r}: only group_column reads it; remove it")


def _check_crosses(features: Sequence[Feature], source: str) -> None:
    """Refuse a cross of fields that are not there or have no ids, and one whose `max_length` does not fit them."""
    fields = {feature.name: feature for feature in features}
    for cross in (feature for feature in features if feature.is_cross):
        where, parts = f"{source}: fields.{cross.name}", [fields.get(name) for name in cross.of]
        if len(set(cross.of)) != len(parts) or not 2 <= len(parts) <= 3:
            raise InputError(f"{where}.of = {list(cross.of)}: wanted the names of two or three other fields; change it")
        for name, part in zip(cross.of, parts, strict=True):
            if part is None or part.is_cross or part.is_weighted or part.is_sequence or not part.is_sparse:
                found = "no field" if part is None else f"of kind {part.kind}"
                raise InputError(
                    f"{where}.of: {name!r} is {found}: wanted fields that are categorical, multi_valued, or numeric with transform = "
                    "'bucketise'; name another one"
                )
        if bool(cross.max_length) != any(part is not None and not part.is_single for part in parts):
            wanted = "no list is among its fields; remove it" if cross.max_length else "a list is among its fields"
            raise InputError(
                f"{where}.max_length = {cross.max_length}: {wanted}"
                + ("" if cross.max_length else ": wanted how many combinations a row keeps; set it, to 64 for instance")
            )


def _check_groups(groups: dict[str, tuple[str, ...]], names: Container[str], source: str) -> None:
    for group, members in groups.items():
        where = f"{source}: groups.{group}"
        if group in RESERVED_GROUPS:
            raise InputError(f"{where}: the model has a group of this name itself; choose another name")
        if not members:
            raise InputError(f"{where} = []: wanted names of fields; add some or remove the group")
        if len(set(members)) < len(members):
            raise InputError(f"{where}: a field is listed twice; remove the repeat")
        for member in members:
            if member not in names:
                raise InputError(f"{where}: {member!r} is not a field; add it to [fields] or remove it here")


def _build_tables(features: list[Feature], shared: dict[str, _SharedTable], source: str) -> tuple[Table, ...]:
    """Collect the embedding tables; fields of one table must agree on what FBGEMM decides per table."""
    members: dict[str, list[Feature]] = {}
    for feature in features:
        if feature.is_sparse:
            members.setdefault(feature.table_name, []).append(feature)
            own, (first, *_) = feature.table_name, members[feature.table_name]
            where = f"{source}: fields.{feature.name}"
            if not feature.table and own in shared:
                raise InputError(
                    f"{where}: [tables] has an entry of this name; set table = {own!r} here, or rename one of the two"
                )
            if not feature.table and feature is not first:
                raise InputError(f"{where}: field {first.name!r} has a table {own!r} too; rename one of the two fields")
    for name, table in shared.items():
        if name not in members:
            raise InputError(f"{source}: tables.{name}: no field uses this table; remove it or set table = {name!r}")
        problem = rows_problem(table, members[name], "table")
        if problem:
            raise InputError(f"{source}: tables.{name}.{problem}")
    tables, longest = [], lengths_of(features)
    for name, (first, *others) in members.items():
        for other in others:
            difference = _difference(first, other)
            if difference:
                raise InputError(f"{source}: fields.{other.name}: {difference}")
        sizes, names = shared.get(name, first), tuple(user.name for user in members[name])
        rows, dim = sizes.num_embeddings, sizes.embedding_dim
        is_pooled = not longest.keys() & names
        tables.append(
            Table(
                name, rows, dim, first.pooling if is_pooled else "sum", names, first.is_weighted, _zch_of(first),  # type: ignore[arg-type]
                0 if is_pooled else sum(longest.get(user, 1) for user in names),
            )
        )  # fmt: skip
    return tuple(tables)


def _difference(first: Feature, other: Feature) -> str:
    """What keeps two fields from sharing a table, or an empty string."""
    shares = f"shares table {first.table_name!r} with {first.name!r} but"
    differ = other.pooling != first.pooling and not (other.is_sequence or first.is_sequence)
    if differ or other.is_weighted != first.is_weighted:
        return f"{shares} pools otherwise; pooling and weights belong to the table: make them equal, or use two tables"
    if _zch_of(other) and _zch_of(first) and _zch_of(other) != _zch_of(first):
        return (
            f"{shares} has another eviction, eviction_interval or zch_buckets, which belong to the table: make them equal, "
            "or use two tables"
        )
    if (other.encoding, other.vocabulary, other.type) != (first.encoding, first.vocabulary, first.type):
        return (
            f"{shares} encodes otherwise, so one value would have two rows; make encoding, vocabulary and type equal, or use two "
            "tables"
        )
    return ""


def _zch_of(feature: Feature) -> Zch | None:
    if not feature.is_unbounded:
        return None
    return Zch(feature.eviction, feature.eviction_interval, feature.zch_buckets)


def schema_to_toml(schema: Schema) -> dict[str, Any]:
    """The file form of a schema: only what differs from the defaults."""
    defaults = {field.name: to_toml_value(field.default) for field in dataclasses.fields(Feature)}
    fields = {
        feature.name: {
            key: value for key, value in to_toml_value(feature).items() if key != "name" and value != defaults[key]
        }
        for feature in schema.features
    }
    shared = {feature.table for feature in schema.features if feature.table}
    top: dict[str, Any] = {"name": schema.name}
    top |= {"labels": list(schema.tasks)} if schema.tasks else {"label": schema.label}
    names = ("group_column", "group_type", "time_column", "weight_column")
    top |= {key: getattr(schema, key) for key in names if getattr(schema, key)}
    top["fields"] = fields
    tables = {
        table.name: {"num_embeddings": table.num_embeddings, "embedding_dim": table.embedding_dim}
        for table in schema.tables
        if table.name in shared
    }
    if tables:
        top["tables"] = tables
    if schema.transforms:
        top["transforms"] = {name: dict(entry) for name, entry in schema.transforms.items()}
    top["groups"] = {name: list(members) for name, members in schema.groups.items()}
    return top


def format_schema(schema: Schema, header: str = "") -> str:
    """Schema file text, one line a field, as a person would write it. `header`: comment lines for the top, without the leading `#`."""
    top = schema_to_toml(schema)
    lines = [f"# {line}".rstrip() for line in header.splitlines()]
    lines += [f"{key} = {toml_text(value)}" for key, value in top.items() if not isinstance(value, dict)]
    for section in ("tables", "transforms", "fields"):
        entries = top.get(section, {})
        if entries:
            lines += ["", f"[{section}]"]
        pad = max((len(toml_key(name)) for name in entries), default=0)
        lines += [f"{toml_key(name):<{pad}} = {inline_table(entry)}" for name, entry in entries.items()]
    if top["groups"]:
        lines += ["", "[groups]"]
        lines += [f"{toml_key(name)} = {toml_text(members)}" for name, members in top["groups"].items()]
    return "\n".join(lines) + "\n"


def toml_key(name: str) -> str:
    """A TOML key, quoted where it must be."""
    bare = name.replace("_", "").replace("-", "")
    return name if bare.isascii() and bare.isalnum() else toml_text(name)


def toml_text(value: Any) -> str:
    """A string, number, boolean or list as TOML, which takes JSON's; what would not be seen is written as its number."""
    text = json.dumps(value, ensure_ascii=False)
    return "".join(each if each.isprintable() else f"\\U{ord(each):08X}" for each in text)


def inline_table(entry: dict[str, Any]) -> str:
    """A field's entry on one line."""
    return "{ " + ", ".join(f"{toml_key(key)} = {toml_text(value)}" for key, value in entry.items()) + " }"
