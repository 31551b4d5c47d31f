"""The model's embedding collections: the one list of them, which table is in which, and TorchRec's configurations of the tables."""

from typing import Any, NamedTuple

import torch
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from data.schema import Schema, Table
from sharding.bridge.zch import EMBEDDING_MODULE, REMAPPERS


class Collection(NamedTuple):
    """One EmbeddingBagCollection, or of tables that sequences read an EmbeddingCollection, which does not pool.

    The first applies weights to every bag or to none, so weighted fields have collections of their own; the second has rows of one width.
    """

    name: str  # the attribute of SparseArch that holds it, and so part of its tables' names in checkpoints
    weighted: bool
    unbounded: bool  # whether its tables give rows to unbounded ids (encoding zch)
    sequences: bool = False

    def configs(self, schema: Schema, data_type: str = "fp32") -> list[Any]:
        """List this collection's tables, with rows of `data_type`."""
        kind: Any = EmbeddingConfig if self.sequences else EmbeddingBagConfig
        return [
            kind(
                name=table.name,
                num_embeddings=table.num_embeddings,
                embedding_dim=table.embedding_dim,
                feature_names=list(table.feature_names),
                data_type=DataType[data_type.upper()],
                **({} if self.sequences else {"pooling": PoolingType[table.pooling.upper()]}),
            )
            for table in schema.tables
            if collection_of(table) == self
        ]


def collection_of(table: Table) -> Collection:
    """The collection that holds a table."""
    if table.positions:
        return Collection(f"ec_{table.embedding_dim}", weighted=False, unbounded=False, sequences=True)
    weighted, unbounded = table.weighted, table.zch is not None
    return Collection(f"{'weighted_' if weighted else ''}{'collision_' if unbounded else ''}ebc", weighted, unbounded)


def meta_collections(schema: Schema, data_type: str = "fp32") -> dict[Collection, Any]:
    """Build the collections that have tables, on the meta device and without managed collision."""
    meta = torch.device("meta")
    every = sorted(
        dict.fromkeys(map(collection_of, schema.tables)),
        key=lambda each: (each.sequences, each.unbounded, each.weighted),
    )
    return {
        each: EmbeddingCollection(each.configs(schema, data_type), device=meta)
        if each.sequences
        else EmbeddingBagCollection(each.configs(schema, data_type), device=meta, is_weighted=each.weighted)
        for each in every
    }


def rows_name(table: Table) -> str:
    """Name of a table's rows in the state of SparseArch."""
    collection = collection_of(table)
    module = f"{collection.name}.{EMBEDDING_MODULE}" if collection.unbounded else collection.name
    return f"{module}.{'embeddings' if collection.sequences else 'embedding_bags'}.{table.name}.weight"


def ids_name(table: Table) -> str:
    """Prefix of the names, in the state of SparseArch, of what is kept about the ids of a table of encoding zch."""
    return f"{collection_of(table).name}.{REMAPPERS}.{table.name}"
