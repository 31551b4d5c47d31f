"""Proves that the shipped schemas load, have the sizes they claim, and feed no target to a model."""

from pathlib import Path

import pytest

from data.schema import Schema, load_schema
from data.synthetic.planted import pailitao_schema

SCHEMAS = Path(__file__).parents[1] / "data" / "schemas"
REAL = sorted({path.stem for path in SCHEMAS.glob("*.toml")} - {"pailitao", "pailitao_demo"})
TARGETS = {"label", "click", "clk", "is_click", "conversion", "purchase", "rating"}


def group_widths(schema: Schema) -> list[int]:
    dense = {feature.name: feature.dense_width for feature in schema.dense}
    return [
        sum(dense[name] if name in dense else schema.table_of[name].embedding_dim for name in members)
        for members in schema.groups.values()
    ]


def test_paper_scale_has_the_papers_sizes():
    schema = pailitao_schema("paper")
    assert len(schema.features) == 192
    assert schema.width == 2780
    # Table 1 of the paper, in its order
    assert group_widths(schema) == [128, 160, 160, 192, 64, 32, 64]
    assert sum(group_widths(schema)) == 800
    sizes = [schema.table_of[name].num_embeddings for name in ("user_id", "item_id")]
    assert sizes == [480_028_940, 974_333_635], "Table 2 of the paper"


def test_demo_is_the_same_schema_but_small():
    demo, paper = pailitao_schema("demo"), pailitao_schema("paper")
    assert [feature.name for feature in demo.features] == [feature.name for feature in paper.features]
    assert [feature.kind for feature in demo.features] == [feature.kind for feature in paper.features]
    assert demo.groups == paper.groups
    assert demo.width < 720
    assert sum(table.num_embeddings * table.embedding_dim for table in demo.tables) < 2_000_000


@pytest.mark.parametrize("name", REAL)
def test_real_schema_is_complete(name):
    schema = load_schema(SCHEMAS / f"{name}.toml")
    assert schema.name == name
    grouped = {field for members in schema.groups.values() for field in members}
    assert grouped == {feature.name for feature in schema.features}, "every field is in a group"
    assert len(schema.groups) >= 4
    # a model must not see a target
    assert not TARGETS & {feature.source_column for feature in schema.features}
    text = (SCHEMAS / f"{name}.toml").read_text(encoding="utf-8")
    assert "#" in text.split("[groups]")[1], "says why its groups"
    # what a small machine holds, but for the one that is meant for a cluster
    assert max(table.embedding_dim for table in schema.tables) <= (128 if name == "criteo_1tb" else 48)
