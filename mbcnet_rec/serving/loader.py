"""Loads what `mbcnet export` wrote and scores rows with it. Every artifact carries it as `mbcnet_serving/__init__.py`.

    model = load("artifact")
    model.predict({"user_id": [3, 7], "tags": [[1, 2], []], ...})   # float32 probabilities, one a row

Needs torch, fbgemm_gpu, NumPy and pyarrow. Reads safetensors, TOML and JSON, no pickle: the dense part is a list of ATen calls that
torch.export recorded, and nothing but those calls is run. Tables are mapped, not read, so workers of one host share them. Rows are
encoded by the files that training encodes with, which the artifact carries too: what training refuses is refused here, in the same words.

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
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.fx as fx
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import (
    BoundsCheckMode,
    EmbeddingLocation,
    PoolingMode,
)
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen
from pyarrow import types as pt
from torch import Tensor

if __name__ == "mbcnet_rec.serving.loader":
    from data.errors import InputError, first_line
    from data.reading.column_types import check_columns
    from data.reading.columns import Columns
    from data.reading.encode import Encoder, Place
    from data.schema import Schema, Table, load_schema
else:  # in an artifact, which carries these files
    from .data.errors import InputError, first_line  # type: ignore[import-not-found]
    from .data.reading.column_types import check_columns  # type: ignore[import-not-found]
    from .data.reading.columns import Columns  # type: ignore[import-not-found]
    from .data.reading.encode import Encoder, Place  # type: ignore[import-not-found]
    from .data.schema import Schema, Table, load_schema  # type: ignore[import-not-found]

FORMAT = 2
READABLE_FORMATS = (1, 2)  # 1 lists the fields in model.json besides, for a preprocessor of its own
COMPILED = "dense_aot.pt2"
ZCH = "zch/"  # before the name of a table of unbounded ids, in TABLES
MODEL, DENSE, TABLES, VOCABULARY = "model.json", "dense.safetensors", "tables.safetensors", "vocabulary.json"
SCHEMA = "schema.toml"
REQUEST = "request"  # stands in messages where training has a file's name
NULL = pa.null()
NUMBERS = {np.dtype(kind): pa.from_numpy_dtype(kind) for kind in ("int64", "uint64", "float64")}
ROW_TYPES = {
    "fp32": SparseType.FP32,
    "fp16": SparseType.FP16,
    "int8": SparseType.INT8,
    "int4": SparseType.INT4,
}
POOLING = {"sum": PoolingMode.SUM, "mean": PoolingMode.MEAN, "weighted": PoolingMode.SUM}
OVERLOAD = type(torch.ops.aten.add.Tensor)
ARITHMETIC: dict[str, Callable[..., Any]] = {
    name: getattr(operator, name) for name in ("getitem", "add", "sub", "mul", "floordiv")
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
Rows = Any  # mapping of column -> list or array, an Arrow table or record batch, or what pyarrow.table takes, such as a DataFrame


class Inputs(NamedTuple):
    """Rows ready for the tables."""

    bags: dict[str, tuple[Tensor, Tensor, Tensor | None]]  # pooling -> ids, offsets, weights
    dense: Tensor  # (B, D) float32


def load(folder: str | Path, *, verify: bool = True, compiled: bool = False) -> "ServingModel":
    """Load an artifact.

    Args:
        folder: what `mbcnet export` wrote.
        verify: compare every file's SHA-256 with model.json; reads all of each file once.
        compiled: run the dense part that `mbcnet export --aot` compiled. It is machine code: load it from people you trust only.

    Raises:
        ValueError: the folder is not an artifact, has another format, or is damaged.
    """
    folder = Path(folder)
    try:
        spec = json.loads((folder / MODEL).read_text())
        if spec["format"] not in READABLE_FORMATS:
            raise ValueError(f"format = {spec['format']}; this loader reads {FORMAT}: use the artifact's own")
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / MODEL}: not an artifact of `mbcnet export` ({error or type(error).__name__})"
        ) from None
    for name, sha256 in spec["files"].items() if verify else ():
        with open(folder / name, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise ValueError(
                    f"{folder / name}: changed since it was written (SHA-256 differs); copy it again"
                )
    vocabularies = load_vocabularies(folder, spec)
    tensors = read_safetensors(folder / TABLES), read_safetensors(folder / DENSE)
    model = ServingModel(spec, load_schema(folder / SCHEMA), *tensors, vocabularies)
    if compiled:
        if not (folder / COMPILED).is_file():
            raise ValueError(f"{folder}: holds no {COMPILED}; export it with --aot, or load without compiled")
        model.graph = torch._inductor.aoti_load_package(str(folder / COMPILED))
    return model


def load_vocabularies(folder: Path, spec: Mapping[str, Any]) -> dict[str, pa.Array]:
    """Read an artifact's vocabularies: name -> values in row order."""
    types = spec.get("vocabulary_types", {})
    listed = json.loads((folder / VOCABULARY).read_text())
    return {name: pa.array(values, types.get(name)) for name, values in listed.items()}


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
        schema: of the run.
        rows: pooling -> all rows of its tables, (bytes,) uint8 as FBGEMM lays them out; "zch/TABLE" -> (2, n) int64, ascending hashes
            of the ids that have a row, and the rows.
        dense: weights of the graph.
        vocabularies: names of vocabulary files -> values in row order.
    """

    def __init__(
        self,
        spec: dict[str, Any],
        schema: Schema,
        rows: dict[str, Tensor],
        dense: dict[str, Tensor],
        vocabularies: Mapping[str, pa.Array],
    ) -> None:
        self.spec = spec
        self.id_rows = {name: values for name, values in rows.items() if name.startswith(ZCH)}
        self.preprocess = Preprocessor(schema, spec["lookups"], vocabularies, self.id_rows)
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
            rows: column name -> list or array of values (None: missing; lists of lists for list columns), an Arrow table or
                record batch, or a DataFrame. Columns that no field reads are ignored.

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
            raise ValueError(f"graph: {argument} is not a dtype; this artifact is damaged or not ours")
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
    if namespace != "aten" or not isinstance(found, OVERLOAD):
        raise ValueError(f"graph: {call!r} is not an ATen operator; this artifact is damaged or not ours")
    return found


class Preprocessor:
    """Rows -> ids and numbers, by the encoder that training uses.

    Args:
        schema: of the run.
        lookups: pooling -> (field, table) pairs.
        vocabularies: names of vocabulary files -> values in row order.
        id_rows: as ServingModel has them.
    """

    def __init__(
        self,
        schema: Schema,
        lookups: Mapping[str, Sequence[tuple[str, int]]],
        vocabularies: Mapping[str, pa.Array],
        id_rows: Mapping[str, Tensor],
    ) -> None:
        self.schema, self.columns = schema, schema.field_columns
        self.encoder = Encoder(schema, vocabularies=vocabularies, has_labels=False)
        self.lookups = {pooling: [field for field, _ in pairs] for pooling, pairs in lookups.items()}
        singles = [feature.name for feature in schema.sparse if feature.is_single]
        lists = [feature.name for feature in schema.sparse if not feature.is_single]
        self.single_at = {name: index for index, name in enumerate(singles)}
        self.list_at = {name: index for index, name in enumerate(lists)}
        self.weighted_at = {feature.name: index for index, feature in enumerate(schema.weighted)}
        self.field_of = {
            column: feature
            for feature in schema.features
            for column in (feature.source_column, feature.weights)
        }
        self.keys = {feature.source_column for feature in schema.features if feature.is_keyed}
        self.checked: dict[str, pa.DataType] = {}  # the types that were last found right
        self.id_rows: dict[str, tuple[Table, np.ndarray, np.ndarray]] = {}
        for name, table in schema.table_of.items():
            if table.zch is not None:
                ids, rows = id_rows[ZCH + table.name].numpy()
                if len(rows) and not 0 <= rows.min() <= rows.max() < table.num_embeddings:
                    raise ValueError(
                        f"field {name!r}: an id has a row that its table lacks; copy the artifact again"
                    )
                self.id_rows[name] = table, ids, rows

    def __call__(self, rows: Rows) -> Inputs:
        """Check and encode rows; see ServingModel.predict."""
        return self.inputs(self.encoder.encode(self._arrays(rows), Place(REQUEST, None)))

    def inputs(self, columns: Columns) -> Inputs:
        """Join encoded rows as the tables want them, each pooling's lookups one after the other."""
        joined = {}
        for pooling, fields in self.lookups.items():
            ids, weights = [], []
            offsets = np.zeros(len(fields) * columns.num_rows + 1, np.int64)
            lengths = offsets[1:].reshape(len(fields), columns.num_rows)
            for field, own_lengths in zip(fields, lengths, strict=True):
                if field in self.single_at:
                    index = self.single_at[field]
                    found = columns.single_ids[index]
                    if columns.absent[index]:
                        own_lengths[:] = found >= 0
                        found = found[found >= 0]
                    else:
                        own_lengths[:] = 1
                elif field in self.list_at:
                    index = self.list_at[field]
                    found = columns.lists.values[index]
                    own_lengths[:] = np.diff(columns.lists.offsets[index])
                else:
                    index = self.weighted_at[field]
                    found = columns.weighted_lists.values[index]
                    own_lengths[:] = np.diff(columns.weighted_lists.offsets[index])
                    weights.append(columns.weighted_lists.weights[index])
                ids.append(self._given_rows(field, found) if field in self.id_rows else found)
            np.cumsum(offsets, out=offsets)
            joined[pooling] = (
                torch.from_numpy(np.concatenate(ids, dtype=np.int64)),
                torch.from_numpy(offsets),
                torch.from_numpy(np.concatenate(weights)) if weights else None,
            )
        return Inputs(joined, torch.from_numpy(columns.dense))

    def _given_rows(self, field: str, hashed: np.ndarray) -> np.ndarray:
        """The row that training gave to each id of a table of encoding zch, or the last row of its bucket."""
        table, ids, rows = self.id_rows[field]
        assert table.zch is not None
        bucket_ids = -(-(2**63 - 1) // table.zch.buckets)
        own = (hashed // bucket_ids + 1) * (table.num_embeddings // table.zch.buckets) - 1
        if not len(ids):
            return own
        places = np.minimum(np.searchsorted(ids, hashed), len(ids) - 1)
        return np.where(ids[places] == hashed, rows[places], own)

    def _arrays(self, rows: Rows) -> dict[str, Any]:
        """The columns that fields read, each as one array of a type that training takes: Arrow's, or NumPy's of plain numbers."""
        if not isinstance(rows, Mapping):
            table = rows if isinstance(rows, (pa.Table, pa.RecordBatch)) else pa.table(rows)
            rows = dict(zip(table.schema.names, table.columns, strict=True))
        arrays = {name: self._array(name, rows[name]) for name in self.columns if name in rows}
        types = {
            name: NUMBERS[array.dtype] if isinstance(array, np.ndarray) else array.type
            for name, array in arrays.items()
        }
        if types != self.checked:
            for name, found in types.items():
                # a column of nothing but missing values has no type of its own: it gets the field's
                if found == NULL or (_is_list(found) and found.value_type == NULL):
                    types[name] = self._type_of_missing(name)
                    arrays[name] = arrays[name].cast(types[name])
            check_columns(pa.schema(list(types.items())), self.schema, REQUEST, has_label=False)
            self.checked = types
        num_rows = len(next(iter(arrays.values()), ()))
        if any(len(array) != num_rows for array in arrays.values()):
            name = next(name for name, array in arrays.items() if len(array) != num_rows)
            raise InputError(
                f"{REQUEST}: field {self.field_of[name].name!r}: {len(arrays[name])} rows in column {name!r}; "
                f"wanted {num_rows}, as the other columns have"
            )
        return arrays

    def _array(self, name: str, column: Any) -> pa.Array | np.ndarray:
        if isinstance(column, pa.Array):
            return column
        if isinstance(column, pa.ChunkedArray):
            return column.combine_chunks()
        numbers = self._numbers(name, column)
        if numbers is not None:
            return numbers
        try:
            if isinstance(column, np.ndarray) and column.ndim == 2:
                return pa.FixedSizeListArray.from_arrays(column.reshape(-1), column.shape[1])
            return pa.array(column)
        except (TypeError, ValueError, OverflowError, pa.ArrowException) as error:
            raise InputError(
                f"{REQUEST}: column {name!r} of field {self.field_of[name].name!r} cannot be read ({first_line(error)}); "
                "wanted a list of values of one type, None where one is missing"
            ) from None

    def _numbers(self, name: str, column: Any) -> np.ndarray | None:
        """Python's numbers, in a fraction of the time that Arrow takes; None for anything else."""
        if not isinstance(column, list) or not column or type(column[0]) not in (int, float):
            return None
        try:
            numbers = np.asarray(column)
        except (ValueError, OverflowError):
            return None
        # as a float, a large id would lose digits
        is_taken = numbers.dtype in NUMBERS and not (name in self.keys and numbers.dtype.kind == "f")
        return numbers if is_taken and numbers.ndim == 1 else None

    def _type_of_missing(self, name: str) -> pa.DataType:
        feature = self.field_of[name]
        kind = pa.float64()
        if feature.is_keyed and name != feature.weights:
            known = self.encoder.vocabularies.get(feature.name)
            kind = pa.int64() if known is None else known.type
        return kind if feature.is_single else pa.list_(kind)


def _is_list(kind: pa.DataType) -> bool:
    return pt.is_list(kind) or pt.is_large_list(kind) or pt.is_fixed_size_list(kind)


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
