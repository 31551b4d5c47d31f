"""Row-wise Adagrad of FBGEMM's tables on a processor of Intel's.

FBGEMM generates this update as machine code, with instructions of SSE among those of AVX. Intel's processors wait at each, half a microsecond a
row in all: 45 of 55 ms of a backward pass of 133 tables and 1,024 rows. A table that several features read is updated by compiled code, on one
thread, in a fifth of the time. So every table gets a second feature, without ids and columns.
"""

from collections import Counter
from itertools import chain
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor, nn

from sharding.bridge.allocated import with_lookups

MOST_THREADS = 4  # with more, the generated code, which uses them all, is as fast


def use_compiled_update(model: nn.Module) -> None:
    """Give the tables of a sharded model second features; parameters, state and, but for rounding, the numbers of a step stay."""
    kernels = [each for each in with_lookups(model) if isinstance(each, SplitTableBatchedEmbeddingBagsCodegen)]
    for kernel in kernels if torch.get_num_threads() <= MOST_THREADS else ():
        if kernel.optimizer == EmbOptimType.EXACT_ROWWISE_ADAGRAD and not kernel.is_nobag:
            kernel.register_forward_pre_hook(SecondFeatures(kernel), with_kwargs=True)


class SecondFeatures:
    """Changes what a kernel knows of its features; then, as a hook before each lookup, the offsets of their ids."""

    def __init__(self, kernel: Any) -> None:
        tables = kernel.feature_table_map
        readers, self._features = Counter(tables), len(tables)
        # of the features' starts, then their ends: a second feature begins where its first one ends
        own = [
            [place, self._features + place] if readers[table] == 1 else [place] for place, table in enumerate(tables)
        ]
        self._order = torch.tensor(list(chain.from_iterable(own)))
        for name in ("weights_offsets", "momentum1_offsets", "rows_per_table"):
            setattr(kernel, name, self._both(getattr(kernel, name), getattr(kernel, name)))
        hashes, columns = kernel.hash_size_cumsum, kernel.D_offsets
        kernel.hash_size_cumsum = torch.cat([self._both(hashes[:-1], hashes[:-1]), hashes[-1:]])
        kernel.D_offsets = torch.cat([self._both(columns[:-1], columns[1:]), columns[-1:]])

    def _both(self, starts: Tensor, ends: Tensor) -> Tensor:
        return torch.cat([starts, ends]).index_select(0, self._order)

    def __call__(self, kernel: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Give second features empty bags: offsets (F B + 1,) of F features and B rows -> (F' B + 1,)."""
        offsets = kwargs["offsets"]
        starts = offsets[:-1].view(self._features, -1)
        ends = offsets[starts.shape[1] :: starts.shape[1]].unsqueeze(1).expand_as(starts)
        return args, kwargs | {"offsets": torch.cat([self._both(starts, ends).flatten(), offsets[-1:]])}
