"""Feature: what one column of the log means, and what can be wrong with saying so."""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, Literal

from .bounds import bounded, bounds_problem  # relative: an exported artifact carries this file
from .names import own_table

Kind = Literal["categorical", "multi_valued", "weighted_multi_valued", "sequence", "numeric", "vector", "cross"]
Encoding = Literal["ids", "vocabulary", "hash", "zch", "gap"]
Pooling = Literal["sum", "mean", "target_attention", "transformer"]
IdType = Literal["", "integer", "text"]
Eviction = Literal["distance_lfu", "lfu", "lru"]
Transform = Literal["identity", "log1p", "standardise", "bucketise"]

FIT = "fit"  # the value that `mbcnet schema fit` and `mbcnet data prepare` replace by what they measure
VOCABULARY_FOLDER = "vocabulary"
MISSING_ROW = 0
OUT_OF_VOCABULARY_ROW = 1
FIRST_VOCABULARY_ROW = 2
MAX_EMBEDDING_DIM = 1024  # above it FBGEMM returns zeros without a word (torchrec issue 3673)
MAX_NUM_EMBEDDINGS = 2**40
MAX_ZCH_BUCKETS = 1024  # TorchRec's own bound
ZCH_LEAST_ROWS = 2  # of a bucket: one for an id, and the one of ids without a row
MAX_LENGTH = 4_096  # of sequences
MAX_WIDTH = 65_536  # of vectors and projections, and of buckets


@dataclass(frozen=True)
class Feature:
    """One field of the log: the keys of its entry in [fields], which docs/data.md describes; 0 and "" say nothing.

    A sequence is an ordered list of ids, the newest last (sequences.py); a cross has no column. Rows by encoding: ids, the value itself;
    vocabulary, its place there + 2; hash, 1 + hash mod (num_embeddings - 1); zch, one of its own, which it can lose to another id; gap, of times g
    since an event, 1 + floor(log2(1 + g)) or the last. log1p is sign(x) log(1 + |x|), standardise (x - mean) / std, bucketise row 1 + the
    number of boundaries <= x.
    """

    name: str
    kind: Kind
    column: str = ""  # if it is not named like the field
    encoding: Encoding = "ids"
    type: IdType = ""  # of hashed, zch and vocabulary ids; empty: as the training files say, or the vocabulary
    num_embeddings: int = 0
    embedding_dim: int = 0
    table: str = ""  # that fields share; empty: one of its own (see own_table)
    pooling: Pooling = "sum"
    target: str = ""  # the categorical field of the same table whose id a sequence's ids are compared with
    beside: str = ""  # the sequence whose events these values belong to, one value an event
    vocabulary: str = ""  # "fit", or a Parquet file (relative to the schema) with one column `value`, in row order
    min_count: int = bounded(1, at_least=1, fix="use 1 to keep every value")  # rarer ones are out of vocabulary
    expire_after: int = bounded(0, at_least=0, fix="use 0 to keep every value")  # growths without a value; 0: never
    eviction: Eviction = "distance_lfu"  # whose row a new id of zch gets when all are taken
    eviction_interval: int = bounded(5, at_least=1, wanted="a number of steps, 1 or more", fix="use 5")
    zch_buckets: int = bounded(
        8, at_least=1, at_most=MAX_ZCH_BUCKETS, wanted=f"1 to {MAX_ZCH_BUCKETS}, a multiple of the number of ranks", fix="use 8"
    )  # fmt: skip
    on_invalid: Literal["error", "null", "modulo"] = "error"  # what an id outside [0, num_embeddings) does
    weights: str = ""  # the column of weights of a weighted_multi_valued field
    transform: str = "identity"  # a Transform, or one that others bring, see transforms.py
    mean: float | Literal["fit"] = 0.0
    std: float | Literal["fit"] = bounded(
        1.0, above=0, wanted="a number above 0", fix="a constant column carries nothing: remove the field"
    )
    boundaries: tuple[float, ...] | Literal["fit"] = ()
    num_buckets: int = bounded(16, at_least=2, at_most=MAX_WIDTH, wanted=f"2 to {MAX_WIDTH}", fix="change it")
    width: int = bounded(
        0, at_least=1, at_most=MAX_WIDTH, wanted=f"the length of the vector, 1 to {MAX_WIDTH}", fix="set it"
    )
    projection: int = bounded(
        0, at_least=0, at_most=MAX_WIDTH, wanted=f"a number of columns, 1 to {MAX_WIDTH}", fix="set it, or remove it"
    )  # fmt: skip
    pooling_factor: float = bounded(0.0, at_least=0, fix="remove the minus")  # ids per row, for the planner alone
    cardinality: int = bounded(0, at_least=0, fix="remove the minus")  # distinct values, for the planner alone
    of: tuple[str, ...] = ()  # the two or three fields whose values a cross combines, as they stand in the columns
    max_length: int = bounded(0, at_least=0, at_most=MAX_WIDTH, wanted=f"1 to {MAX_WIDTH}", fix="change it")

    @property
    def is_sparse(self) -> bool:
        """Whether the field looks up rows of an embedding table."""
        return self.kind not in ("numeric", "vector") or self.is_bucketised

    @property
    def is_sequence(self) -> bool:
        """Whether the column holds lists whose order counts."""
        return self.kind == "sequence"

    @property
    def is_bucketised(self) -> bool:
        """Whether the field is a number that becomes a row."""
        return self.kind == "numeric" and self.transform == "bucketise"

    @property
    def is_keyed(self) -> bool:
        """Whether the column holds ids."""
        return self.kind not in ("numeric", "vector", "cross") and self.encoding != "gap"

    @property
    def is_cross(self) -> bool:
        """Whether the field combines the values of others."""
        return self.kind == "cross"

    @property
    def is_hashed(self) -> bool:
        """Whether the field's row is a hash modulo the rows."""
        return self.is_cross or (self.is_keyed and self.encoding == "hash")

    @property
    def is_unbounded(self) -> bool:
        """Whether the model takes the field's hashed ids as they are, and gives rows to them."""
        return self.is_keyed and self.encoding == "zch"

    @property
    def is_single(self) -> bool:
        """Whether the field has at most one id per row."""
        return self.kind in ("categorical", "numeric") or (self.is_cross and not self.max_length)

    @property
    def is_weighted(self) -> bool:
        """Whether the field's ids carry weights."""
        return self.kind == "weighted_multi_valued"

    @property
    def is_fitted(self) -> bool:
        """Whether nothing is left for a fit to measure."""
        return FIT not in (self.vocabulary, self.mean, self.std, self.boundaries)

    @property
    def source_column(self) -> str:
        """The Parquet column the field reads; a cross has none."""
        return "" if self.is_cross else self.column or self.name

    @property
    def table_name(self) -> str:
        """The table the field looks up."""
        return self.table or own_table(self.name)

    @property
    def dense_width(self) -> int:
        """Columns of `dense_features` the field takes; 0 for a sparse field."""
        if self.is_sparse:
            return 0
        return self.width if self.kind == "vector" else 1

    @property
    def model_width(self) -> int:
        """Columns that a dense field brings to the branches: its projection's, if it has one; 0 for a sparse field."""
        return self.projection or self.dense_width


