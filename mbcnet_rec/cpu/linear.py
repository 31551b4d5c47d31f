"""Products of linear layers, by whichever of the CPU's two libraries is faster at them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ONE_DNN_FROM = 2**16  # weights of a matrix; a call of oneDNN costs tens of microseconds before it multiplies


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Map x to W x + b: F.linear, with float32 products by oneDNN where a step trains on a CPU.

    MKL, which torch takes for float32, is not at its best on every CPU: on an AMD EPYC (Zen 4) its products of the
    paper's widest layer run at 112 to 145 GFLOP/s, oneDNN's at 178 to 188, and a step of the whole model is a tenth shorter.
    Half precision goes to oneDNN anyway. Evaluation and export keep F.linear. (B, n), (m, n), (m,) -> (B, m).
    """
    if (
        weight.numel() >= ONE_DNN_FROM
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and torch.backends.mkldnn.is_available()
    ):
        return _OneDNNLinear.apply(x, weight, bias)  # type: ignore[no-any-return]
    return F.linear(x, weight, bias)


class _OneDNNLinear(torch.autograd.Function):
    """The three products of a linear layer by oneDNN, which reads transposed matrices without a copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = x.contiguous()  # columns of a wider tensor would send oneDNN to its reference kernel
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        return (
            _product(gradient, weight.t()) if ctx.needs_input_grad[0] else None,
            _weight_gradient(gradient, x) if ctx.needs_input_grad[1] else None,
            gradient.sum(0) if ctx.has_bias else None,
        )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _weight_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """(B, m), (B, n) -> (m, n). Without AVX-512 oneDNN is slow where the sum is over rows, and MKL only where rows of n are not aligned."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" and x.shape[1] % 8 == 0:
        return gradient.t().mm(x)
    return _product(gradient.t(), x.t())


def bf16_in_hardware() -> bool:
    """Whether oneDNN has bf16 products for this CPU: AVX-512, AMX or their like. Without, a DNN trained at a seventh of float32's speed."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
