"""The layers that branches are made of.

Shapes: B batch, N flattened width of all fields, F fields, n_f width of field f, G groups, n_g width of group g, E experts,
r low rank, k width of an FM vector. Activations are float32 (bfloat16 inside matrix products under autocast); parameters are float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.schema.bounds import Bounded, bounded
from mbcnet_rec.model.input_layout import ALL, InputLayout


@dataclass(frozen=True, kw_only=True)  # so that the inheriting config's own keys come first
class Regularisation(Bounded):
    """What every dense layer has besides its ReLU. The configs of networks inherit these two keys.

    Attributes:
        batch_norm: in every dense layer. Padding rows of a last, partial batch enter its statistics, and
            those of a shared top are taken over all branches together.
        dropout: in every dense layer, a probability.
    """

    batch_norm: bool = False
    dropout: float = bounded(0.0, at_least=0, below=1, wanted="a probability in [0, 1)")


PLAIN = Regularisation()


class MLP(nn.Sequential):
    """h_{l+1} = dropout(ReLU(norm(W_l h_l + b_l))): ReLU after every layer, the last one included.

    Args:
        in_features: width of the input.
        hidden: width of each layer; none is the identity.
        regularisation: batch norm before each ReLU, dropout after it.
    """

    def __init__(self, in_features: int, hidden: Sequence[int], regularisation: Regularisation = PLAIN) -> None:
        layers: list[nn.Module] = []
        for out_features in hidden:
            layers.append(nn.Linear(in_features, out_features))
            if regularisation.batch_norm:
                layers.append(nn.BatchNorm1d(out_features))
            layers.append(nn.ReLU(inplace=True))  # its own output is all that its gradient needs
            if regularisation.dropout > 0:
                layers.append(nn.Dropout(regularisation.dropout))
            in_features = out_features
        super().__init__(*layers)


class GroupedMLP(nn.Module):
    """G MLPs of the same hidden widths on inputs of different widths (Eq. 3)."""

    def __init__(self, in_features: Sequence[int], hidden: Sequence[int], regularisation: Regularisation) -> None:
        super().__init__()
        self.mlps = nn.ModuleList(MLP(width, hidden, regularisation) for width in in_features)

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Map G tensors (B, n_g) to G tensors (B, hidden[-1])."""
        return [mlp(features) for mlp, features in zip(self.mlps, inputs, strict=True)]


@dataclass(frozen=True)
class CrossConfig(Bounded):
    """The cross network.

    Attributes:
        kind: low_rank_mixture (the paper's CrossNetV2) or full_rank (what FuxiCTR and BARS call by that
            name).
        num_layers: cross layers; L layers reach degree L + 1.
        num_experts, low_rank: of low_rank_mixture.
    """

    kind: Literal["low_rank_mixture", "full_rank"] = "low_rank_mixture"
    num_layers: int = bounded(2, at_least=1)
    num_experts: int = bounded(2, at_least=1)
    low_rank: int = bounded(16, at_least=1)


