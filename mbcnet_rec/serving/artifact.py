"""Takes a run's weights apart for serving: packed tables, the dense part as JSON, vocabularies; and writes the folder that holds them.

    OUT/model.json  tables.safetensors  dense.safetensors  vocabulary.json  schema.toml  config.toml  check.json
        mbcnet_serving/  mbcnet_serving.py
    and, with --aot, dense_aot.pt2

What only training needs is left out: transforms, losses and optimizer state. A second graph gives each branch's logit beside the
fused one. The package mbcnet_serving/ loads the artifact without this project: it is loader.py and a copy of the files that encode
rows in training (ENCODER_FILES). The dense part is what torch.export records, written as JSON: torch's own .pt2 files unpickle when they
are loaded.
"""

import copy
import dataclasses
import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from safetensors.torch import save_file
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedTensor

import data
from data.errors import InputError, first_line
from data.plugins import write_plugins
from data.reading.keys import read_vocabularies
from data.schema import Schema, Table, format_schema
from data.schema.sequences import lengths_of
from data.schema.transforms import FILE
from data.whole_folder import whole_folder
from mbcnet_rec.build import SPARSE_ARCH
from mbcnet_rec.config import RunConfig, config_text
from mbcnet_rec.doctor import installed
from mbcnet_rec.model.input_layout import wide_table
from mbcnet_rec.model.models import build_arch, model_layout, schema_with_wide, tasks_of
from mbcnet_rec.model.sequences import SequencePooling
from mbcnet_rec.model.sparse_arch import FeatureRegroup, wide_key
from mbcnet_rec.scoring.trained_run import TrainedRun
from mbcnet_rec.serving import loader as serving
from mbcnet_rec.serving import preprocess
from mbcnet_rec.serving.dense_graph import graph_spec, trace
from sharding.bridge.collections import ids_name, rows_name
from sharding.bridge.zch import FREE

LOADER, PACKAGE = "mbcnet_serving.py", "mbcnet_serving"
SCRIPT = """\
# Scores a Parquet file: python mbcnet_serving.py FOLDER ROWS.parquet. To import: the folder of the same name beside this file.
import sys

from mbcnet_serving import main

sys.exit(main())
"""
# What encodes rows, in training and in every artifact: files of `data` that import each other relatively and nothing else of ours
_OF_SCHEMA = ("__init__", "bounds", "feature", "names", "parse", "schema", "sequences", "transforms")
_OF_READING = ("__init__", "column_types", "columns", "crosses", "encode", "ids", "keys", "numbers", "plain")
ENCODER_FILES = ["__init__.py", "errors.py", "plugins.py", *(f"schema/{each}.py" for each in _OF_SCHEMA)]
ENCODER_FILES += [f"reading/{each}.py" for each in _OF_READING]
DATA = Path(data.__file__).parent
CHUNK_ROWS = 65_536  # quantised at a time


@dataclass(frozen=True)
class Exported:
    """A model taken apart for serving."""

    spec: dict[str, Any]  # model.json without the files' sums
    schema: Schema  # of the run
    # pooling -> rows of its tables; "zch/TABLE" -> ids and their rows, see serving.ServingModel
    rows: dict[str, Tensor]
    dense: dict[str, Tensor]  # weights of the graph
    vocabularies: Mapping[str, pa.Array]  # names of vocabulary files -> values in row order
    program: torch.export.ExportedProgram  # the dense part

    def model(self) -> serving.ServingModel:
        """Serve it from memory."""
        return serving.ServingModel(self.spec, self.schema, self.rows, self.dense, self.vocabularies)


@dataclass(frozen=True)
class Weights:
    """A run's weights, unsharded."""

    config: RunConfig
    schema: Schema
    tables: tuple[Table, ...]  # all of the model, wide ones included
    rows: dict[str, Tensor]  # table name -> (rows, width) float32
    regroup: FeatureRegroup  # with its weights loaded, in evaluation mode, as `arch`
    arch: nn.Module
    sequences: SequencePooling | None = None  # as `regroup`
    # of each table of unbounded ids: (2, n) int64, ascending hashes of the ids that have a row, and the rows
    id_rows: dict[str, Tensor] = dataclasses.field(default_factory=dict)


