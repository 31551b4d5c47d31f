"""Dense layers on an Intel CPU that trains: what is not a product in them makes half as many passes over memory."""

from typing import Any

import torch
from torch import Tensor, nn

from mbcnet_rec.cpu import layers
from mbcnet_rec.model.layers import MLP

MANY = 2**19  # numbers of the widest layer's output; with fewer there is little to save
# Columns between the rows of a hidden layer whose width is a multiple of 512. Rows that start a multiple of 4 KiB apart share
# their places in the cache: the narrow products of EFGC's groups take a twentieth longer.
APART, CLASHING = 16, 512


class FastMLP(MLP):
    """MLP, whose gradient is written by hand where it has nothing but dense layers and ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_features) to (B, hidden[-1])."""
        dense = [layer for layer in self if isinstance(layer, nn.Linear)]
        relus = sum(isinstance(layer, nn.ReLU) for layer in self)
        if (
            not layers.INTEL  # elsewhere oneDNN's products are faster, which write no rows that lie apart
            or not dense
            or len(dense) + relus < len(self)
            or not torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or x.device.type != "cpu"
            or torch.is_autocast_enabled("cpu")
            or x.ndim != 2
            or len(x) * max(layer.out_features for layer in dense) < MANY
        ):
            return super().forward(x)
        parameters = [each for layer in dense for each in (layer.weight, layer.bias)]
        return _DenseLayers.apply(relus, x, *parameters)  # type: ignore[no-any-return]


class _DenseLayers(torch.autograd.Function):
    """h_{l+1} = ReLU(W_l h_l + b_l), for the first `relus` of the layers; W_l h_l + b_l for a last one.

    The bias is added and ReLU taken in one pass. The gradients to hidden layers are nobody else's, so ReLU's gradient works in place.
    """

    @staticmethod
    def forward(ctx: Any, relus: int, x: Tensor, *parameters: Tensor) -> Tensor:
        weights, biases = parameters[::2], parameters[1::2]
        hidden = [x]
        for place, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            last = place == len(weights) - 1
            y = x.new_empty(len(x), len(weight)) if last else _rows(x, len(weight))
            torch.mm(hidden[-1], weight.t(), out=y)
            hidden.append(torch._add_relu(y, bias, out=y) if place < relus else y.add_(bias))
        ctx.relus = relus
        ctx.save_for_backward(*hidden, *weights)
        return hidden[-1]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        layers = len(ctx.saved_tensors) // 2
        hidden, weights = ctx.saved_tensors[: layers + 1], ctx.saved_tensors[layers + 1 :]
        found: list[Tensor] = []
        own: Tensor | None = None  # the gradient, once it is nobody else's
        for place in reversed(range(layers)):
            if place < ctx.relus:
                output = torch.empty_like(gradient) if own is None else own
                gradient = torch.ops.aten.threshold_backward(gradient, hidden[place + 1], 0, grad_input=output)
            found[:0] = [gradient.t().mm(hidden[place]), gradient.sum(0)]
            if place or ctx.needs_input_grad[1]:
                weight = weights[place]
                columns = weight.shape[1]
                own = _rows(gradient, columns) if place else gradient.new_empty(len(gradient), columns)
                gradient = torch.mm(gradient, weight, out=own)
        return (None, gradient if ctx.needs_input_grad[1] else None, *found)


def _rows(like: Tensor, columns: int) -> Tensor:
    """An empty (B, columns), its rows apart where they would share places in the cache."""
    return like.new_empty(len(like), columns + APART * (columns % CLASHING == 0))[:, :columns]
