"""Loads what `mbcnet export` wrote and scores rows with it. Every artifact carries it as `mbcnet_serving/__init__.py`.

    model = load("artifact")
    model.predict({"user_id": [3, 7], "tags": [[1, 2], []], ...})   # float32 probabilities, one a row
    model.apply("delta")                                             # what `mbcnet export --since` wrote: the next day's model

Needs torch, fbgemm_gpu, NumPy and pyarrow. Reads safetensors, TOML and JSON, no pickle: the dense part is a list of ATen calls that
torch.export recorded, and nothing but those calls is run. Tables are mapped, not read, so workers of one host share them. Rows are
encoded by the files that training encodes with, which the artifact carries too: what training refuses is refused here, in the same words.

Shapes: B rows, D dense columns, N flattened width of all fields.
"""

import argparse
import copy
import functools
import hashlib
import json
import operator
import os
import struct
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import fbgemm_gpu  # noqa: F401 (registers the operators)
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.fx as fx
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen
from torch import Tensor

# relative: an artifact carries it too
from .preprocess import REQUEST, ZCH, Inputs, Preprocessor, Rows, Schema, load_schema

FORMAT = 2
COMPILED = "dense_aot.pt2"
MODEL, DENSE, TABLES, VOCABULARY = "model.json", "dense.safetensors", "tables.safetensors", "vocabulary.json"
SCHEMA = "schema.toml"
DELTA, CHANGES = "delta.json", "changes.safetensors"
# of "sequence" each position is a bag of one row, or of none
POOLING = {"sum": PoolingMode.SUM, "mean": PoolingMode.MEAN, "weighted": PoolingMode.SUM, "sequence": PoolingMode.SUM}
TABLE_KEYS = ("name", "num_embeddings", "embedding_dim")
OVERLOAD = type(torch.ops.aten.add.Tensor)
ARITHMETIC: dict[str, Callable[..., Any]] = {
    name: getattr(operator, name) for name in ("getitem", "add", "sub", "mul", "floordiv")
}
# torch's own functions, where they are called in half the time that an operator object takes
DIRECT: dict[str, Callable[..., Any]] = {
    f"aten.{call}": getattr(torch, call.split(".")[0])
    for call in (
        "addmm.default", "cat.default", "flatten.using_ints", "mean.dim", "mm.default", "mul.Tensor", "narrow.default", "relu_.default",
        "softmax.int", "split_with_sizes.default", "squeeze.dim", "stack.default", "tanh.default", "unflatten.int", "unsqueeze.default",
    )
} | {"aten.add_.Tensor": Tensor.add_}  # fmt: skip
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def load(folder: str | Path, *, verify: bool = True, compiled: bool = False) -> "ServingModel":
    """Load what `mbcnet export` wrote; ValueError if the folder is not an artifact, has another format, or is damaged.

    `verify` reads all of each file once, for its SHA-256. `compiled` runs what `--aot` compiled, machine code: only from people you trust.
    """
    folder = Path(folder)
    try:
        spec = json.loads((folder / MODEL).read_text(encoding="utf-8"))
        written = spec["format"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / MODEL}: not an artifact of `mbcnet export` ({error or type(error).__name__})"
        ) from None
    if written != FORMAT:
        raise ValueError(
            f"{folder}: an artifact of format {written}, wanted {FORMAT}: export it again, or use its own loader"
        )
    if unlisted := {MODEL, DENSE, TABLES, VOCABULARY, SCHEMA}.difference(spec["files"], [MODEL]):
        raise ValueError(f"{folder / MODEL}: has no SHA-256 of {min(unlisted)}; export it again")
    for name, sha256 in spec["files"].items() if verify else ():
        if sha256_of(folder / name) != sha256:
            raise ValueError(f"{folder / name}: changed since it was written (SHA-256 differs); copy it again")
    vocabularies = load_vocabularies(folder, spec)
    tensors = read_safetensors(folder / TABLES), read_safetensors(folder / DENSE)
    model = ServingModel(spec, load_schema(folder / SCHEMA), *tensors, vocabularies)
    model.digest = sha256_of(folder / MODEL)
    if compiled:
        if not (folder / COMPILED).is_file():
            raise ValueError(f"{folder}: holds no {COMPILED}; export it with --aot, or load without compiled")
        model.graph = torch._inductor.aoti_load_package(str(folder / COMPILED))
    return model