# Which fields read a key; on any other field it would be ignored silently, so it is refused there.
_READERS: tuple[tuple[str, Callable[[Feature], bool], str], ...] = (
    ("encoding", lambda feature: feature.kind not in ("numeric", "vector", "cross"), "fields of ids"),
    ("target beside", lambda feature: feature.is_sequence, 'kind = "sequence"'),
    ("type", lambda feature: feature.encoding not in ("ids", "gap"), 'encoding = "hash", "zch" or "vocabulary"'),
    ("vocabulary min_count expire_after", lambda feature: feature.encoding == "vocabulary", 'encoding = "vocabulary"'),
    ("eviction eviction_interval zch_buckets", lambda feature: feature.encoding == "zch", 'encoding = "zch"'),
    ("num_embeddings embedding_dim table pooling", lambda feature: feature.is_sparse, "fields with a table"),
    ("weights", lambda feature: feature.is_weighted, 'kind = "weighted_multi_valued"'),
    ("of", lambda feature: feature.is_cross, 'kind = "cross"'),
    (
        "max_length",
        lambda feature: feature.is_cross or (feature.is_sequence and not feature.beside),
        'kind = "cross" or "sequence" (not beside another)',
    ),
    ("column on_invalid table", lambda feature: not feature.is_cross, "fields with a column"),
    ("transform", lambda feature: feature.kind == "numeric", 'kind = "numeric"'),
    ("mean std", lambda feature: feature.transform == "standardise", 'transform = "standardise"'),
    ("boundaries num_buckets", lambda feature: feature.is_bucketised, 'transform = "bucketise"'),
    ("width projection", lambda feature: feature.kind == "vector", 'kind = "vector"'),
    ("pooling_factor", lambda feature: feature.is_sparse, "fields with a table"),
)
_DEFAULTS = {field.name: field.default for field in fields(Feature)}


def feature_problem(feature: Feature, labels: Container[str], shared_tables: Container[str]) -> str:
    """What is wrong with a field, as `key = value: wanted ...; how to fix it`, or ""; `labels`, `shared_tables`: the schema's names of both."""
    for role, column in (("column", feature.source_column), ("weights", feature.weights)):
        if column in labels:
            return f"{role} = {column!r}: this column is the label; a model must not see it; remove the field"
    unread = set() if feature.boundaries == FIT else {"num_buckets"}  # only a fit reads it
    for keys, reads, where in _READERS:
        if not reads(feature):
            for key in keys.split():
                value = getattr(feature, key)
                if value != _DEFAULTS[key]:
                    return f"{key} = {value!r}: only {where} reads it; remove it, or change the field's kind"
                unread.add(key)
    if feature.on_invalid == "modulo" and not (feature.is_keyed and feature.encoding == "ids"):
        return "on_invalid = 'modulo': only encoding = 'ids' has ids to take modulo num_embeddings; remove it"
    if problem := _sequence_problem(feature):
        return problem
    return bounds_problem(feature, unread) or (_table_problem(feature, shared_tables) if feature.is_sparse else "")


