"""Schema: which columns a log has, what each means, which table each looks up, and the EFGC groups. Imports no torch.

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

What a missing value (null) means, by kind: categorical "ids" -> an empty bag, which looks up the zero vector; "vocabulary", "hash"
and bucketised numerics -> row 0, which is learned; multi-valued -> an empty list; numeric -> 0 after the transform; vector -> zeros.
A vocabulary of V values has V + 2 rows: row 0 missing, row 1 out of vocabulary, row 2 + i the i-th value.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from data.errors import InputError
from data.typed import parse_dataclass, read_toml, to_toml_value

Kind = Literal["categorical", "multi_valued", "weighted_multi_valued", "numeric", "vector"]
Encoding = Literal["ids", "vocabulary", "hash"]
Transform = Literal["identity", "log1p", "standardise", "bucketise"]

FIT = "fit"  # the value that `mbcnet data prepare` replaces by what it measured on the training split
MISSING_ROW = 0
OUT_OF_VOCABULARY_ROW = 1
FIRST_VOCABULARY_ROW = 2
MAX_EMBEDDING_DIM = 1024  # above it FBGEMM returns zeros without a word (torchrec issue 3673)
MAX_NUM_EMBEDDINGS = 2**40


@dataclass(frozen=True)
class Feature:
    """One field of the log.

    Attributes:
        kind: categorical (one id), multi_valued (a list of ids), weighted_multi_valued (a list of ids and a list of weights), numeric
            (one number), vector (a fixed-size list of numbers).
        column: the Parquet column, if it is not named like the field.
        encoding: how a categorical value becomes a row: ids (integers in [0, num_embeddings)), vocabulary (a fitted list of values),
            hash (64-bit hash, modulo num_embeddings - 1, plus 1).
        num_embeddings: rows of the field's table; 0 where a table or a fit says it.
        embedding_dim: width of the field's table, a multiple of 4, at most 1024; 0 where a table says it.
        table: name of the table, if fields share one; default: the field's own name.
        pooling: how a list's rows become one vector.
        vocabulary: "fit", or a Parquet file (relative to the schema) with one column `value`, in row order.
        min_count: values seen fewer times in training become out-of-vocabulary at fit.
        on_invalid: what an id outside [0, num_embeddings) does: error, null (as if missing) or modulo.
        weights: the column of weights of a weighted_multi_valued field.
        transform: of a numeric field. log1p is sign(x) * log(1 + |x|); standardise is (x - mean) / std; bucketise turns
            the number into a row: 0 missing, 1 + the number of boundaries <= x.
        mean, std: of standardise, "fit" or numbers.
        boundaries: of bucketise, "fit" (quantiles of the training split) or ascending numbers.
        num_buckets: how many buckets a fit of the boundaries makes at most.
        width: length of a vector.
    """

    name: str
    kind: Kind
    column: str = ""
    encoding: Encoding = "ids"
    num_embeddings: int = 0
    embedding_dim: int = 0
    table: str = ""
    pooling: Literal["sum", "mean"] = "sum"
    vocabulary: str = ""
    min_count: int = 1
    on_invalid: Literal["error", "null", "modulo"] = "error"
    weights: str = ""
    transform: Transform = "identity"
    mean: float | Literal["fit"] = 0.0
    std: float | Literal["fit"] = 1.0
    boundaries: tuple[float, ...] | Literal["fit"] = ()
    num_buckets: int = 16
    width: int = 0

    @property
    def is_sparse(self) -> bool:
        """Whether the field looks up rows of an embedding table."""
        return self.kind not in ("numeric", "vector") or self.transform == "bucketise"

    @property
    def is_single(self) -> bool:
        """Whether the field has at most one id per row."""
        return self.kind in ("categorical", "numeric")

    @property
    def is_weighted(self) -> bool:
        """Whether the field's ids carry weights."""
        return self.kind == "weighted_multi_valued"

    @property
    def is_fitted(self) -> bool:
        """Whether nothing is left for `mbcnet data prepare` to measure."""
        return FIT not in (self.vocabulary, self.mean, self.std, self.boundaries)

    @property
    def source_column(self) -> str:
        """The Parquet column the field reads."""
        return self.column or self.name

    @property
    def table_name(self) -> str:
        """The table the field looks up."""
        return self.table or self.name

    @property
    def dense_width(self) -> int:
        """Columns of `dense_features` the field takes; 0 for a sparse field."""
        if self.is_sparse:
            return 0
        return self.width if self.kind == "vector" else 1