class Cross(nn.Module):
    """The cross network of DCNv2: x_{l+1} = x_l + x_0 * layer_l(x_l), with * element by element.

    layer_l is a mixture of low-rank experts (Appendix A; DCNv2, Eq. 4: see LowRankMixture), or W_l x + b_l of full rank.
    """

    def __init__(self, config: CrossConfig, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(config.num_layers):
            if config.kind == "low_rank_mixture":
                layers.append(LowRankMixture(width, config.num_experts, config.low_rank))
            else:
                layers.append(nn.Linear(width, width))
        self.layers = nn.ModuleList(layers)

    def forward(self, x_0: Tensor) -> Tensor:
        """Map (B, N) to (B, N); after L layers the polynomial degree in x_0 is up to L + 1."""
        x = x_0
        for layer in self.layers:
            x = (x_0 * layer(x)).add_(x)  # the gradient of torch.addcmul takes two passes more
        return x


class LowRankMixture(nn.Module):
    """sum_e g_e(x) U_e tanh(C_e tanh(V_e^T x)) + b, with g(x) = softmax(G x), of E experts of rank r on N columns.

    The gates sum to 1, so one bias outside the sum is the same as a common bias inside every expert.
    """

    def __init__(self, width: int, num_experts: int, low_rank: int) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.empty(num_experts, low_rank, width))  # V_e^T
        self.c = nn.Parameter(torch.empty(num_experts, low_rank, low_rank))
        self.u = nn.Parameter(torch.empty(num_experts, width, low_rank))
        self.gate = nn.Parameter(torch.empty(num_experts, width))
        self.bias = nn.Parameter(torch.zeros(width))
        # each expert by its own fan-in and fan-out
        for matrix in (*self.v.detach(), *self.c.detach(), *self.u.detach(), self.gate.detach()):
            nn.init.xavier_uniform_(matrix)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N) to (B, N)."""
        num_experts, low_rank, _ = self.v.shape
        # One wide product for all experts and the gate instead of E + 1 thin ones; another one on the way back.
        projected = self.product(x, torch.cat([self.v.flatten(0, 1), self.gate]))  # (B, E r + E)
        low, scores = projected.split([num_experts * low_rank, num_experts], dim=1)
        low = torch.tanh(low).unflatten(1, (num_experts, low_rank))  # (B, E, r)
        gated = torch.tanh(self.expert_products(low)) * torch.softmax(scores, dim=1).unsqueeze(2)
        return self.product(gated.flatten(1), self.u.transpose(0, 1).flatten(1), self.bias)

    # mbcnet_rec/cpu has other ways to the numbers of these two

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """W x + b: (B, n), (m, n), (m,) -> (B, m)."""
        return F.linear(x, weight, bias)

    def expert_products(self, low: Tensor) -> Tensor:
        """C_e x_e of each expert: (B, E, r) -> (B, E, r)."""
        return torch.einsum("bes,ers->ber", low, self.c)


class FieldVectors(nn.Module):
    """(B, N) -> (B, F, k): one vector of the same width for every field, for a factorisation machine.

    A sparse field whose table is k wide enters as it is, so fields of equal width give the plain FM. The
    others, and all dense fields, enter through a matrix of their own: v_f = e_f P_f with P_f (n_f, k). For a
    number x that is x * v with a learned v (Rendle, 2010).

    Args:
        layout: gives the fields.
        dim: k; 0: the most common width of the sparse fields.
    """

    def __init__(self, layout: InputLayout, dim: int = 0) -> None:
        super().__init__()
        self.dim = dim or layout.common_width()
        alike: dict[tuple[int, bool], list[int]] = {}  # (width, whether sparse) -> first columns
        for key in layout.keys(ALL):
            start, width = layout.columns(key)
            alike.setdefault((width, key in layout.embedding_dims), []).append(start)
        self.projections = nn.ParameterDict()
        self._num_kinds = len(alike)
        for kind, ((width, sparse), starts) in enumerate(alike.items()):
            columns = torch.tensor(starts).unsqueeze(1) + torch.arange(width)  # (F_kind, width)
            self.register_buffer(f"columns_{kind}", columns, persistent=False)
            if not sparse or width != self.dim:
                # A projection keeps the length of an embedding; the vector of a number starts as small as one.
                std = width**-0.5 if sparse else 0.01
                matrices = torch.randn(len(starts), width, self.dim) * std
                self.projections[str(kind)] = nn.Parameter(matrices)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N) to (B, F, k); fields of one kind and width stand together."""
        vectors = []
        for kind in range(self._num_kinds):
            columns = self.get_buffer(f"columns_{kind}")
            fields = x.index_select(1, columns.flatten()).unflatten(1, columns.shape)  # (B, F_kind, width)
            if str(kind) in self.projections:
                fields = torch.einsum("bfn,fnk->bfk", fields, self.projections[str(kind)])
            vectors.append(fields)
        return torch.cat(vectors, dim=1)


def bi_interaction(vectors: Tensor) -> Tensor:
    """sum_{f < g} v_f * v_g, element by element, in O(F k): ((sum_f v_f)^2 - sum_f v_f^2) / 2. (B, F, k) -> (B, k)."""
    return 0.5 * (vectors.sum(1).square() - vectors.square().sum(1))
