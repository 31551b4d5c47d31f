"""The layers of a model, computed in ways that a CPU is faster at: products by `linear`, dropout by `cheap_dropout`."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from numpy import float32, uint64
from torch import Tensor, nn

from data.compiled import compiled

ONE_DNN_FROM = 2**16  # weights of a matrix; a call of oneDNN costs tens of microseconds before it multiplies
_CPUS = Path("/proc/cpuinfo")
# by name: measured rates would not choose the same in every run
INTEL = _CPUS.exists() and "GenuineIntel" in _CPUS.read_text(encoding="utf-8")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Map x to W x + b: F.linear, with products by oneDNN where `one_dnn` says so and a step trains.

    Half precision goes to oneDNN anyway. Evaluation and export keep F.linear. (B, n), (m, n), (m,) -> (B, m).
    """
    if torch.is_grad_enabled() and one_dnn(x, weight):
        return _OneDNNLinear.apply(x, weight, bias)  # type: ignore[no-any-return]
    return F.linear(x, weight, bias)


def one_dnn(x: Tensor, weight: Tensor) -> bool:
    """Whether the products of a layer are oneDNN's: of float32, from a size on, on a CPU that is not Intel's.

    MKL, which torch takes for float32, is at its best on its maker's CPUs only: on an AMD EPYC (Zen 4) its products of the
    paper's widest layer run at 112 to 145 GFLOP/s, oneDNN's at 178 to 188, and a step of the whole model is a tenth shorter. On an Intel
    Xeon (Emerald Rapids) MKL's run at 158 to 161, oneDNN's at 149, 110 and 127 forward, to the input and to the weights.
    """
    return (
        weight.numel() >= ONE_DNN_FROM
        and not INTEL
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and torch.backends.mkldnn.is_available()
    )


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


def product(x: Tensor, weight: Tensor) -> Tensor:
    """(B, n), (m, n) -> (B, m), outside autograd."""
    return _product(x, weight) if one_dnn(x, weight) else x.mm(weight.t())


def weight_gradient(gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The gradient of `product` to its weight: (B, m), (B, n), (m, n) -> (m, n)."""
    return _weight_gradient(gradient, x) if one_dnn(x, weight) else gradient.t().mm(x)


def bf16_in_hardware() -> bool:
    """Whether bf16 products pay on this CPU: AVX-512 on AMD's, AMX on Intel's. Without, a DNN trained at a seventh of float32's speed.

    On an Intel Xeon without AMX (a virtual machine may hide it) bf16's products ran at 75 to 80 GFLOP/s, float32's at 160.
    """
    amx = not INTEL or torch.cpu._is_amx_tile_supported()
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported() and amx


class Linear(nn.Linear):
    """y = W x + b by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_features) to (B, out_features)."""
        return linear(x, self.weight, self.bias)


class Dropout(nn.Dropout):
    """y = x m / (1 - p), each m 1 with probability 1 - p, else 0; the identity outside training. By `cheap_dropout`."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (...) to (...)."""
        if self.training and x.device.type == "cpu" and not torch.compiler.is_compiling():
            return cheap_dropout(x, self.p)
        return super().forward(x)


def cheap_dropout(x: Tensor, p: float) -> Tensor:
    """Apply dropout to x, (...) of any floating dtype, with p in [0, 1), on a CPU.

    torch draws two random numbers for each element, one element at a time, which takes 12 ms for 4,096 x 400. Here its generator gives one
    seed, from which `draw_mask` hashes the mask: 1 ms. p is rounded to a multiple of 2^-16, and the scale is that of the rounded p, so the
    mean is exact.
    """
    dropped = min(round(p * 2**16), 2**16 - 1)  # of the 2^16 values
    seed = int(torch.empty((), dtype=torch.int64).random_(-(2**63), None))
    mask = torch.empty((x.numel() + 3) // 4 * 4)
    draw_mask(seed, dropped, 2**16 / (2**16 - dropped), mask.numpy())
    return x * mask[: x.numel()].view(x.shape).to(x.dtype)


@compiled
def draw_mask(seed: int, dropped: int, scale: float, out: Any) -> None:
    """Set each element of `out`, (4 n,) float32, to 0 with probability dropped / 2^16, else to `scale`.

    Four neighbours share a 64-bit hash of the seed and their position, 16 bits each: SplitMix64 (Steele et al., 2014).
    """
    for i in range(len(out) // 4):
        bits = uint64(seed) + uint64(i) * uint64(0x9E3779B97F4A7C15)
        bits = (bits ^ (bits >> uint64(30))) * uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> uint64(27))) * uint64(0x94D049BB133111EB)
        bits ^= bits >> uint64(31)
        for j in range(4):  # numba does not vectorize this loop if `out` has two dimensions
            number = (bits >> uint64(16 * j)) & uint64(0xFFFF)
            out[4 * i + j] = float32(scale) if number >= uint64(dropped) else float32(0)
