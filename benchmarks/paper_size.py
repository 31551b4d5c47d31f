"""What the benchmarks of a training step share: the model at the paper's size on small tables, random batches without files, a step."""

import re
import tomllib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import side_by_side  # noqa: F401 (finds this checkout)
import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from data.reading.config import StreamOptions
from data.reading.files import resolve_files
from data.schema import Schema, load_schema, parse_schema
from data.schema.feature import Feature
from data.stream import Batch, ParquetStream
from data.synthetic.planted import SCHEMAS
from data.synthetic.write import write_synthetic
from mbcnet_rec.config import DataConfig, RunConfig, TrainConfig
from mbcnet_rec.model.losses import CoteachingConfig, DifferentiationConfig
from mbcnet_rec.model.mbcnet import MBCNetConfig
from mbcnet_rec.model.models import ModelConfig
from mbcnet_rec.plugins import model_config
from mbcnet_rec.training.built import Built

# Training FLOPs of one sample at 2,780 dims and 800 group dims: 6 for each multiply-add of a forward pass.
PREDICTED_FLOPS = 85.8e6
# Multiply-adds of a sample's forward pass by the widths of pailitao.toml, of whole rows and of a slice for each branch.
PREDICTED_SHARED, PREDICTED_PER_BRANCH = 14.1e6, 10.2e6
TRAIN_FOLDER = "ds=2024-05-01"

MBCNET = model_config()
PER_BRANCH = model_config(mbcnet=MBCNetConfig(embeddings="per_branch"))
# Cross and deep branch under the shared top, without a word between them: what EFGC and cooperation come on top of.
TWO_BRANCHES = model_config(
    mbcnet=MBCNetConfig(
        branches=("cross", "deep"),
        coteaching=CoteachingConfig(weight=0.0),
        differentiation=DifferentiationConfig(weight=0.0),
    )
)


def cut_schema(max_rows: int, scale: str = "paper") -> Schema:
    """The 192 fields with tables of at most `max_rows` rows; scale "demo" has 684 dims instead of 2,780."""
    text = re.sub(
        r"num_embeddings = (\d+)",
        lambda match: f"num_embeddings = {min(int(match[1]), max_rows)}",
        SCHEMAS[scale].read_text(),
    )
    return parse_schema(tomllib.loads(text), f"{scale} schema, cut", Path())


def uniform_schema(fields: int, rows: int, dim: int, groups: Sequence[Sequence[int]] = ()) -> Schema:
    """So many single-valued fields with a table each, and groups of them by number."""
    field = {"kind": "categorical", "num_embeddings": rows, "embedding_dim": dim}
    table = {
        "name": f"uniform_{fields}",
        "label": "label",
        "fields": {f"f{number}": field for number in range(fields)},
        "groups": {f"g{place}": [f"f{number}" for number in group] for place, group in enumerate(groups)},
    }
    return parse_schema(table, "uniform schema", Path())


def random_batch(schema: Schema, rows: int) -> Batch:
    """Ids with a power law, one a field and row, as click logs have them; labels of 9 %."""
    draw = torch.Generator().manual_seed(0)

    def ids(features: Sequence[Feature], weighted: bool) -> KeyedJaggedTensor:
        sizes = [schema.table_of[feature.name].num_embeddings for feature in features]
        values = [(size * torch.rand(rows, generator=draw) ** 4).long().clamp(max=size - 1) for size in sizes]
        lengths = torch.ones(len(features) * rows, dtype=torch.int32)
        weights = torch.ones(len(lengths)) if weighted else None
        return KeyedJaggedTensor([each.name for each in features], torch.cat(values), weights, lengths)

    width = sum(feature.dense_width for feature in schema.dense)
    return Batch(
        dense_features=torch.randn(rows, width, generator=draw),
        sparse_features=ids(schema.sparse, weighted=False),
        weighted_features=ids(schema.weighted, weighted=True) if schema.weighted else None,
        labels=(torch.rand(rows, generator=draw) < 0.09).float(),
        weights=torch.ones(rows),
    )


def written_log(folder: Path, schema: Schema, train_rows: int) -> Schema:
    """Write a synthetic log of three days, the first for training; return its schema."""
    write_synthetic(schema, folder, rows=3 * train_rows, days=3, threads=1)
    return load_schema(folder / "schema.toml")


def read_batches(folder: Path, schema: Schema, batch_size: int) -> list[Batch]:
    """All batches of the training day."""
    options = StreamOptions(batch_size, 1, "partitioned", 8_192, prefetch=0)
    return list(ParquetStream(resolve_files([str(folder / TRAIN_FOLDER)]), schema, options))


def run_config(folder: Path, model: ModelConfig, batch_size: int, **train: Any) -> RunConfig:
    """A run over the training day of the log in `folder`."""
    return RunConfig(
        name="benchmark",
        schema=str(folder / "schema.toml"),
        data=DataConfig(train=(str(folder / TRAIN_FOLDER),), batch_size=batch_size),
        model=model,
        train=replace(TrainConfig(), device="cpu", **train),
    )


def objective_of(built: Built) -> Any:
    """The objective inside TorchRec's and torch's wrappers."""
    module: nn.Module = built.model
    while hasattr(module, "module"):
        module = module.module  # type: ignore[assignment]
    return module


def training_step(built: Built, batch: Batch, autocast: bool = False) -> Callable[[], Tensor]:
    """One step on a batch that is at hand: forward, backward with the tables' update, dense optimizer."""

    def step() -> Tensor:
        with torch.autocast(batch.labels.device.type, torch.bfloat16) if autocast else nullcontext():
            loss, _ = built.model(batch)
        loss.backward()
        built.optimizer.step()
        built.optimizer.zero_grad()
        return loss.detach()

    return step


def matrix_flops(module: nn.Module, rows: int) -> float:
    """Training FLOPs of a module's matrices on so many rows: each weight is 3 multiply-adds a row."""
    return 6.0 * rows * sum(parameter.numel() for parameter in module.parameters() if parameter.ndim > 1)


def looked_up_floats(pooled: Any, features: Any) -> float:
    """Floats of the rows that a batch of features looks up."""
    lengths = dict(zip(features.keys(), features.length_per_key(), strict=True))
    widths = zip(pooled.keys(), pooled.length_per_key(), strict=True)
    return sum(width * lengths[key] for key, width in widths)