def _sequence_problem(feature: Feature) -> str:
    if not feature.is_sequence:
        if feature.pooling not in ("sum", "mean"):
            return f"pooling = {feature.pooling!r}: wanted 'sum' or 'mean'; change it, or the kind to 'sequence'"
        return "encoding = 'gap': only sequences have gaps; use kind = 'sequence'" if feature.encoding == "gap" else ""
    if feature.encoding == "zch":
        return "encoding = 'zch': TorchRec gives rows to unbounded ids of pooled fields only; use encoding = 'hash'"
    if feature.on_invalid == "null":
        return "on_invalid = 'null': a sequence keeps a place for each event; use 'error' or 'modulo'"
    if feature.beside and feature.pooling != "sum":
        return f"pooling = {feature.pooling!r}: the sequence {feature.beside!r} pools the fields beside it; remove it"
    if not feature.beside and not 1 <= feature.max_length <= MAX_LENGTH:
        return f"max_length = {feature.max_length}: wanted how many values to keep, 1 to {MAX_LENGTH}; use 50"
    if feature.pooling == "target_attention" and not feature.target:
        return "target is missing: wanted the categorical field that the sequence is compared with; add it"
    return ""


def _table_problem(feature: Feature, shared_tables: Container[str]) -> str:
    if feature.table and feature.table not in shared_tables:
        return f"table = {feature.table!r}: no such table; add [tables] {feature.table} = {{ num_embeddings, embedding_dim }}"
    if feature.table and (feature.num_embeddings or feature.embedding_dim):
        return f"table = {feature.table!r}: the table has its own sizes; remove num_embeddings and embedding_dim here"
    if feature.is_bucketised:
        return _boundaries_problem(feature)
    if feature.is_weighted and not feature.weights:
        return "weights is missing: wanted the column that holds the list of weights; add it"
    if feature.is_weighted and feature.pooling == "mean":
        return "pooling = 'mean': FBGEMM computes weighted bags as sums only; use pooling = 'sum'"
    if feature.encoding == "vocabulary" and not feature.vocabulary:
        return "vocabulary is missing: wanted 'fit' or a Parquet file of values; add vocabulary = \"fit\""
    return "" if feature.table else rows_problem(feature, [feature], "field")


def _boundaries_problem(feature: Feature) -> str:
    if feature.table:
        return f"table = {feature.table!r}: a bucketised number has a table of its own; remove it"
    if not feature.boundaries:
        return "boundaries is missing: wanted 'fit' or ascending numbers; add boundaries = \"fit\""
    if feature.boundaries != FIT:
        numbers = list(feature.boundaries)
        if any(low >= high for low, high in pairwise(numbers)):  # type: ignore[operator]
            return f"boundaries = {numbers}: wanted ascending numbers; sort them and remove repeats"
        rows = len(numbers) + FIRST_VOCABULARY_ROW
        if feature.num_embeddings != rows:
            return f"num_embeddings = {feature.num_embeddings}: {len(numbers)} boundaries need {rows} rows; set {rows}"
    return rows_problem(feature, [feature], "field")


def rows_problem(sizes: Any, users: Sequence[Feature], what: str) -> str:
    """What is wrong with the sizes of a "field" or "table", `what`, or an empty string; FBGEMM needs dims that are multiples of 4.

    As long as one of the `users`, the fields that look it up, waits for a fit, there may be 0 rows.
    """
    num_embeddings, embedding_dim = sizes.num_embeddings, sizes.embedding_dim
    if embedding_dim < 4 or embedding_dim % 4 or embedding_dim > MAX_EMBEDDING_DIM:
        near = min(max(4, embedding_dim + 3 - (embedding_dim + 3) % 4), MAX_EMBEDDING_DIM)
        wanted = f"a multiple of 4 in [4, {MAX_EMBEDDING_DIM}]"
        return f"embedding_dim = {embedding_dim}: wanted {wanted}; use {near}"
    is_fitted = all(user.is_fitted for user in users)
    if not is_fitted <= num_embeddings <= MAX_NUM_EMBEDDINGS:
        return f"num_embeddings = {num_embeddings}: wanted a number of rows in [1, 2**40]; set it to the field's number of ids"
    if is_fitted and num_embeddings < 2 and any(user.is_hashed for user in users):
        return f"num_embeddings = {num_embeddings}: a hashed {what} needs at least 2 rows, row 0 being the missing one; raise it"
    buckets = users[0].zch_buckets
    least = ZCH_LEAST_ROWS * buckets
    if users[0].is_unbounded and (num_embeddings < least or num_embeddings % buckets):
        near = max(least, -(-num_embeddings // buckets) * buckets)
        return (
            f"num_embeddings = {num_embeddings}: encoding = 'zch' wants a multiple of zch_buckets = {buckets}, at least {least}; "
            f"use {near}"
        )
    return ""
