"""The cross network on a CPU that trains: fewer passes over its (B, N) numbers than autograd makes."""

from typing import Any

import torch
from torch import Tensor, nn

from mbcnet_rec.cpu.layers import ONE_DNN_FROM, linear, one_dnn, product, weight_gradient
from mbcnet_rec.model.layers import Cross, LowRankMixture

MANY = 2**19  # numbers of (B, N): with fewer, Python's share is larger than what a pass costs


class FastLowRankMixture(LowRankMixture):
    """LowRankMixture, from some rank on a product for each expert: twice as fast there."""

    def expert_products(self, low: Tensor) -> Tensor:
        """C_e x_e of each expert: (B, E, r) -> (B, E, r)."""
        if self.c[0].numel() < ONE_DNN_FROM:
            return super().expert_products(low)
        pairs = zip(low.unbind(1), self.c.unbind(0), strict=True)
        return torch.stack([linear(each, matrix) for each, matrix in pairs], dim=1)


class FastCross(Cross):
    """Cross with a gradient written by hand: sums of gradients are taken in place, and a layer's bias is added to its product in place."""

    def forward(self, x_0: Tensor) -> Tensor:
        """Map (B, N) to (B, N)."""
        trains = torch.is_grad_enabled() and not torch.compiler.is_compiling() and x_0.device.type == "cpu"
        if not trains or torch.is_autocast_enabled("cpu") or x_0.numel() < MANY:
            return super().forward(x_0)
        weights: list[Tensor | None] = []
        for layer in self.layers:
            if isinstance(layer, LowRankMixture):
                weights += [layer.first(), layer.c, layer.u.transpose(0, 1).flatten(1), layer.bias]
            else:
                weights += [None, None, layer.weight, layer.bias]  # pyright: ignore[reportArgumentType]
        return _CrossNetwork.apply(list(self.layers), x_0.contiguous(), *weights)


class _CrossNetwork(torch.autograd.Function):
    """x_{l+1} = x_l + x_0 * (W gated(D x_l) + b) for each layer; of full rank: x_l + x_0 * (W x_l + b)."""

    @staticmethod
    def forward(ctx: Any, layers: list[nn.Module], x_0: Tensor, *weights: Any) -> Tensor:
        x, kept, ctx.layers, ctx.graphs = x_0, [], layers, []
        for place, layer in enumerate(layers):
            first, _, last, bias = weights[4 * place : 4 * place + 4]
            inner, graph = x, None
            if first is not None:
                projected = product(x, first).requires_grad_()
                with torch.enable_grad():  # what is narrow is autograd's
                    graph = (projected, layer.gated(projected))  # type: ignore[operator]
                inner = graph[1].detach()
            y = product(inner, last).add_(bias)
            kept += [x, inner, y]
            ctx.graphs.append(graph)
            x = torch.addcmul(x, x_0, y)
        ctx.save_for_backward(x_0, *weights, *kept)
        return x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_0, *saved = ctx.saved_tensors
        layers = len(ctx.layers)
        weights, kept = saved[: 4 * layers], saved[4 * layers :]
        found: list[Tensor | None] = []
        of_x, of_x_0 = gradient, None
        of_y = torch.empty_like(x_0)  # one for all layers: memory in use is written faster than fresh
        for place in reversed(range(layers)):
            first, c, last, _ = weights[4 * place : 4 * place + 4]
            x, inner, y = kept[3 * place : 3 * place + 3]
            of_x_0 = of_x * y if of_x_0 is None else of_x_0.addcmul_(of_x, y)
            torch.mul(of_x, x_0, out=of_y)
            of_last, of_bias = weight_gradient(of_y, inner, last), of_y.sum(0)
            of_first = of_c = None
            of_product, weight = of_y, last
            if first is not None:
                of_inner = product(of_y, last.t())
                of_product, of_c = torch.autograd.grad(ctx.graphs[place][1], (ctx.graphs[place][0], c), of_inner)
                of_first, weight = weight_gradient(of_product, x, first), first
            if one_dnn(of_product, weight):
                of_x = of_x + product(of_product, weight.t())
            else:
                of_x = torch.addmm(of_x, of_product, weight, out=None if of_x is gradient else of_x)
            found[:0] = [of_first, of_c, of_last, of_bias]
        assert of_x_0 is not None
        return (None, of_x_0.add_(of_x), *found)