def untrained(config: RunConfig, schema: Schema) -> Weights:
    """Build a model unsharded, without rows and with freshly drawn dense weights."""
    layout = model_layout(config.model, schema)
    tables = schema_with_wide(config.model, schema).tables
    arch = build_arch(config.model, layout)
    sequences = SequencePooling(layout).eval() if layout.sequences else None
    return Weights(config, schema, tables, {}, FeatureRegroup(layout).eval(), arch.eval(), sequences)


def load_weights(run: TrainedRun) -> Weights:
    """Read a checkpoint into one process, all tables as float32; InputError if it is damaged or of another model."""
    weights = untrained(run.config, run.schema)
    tensors = {f"model.dense_arch.{name}": value for name, value in weights.arch.state_dict().items()}
    regroup = weights.regroup.state_dict()
    tensors |= {f"model.sparse_arch.regroup.{name}": value for name, value in regroup.items()}
    pools = weights.sequences.state_dict() if weights.sequences else {}
    tensors |= {f"model.sparse_arch.sequences.{name}": value for name, value in pools.items()}
    ids: dict[str, Tensor] = {}
    for table in weights.tables:
        rows = torch.empty(table.num_embeddings, table.embedding_dim)
        if table.zch is not None:
            module = f"{SPARSE_ARCH}{ids_name(table)}"
            ids[table.name] = torch.empty(2, table.num_embeddings, dtype=torch.int64)
            tensors |= {f"{module}.raw_ids": ids[table.name][0], f"{module}.slots": ids[table.name][1]}
        tensors[f"{SPARSE_ARCH}{rows_name(table)}"] = rows
        weights.rows[table.name] = rows
    run.read_whole(tensors)
    for name, pairs in ids.items():
        known = pairs[:, pairs[0] != FREE]
        if known.numel() and not 0 <= int(known[1].min()) <= int(known[1].max()) < pairs.shape[1]:
            raise InputError(f"{run.folder}: table {name!r}: an id has a row that the table lacks; use another run")
        weights.id_rows[name] = known[:, known[0].argsort()].contiguous()
    return weights


def take_apart(
    weights: Weights, branches: Sequence[str] = (), vocabularies: Mapping[str, pa.Array] | None = None
) -> Exported:
    """Record the dense part and describe the fields; `with_rows` adds the tables' rows. InputError if the branches cannot serve.

    Without branches all of an MBCnet's serve. Vocabularies, file name -> values in row order, are read from the schema's folder if not given.
    """
    chosen = check_branches(weights.config, branches)
    tables, lookups = pool_tables(weights.tables, weights.schema)
    path = FusedPath(weights, chosen, tables, lookups)
    program = trace(path, path.width)
    graph, dense = graph_spec(program)
    branch_graph = None
    if chosen:
        path = FusedPath(weights, chosen, tables, lookups, each=True)
        branch_graph, own = graph_spec(trace(path, path.width))
        dense |= own
    if vocabularies is None:
        vocabularies = read_vocabularies(weights.schema)
    spec = {
        "format": serving.FORMAT,
        "name": weights.config.name,
        "kind": weights.config.model.kind,
        "branches": chosen,
        **({"tasks": list(tasks)} if (tasks := tasks_of(weights.config.model, weights.schema)) else {}),
        "rows": "",
        "versions": {name: installed(name) for name in ("mbcnet-rec", "torch", "fbgemm-gpu", "fbgemm-gpu-cpu")},
        "vocabulary_types": {
            name: str(values.type) if pa.types.is_integer(values.type) else "string"
            for name, values in vocabularies.items()
        },
        "tables": {
            pooling: [{key: getattr(table, key) for key in serving.TABLE_KEYS} for table in members]
            for pooling, members in tables.items()
        },
        "lookups": lookups,
        "graph": graph,
        "branch_graph": branch_graph,
    }
    return Exported(spec, weights.schema, {}, dense, vocabularies, program)


