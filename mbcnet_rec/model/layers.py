"""The layers that branches are made of, and the layout of their input. Imports no torchrec.

Shapes: B batch, N flattened width of all fields, G groups, n_g width of group g, E experts, r low rank, D
dense columns. Activations are float32 (bfloat16 inside matrix products under autocast); parameters are
float32.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.errors import InputError

ALL = "all"  # the name of the group of every field


@dataclass(frozen=True)
class InputLayout:
    """What the fields are called, how wide they are and which groups they form. A field may be in many groups.

    Attributes:
        embedding_dims: key of a KeyedJaggedTensor -> width; its order is the order inside "all".
        dense_slices: dense field -> (first column, width) in `dense_features`.
        groups: EFGC group -> keys of either kind.
    """

    embedding_dims: Mapping[str, int]
    dense_slices: Mapping[str, tuple[int, int]]
    groups: Mapping[str, tuple[str, ...]]

    def __post_init__(self) -> None:
        """Refuse groups that cannot be cut out of the fields."""
        if both := self.embedding_dims.keys() & self.dense_slices.keys():
            raise InputError(
                f"field {min(both)!r} is both sparse and dense; wanted one kind; rename one of the two"
            )
        for name, keys in self.groups.items():
            where = f"groups.{name} = {list(keys)}"
            if name == ALL:
                raise InputError(
                    f"{where}: the name {ALL!r} is taken by the group of every field; rename the group"
                )
            if not keys or len(set(keys)) != len(keys):
                raise InputError(f"{where}: wanted at least one field and none twice; change the list")
            for key in keys:
                if key not in self.embedding_dims and key not in self.dense_slices:
                    raise InputError(
                        f"{where}: {key!r} is not a field; add it to the fields or take it out of the group"
                    )

    def keys(self, group: str) -> tuple[str, ...]:
        """List the keys of a group, sparse ones first, in the order in which their columns stand."""
        members = (*self.embedding_dims, *self.dense_slices) if group == ALL else self.groups[group]
        return tuple(sorted(members, key=lambda key: key in self.dense_slices))  # a stable sort

    def width(self, group: str = ALL) -> int:
        """Columns of a group: N for "all", n_g for group g."""
        return sum(
            self.embedding_dims[key] if key in self.embedding_dims else self.dense_slices[key][1]
            for key in self.keys(group)
        )


class MLP(nn.Sequential):
    """h_{l+1} = dropout(ReLU(norm(W_l h_l + b_l))): ReLU after every layer, the last one included.

    Args:
        in_features: width of the input.
        hidden: width of each layer.
        batch_norm: normalise each layer before its ReLU.
        dropout: probability of zeroing an activation in training.
    """

    def __init__(
        self, in_features: int, hidden: Sequence[int], batch_norm: bool = False, dropout: float = 0.0
    ) -> None:
        layers: list[nn.Module] = []
        for wide, narrow in zip((in_features, *hidden), hidden, strict=False):
            layers.append(nn.Linear(wide, narrow))
            if batch_norm:
                layers.append(nn.BatchNorm1d(narrow))
            layers.append(nn.ReLU())
            if dropout > 0:
                layers.append(nn.Dropout(dropout))
        super().__init__(*layers)


class GroupedMLP(nn.Module):
    """G MLPs of the same hidden widths on inputs of different widths (Eq. 3).

    Args:
        in_features: n_g of each group.
        hidden, batch_norm, dropout: of every MLP.
    """

    def __init__(
        self,
        in_features: Sequence[int],
        hidden: Sequence[int],
        batch_norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.mlps = nn.ModuleList(MLP(width, hidden, batch_norm, dropout) for width in in_features)

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Map G tensors (B, n_g) to G tensors (B, hidden[-1])."""
        return [mlp(features) for mlp, features in zip(self.mlps, inputs, strict=True)]


class Cross(nn.Module):
    """The cross network of DCNv2: x_{l+1} = x_l + x_0 * layer_l(x_l), with * element by element.

    Args:
        layers: modules (B, N) -> (B, N).
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x_0: Tensor) -> Tensor:
        """Map (B, N) to (B, N); after L layers the polynomial degree in x_0 is up to L + 1."""
        x = x_0
        for layer in self.layers:
            x = x + x_0 * layer(x)
        return x


class FullRankCross(Cross):
    """layer_l(x) = W_l x + b_l, with W_l (N, N)."""

    def __init__(self, width: int, num_layers: int) -> None:
        super().__init__([nn.Linear(width, width) for _ in range(num_layers)])


class LowRankMixtureCross(Cross):
    """layer_l is a mixture of low-rank experts (Appendix A; DCNv2, Eq. 4): see LowRankMixture."""

    def __init__(self, width: int, num_layers: int, num_experts: int, low_rank: int) -> None:
        super().__init__([LowRankMixture(width, num_experts, low_rank) for _ in range(num_layers)])


class LowRankMixture(nn.Module):
    """sum_e g_e(x) U_e tanh(C_e tanh(V_e^T x)) + b, with g(x) = softmax(G x).

    The gates sum to 1, so one bias outside the sum is the same as a common bias inside every expert.

    Args:
        width: N.
        num_experts: E.
        low_rank: r.
    """

    def __init__(self, width: int, num_experts: int, low_rank: int) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.empty(num_experts, low_rank, width))  # V_e^T
        self.c = nn.Parameter(torch.empty(num_experts, low_rank, low_rank))
        self.u = nn.Parameter(torch.empty(num_experts, width, low_rank))
        self.gate = nn.Parameter(torch.empty(num_experts, width))
        self.bias = nn.Parameter(torch.zeros(width))
        for matrix in (
            *self.v.detach(),
            *self.c.detach(),
            *self.u.detach(),
            self.gate.detach(),
        ):  # each expert by its own fan-in and fan-out
            nn.init.xavier_uniform_(matrix)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N) to (B, N)."""
        num_experts, low_rank, _ = self.v.shape
        # One wide product for all experts and the gate instead of E + 1 thin ones; another one on the way back.
        projected = F.linear(x, torch.cat([self.v.flatten(0, 1), self.gate]))  # (B, E r + E)
        low, scores = projected.split([num_experts * low_rank, num_experts], dim=1)
        low = torch.tanh(low).unflatten(1, (num_experts, low_rank))  # (B, E, r)
        low = torch.tanh(torch.einsum("bes,ers->ber", low, self.c))
        gated = low * torch.softmax(scores, dim=1).unsqueeze(2)
        return F.linear(gated.flatten(1), self.u.transpose(0, 1).flatten(1), self.bias)
