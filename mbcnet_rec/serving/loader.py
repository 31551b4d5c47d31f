"""Loads what `mbcnet export` wrote and scores rows with it. One file, copied into every artifact as `mbcnet_serving.py`.

    model = load("artifact")
    model.predict({"user_id": [3, 7], "tags": [[1, 2], []], ...})   # float32 probabilities, one a row

Needs torch, fbgemm_gpu and NumPy; pyarrow only where rows come as Arrow or Parquet. Reads safetensors and JSON, no pickle: the dense
part is a list of ATen calls that torch.export recorded, and nothing but those calls is run. Tables are mapped, not read, so workers of
one host share them. A value that training would have refused is refused here, with its row and field. It is longer than this project's
other files because it must be whole in one.

Shapes: B rows, D dense columns, N flattened width of all fields.
"""

import argparse
import hashlib
import json
import operator
import os
import struct
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fbgemm_gpu  # noqa: F401 (registers the operators)
import numpy as np
import torch
import torch.fx as fx
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import (
    BoundsCheckMode,
    EmbeddingLocation,
    PoolingMode,
)
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen
from torch import Tensor

try:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
except ImportError:  # rows then come as dicts of lists
    pc = pq = None

FORMAT = 1
COMPILED = "dense_aot.pt2"
ZCH = "zch/"  # before the name of a table of unbounded ids, in TABLES
MODEL, DENSE, TABLES, VOCABULARY = "model.json", "dense.safetensors", "tables.safetensors", "vocabulary.json"
ROW_TYPES = {
    "fp32": SparseType.FP32,
    "fp16": SparseType.FP16,
    "int8": SparseType.INT8,
    "int4": SparseType.INT4,
}
POOLING = {"sum": PoolingMode.SUM, "mean": PoolingMode.MEAN, "weighted": PoolingMode.SUM}
MISSING_ROW, OUT_OF_VOCABULARY_ROW, FIRST_VOCABULARY_ROW = 0, 1, 2
ARITHMETIC: dict[str, Callable[..., Any]] = {
    "getitem": operator.getitem,
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
}
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
Rows = Any  # Mapping of column -> list or array, or an Arrow table or record batch


class Values(NamedTuple):
    """A flat column. `valid`: which are not null; None: all."""

    values: np.ndarray
    valid: np.ndarray | None


class Bags(NamedTuple):
    """The table rows of one field: row i of the input has `lengths[i]` of `ids`, in order."""

    ids: np.ndarray  # int64
    lengths: np.ndarray  # (B,) int64
    weights: np.ndarray | None = None  # float32, like ids


class Inputs(NamedTuple):
    """Rows ready for the tables."""

    bags: dict[str, tuple[Tensor, Tensor, Tensor | None]]  # pooling -> ids, offsets, weights
    dense: Tensor  # (B, D) float32


