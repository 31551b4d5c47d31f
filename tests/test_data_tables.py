"""Proves that the tables TorchRec is told of are those of the schema, each in the one collection that can hold it."""

from pathlib import Path

import pytest
import torch
from torchrec.modules.embedding_configs import DataType, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from data.schema import parse_schema
from data.synthetic.pailitao import pailitao_schema
from sharding.bridge.tables import embedding_bag_configs


def schema_of():
    table = {
        "name": "s",
        "label": "y",
        "tables": {"item": {"num_embeddings": 50, "embedding_dim": 8}},
        "fields": {
            "item": {"kind": "categorical", "table": "item", "pooling": "mean"},
            "seen": {"kind": "multi_valued", "table": "item", "pooling": "mean"},
            "liked": {
                "kind": "weighted_multi_valued",
                "weights": "w",
                "num_embeddings": 9,
                "embedding_dim": 4,
            },
            "age": {
                "kind": "numeric",
                "transform": "bucketise",
                "boundaries": [1.0],
                "num_embeddings": 3,
                "embedding_dim": 4,
            },
            "price": {"kind": "numeric"},
        },
        "groups": {},
    }
    return parse_schema(table, "s.toml", Path())


def test_each_table_is_in_one_collection():
    plain = embedding_bag_configs(schema_of(), weighted=False)
    assert [(c.name, c.num_embeddings, c.embedding_dim, c.feature_names, c.pooling) for c in plain] == [
        ("item", 50, 8, ["item", "seen"], PoolingType.MEAN),
        ("age", 3, 4, ["age"], PoolingType.SUM),
    ]
    weighted = embedding_bag_configs(schema_of(), weighted=True, data_type=DataType.FP16)
    assert [(c.name, c.pooling, c.data_type) for c in weighted] == [("liked", PoolingType.SUM, DataType.FP16)]


@pytest.mark.parametrize("weighted", [False, True])
def test_torchrec_takes_the_demo_schema(weighted):
    schema = pailitao_schema("demo")
    configs = embedding_bag_configs(schema, weighted=weighted)
    collection = EmbeddingBagCollection(configs, device=torch.device("meta"), is_weighted=weighted)
    fields = [name for config in collection.embedding_bag_configs() for name in config.feature_names]
    wanted = schema.weighted if weighted else schema.sparse
    assert sorted(fields) == sorted(feature.name for feature in wanted)