def sha256_of(path: Path) -> str:
    """The sum of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_vocabularies(folder: Path, spec: Mapping[str, Any]) -> dict[str, pa.Array]:
    """Read an artifact's vocabularies: name -> values in row order."""
    listed = json.loads((folder / VOCABULARY).read_text(encoding="utf-8"))
    return {name: pa.array(values, spec["vocabulary_types"][name]) for name, values in listed.items()}


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

    `spec` is model.json, `rows` pooling -> all rows of its tables, (bytes,) uint8 as FBGEMM lays them out, and "zch/TABLE" -> (2, n) int64,
    ascending hashes of the ids that have a row, and the rows. `dense` are the weights of the graph, `vocabularies` file -> values by row.
    """

    def __init__(
        self,
        spec: dict[str, Any],
        schema: Schema,
        rows: dict[str, Tensor],
        dense: dict[str, Tensor],
        vocabularies: Mapping[str, pa.Array],
    ) -> None:
        self.spec, self.vocabularies = spec, vocabularies
        self.digest = ""  # SHA-256 of model.json, by which deltas name what they change
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
        self.branches: list[str] = spec["branches"]
        each = spec.get("branch_graph")  # artifacts of earlier versions have none
        self.branch_graph = build_graph(each, dense) if each else None  # (B, N) -> (B, 1 + K), or (B, T (1 + K))
        self.tasks: list[str] = spec.get("tasks", [])  # of several labels, in the order of the probabilities

    def apply(self, delta: str | Path) -> None:
        """Become the artifact that a delta leads to. A `predict` that runs meanwhile is of the one or the other; see `updated`."""
        self.__dict__ = self.updated(delta).__dict__

    def updated(self, delta: str | Path) -> "ServingModel":
        """The artifact that a delta leads to, in memory of its own, byte for byte; ValueError if the delta is damaged, or of another artifact."""
        folder = Path(delta)
        try:
            said = json.loads((folder / DELTA).read_text(encoding="utf-8"))
            parent, files = said["parent"], said["files"]
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder / DELTA}: not a delta of `mbcnet export --since` ({error!r})") from None
        for name, sha256 in files.items():
            if sha256_of(folder / name) != sha256:
                raise ValueError(f"{folder / name}: changed since it was written (SHA-256 differs); copy it again")
        if parent != self.digest:
            raise ValueError(
                f"{folder}: changes the artifact whose model.json has SHA-256 {parent[:12]}, this is {self.digest[:12]}: apply deltas "
                "in their order, or load a whole artifact"
            )
        spec = json.loads((folder / MODEL).read_text(encoding="utf-8"))
        changes = read_safetensors(folder / CHANGES)
        rows = {pooling: self._changed_rows(spec, pooling, changes) for pooling in spec["tables"]}
        rows |= {
            name: self._changed_ids(name, changes)
            for name in changes
            if name.startswith(ZCH) and not name.endswith("/gone")
        }
        listed = json.loads((folder / VOCABULARY).read_text(encoding="utf-8"))
        vocabularies = {name: self._changed_values(name, spec, *changed) for name, changed in listed.items()}
        model = ServingModel(spec, load_schema(folder / SCHEMA), rows, read_safetensors(folder / DENSE), vocabularies)
        model.digest = files[MODEL]
        return model

    def _changed_rows(self, spec: Mapping[str, Any], pooling: str, changes: Mapping[str, Tensor]) -> Tensor:
        opened = open_tables(spec["tables"][pooling], spec["lookups"][pooling], spec["rows"], pooling)
        before = rows_of(self.tables[pooling], self.spec["tables"][pooling]) if pooling in self.tables else {}
        for name, table in rows_of(opened, spec["tables"][pooling]).items():
            if name in before and before[name].shape[1:] == table.shape[1:]:
                table[: len(before[name])] = before[name]
            table[changes[f"{pooling}/{name}/places"].long()] = changes[f"{pooling}/{name}/rows"]
        return opened.weights_host

    def _changed_values(
        self, name: str, spec: Mapping[str, Any], length: int, places: list[int], changed: list[Any]
    ) -> pa.Array:
        values = self.vocabularies[name][:length].to_pylist() if name in self.vocabularies else []
        for place, value in zip(places, changed, strict=False):
            values[place] = value
        return pa.array(values + changed[len(places) :], spec["vocabulary_types"][name])

    def _changed_ids(self, name: str, changes: Mapping[str, Tensor]) -> Tensor:
        pairs = self.id_rows.get(name, torch.empty(2, 0, dtype=torch.int64))
        pairs = torch.cat([pairs[:, ~torch.isin(pairs[0], changes[f"{name}/gone"])], changes[name]], dim=1)
        return pairs[:, pairs[0].argsort()].contiguous()

    def predict(self, rows: Rows) -> np.ndarray:
        """Return the click probability of each row, (B,) float32; of T tasks (B, T).

        `rows`: column name -> list or array of values (None: missing; lists of lists for list columns), an Arrow table or record batch, or a
        DataFrame. Columns that no field reads are ignored. ValueError if a column is missing or training would have refused a value.
        """
        return self._predict(rows, REQUEST, 0)

    def _predict(self, rows: Rows, place: str, first_row: int) -> np.ndarray:
        model = copy.copy(self)  # as it is now, from encoding to score, whatever `apply` does meanwhile
        scores = model.score(model.preprocess(rows, place, first_row))
        if not scores.isfinite().all():
            row = first_row + int(scores.isfinite().logical_not().nonzero()[0, 0])
            raise ValueError(
                f"{place}: row {row}: its score is not a number; a value is far beyond those of training, or the run's weights are "
                "not finite: fix the row, or export another run"
            )
        return model.probabilities(scores)

    def probabilities(self, logits: Tensor) -> np.ndarray:
        """Of fused logits (B,), or with those of the branches (B, 1 + K): the sigmoid, and of fused ones what the calibration says."""
        found, own = torch.sigmoid(logits).numpy(), self.spec.get("calibration")
        if own:
            z = logits.numpy().reshape(len(logits), -1)[:, 0].astype(np.float64)
            isotonic = own["kind"] == "isotonic"
            with np.errstate(over="ignore"):  # of e^large, whose 1 / (1 + e^large) is 0
                p = np.interp(z, own["x"], own["y"]) if isotonic else 1 / (1 + np.exp(-own["a"] * z - own["b"]))
            found.reshape(len(found), -1)[:, 0] = p
        return found

    @torch.inference_mode()
    def score(self, inputs: Inputs) -> Tensor:
        """Return the fused logit of preprocessed rows, (B,) or (B, T)."""
        return self.graph(self.embed(inputs))

    @torch.inference_mode()
    def embed(self, inputs: Inputs) -> Tensor:
        """Look up and pool: (B, N), pooled fields first, then rows of sequences, dense columns and lengths of sequences."""
        pooled = [self.tables[pooling](*bag) for pooling, bag in inputs.bags.items()]
        x = torch.cat([*pooled, inputs.dense], dim=1)
        return x if inputs.shared is None else x.add_(self.embed(inputs.shared)[inputs.owners])

    def predict_parquet(self, path: str | Path, batch_rows: int = 4096) -> Iterator[np.ndarray]:
        """Yield the probabilities of a file's rows, `batch_rows` at a time; ValueError if a value is faulty, or Arrow ends before the last row."""
        first_row = 0
        with pq.ParquetFile(path) as file:
            known = [name for name in self.preprocess.columns if name in file.schema_arrow.names]
            for batch in file.iter_batches(batch_rows, columns=known):
                yield self._predict(batch, str(path), first_row)
                first_row += batch.num_rows
            if first_row != file.metadata.num_rows:
                raise ValueError(
                    f"{path}: {first_row} rows to read, but {file.metadata.num_rows} by the footer: it is damaged; write it again"
                )