def load(folder: str | Path, *, verify: bool = True, compiled: bool = False) -> "ServingModel":
    """Load an artifact.

    Args:
        folder: that `mbcnet export` wrote.
        verify: compare every file's SHA-256 with model.json; reads all of each file once.
        compiled: run the dense part that `mbcnet export --aot` compiled. It is machine code: load it from people you trust only.

    Raises:
        ValueError: the folder is no artifact, of another format, or damaged.
    """
    folder = Path(folder)
    try:
        spec = json.loads((folder / MODEL).read_text())
        if spec["format"] != FORMAT:
            raise ValueError(f"format = {spec['format']}; this loader reads {FORMAT}: use the artifact's own")
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / MODEL}: no artifact of `mbcnet export` ({error or type(error).__name__})"
        ) from None
    for name, sha256 in spec["files"].items() if verify else ():
        with open(folder / name, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise ValueError(
                    f"{folder / name}: changed since it was written (SHA-256 differs); copy it again"
                )
    vocabularies = json.loads((folder / VOCABULARY).read_text())
    model = ServingModel(
        spec, read_safetensors(folder / TABLES), read_safetensors(folder / DENSE), vocabularies
    )
    if compiled:
        if not (folder / COMPILED).is_file():
            raise ValueError(f"{folder}: holds no {COMPILED}; export it with --aot, or load without compiled")
        model.graph = torch._inductor.aoti_load_package(str(folder / COMPILED))
    return model


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Map a safetensors file: name -> tensor on the file's own pages (private: a write would not reach the file)."""
    size = path.stat().st_size
    whole = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    (length,) = struct.unpack("<Q", bytes(whole[:8].tolist()))
    header = json.loads(bytes(whole[8 : 8 + length].numpy()))
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            tensors[name] = whole[begin:end].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


class ServingModel:
    """Preprocessing, quantised tables and the dense part of one model, on a CPU.

    Args:
        spec: model.json.
        rows: pooling -> all rows of its tables, (bytes,) uint8 as FBGEMM lays them out; "zch/TABLE" -> (2, n) int64, ascending hashes
            of the ids that have a row, and the rows.
        dense: weights of the graph.
        vocabularies: name -> values in row order.
    """

    def __init__(
        self,
        spec: dict[str, Any],
        rows: dict[str, Tensor],
        dense: dict[str, Tensor],
        vocabularies: dict[str, list[Any]],
    ) -> None:
        self.spec = spec
        self.id_rows = {name: values for name, values in rows.items() if name.startswith(ZCH)}
        self.preprocess = Preprocessor(spec["fields"], spec["lookups"], vocabularies, self.id_rows)
        self.tables = {
            pooling: open_tables(entries, spec["lookups"][pooling], spec["rows"], pooling)
            for pooling, entries in spec["tables"].items()
        }
        for pooling, tables in self.tables.items():
            if tables.weights_host.numel() != rows[pooling].numel():
                raise ValueError(
                    f"{TABLES}: {rows[pooling].numel():,} bytes of {pooling} rows; this fbgemm_gpu wants "
                    f"{tables.weights_host.numel():,}: use the version that model.json names"
                )
            tables.weights_host = rows[pooling]
        self.graph = build_graph(spec["graph"], dense)

    def predict(self, rows: Rows) -> np.ndarray:
        """Return the click probability of each row, (B,) float32.

        Args:
            rows: column name -> list or array of values (None: missing; lists of lists for list columns), or an Arrow table or
                record batch. Columns that no field reads are ignored.

        Raises:
            ValueError: a column is missing or a value is one that training would have refused.
        """
        return torch.sigmoid(self.logits(rows)).numpy()

    @torch.inference_mode()
    def logits(self, rows: Rows) -> Tensor:
        """Return the fused logit of each row, (B,) float32."""
        return self.score(self.preprocess(rows))

    @torch.inference_mode()
    def score(self, inputs: Inputs) -> Tensor:
        """Return the fused logit of preprocessed rows, (B,)."""
        return self.graph(self.embed(inputs))

    @torch.inference_mode()
    def embed(self, inputs: Inputs) -> Tensor:
        """Look up and pool: (B, N), pooled fields first, then dense columns."""
        pooled = [
            self.tables[pooling](ids, offsets, weights)
            for pooling, (ids, offsets, weights) in inputs.bags.items()
        ]
        return torch.cat([*pooled, inputs.dense], dim=1)

    def predict_parquet(self, path: str | Path, batch_rows: int = 4096) -> Iterator[np.ndarray]:
        """Yield the probabilities of a Parquet file's rows, in its order, `batch_rows` at a time."""
        if pq is None:
            raise ValueError("reading Parquet needs pyarrow, which is not installed")
        with pq.ParquetFile(path) as file:
            known = [name for name in self.preprocess.columns if name in file.schema_arrow.names]
            for batch in file.iter_batches(batch_rows, columns=known):
                yield self.predict(batch)


def open_tables(
    tables: Sequence[Mapping[str, Any]], lookups: Sequence[tuple[str, int]], rows: str, pooling: str
) -> IntNBitTableBatchedEmbeddingBagsCodegen:
    """Make FBGEMM's tables of one pooling, their rows still unset: `weights_host` has the size wanted.

    Args:
        tables: name, num_embeddings, embedding_dim of each.
        lookups: (field, index of its table), in the order of the output's columns.
        rows: fp32, fp16, int8 or int4.
        pooling: sum, mean, or weighted (a weighted sum).
    """
    specs = [
        (
            each["name"],
            each["num_embeddings"],
            each["embedding_dim"],
            ROW_TYPES[rows],
            EmbeddingLocation.HOST,
        )
        for each in tables
    ]
    opened = IntNBitTableBatchedEmbeddingBagsCodegen(
        specs,
        feature_table_map=[index for _, index in lookups],
        device="cpu",
        output_dtype=SparseType.FP32,
        pooling_mode=POOLING[pooling],
        bounds_check_mode=BoundsCheckMode.NONE,  # the preprocessor has checked every id
    )
    opened.initialize_weights()
    return opened


def build_graph(spec: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """Make the dense part, (B, N) -> (B,), from its straight list of ATen calls.

    torch.fx writes them as one Python function, which drops each value after its last use.

    Args:
        spec: input, output and calls; arguments that are nodes read {"node": name}, dtypes {"torch": name}.
        weights: name -> tensor.
    """
    graph = fx.Graph()
    nodes = {spec["input"]: graph.placeholder("x")}
    values = []
    for name, weight in spec["weights"].items():
        nodes[name] = graph.placeholder(f"weight_{len(values)}")
        values.append(weights[weight])

    def read(argument: Any) -> Any:
        if isinstance(argument, list):
            return [read(each) for each in argument]
        if not isinstance(argument, dict):
            return argument
        found = nodes[argument["node"]] if "node" in argument else getattr(torch, argument["torch"])
        if not isinstance(found, (fx.Node, torch.dtype, torch.layout)):
            raise ValueError(f"graph: {argument} is no dtype; this artifact is damaged or not ours")
        return found

    for call in spec["calls"]:
        kwargs = {key: read(value) for key, value in call["kwargs"].items()}
        nodes[call["name"]] = graph.call_function(resolve(call["call"]), tuple(read(call["args"])), kwargs)
    graph.output(nodes[spec["output"]])
    run = fx.GraphModule(torch.nn.Module(), graph).forward
    return lambda x: run(x, *values)


def resolve(call: str) -> Callable[..., Any]:
    """Find a call by name: an overload of torch.ops.aten, or arithmetic on sizes.

    Raises:
        ValueError: it is neither, so it is not run.
    """
    if call in ARITHMETIC:
        return ARITHMETIC[call]
    namespace, _, rest = call.partition(".")
    packet, _, overload = rest.rpartition(".")
    found = getattr(getattr(torch.ops.aten, packet, None), overload, None)
    if namespace != "aten" or not isinstance(found, torch._ops.OpOverload):
        raise ValueError(f"graph: {call!r} is no ATen operator; this artifact is damaged or not ours")
    return found


class Preprocessor:
    """Rows -> ids and numbers, by the rules of the training data plane.

    Args:
        fields: as in model.json.
        lookups: pooling -> (field, table) pairs.
        vocabularies: name -> values in row order.
        id_rows: as ServingModel has them.
    """

    def __init__(
        self,
        fields: Sequence[Mapping[str, Any]],
        lookups: Mapping[str, Sequence[tuple[str, int]]],
        vocabularies: Mapping[str, list[Any]],
        id_rows: Mapping[str, Tensor],
    ) -> None:
        self.id_rows = {name: values.numpy() for name, values in id_rows.items()}
        for field in fields:
            rows = (
                self.id_rows[ZCH + field["zch_table"]][1] if field.get("encoding") == "zch" else np.zeros(0)
            )
            if len(rows) and not 0 <= rows.min() <= rows.max() < field["num_embeddings"]:
                raise ValueError(
                    f"field {field['name']!r}: an id has a row that its table has not; copy the artifact again"
                )
        self.sparse = [field for field in fields if field["is_sparse"]]
        self.dense = [field for field in fields if not field["is_sparse"]]
        self.dense_width = sum(field["dense_width"] for field in self.dense)
        self.lookups = {pooling: [field for field, _ in pairs] for pooling, pairs in lookups.items()}
        self.rows_of = {
            name: {value: row for row, value in enumerate(values, FIRST_VOCABULARY_ROW)}
            for name, values in vocabularies.items()
        }
        names = [
            column for field in fields for column in (field["column"], field.get("weights", "")) if column
        ]
        self.columns = list(dict.fromkeys(names))

    def __call__(self, rows: Rows) -> Inputs:
        """Check and encode rows; see ServingModel.predict."""
        rows = columns_of(rows)
        bags = self._plain_bags(rows)
        bags |= {field["name"]: self._bags(field, rows) for field in self.sparse if field["name"] not in bags}
        dense_columns = [self._numbers(field, rows) for field in self.dense]
        num_rows = (
            len(next(iter(bags.values())).lengths) if bags else len(dense_columns[0]) if dense_columns else 0
        )
        for field in self.sparse:
            if len(bags[field["name"]].lengths) != num_rows:
                raise ValueError(
                    f"field {field['name']!r}: {len(bags[field['name']].lengths)} rows; wanted {num_rows}, as "
                    "the other columns have"
                )
        joined = {}
        for pooling, names in self.lookups.items():
            parts = [bags[name] for name in names]
            offsets = np.zeros(len(parts) * num_rows + 1, np.int64)
            np.cumsum(np.concatenate([part.lengths for part in parts]), out=offsets[1:])
            weights = [part.weights for part in parts if part.weights is not None]
            joined[pooling] = (
                torch.from_numpy(np.concatenate([part.ids for part in parts])),
                torch.from_numpy(offsets),
                torch.from_numpy(np.concatenate(weights)) if weights else None,
            )
        dense = np.concatenate([np.zeros((num_rows, 0), np.float32), *dense_columns], axis=1)
        return Inputs(joined, torch.from_numpy(dense))

    def _plain_bags(self, rows: Mapping[str, Any]) -> dict[str, Bags]:
        """Fields whose every row holds one id that is right, checked all at once: most of a usual request."""
        columns, limits = {}, []
        for field in self.sparse:
            if field["kind"] == "categorical" and field["encoding"] == "ids":
                values, valid = flat_values(read_column(rows, field["column"], field["name"]))
                if valid is None and np.can_cast(values.dtype, np.int64):
                    columns[field["name"]] = values
                    limits.append(field["num_embeddings"])
        if len({len(values) for values in columns.values()}) != 1:
            return {}
        ids = np.stack(list(columns.values()), dtype=np.int64)
        good = np.all((ids >= 0) & (ids < np.asarray(limits)[:, None]), axis=1).tolist()
        ones = np.ones(ids.shape[1], np.int64)
        return {
            name: Bags(own, ones) for name, own, is_good in zip(columns, ids, good, strict=True) if is_good
        }

    def _bags(self, field: Mapping[str, Any], rows: Mapping[str, Any]) -> Bags:
        column = read_column(rows, field["column"], field["name"])
        if field["kind"] == "numeric":
            numbers, valid = finite(flat_values(column), field)
            ids = np.searchsorted(np.asarray(field["boundaries"]), numbers, side="right") + 1
            ids = ids if valid is None else np.where(valid, ids, MISSING_ROW)
            return Bags(ids.astype(np.int64), np.ones(len(ids), np.int64))
        if field["kind"] == "categorical":
            values = flat_values(column)
            ids = self._ids(field, values, None)
            if values.valid is not None:
                missing = -1 if field["encoding"] in ("ids", "zch") else MISSING_ROW
                ids = np.where(values.valid, ids, missing)
            present = ids >= 0
            return Bags(ids[present], present.astype(np.int64))
        values, lengths = list_values(column)
        ids = self._ids(field, values, lengths)
        weights = self._weights(field, rows, lengths) if field["kind"] == "weighted_multi_valued" else None
        keep = ids >= 0 if values.valid is None else (ids >= 0) & values.valid
        if not keep.all():
            owners = np.repeat(np.arange(len(lengths)), lengths)
            lengths = np.bincount(owners[keep], minlength=len(lengths))
            ids, weights = ids[keep], None if weights is None else weights[keep]
        return Bags(ids, lengths.astype(np.int64), weights)

    def _weights(self, field: Mapping[str, Any], rows: Mapping[str, Any], wanted: np.ndarray) -> np.ndarray:
        values, lengths = list_values(read_column(rows, field["weights"], field["name"]))
        if not np.array_equal(lengths, wanted):
            raise ValueError(
                f"field {field['name']!r}: its weights in {field['weights']!r} are not as many as its values"
            )
        numbers, valid = finite(values, field, wanted)
        return (numbers if valid is None else np.where(valid, numbers, 0.0)).astype(np.float32)

    def _ids(self, field: Mapping[str, Any], column: Values, lengths: np.ndarray | None) -> np.ndarray:
        """Rows of the table, -1 for an id that counts as missing; what stands at nulls means nothing."""
        limit = field["num_embeddings"]
        if field["encoding"] == "hash":
            return (hash_values(column.values) % np.uint64(limit - 1)).astype(np.int64) + 1
        if field["encoding"] == "vocabulary":
            return self._vocabulary_rows(field, column)
        if field["encoding"] == "zch":
            return self._given_rows(field, column)
        ids = column.values
        if len(ids) and ids.dtype.kind not in "iub":
            raise ValueError(f"field {field['name']!r} = {ids[0]!r}: wanted integer ids")
        bad = (ids < 0) | (ids >= limit)
        if column.valid is not None:
            bad &= column.valid
        if not bad.any():
            return ids.astype(np.int64)
        if field["on_invalid"] == "error":
            first = int(np.flatnonzero(bad)[0])
            raise ValueError(
                f"row {owner(first, lengths)}, field {field['name']!r} = {ids[first]}: wanted an id in [0, {limit})"
            )
        return np.where(bad, -1 if field["on_invalid"] == "null" else ids % limit, ids).astype(np.int64)

    def _given_rows(self, field: Mapping[str, Any], column: Values) -> np.ndarray:
        """The row that training gave an id, or the last row of its bucket."""
        ids, rows = self.id_rows[ZCH + field["zch_table"]]
        buckets, last = np.uint64(field["zch_buckets"]), np.uint64(2**63 - 1)
        hashed = np.minimum(hash_values(column.values) & last, last - np.uint64(1))
        bucket = (hashed // ((last + buckets - np.uint64(1)) // buckets)).astype(np.int64)
        own = (bucket + 1) * (field["num_embeddings"] // field["zch_buckets"]) - 1
        if not len(ids):
            return own
        hashed = hashed.view(np.int64)
        places = np.minimum(np.searchsorted(ids, hashed), len(ids) - 1)
        return np.where(ids[places] == hashed, rows[places], own)

    def _vocabulary_rows(self, field: Mapping[str, Any], column: Values) -> np.ndarray:
        row_of = self.rows_of[field["vocabulary"]]
        cast = int if field["vocabulary_type"] == "integer" else str
        rows = np.full(len(column.values), MISSING_ROW, np.int64)
        present = slice(None) if column.valid is None else column.valid
        try:
            rows[present] = [
                row_of.get(cast(value), OUT_OF_VOCABULARY_ROW) for value in column.values[present].tolist()
            ]
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"field {field['name']!r}: wanted {field['vocabulary_type']}s ({error})"
            ) from None
        return rows

    def _numbers(self, field: Mapping[str, Any], rows: Mapping[str, Any]) -> np.ndarray:
        """(B, width) float32 of a numeric or vector field; missing numbers are 0."""
        column = read_column(rows, field["column"], field["name"])
        if field["kind"] == "vector":
            return self._vectors(field, column)
        numbers, valid = finite(flat_values(column), field)
        if field["transform"] == "log1p":
            numbers = np.copysign(np.log1p(np.abs(numbers)), numbers)
        elif field["transform"] == "standardise":
            numbers = (numbers - field["mean"]) / field["std"]
        return (numbers if valid is None else np.where(valid, numbers, 0.0)).astype(np.float32)[:, None]

    def _vectors(self, field: Mapping[str, Any], column: Any) -> np.ndarray:
        width = field["dense_width"]
        values, lengths = list_values(column)
        present = list_present(column, lengths)
        wrong = present & (lengths != width)
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            raise ValueError(
                f"row {row}, field {field['name']!r}: a vector of length {lengths[row]}: wanted {width}"
            )
        numbers, valid = finite(values, field, lengths)
        out = np.zeros((len(lengths), width), np.float32)
        out[present] = (numbers if valid is None else np.where(valid, numbers, 0.0)).reshape(-1, width)
        return out


def columns_of(rows: Rows) -> Mapping[str, Any]:
    """Columns by name, of a mapping or of Arrow data."""
    return rows if isinstance(rows, Mapping) else dict(zip(rows.schema.names, rows.columns, strict=True))


def read_column(rows: Mapping[str, Any], column: str, field: str) -> Any:
    """Take one column, in one piece.

    Raises:
        ValueError: it is missing.
    """
    if column not in rows:
        raise ValueError(f"column {column!r} is missing, which field {field!r} reads")
    found = rows[column]
    return found.combine_chunks() if hasattr(found, "combine_chunks") else found


def is_arrow(column: Any) -> bool:
    """Whether a column is an Arrow array."""
    return hasattr(column, "null_count")


def flat_values(column: Any) -> Values:
    """Values of a flat column and which are not null; nulls read 0 or an empty string."""
    if is_arrow(column):
        return arrow_values(column)
    array = np.asarray(column)
    if array.dtype.kind in "iufb":
        return Values(array if len(array) else array.astype(np.int64), None)
    filled = list(column)
    valid = np.fromiter((value is not None for value in filled), bool, len(filled))
    is_text = any(isinstance(value, str) for value in filled)
    if not valid.all():
        filled = [("" if is_text else 0) if value is None else value for value in filled]
    return Values(np.asarray(filled, object if is_text else None), None if valid.all() else valid)


def arrow_values(column: Any) -> Values:
    """The same of an Arrow array."""
    kind = str(column.type)
    if kind.startswith("dictionary"):
        column = column.dictionary_decode()
        kind = str(column.type)
    valid = column.is_valid().to_numpy(zero_copy_only=False) if column.null_count else None
    if kind in ("string", "large_string", "string_view"):
        return Values(np.asarray([value or "" for value in column.to_pylist()], object), valid)
    if kind.startswith("decimal") or kind in ("null", "halffloat"):
        column = column.cast("float64")
    if column.null_count:
        column = column.fill_null(False if kind == "bool" else 0)
    return Values(column.to_numpy(zero_copy_only=False), valid)


def list_values(column: Any) -> tuple[Values, np.ndarray]:
    """Values of a list column, laid end to end, and each row's length; a null list has none."""
    if is_arrow(column):
        lengths = pc.list_value_length(column)  # type: ignore[union-attr]
        lengths = (lengths.fill_null(0) if lengths.null_count else lengths).to_numpy()
        return flat_values(column.flatten()), lengths.astype(np.int64)
    if isinstance(column, np.ndarray) and column.ndim == 2:
        return flat_values(column.reshape(-1)), np.full(len(column), column.shape[1], np.int64)
    rows = [() if row is None else row for row in column]
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    return flat_values([value for row in rows for value in row]), lengths


def list_present(column: Any, lengths: np.ndarray) -> np.ndarray:
    """Which rows of a list column are not null."""
    if is_arrow(column):
        return column.is_valid().to_numpy(zero_copy_only=False)
    return np.fromiter((row is not None for row in column), bool, len(lengths))


def finite(
    column: Values, field: Mapping[str, Any], lengths: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Numbers, 0 where they are NaN or infinite, and their validity (None: all).

    Raises:
        ValueError: a number is NaN or infinite and the field's on_invalid is not "null".
    """
    numbers, valid = column
    try:
        numbers = numbers.astype(np.float64) if numbers.dtype.kind != "f" else numbers
    except (TypeError, ValueError):
        raise ValueError(f"field {field['name']!r}: wanted numbers, found {numbers[0]!r}") from None
    good = np.isfinite(numbers)
    if good.all():
        return numbers, valid
    if field["on_invalid"] != "null":
        first = int(np.flatnonzero(~good)[0])
        raise ValueError(
            f"row {owner(first, lengths)}, field {field['name']!r} = {numbers[first]}: wanted a finite number or null"
        )
    return np.where(good, numbers, 0.0), good if valid is None else valid & good


def owner(value: int, lengths: np.ndarray | None) -> int:
    """The row that holds a value of a list column."""
    return value if lengths is None else int(np.searchsorted(np.cumsum(lengths), value, side="right"))


def hash_values(values: np.ndarray) -> np.ndarray:
    """64-bit hashes, equal to those of training: splitmix64 of an integer; of a string, over its length and its UTF-8 bytes by eights."""
    if values.dtype.kind in "iub":
        return splitmix64(values if values.dtype == np.uint64 else values.astype(np.int64).view(np.uint64))
    hashes = {}
    for text in set(values.tolist()):
        data = str(text).encode()
        words = np.frombuffer(data + b"\0" * (-len(data) % 8), "<u8")
        hashed = splitmix64(np.asarray([len(data)], np.uint64))
        for word in words:
            hashed = splitmix64(hashed ^ word)
        hashes[text] = hashed[0]
    return np.asarray([hashes[text] for text in values.tolist()], np.uint64).reshape(len(values))


def splitmix64(numbers: np.ndarray) -> np.ndarray:
    """Mix uint64 numbers (Steele, Lea and Flood, 2014)."""
    with np.errstate(over="ignore"):
        mixed = numbers + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))


def main() -> int:
    """Score a Parquet file: one probability a line."""
    parser = argparse.ArgumentParser(description="Score the rows of a Parquet file with an exported model.")
    parser.add_argument("folder", help="the artifact")
    parser.add_argument("parquet", help="rows")
    args = parser.parse_args()
    try:
        for probabilities in load(args.folder).predict_parquet(args.parquet):
            sys.stdout.writelines(f"{value:.7f}\n" for value in probabilities)
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"mbcnet_serving: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
