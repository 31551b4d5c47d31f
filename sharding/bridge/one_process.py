"""A single process: TorchRec's sharded collections without what several processes need.

Around the lookup of a small model TorchRec spends more than the lookup itself takes: it splits the features by shard, wraps them in
awaitables of an exchange that moves nothing, and copies every gradient of a replicated table.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.model_parallel import DataParallelWrapper
from torchrec.distributed.types import ShardingEnv
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

WHOLE_TABLES = {"data_parallel", "table_wise"}  # one shard a table: a lookup gives the table's own columns


class NoCopies(DataParallelWrapper):
    """No data parallelism: DistributedDataParallel would copy every gradient and divide it by 1."""

    def wrap(self, dmp: DistributedModelParallel, env: ShardingEnv, device: torch.device) -> None:
        """Only move the dense part to its device."""
        dmp._dmp_wrapped_module.to(device)


def shorten_lookups(model: nn.Module) -> None:
    """Let the collections of a model that is sharded over one process look up their rows directly, where that gives the same.

    State, parameters and optimizers stay TorchRec's; a train pipeline may still put its own forward pass in the place of this one.
    """
    for module in model.modules():
        lookups: Any = getattr(module, "_lookups", ())
        for place, lookup in enumerate(lookups):
            if isinstance(lookup, DistributedDataParallel):
                lookups[place] = lookup.module
        if isinstance(module, ShardedEmbeddingBagCollection) and set(module._sharding_types) <= WHOLE_TABLES:
            module.forward = DirectLookup(module)  # type: ignore[method-assign]


class DirectLookup:
    """The forward pass of a collection whose tables all lie here, whole.

    Its first call is TorchRec's, which checks the features against the tables and finds the order that the lookups want. So are
    calls of what only that can do: a batch size for each feature, trackers of rows.
    """

    def __init__(self, collection: ShardedEmbeddingBagCollection) -> None:
        self._collection: Any = collection
        self._exchanged: Callable[[KeyedJaggedTensor], Any] = collection.forward

    def __call__(self, features: KeyedJaggedTensor) -> Any:
        """Look up the rows of B samples: (B, sum of the tables' widths), by table."""
        collection = self._collection
        if (
            collection._has_uninitialized_input_dist
            or collection._has_mean_pooling_callback
            or collection.post_lookup_tracker_fn is not None
            or features.variable_stride_per_key()
        ):
            return self._exchanged(features)
        if collection._has_features_permute:
            features = features.permute(collection._features_order, collection._features_order_tensor)
        pooled = [
            table_batch(own)
            for lookup, of_lookup in parts_of(collection._lookups, collection._feature_splits, features)
            for table_batch, own in parts_of(lookup._emb_modules, lookup._feature_splits, of_lookup)
        ]
        return KeyedTensor(
            keys=collection._embedding_names,
            length_per_key=collection._embedding_dims,
            values=pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=1),
        )


def parts_of(modules: Any, splits: Any, features: KeyedJaggedTensor) -> list[tuple[Any, KeyedJaggedTensor]]:
    """Each module with its features, which follow each other; a split in one costs what a small lookup costs, so there is none."""
    if len(modules) == 1:
        return [(modules[0], features)]
    return list(zip(modules, features.split(splits), strict=True))