def open_tables(
    tables: Sequence[Mapping[str, Any]], lookups: Sequence[tuple[str, int]], rows: str, pooling: str
) -> IntNBitTableBatchedEmbeddingBagsCodegen:
    """Make FBGEMM's tables of one pooling (see POOLING), their rows still unset: `weights_host` has the size wanted.

    `tables` have TABLE_KEYS; `lookups` are (field, index of its table), in the order of the output's columns; `rows` fp32, fp16, int8 or int4.
    """
    specs = [(*(each[key] for key in TABLE_KEYS), SparseType(rows), EmbeddingLocation.HOST) for each in tables]
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


def rows_of(opened: IntNBitTableBatchedEmbeddingBagsCodegen, tables: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Views of tables as FBGEMM lays them out: name -> (rows, bytes of a row) uint8."""
    views = [view for view, _ in opened.split_embedding_weights(split_scale_shifts=False)]
    return {each["name"]: view for each, view in zip(tables, views, strict=True)}


def build_graph(spec: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """Make the dense part, (B, N) -> (B,), from its straight list of ATen calls: one Python function, which drops what it needs no more.

    In `spec`, arguments that are nodes read {"node": name}, dtypes {"torch": name}.
    """
    run = compile_graph(json.dumps(spec))
    values = [weights[name] for name in spec["weights"].values()]
    return lambda x: run(x, *values)


@functools.lru_cache(maxsize=16)
def compile_graph(text: str) -> Callable[..., Tensor]:
    """The function of a graph, of x and its weights. torch.fx never forgets a function's source: a model's next version takes the same one."""
    spec = json.loads(text)
    graph = fx.Graph()
    nodes = {spec["input"]: graph.placeholder("x")}
    for number, name in enumerate(spec["weights"]):
        nodes[name] = graph.placeholder(f"weight_{number}")

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
    return fx.GraphModule(torch.nn.Module(), graph).forward


def resolve(call: str) -> Callable[..., Any]:
    """Find a call by name: an overload of torch.ops.aten, or arithmetic on sizes; ValueError if it is neither, so it is not run."""
    if own := ARITHMETIC.get(call) or DIRECT.get(call):
        return own
    namespace, _, rest = call.partition(".")
    packet, _, overload = rest.rpartition(".")
    found = getattr(getattr(torch.ops.aten, packet, None), overload, None)
    if namespace != "aten" or not isinstance(found, OVERLOAD):
        raise ValueError(f"graph: {call!r} is not an ATen operator; this artifact is damaged or not ours")
    return found


def main() -> int:
    """Score a Parquet file: the probability of a row a line, or those of its tasks with tabs between them."""
    parser = argparse.ArgumentParser(description="Score the rows of a Parquet file with an exported model.")
    parser.add_argument("folder", help="the artifact")
    parser.add_argument("parquet", help="rows")
    args = parser.parse_args()
    try:
        for probabilities in load(args.folder).predict_parquet(args.parquet):
            rows = probabilities.reshape(len(probabilities), -1)
            sys.stdout.writelines("\t".join(f"{value:.7f}" for value in row) + "\n" for row in rows)
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"mbcnet_serving: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
