"""Schemas of any size and random batches for them, without files: what the growth of a step's cost is measured on."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from data.schema import Schema, parse_schema
from data.schema.feature import Feature
from data.stream import Batch


def uniform_schema(fields: int, rows: int, dim: int, groups: Sequence[Sequence[int]] = ()) -> Schema:
    """So many single-valued fields with a table each, and groups of them by number."""
    table = {
        "name": f"uniform_{fields}",
        "label": "label",
        "fields": {
            f"f{number}": {"kind": "categorical", "num_embeddings": rows, "embedding_dim": dim}
            for number in range(fields)
        },
        "groups": {f"g{place}": [f"f{number}" for number in group] for place, group in enumerate(groups)},
    }
    return parse_schema(table, "uniform schema", Path())


def random_batch(schema: Schema, rows: int, seed: int = 0) -> Batch:
    """Ids with a power law, one a field and row, as click logs have them; labels of 9 %."""
    draw = torch.Generator().manual_seed(seed)

    def ids(features: Sequence[Feature], weighted: bool) -> KeyedJaggedTensor:
        values = []
        for feature in features:
            size = schema.table_of[feature.name].num_embeddings
            values.append((size * torch.rand(rows, generator=draw) ** 4).long().clamp(max=size - 1))
        lengths = torch.ones(len(features) * rows, dtype=torch.int32)
        weights = torch.ones(len(lengths)) if weighted else None
        return KeyedJaggedTensor([each.name for each in features], torch.cat(values), weights, lengths)

    return Batch(
        dense_features=torch.randn(
            rows, sum(feature.dense_width for feature in schema.dense), generator=draw
        ),
        sparse_features=ids(schema.sparse, weighted=False),
        weighted_features=ids(schema.weighted, weighted=True) if schema.weighted else None,
        labels=(torch.rand(rows, generator=draw) < 0.09).float(),
        weights=torch.ones(rows),
    )
