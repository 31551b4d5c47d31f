"""The layers that branches are made of.

Shapes: B batch, N flattened width of all fields, G groups, n_g width of group g, E experts,
r low rank. Activations are float32 (bfloat16 inside matrix products under autocast); parameters are float32.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.schema.bounds import Bounded, bounded
from mbcnet_rec.model.side_by_side import grouped_product


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
    """h_{l+1} = dropout(ReLU(norm(W_l h_l + b_l))): ReLU after every layer, the last one included unless `last_relu` is False.

    Args:
        in_features: width of the input.
        hidden: width of each layer; none is the identity.
        regularisation: batch norm before each ReLU, dropout after it.
        last_relu: whether the last layer has its ReLU.
    """

    def __init__(
        self, in_features: int, hidden: Sequence[int], regularisation: Regularisation = PLAIN, *, last_relu: bool = True
    ) -> None:
        layers: list[nn.Module] = []
        for place, out_features in enumerate(hidden):
            layers.append(nn.Linear(in_features, out_features))
            if regularisation.batch_norm:
                layers.append(nn.BatchNorm1d(out_features))
            if last_relu or place < len(hidden) - 1:
                layers.append(nn.ReLU(inplace=True))  # its own output is all that its gradient needs
            if regularisation.dropout > 0:
                layers.append(nn.Dropout(regularisation.dropout))
            in_features = out_features
        super().__init__(*layers)


class Logit(nn.Linear):
    """w h + b in float32 also under autocast: (..., n) -> (...), or (..., T) of T tasks. bfloat16 would leave a thousand distinct scores."""

    def __init__(self, in_features: int, num_tasks: int = 1, *, bias: bool = True) -> None:
        super().__init__(in_features, num_tasks, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., n) to the logits."""
        with without_autocast(input.device.type):
            return super().forward(input.to(self.weight.dtype)).squeeze(-1)


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Full precision: entering autocast to switch it off, where it is off, is a hundredth of a small step."""
    if device_type != "meta" and torch.is_autocast_enabled(device_type):  # meta tensors have none
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


class GroupedMLP(nn.Module):
    """G MLPs of the same hidden widths on inputs of different widths (Eq. 3).

    On a GPU those on inputs of equal widths are one grouped product a layer, unless they have batch norm.
    """

    def __init__(self, in_features: Sequence[int], hidden: Sequence[int], regularisation: Regularisation) -> None:
        super().__init__()
        self.mlps = nn.ModuleList(MLP(width, hidden, regularisation) for width in in_features)
        alike: dict[tuple[int, int], list[int]] = {}
        for place, width in enumerate(in_features):
            alike.setdefault((width, place * regularisation.batch_norm), []).append(place)
        self._alike = list(alike.values())  # places of MLPs that are computed together

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Map G tensors (B, n_g) to G tensors (B, hidden[-1])."""
        if inputs[0].device.type != "cuda":  # on a CPU torch rounds a grouped product otherwise
            return [mlp(features) for mlp, features in zip(self.mlps, inputs, strict=True)]
        outputs: dict[int, Tensor] = {}
        for places in self._alike:
            grouped = grouped_product([self.mlps[place] for place in places], [inputs[place] for place in places])
            outputs |= zip(places, grouped, strict=True)
        return [outputs[place] for place in range(len(inputs))]


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
        return F.linear(self.gated(F.linear(x, self.first())), self.u.transpose(0, 1).flatten(1), self.bias)

    # mbcnet_rec/cpu has other ways to these products

    def first(self) -> Tensor:
        """V and G, (E r + E, N): one wide product for all experts and the gate instead of E + 1 thin ones; another one on the way back."""
        return torch.cat([self.v.flatten(0, 1), self.gate])

    def gated(self, projected: Tensor) -> Tensor:
        """g_e tanh(C_e tanh(.)) of each expert, g = 1 of one alone: (B, E r + E) -> (B, E r)."""
        num_experts, low_rank, _ = self.v.shape
        low, scores = projected.tensor_split([num_experts * low_rank], dim=1)
        low = torch.tanh(self.expert_products(torch.tanh(low).unflatten(1, (num_experts, low_rank))))  # (B, E, r)
        return (low * torch.softmax(scores, dim=1).unsqueeze(2) if num_experts > 1 else low).flatten(1)

    def expert_products(self, low: Tensor) -> Tensor:
        """C_e x_e of each expert: (B, E, r) -> (B, E, r)."""
        return torch.einsum("bes,ers->ber", low, self.c)
