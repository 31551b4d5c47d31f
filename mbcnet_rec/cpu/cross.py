"""The cross network on a CPU that trains: fewer passes over its (B, N) numbers than autograd makes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mbcnet_rec.cpu.layers import ONE_DNN_FROM, linear, one_dnn, product, weight_gradient
from mbcnet_rec.model.layers import Cross, LowRankMixture

MANY = 2**19  # numbers of (B, N): with fewer, Python's share is larger than what a pass costs
# Columns of a last matrix. Of a narrower one the bias is one more column: a copy of it is less than a pass over (B, N). MKL computes its
# gradient a quarter faster transposed, and to turn it back is a small copy.
NARROW = 128


class FastLowRankMixture(LowRankMixture):
    """LowRankMixture, from some rank on a product for each expert: twice as fast there."""

    def expert_products(self, low: Tensor) -> Tensor:
        """C_e x_e of each expert: (B, E, r) -> (B, E, r)."""
        if self.c[0].numel() < ONE_DNN_FROM:
            return super().expert_products(low)
        pairs = zip(low.unbind(1), self.c.unbind(0), strict=True)
        return torch.stack([linear(each, matrix) for each, matrix in pairs], dim=1)


class FastCross(Cross):
    """Cross with a gradient written by hand: what is element by element takes fewer passes, forward and back."""

    def forward(self, x_0: Tensor) -> Tensor:
        """Map (B, N) to (B, N)."""
        if (
            x_0.numel() < MANY
            or not torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or x_0.device.type != "cpu"
            or x_0.dtype not in (torch.float32, torch.float64)
            or torch.is_autocast_enabled("cpu")
            or not all(each.requires_grad for each in self.parameters())
        ):
            return super().forward(x_0)
        weights: list[Tensor | None] = []
        for layer in self.layers:
            if isinstance(layer, LowRankMixture):
                alone = len(layer.v) == 1  # its gate is 1, takes no part and learns nothing
                first, gate = (layer.v.flatten(0, 1), layer.gate) if alone else (layer.first(), None)
                weights += [first, layer.c, layer.u.transpose(0, 1).flatten(1), layer.bias, gate]
            else:
                weights += [None, None, layer.weight, layer.bias, None]  # type: ignore[list-item]
        return _CrossNetwork.apply(list(self.layers), x_0.contiguous(), *weights)  # type: ignore[no-any-return]


class _CrossNetwork(torch.autograd.Function):
    """x_{l+1} = x_l + x_0 * y_l, y_l = W_l gated(D_l x_l) + b_l; of full rank: W_l x_l + b_l. Of the first layer x_1 = x_0 * (y_0 + 1).

    1 is added to the bias there, and the bias may be one more column of W, so that neither takes a pass of its own. Of the weights of a layer,
    (D, C, W, b, gate), the gate is there if it has one expert.
    """

    @staticmethod
    def forward(ctx: Any, layers: list[nn.Module], x_0: Tensor, *weights: Any) -> Tensor:
        x, kept, ctx.layers, ctx.graphs = x_0, [], layers, []
        for place, (layer, (first, c, last, bias, gate)) in enumerate(zip(layers, batched(weights), strict=True)):
            inner, low, graph, bias = x, None, None, bias if place else bias + 1
            if first is not None:
                projected = product(x, first)
                if gate is None:
                    with torch.enable_grad():  # what is narrow is autograd's
                        graph = (projected.requires_grad_(), layer.gated(projected))  # type: ignore[operator]
                    inner = graph[1].detach()
                else:
                    low, inner = one_expert(projected, c[0])
            if narrow(first, last):
                inner = torch.cat([inner, x.new_ones(len(x), 1)], dim=1)
                y = product(inner, torch.cat([last, bias.unsqueeze(1)], dim=1))
            else:
                y = product(inner, last).add_(bias)
            kept += [x, inner, y, low]
            ctx.graphs.append(graph)
            x = torch.addcmul(x, x_0, y) if place else x_0 * y
        ctx.save_for_backward(x_0, *weights, *kept)
        return x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_0, *saved = ctx.saved_tensors
        count = len(ctx.layers)
        weights, kept = batched(saved[: 5 * count]), batched(saved[5 * count :], 4)
        found: list[Any] = []
        of_x, of_x_0 = gradient, None
        for place in reversed(range(count)):
            (first, c, last, _, gate), (x, inner, y, low) = weights[place], kept[place]
            of_x_0 = of_x * y if of_x_0 is None else of_x_0.addcmul_(of_x, y)
            torch.mul(of_x, x_0, out=y)  # to y, in its place: a second backward pass is an error
            if narrow(first, last):
                of_both = weight_gradient(y, inner, last) if one_dnn(y, last) else inner.t().mm(y).t()
                of_last, of_bias = of_both[:, :-1], of_both[:, -1]
            else:
                of_last, of_bias = weight_gradient(y, inner, last), y.t().mv(y.new_ones(len(y)))
            if first is None:
                of_product, weight, of_first, of_c = y, last, None, None
            else:
                of_inner = product(y, last.t())
                if gate is None:
                    of_product, of_c = torch.autograd.grad(ctx.graphs[place][1], (ctx.graphs[place][0], c), of_inner)
                else:
                    of_product, of_c = one_expert_gradient(of_inner, low, inner[:, : last.shape[1]], c[0])
                of_first, weight = weight_gradient(of_product, x, first), first
            if place == 0:
                of_x = of_x_0  # x_1 = x_0 * (y_0 + 1): all that comes down is in it
            elif of_x is gradient:
                # y was read for the last time, unless the next product reads it
                of_x = gradient.clone() if of_product is y else y.copy_(gradient)
            if one_dnn(of_product, weight):
                of_x += product(of_product, weight.t())
            else:
                of_x.addmm_(of_product, weight)
            found[:0] = [of_first, of_c, of_last, of_bias, None if gate is None else torch.zeros_like(gate)]
        return (None, of_x, *found)


def narrow(first: Tensor | None, last: Tensor) -> bool:
    """Whether the bias of a layer is one more column of its last matrix."""
    return first is not None and last.shape[1] < NARROW


def one_expert(projected: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """tanh(x), in the place of x, and tanh(C tanh(x)): (B, r), (r, r) -> (B, r), (B, r)."""
    return projected.tanh_(), product(projected, c).tanh_()


def one_expert_gradient(gradient: Tensor, low: Tensor, output: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients to x, (B, r), and to C, (1, r, r), from that to the last of what `one_expert` gives, which is written over."""
    tanh_gradient = torch.ops.aten.tanh_backward
    tanh_gradient(gradient, output, grad_input=gradient)
    of_low = product(gradient, c.t())
    return tanh_gradient(of_low, low, grad_input=of_low), weight_gradient(gradient, low, c).unsqueeze(0)


def batched(each: Sequence[Any], size: int = 5) -> list[Sequence[Any]]:
    """What a layer has, layer by layer."""
    return [each[start : start + size] for start in range(0, len(each), size)]
