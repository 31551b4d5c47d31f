"""Dense layers on an Intel CPU that trains: fewer passes over memory, and no gradient to the columns of dense fields, which are data."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mbcnet_rec.cpu import layers
from mbcnet_rec.model.layers import MLP
from mbcnet_rec.model.sparse_arch import FeatureRegroup

MANY = 2**19  # numbers of the widest layer's output; with fewer there is little to save
# Columns between the rows of a hidden layer whose width is a multiple of 512. Rows that start a multiple of 4 KiB apart share
# their places in the cache: the narrow products of EFGC's groups take a twentieth longer.
APART, CLASHING = 16, 512
LEARNED = "learned_columns"  # attribute of a tensor: how many of its first columns want a gradient


class FastRegroup(FeatureRegroup):
    """FeatureRegroup, which says of each group how many columns come before those of dense fields: those are data, without a gradient."""

    def forward(self, keyed_tensors: Sequence[Any], dense_features: Tensor) -> dict[str, Tensor]:
        """Regroup as FeatureRegroup does."""
        groups = super().forward(keyed_tensors, dense_features)
        for name, slices in self.dense_slices.items() if not self.projections else ():
            if slices and not dense_features.requires_grad:
                setattr(groups[name], LEARNED, groups[name].shape[1] - sum([width for _, width in slices]))
        return groups


class FastMLP(MLP):
    """MLP, whose gradient is written by hand where it has nothing but dense layers and ReLU.

    Attributes:
        least_rows: with fewer in a batch it is torch's; see `note_size`.
    """

    least_rows: float

    def note_size(self) -> None:
        """Say what batches are large enough, so that a small one costs one comparison."""
        dense = [layer for layer in self if isinstance(layer, nn.Linear)]
        # elsewhere than on Intel's CPUs oneDNN's products are faster, which write no rows that lie apart
        plain = layers.INTEL and dense and all(isinstance(layer, nn.Linear | nn.ReLU) for layer in self)
        self.least_rows = MANY / max(layer.out_features for layer in dense) if plain else math.inf

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_features) to (B, hidden[-1])."""
        if (
            len(x) < self.least_rows
            or not torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or x.device.type != "cpu"
            or torch.is_autocast_enabled("cpu")
            or x.ndim != 2
        ):
            return super().forward(x)
        dense = [layer for layer in self if isinstance(layer, nn.Linear)]
        parameters = [each for layer in dense for each in (layer.weight, layer.bias)]
        return _DenseLayers.apply(len(self) - len(dense), getattr(x, LEARNED, x.shape[1]), x, *parameters)  # type: ignore[no-any-return]


class _DenseLayers(torch.autograd.Function):
    """h_{l+1} = ReLU(W_l h_l + b_l), for the first `relus` of the layers; W_l h_l + b_l for a last one.

    The bias is added and ReLU taken in one pass. The gradients to hidden layers are nobody else's, so ReLU's gradient works in place.
    The gradient to x is that to its first `learned` columns, then 0.
    """

    @staticmethod
    def forward(ctx: Any, relus: int, learned: int, x: Tensor, *parameters: Tensor) -> Tensor:
        weights, biases = parameters[::2], parameters[1::2]
        hidden = [x]
        for place, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            last = place == len(weights) - 1
            y = x.new_empty(len(x), len(weight)) if last else _rows(x, len(weight))
            torch.mm(hidden[-1], weight.t(), out=y)
            hidden.append(torch._add_relu(y, bias, out=y) if place < relus else y.add_(bias))
        ctx.relus, ctx.learned = relus, learned
        ctx.save_for_backward(*hidden, *weights)
        return hidden[-1]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        layers = len(ctx.saved_tensors) // 2
        hidden, weights = ctx.saved_tensors[: layers + 1], ctx.saved_tensors[layers + 1 :]
        found: list[Tensor] = []
        own: Tensor | None = None  # the gradient, once it is nobody else's
        ones = gradient.new_ones(len(gradient))  # a product with it is a tenth to a quarter faster than a sum over rows
        for place in reversed(range(layers)):
            if place < ctx.relus:
                output = torch.empty_like(gradient) if own is None else own
                gradient = torch.ops.aten.threshold_backward(gradient, hidden[place + 1], 0, grad_input=output)
            found[:0] = [gradient.t().mm(hidden[place]), gradient.t().mv(ones)]
            if place:
                own = _rows(gradient, weights[place].shape[1])
                gradient = torch.mm(gradient, weights[place], out=own)
        of_x = None
        if ctx.needs_input_grad[2]:
            of_x = torch.empty_like(hidden[0])
            torch.mm(gradient, weights[0][:, : ctx.learned], out=of_x[:, : ctx.learned])
            of_x[:, ctx.learned :] = 0
        return (None, None, of_x, *found)


def _rows(like: Tensor, columns: int) -> Tensor:
    """An empty (B, columns), its rows apart where they would share places in the cache."""
    return like.new_empty(len(like), columns + APART * (columns % CLASHING == 0))[:, :columns]
