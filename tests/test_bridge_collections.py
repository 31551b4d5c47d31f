"""Proves that the tables TorchRec is told of are those of the schema, each in the one collection that can hold it."""

import tomllib
from pathlib import Path

from torchrec.modules.embedding_configs import DataType, PoolingType

from data.schema import parse_schema
from sharding.bridge.collections import Collection, ids_name, meta_collections, rows_name
from sharding.bridge.zch import collision_collection

SCHEMA = """
name = "s"
label = "y"
[tables]
item = { num_embeddings = 50, embedding_dim = 8 }
[fields]
item   = { kind = "categorical", table = "item", pooling = "mean" }
seen   = { kind = "multi_valued", table = "item", pooling = "mean" }
liked  = { kind = "weighted_multi_valued", weights = "w", num_embeddings = 9, embedding_dim = 4 }
user   = { kind = "categorical", encoding = "zch", num_embeddings = 80, embedding_dim = 8 }
basket = { kind = "weighted_multi_valued", encoding = "zch", weights = "b", num_embeddings = 80, embedding_dim = 8 }
age    = { kind = "numeric", transform = "bucketise", boundaries = [1.0], num_embeddings = 3, embedding_dim = 4 }
price  = { kind = "numeric" }
"""


def schema_of():
    return parse_schema(tomllib.loads(SCHEMA), "s.toml", Path())


def test_each_table_is_in_one_collection():
    found = {
        each.name: [
            (config.name, config.num_embeddings, config.embedding_dim, config.feature_names, config.pooling)
            for config in module.embedding_bag_configs()
        ]
        for each, module in meta_collections(schema_of()).items()
    }
    assert found == {
        "ebc": [("item", 50, 8, ["item", "seen"], PoolingType.MEAN), ("age", 3, 4, ["age"], PoolingType.SUM)],
        "weighted_ebc": [("liked", 9, 4, ["liked"], PoolingType.SUM)],
        "collision_ebc": [("user", 80, 8, ["user"], PoolingType.SUM)],
        "weighted_collision_ebc": [("basket", 80, 8, ["basket"], PoolingType.SUM)],
    }
    (liked,) = Collection("weighted_ebc", weighted=True, unbounded=False).configs(schema_of(), "fp16")
    assert liked.data_type == DataType.FP16


def test_names_in_checkpoints_are_those_of_the_state():
    schema = schema_of()
    state = {
        f"{each.name}.{name}"
        for each, rows in meta_collections(schema).items()
        for name in (collision_collection(schema, rows) if each.unbounded else rows).state_dict()
    }
    for table in schema.tables:
        assert rows_name(table) in state
        assert (f"{ids_name(table)}.slots" in state) == (table.zch is not None)