@dataclass(frozen=True)
class Table:
    """One embedding table: rows, width, pooling, and the fields that look it up."""

    name: str
    num_embeddings: int
    embedding_dim: int
    pooling: Literal["sum", "mean"]
    feature_names: tuple[str, ...]
    weighted: bool


@dataclass(frozen=True)
class Schema:
    """A log's fields, tables and groups.

    Attributes:
        name: of the data set.
        label: column of 0 and 1.
        features: every field, in the file's order.
        tables: the embedding tables, in order of first use.
        groups: EFGC groups, Eq. 2: name -> names of fields. A field may be in many groups and is looked up once.
        group_column: column whose values group rows for GAUC; empty if none.
        time_column: column that orders rows; empty if none.
        folder: where relative vocabulary paths start.
    """

    name: str
    label: str
    features: tuple[Feature, ...]
    tables: tuple[Table, ...]
    groups: dict[str, tuple[str, ...]]
    group_column: str = ""
    time_column: str = ""
    folder: Path = Path()

    @property
    def sparse(self) -> tuple[Feature, ...]:
        """Unweighted fields with a table, in the key order of `Batch.sparse_features`: single-valued, then lists."""
        sparse = [feature for feature in self.features if feature.is_sparse and not feature.is_weighted]
        return tuple(sorted(sparse, key=lambda feature: not feature.is_single))

    @property
    def weighted(self) -> tuple[Feature, ...]:
        """Weighted multi-valued fields, in the key order of `Batch.weighted_features`."""
        return tuple(feature for feature in self.features if feature.is_weighted)

    @property
    def dense(self) -> tuple[Feature, ...]:
        """Fields that enter as numbers, in the column order of `Batch.dense_features`."""
        return tuple(feature for feature in self.features if not feature.is_sparse)

    @cached_property
    def table_of(self) -> dict[str, Table]:
        """Field name -> its table."""
        return {name: table for table in self.tables for name in table.feature_names}

    @property
    def width(self) -> int:
        """N, the width of all fields together: sum of embedding dims plus dense columns."""
        return sum(table.embedding_dim * len(table.feature_names) for table in self.tables) + sum(
            feature.dense_width for feature in self.dense
        )

    @property
    def columns(self) -> tuple[str, ...]:
        """Every Parquet column that training reads, without repeats."""
        names = [self.label]
        for feature in self.features:
            names += [feature.source_column] + ([feature.weights] if feature.weights else [])
        return tuple(dict.fromkeys(names + ([self.group_column] if self.group_column else [])))

    def require_fitted(self) -> None:
        """Raise InputError if a field still waits for `mbcnet data prepare`."""
        for feature in self.features:
            if not feature.is_fitted:
                raise InputError(
                    f"schema {self.name!r}: field {feature.name!r} still says 'fit'; run `mbcnet data prepare`, "
                    "which writes a fitted schema.toml beside the data, and train with that one"
                )

    def fingerprint(self) -> str:
        """Twelve hex digits that change whenever fields, tables or groups change."""
        text = json.dumps(schema_to_toml(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class _SharedTable:
    """The [tables] entry of a schema file: a table that several fields share."""

    num_embeddings: int
    embedding_dim: int


@dataclass(frozen=True)
class _SchemaTop:
    """A schema file's top level, as written, without its fields."""

    name: str
    label: str
    groups: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    tables: dict[str, _SharedTable] = dataclasses.field(default_factory=dict)
    group_column: str = ""
    time_column: str = ""


def load_schema(path: str | Path) -> Schema:
    """Read and check a schema file.

    Raises:
        InputError: naming file, field, value, what was wanted and the mend.
    """
    path = Path(path)
    return parse_schema(read_toml(path), str(path), path.parent)


def parse_schema(table: dict[str, Any], source: str, folder: Path) -> Schema:
    """Turn a parsed schema file into a checked Schema. `source` names it in messages."""
    raw_fields = table.get("fields")
    if not isinstance(raw_fields, dict) or not raw_fields:
        raise InputError(
            f'{source}: [fields] is missing or empty; list each column, e.g. age = {{ kind = "numeric" }}'
        )
    top = parse_dataclass(_SchemaTop, {key: value for key, value in table.items() if key != "fields"}, source)
    features = []
    for name, entry in raw_fields.items():
        if not isinstance(entry, dict):
            raise InputError(
                f'{source}: fields.{name} = {entry!r}: wanted a table such as {{ kind = "categorical" }}'
            )
        feature = parse_dataclass(Feature, {"name": name, **entry}, source, f"fields.{name}")
        problem = _feature_problem(feature, top)
        if problem:
            raise InputError(f"{source}: fields.{name}.{problem}")
        features.append(feature)
    _check_groups(top.groups, features, source)
    return Schema(
        name=top.name,
        label=top.label,
        features=tuple(features),
        tables=_build_tables(features, top.tables, source),
        groups=top.groups,
        group_column=top.group_column,
        time_column=top.time_column,
        folder=folder,
    )


def _feature_problem(feature: Feature, top: _SchemaTop) -> str:
    """What is wrong with one field, as `key = value: wanted ...; mend`, or an empty string."""
    if feature.source_column == top.label:
        return f"column = {feature.source_column!r}: this column is the label; a model must not see it; remove the field"
    if not feature.is_sparse:
        return _dense_problem(feature)
    if feature.weights and not feature.is_weighted:
        return f"weights = {feature.weights!r}: only kind = 'weighted_multi_valued' has weights; change the kind or remove it"
    if feature.is_weighted and not feature.weights:
        return "weights is missing: wanted the column that holds the list of weights; add it"
    if feature.is_weighted and feature.pooling == "mean":
        return "pooling = 'mean': FBGEMM computes weighted bags as sums only; use pooling = 'sum'"
    if feature.kind == "numeric":
        return _boundaries_problem(feature)
    if feature.encoding == "vocabulary" and not feature.vocabulary:
        return "vocabulary is missing: wanted 'fit' or a Parquet file of values; add vocabulary = \"fit\""
    if feature.vocabulary and feature.encoding != "vocabulary":
        return f"vocabulary = {feature.vocabulary!r}: only encoding = 'vocabulary' reads it; add encoding = \"vocabulary\""
    if feature.min_count < 1:
        return f"min_count = {feature.min_count}: wanted 1 or more; use 1 to keep every value"
    if feature.table and feature.table not in top.tables:
        return f"table = {feature.table!r}: no such table; add [tables] {feature.table} = {{ num_embeddings, embedding_dim }}"
    if feature.table and (feature.num_embeddings or feature.embedding_dim):
        return f"table = {feature.table!r}: the table has its own sizes; remove num_embeddings and embedding_dim here"
    return "" if feature.table else _size_problem(feature)


def _dense_problem(feature: Feature) -> str:
    if feature.embedding_dim or feature.num_embeddings or feature.table:
        return "embedding_dim: a dense field has no table; remove it, or use transform = 'bucketise' on a numeric field"
    if feature.kind == "vector" and feature.width < 1:
        return f"width = {feature.width}: wanted the length of the vector, 1 or more; set it"
    if feature.kind == "vector" and feature.transform != "identity":
        return f"transform = {feature.transform!r}: vectors enter as they are; remove it"
    if isinstance(feature.std, float) and feature.std <= 0:
        return f"std = {feature.std}: wanted a number above 0; a constant column carries nothing: remove the field"
    return ""


def _boundaries_problem(feature: Feature) -> str:
    if feature.boundaries == FIT:
        return (
            f"num_buckets = {feature.num_buckets}: wanted 2 or more; raise it"
            if feature.num_buckets < 2
            else ""
        )
    if not feature.boundaries:
        return "boundaries is missing: wanted 'fit' or ascending numbers; add boundaries = \"fit\""
    if any(low >= high for low, high in zip(feature.boundaries, feature.boundaries[1:], strict=False)):  # type: ignore[operator]
        return (
            f"boundaries = {list(feature.boundaries)}: wanted ascending numbers; sort them and remove repeats"
        )
    rows = len(feature.boundaries) + FIRST_VOCABULARY_ROW
    if feature.num_embeddings != rows:
        return f"num_embeddings = {feature.num_embeddings}: {len(feature.boundaries)} boundaries need {rows} rows; set {rows}"
    return _size_problem(feature)


def _size_problem(sized: "Feature | _SharedTable") -> str:
    """What is wrong with a table's sizes, or an empty string. FBGEMM needs dims that are multiples of 4."""
    dim, rows = sized.embedding_dim, sized.num_embeddings
    fitted = not isinstance(sized, Feature) or sized.is_fitted
    if dim < 4 or dim % 4 or dim > MAX_EMBEDDING_DIM:
        mend = min(max(4, dim + 3 - (dim + 3) % 4), MAX_EMBEDDING_DIM)
        return f"embedding_dim = {dim}: wanted a multiple of 4 in [4, {MAX_EMBEDDING_DIM}]; use {mend}"
    if fitted and not 1 <= rows <= MAX_NUM_EMBEDDINGS:
        return f"num_embeddings = {rows}: wanted a number of rows in [1, 2**40]; set it to the field's number of ids"
    if isinstance(sized, Feature) and sized.encoding == "hash" and rows < 2:
        return f"num_embeddings = {rows}: a hashed field needs at least 2 rows, row 0 being the missing one; raise it"
    return ""


def _check_groups(groups: dict[str, tuple[str, ...]], features: list[Feature], source: str) -> None:
    known = {feature.name for feature in features}
    for group, members in groups.items():
        if group == "all":
            raise InputError(
                f"{source}: groups.all: the name 'all' means every field already; choose another name"
            )
        if not members:
            raise InputError(
                f"{source}: groups.{group} = []: wanted names of fields; add some or remove the group"
            )
        if len(set(members)) < len(members):
            raise InputError(f"{source}: groups.{group}: a field is listed twice; remove the repeat")
        for member in members:
            if member not in known:
                raise InputError(
                    f"{source}: groups.{group}: {member!r} is not a field; add it to [fields] or remove it here"
                )


def _build_tables(features: list[Feature], shared: dict[str, _SharedTable], source: str) -> tuple[Table, ...]:
    """Collect the embedding tables; fields of one table must agree on what FBGEMM decides per table."""
    for name, table in shared.items():
        problem = _size_problem(table)
        if problem:
            raise InputError(f"{source}: tables.{name}.{problem}")
    members: dict[str, list[Feature]] = {}
    for feature in features:
        if feature.is_sparse:
            members.setdefault(feature.table_name, []).append(feature)
    for name in shared:
        if name not in members:
            raise InputError(
                f"{source}: tables.{name}: no field uses this table; remove it or set table = {name!r} in a field"
            )
    tables = []
    for name, users in members.items():
        first = users[0]
        for other in users[1:]:
            if name not in shared:
                raise InputError(
                    f"{source}: fields.{other.name}: table {name!r} belongs to a field; share it through [tables]"
                )
            if other.pooling != first.pooling or other.is_weighted != first.is_weighted:
                raise InputError(
                    f"{source}: fields.{other.name}: shares table {name!r} with {first.name!r} but pools otherwise; "
                    "pooling and weights belong to the table: make them equal, or use two tables"
                )
        sizes = shared.get(name, first)
        names = tuple(user.name for user in users)
        tables.append(
            Table(name, sizes.num_embeddings, sizes.embedding_dim, first.pooling, names, first.is_weighted)
        )
    return tuple(tables)


def schema_to_toml(schema: Schema) -> dict[str, Any]:
    """The file form of a schema: only what differs from the defaults."""
    defaults = {field.name: field.default for field in dataclasses.fields(Feature)}
    fields = {
        feature.name: {
            key: value
            for key, value in to_toml_value(feature).items()
            if key != "name" and value != to_toml_value(defaults[key])
        }
        for feature in schema.features
    }
    shared = {feature.table for feature in schema.features if feature.table}
    top: dict[str, Any] = {"name": schema.name, "label": schema.label}
    top |= {key: getattr(schema, key) for key in ("group_column", "time_column") if getattr(schema, key)}
    top["fields"] = fields
    tables = {
        table.name: {"num_embeddings": table.num_embeddings, "embedding_dim": table.embedding_dim}
        for table in schema.tables
        if table.name in shared
    }
    if tables:
        top["tables"] = tables
    top["groups"] = {name: list(members) for name, members in schema.groups.items()}
    return top


def format_schema(schema: Schema, header: str = "") -> str:
    """Schema file text, one line a field, as a person would write it.

    Args:
        schema: what to write.
        header: comment lines for the top, without the leading `#`.
    """
    top = schema_to_toml(schema)
    lines = [f"# {line}".rstrip() for line in header.splitlines()]
    lines += [f"{key} = {json.dumps(value)}" for key, value in top.items() if not isinstance(value, dict)]
    for section in ("tables", "fields"):
        entries = top.get(section, {})
        if entries:
            lines += ["", f"[{section}]"]
        pad = max((len(_key(name)) for name in entries), default=0)
        lines += [f"{_key(name):<{pad}} = {_inline(entry)}" for name, entry in entries.items()]
    if top["groups"]:
        lines += ["", "[groups]"] + [
            f"{_key(name)} = {json.dumps(members)}" for name, members in top["groups"].items()
        ]
    return "\n".join(lines) + "\n"


def _key(name: str) -> str:
    bare = name.replace("_", "").replace("-", "")
    return name if bare.isascii() and bare.isalnum() else json.dumps(name, ensure_ascii=False)


def _inline(entry: dict[str, Any]) -> str:
    # JSON's strings, numbers and lists are valid TOML; booleans too.
    return "{ " + ", ".join(f"{key} = {json.dumps(value)}" for key, value in entry.items()) + " }"
