"""Schema -> TorchRec table configurations."""

from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType

from data.schema import Schema

POOLING = {"sum": PoolingType.SUM, "mean": PoolingType.MEAN}


def embedding_bag_configs(
    schema: Schema, *, weighted: bool, unbounded: bool = False, data_type: DataType = DataType.FP32
) -> list[EmbeddingBagConfig]:
    """List the tables of one EmbeddingBagCollection.

    A weighted collection applies weights to every bag, so weighted fields have a collection of their own.

    Args:
        schema: names the tables.
        weighted: whether to list the tables of weighted fields or those of all others.
        unbounded: whether to list the tables that give rows to unbounded ids or those of all others.
        data_type: of the rows.
    """
    return [
        EmbeddingBagConfig(
            name=table.name,
            num_embeddings=table.num_embeddings,
            embedding_dim=table.embedding_dim,
            feature_names=list(table.feature_names),
            pooling=POOLING[table.pooling],
            data_type=data_type,
        )
        for table in schema.tables
        if table.weighted == weighted and (table.zch is not None) == unbounded
    ]