def with_rows(exported: Exported, weights: Weights, rows: str) -> Exported:
    """The same with rows packed as fp32, fp16, int8 or int4: a block of bytes for each pooling, laid out as FBGEMM reads it.

    int8, int4: x ~ scale * q + bias, q of 8 or 4 bits, both float16, so an error is at most (max - min) / 2 / (2^bits - 1) of a row, and rounding.
    """
    spec: dict[str, Any] = exported.spec | {"rows": rows}
    packed = {f"{serving.ZCH}{name}": pairs for name, pairs in weights.id_rows.items()}
    for pooling, tables in spec["tables"].items():
        opened = serving.open_tables(tables, spec["lookups"][pooling], rows, pooling)
        for entry, (into, scales) in zip(tables, opened.split_embedding_weights(), strict=True):
            table = weights.rows[entry["name"]]
            for first in range(0, len(table), CHUNK_ROWS):
                chunk, part = table[first : first + CHUNK_ROWS], slice(first, first + CHUNK_ROWS)
                if rows.startswith("int"):
                    bits = SparseType(rows).bit_rate()
                    quantised = torch.ops.fbgemm.FloatOrHalfToFusedNBitRowwiseQuantizedSBHalf(chunk, bits)
                    assert scales is not None
                    into[part].copy_(quantised[:, : into.shape[1]])
                    scales[part].copy_(quantised[:, into.shape[1] :])
                else:
                    into[part].copy_((chunk.half() if rows == "fp16" else chunk).view(torch.uint8))
        packed[pooling] = opened.weights_host
    return dataclasses.replace(exported, spec=spec, rows=packed)


def open_artifact(folder: Path, **how: bool) -> serving.ServingModel:
    """Load an artifact as `serving.load` does; InputError if it is none, or damaged."""
    try:
        return serving.load(folder, **how)
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from None


def check_branches(config: RunConfig, wanted: Sequence[str]) -> tuple[str, ...]:
    """The branches to serve, in the model's order, none for models without; InputError if the model cannot serve these."""
    have = config.model.branch_names
    where = f"--branches {','.join(wanted)}"
    if wanted and not have:
        raise InputError(f"{where}: a {config.model.kind} has no branches; leave the option out")
    unknown = [name for name in wanted if name not in have]
    if unknown:
        raise InputError(f"{where}: this run has no branch {unknown[0]!r}; it has {', '.join(have)}")
    if 1 < len(set(wanted)) < len(have) and getattr(config.model.own, "fusion", "") == "gated":
        raise InputError(f"{where}: fusion = 'gated' weighs all branches together; serve all of them or a single one")
    return tuple(name for name in have if not wanted or name in wanted)


Tables = dict[str, list[Table]]  # by pooling
Lookups = dict[str, list[tuple[str, int]]]  # pooling -> (field, index of its table)


def pool_tables(tables: Sequence[Table], schema: Schema) -> tuple[Tables, Lookups]:
    """Sort tables by pooling, which FBGEMM fixes for a group: in it those of lists last, so that the lookups of one id a row are joined.

    Those that sequences read stand last, with a lookup for each position.
    """
    pooled: Tables = {}
    lookups: Lookups = {}
    lengths = lengths_of(schema.features)
    lists = {each.name for each in schema.features if not each.is_single}
    for table in sorted(tables, key=lambda table: (table.positions > 0, not lists.isdisjoint(table.feature_names))):
        pooling = "sequence" if table.positions else "weighted" if table.weighted else table.pooling
        group, own = pooled.setdefault(pooling, []), lookups.setdefault(pooling, [])
        for field in table.feature_names:
            own += [(field, len(group))] * (lengths[field] if table.positions and field in lengths else 1)
        group.append(table)
    return pooled, lookups


def write_artifact(exported: Exported, config: RunConfig, out: Path, *, aot: bool = False) -> str:
    """Write the folder by one rename; with `aot` the dense part is compiled besides. Returns why it could not be compiled, or ""."""
    with whole_folder(out) as partial:
        save_file(exported.rows, partial / serving.TABLES)
        save_file({name: value.contiguous() for name, value in exported.dense.items()}, partial / serving.DENSE)
        vocabularies = {name: values.to_pylist() for name, values in exported.vocabularies.items()}
        (partial / serving.VOCABULARY).write_text(json.dumps(vocabularies), encoding="utf-8")
        (partial / serving.SCHEMA).write_text(format_schema(exported.schema), encoding="utf-8")
        (partial / "config.toml").write_text(config_text(config), encoding="utf-8")
        write_plugins(partial, [each[FILE] for each in exported.schema.transforms.values() if FILE in each])
        _write_package(partial)
        problem = _compile_dense(exported.program, partial / serving.COMPILED) if aot else ""
        files = [path for path in sorted(partial.rglob("*")) if path.is_file()]
        for path in files:  # safetensors writes for its owner's eyes only
            path.chmod((partial / serving.VOCABULARY).stat().st_mode)
        sums = {path.relative_to(partial).as_posix(): serving.sha256_of(path) for path in files}
        (partial / serving.MODEL).write_text(json.dumps(exported.spec | {"files": sums}, indent=1), encoding="utf-8")
    return problem


