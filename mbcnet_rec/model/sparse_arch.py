"""Tables and the one regroup of their output into groups: the part that TorchRec shards.

Shapes: B batch, N flattened width of all fields, G groups, n_g width of group g, D dense columns.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torchrec.modules.regroup import KTRegroupAsDict
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from mbcnet_rec.model.layers import ALL, InputLayout


class SparseArch(nn.Module):
    """Embedding collections and the one regroup of their output (Eq. 1 and 2).

    Args:
        ebc: KeyedJaggedTensor -> KeyedTensor.
        weighted_ebc: the same for fields with weights, or None.
        layout: names and widths of the fields and groups.
    """

    def __init__(self, ebc: nn.Module, weighted_ebc: nn.Module | None, layout: InputLayout) -> None:
        super().__init__()
        self.ebc = ebc
        self.weighted_ebc = weighted_ebc
        self.regroup = FeatureRegroup(layout)

    def forward(
        self,
        dense_features: Tensor,
        sparse_features: KeyedJaggedTensor,
        weighted_features: KeyedJaggedTensor | None = None,
    ) -> dict[str, Tensor]:
        """Look up every field once: "all" -> (B, N), group g -> (B, n_g)."""
        pooled: list[KeyedTensor] = [self.ebc(sparse_features)]
        if self.weighted_ebc is not None:
            pooled.append(self.weighted_ebc(weighted_features))
        return self.regroup(pooled, dense_features)


class FeatureRegroup(nn.Module):
    """Pooled embeddings and dense columns -> one tensor per group (Eq. 2), and "all" (Eq. 5).

    Columns are always found by key: the order of keys in the output of a sharded collection depends on the
    plan. Inside a group sparse fields come first, then dense ones, each in the layout's order.
    """

    def __init__(self, layout: InputLayout) -> None:
        super().__init__()
        members = {name: layout.keys(name) for name in (ALL, *layout.groups)}
        self._sparse = {
            name: [key for key in keys if key in layout.embedding_dims] for name, keys in members.items()
        }
        self._dense = {
            name: join_slices([layout.dense_slices[key] for key in keys if key in layout.dense_slices])
            for name, keys in members.items()
        }
        named = {name: keys for name, keys in self._sparse.items() if keys}
        self._permute = KTRegroupAsDict(list(named.values()), list(named))
        self._permuted_keys: list[list[str]] = []

    def forward(self, keyed_tensors: Sequence[KeyedTensor], dense_features: Tensor) -> dict[str, Tensor]:
        """Regroup the outputs of one or more embedding collections.

        Args:
            keyed_tensors: that together hold every key of `embedding_dims`.
            dense_features: (B, D).

        Returns:
            "all" -> (B, N), and each group g -> (B, n_g).
        """
        if regroup_op(dense_features.device) == "permute":
            sparse = self._permute_by_plan(keyed_tensors)
        else:
            sparse = split_by_key(keyed_tensors, self._sparse)
        groups = {}
        for name, slices in self._dense.items():
            pieces = [
                *sparse.get(name, []),
                *(dense_features.narrow(1, start, width) for start, width in slices),
            ]
            groups[name] = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
        return groups

    def _permute_by_plan(self, keyed_tensors: Sequence[KeyedTensor]) -> dict[str, list[Tensor]]:
        # The module caches its permutation at the first call; a change of plan would turn it silently wrong.
        keys = [list(tensor.keys()) for tensor in keyed_tensors]
        if keys != self._permuted_keys:
            self._permute.clear_cache()
            self._permuted_keys = keys
        return {name: [tensor] for name, tensor in self._permute(list(keyed_tensors)).items()}


def regroup_op(device: torch.device) -> Literal["permute", "split"]:
    """Choose the regroup by device: FBGEMM's fused permute on CUDA, split + cat on CPU.

    Measured on CPU, seven overlapping groups of 192 keys: the permute is 17 to 80 times slower.
    """
    return "permute" if device.type == "cuda" else "split"


def split_by_key(
    keyed_tensors: Sequence[KeyedTensor], groups: Mapping[str, Sequence[str]]
) -> dict[str, list[Tensor]]:
    """Cut keyed tensors (B, sum of widths) into views: group -> one (B, width) for each of its keys."""
    columns: dict[str, Tensor] = {}
    for tensor in keyed_tensors:
        columns.update(zip(tensor.keys(), tensor.values().split(tensor.length_per_key(), dim=1), strict=True))
    return {name: [columns[key] for key in keys] for name, keys in groups.items()}


def join_slices(slices: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join neighbouring (start, width) slices, so that hundreds of dense fields in a row cost one copy."""
    joined: list[tuple[int, int]] = []
    for start, width in slices:
        if joined and sum(joined[-1]) == start:
            joined[-1] = (joined[-1][0], joined[-1][1] + width)
        else:
            joined.append((start, width))
    return joined
