"""What a model sees of a schema, and which tables it looks up: the fields' own, and one of single weights for each field where it is wide."""

from dataclasses import replace

from data.errors import InputError
from data.schema import Schema
from mbcnet_rec.model.layers import InputLayout, wide_tables
from mbcnet_rec.model.models import ModelConfig, needs_wide


def input_layout(schema: Schema) -> InputLayout:
    """Describe a schema's fields and groups to the model."""
    dims = {
        feature.name: schema.table_of[feature.name].embedding_dim
        for feature in (*schema.sparse, *schema.weighted)
    }
    slices, start = {}, 0
    for feature in schema.dense:
        slices[feature.name] = (start, feature.dense_width)
        start += feature.dense_width
    projections = {feature.name: feature.projection for feature in schema.dense if feature.projection}
    return InputLayout(dims, slices, schema.groups, projections=projections)


def schema_with_wide(config: ModelConfig, schema: Schema) -> Schema:
    """Add a table of one weight per id for each field, where the model has a wide part; else return the schema.

    Raises:
        InputError: a field's ids are unbounded: TorchRec looks each one up in one table only.
    """
    if not needs_wide(config):
        return schema
    unbounded = [table.feature_names[0] for table in schema.tables if table.zch is not None]
    if unbounded:
        raise InputError(
            f"schema {schema.name!r}: field {unbounded[0]!r} is of encoding 'zch', and this model has a wide part, which looks each field "
            "up in a second table, as TorchRec's managed collision cannot; use encoding = 'hash' for the field, or a model without a "
            "wide part"
        )
    return replace(schema, tables=(*schema.tables, *wide_tables(schema.tables)))