def _write_package(folder: Path) -> None:
    """Copy the loader and the files that encode rows, which a user's own `data` cannot shadow: they are mbcnet_serving.data."""
    (folder / LOADER).write_text(SCRIPT, encoding="utf-8")
    for name in ENCODER_FILES:
        copy_to = folder / PACKAGE / "data" / name
        copy_to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(DATA / name, copy_to)
    shutil.copyfile(preprocess.__file__, folder / PACKAGE / "preprocess.py")
    shutil.copyfile(serving.__file__, folder / PACKAGE / "__init__.py")


def _compile_dense(program: torch.export.ExportedProgram, path: Path) -> str:
    """Compile by AOTInductor; return why it failed, or an empty string."""
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    except Exception as error:  # the compiler's, Inductor's and the loader's own, of many classes
        path.unlink(missing_ok=True)
        return first_line(error) or type(error).__name__
    return ""


class FusedPath(nn.Module):
    """Pooling of sequences -> regroup -> the chosen branches -> shared top -> fusion -> the fused logit (Eq. 15).

    The dense part serves the chosen branches by its `serve` if it has that (see BranchArch), else its fused logit. `tables` and `lookups`
    give the columns of each lookup, in the order in which they stand; dense columns and the lengths of sequences follow. With `each`,
    each chosen branch's own logit stands beside the fused one.
    """

    def __init__(
        self, weights: Weights, branches: Sequence[str], tables: Tables, lookups: Lookups, each: bool = False
    ) -> None:
        super().__init__()
        self.regroup = copy.deepcopy(weights.regroup)  # it remembers the first layout that it meets
        self.arch, self.sequences = weights.arch, weights.sequences
        self._branches, self._each = list(branches), each
        columns = {
            pooling: [(field, tables[pooling][index]) for field, index in own] for pooling, own in lookups.items()
        }
        pooled = [each for pooling, own in columns.items() if pooling != "sequence" for each in own]
        named = ((wide_key(name) if table.name == wide_table(name) else name, table) for name, table in pooled)
        self._widths = {key: table.embedding_dim for key, table in named}
        positions = groupby(columns.get("sequence", []), key=itemgetter(0))
        self._padded = {field: [table.embedding_dim for _, table in own] for field, own in positions}
        self._first = [each.name for each in weights.schema.features if each.is_sequence and not each.beside]
        self._dense = sum(feature.dense_width for feature in weights.schema.dense)
        self._parts = [sum(self._widths.values()), *map(sum, self._padded.values()), self._dense, len(self._first)]
        self.width = sum(self._parts)  # N
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N) to (B,), or with `each` to (B, 1 + K); of T tasks to (B, T) or (B, T (1 + K))."""
        pooled, *rows, dense, lengths = x.split(self._parts, dim=1)
        tensors = [KeyedTensor(list(self._widths), list(self._widths.values()), pooled)] if self._widths else []
        if self.sequences is not None:
            padded = {
                field: own.unflatten(1, (len(widths), widths[0]))
                for (field, widths), own in zip(self._padded.items(), rows, strict=True)
            }
            tensors.append(self.sequences.pooled(padded, dict(zip(self._first, lengths.unbind(1), strict=True))))
        features = self.regroup(tensors, dense)
        if self._branches and hasattr(self.arch, "serve"):
            found = self.arch.serve(features, self._branches, each=self._each)  # pyright: ignore[reportCallIssue]
        else:
            own = self.arch(features)
            found = torch.stack([own.fused_logits, *own.branch_logits], dim=1) if self._each else own.fused_logits
        return found.transpose(1, 2).flatten(1) if found.dim() > 2 else found
