"""Table 8: parameters, FLOPs and measured latency of each part of an MBCnet, on this machine, in the forward pass."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from data.schema import Schema
from mbcnet_rec.model.input_layout import input_layout
from mbcnet_rec.model.layers import ALL, WIDE
from mbcnet_rec.model.mbcnet import BranchArch, MBCNetConfig

WARM_UP, ROUNDS = 5, 30


@dataclass(frozen=True)
class Part:
    """What one part costs.

    Attributes:
        name: a branch, or what it is.
        complexity: as the paper prints it; "" where it prints none.
        parameters: of the part.
        flops: of one row's forward pass.
        milliseconds: median of a batch's forward pass.
    """

    name: str
    complexity: str
    parameters: int
    flops: float
    milliseconds: float

    def as_dict(self) -> dict[str, Any]:
        """For pictures."""
        return {key: getattr(self, key) for key in ("name", "parameters", "flops", "milliseconds")}


FORMULAS = {
    "efgc": "O(N_g L_EFGC d^2)",
    "cross": "O(L_CrossNet N_experts F d)",
    "deep": "O(L_Deep d^2)",
}


def measure_parts(config: MBCNetConfig, schema: Schema, rows: int, device: torch.device) -> list[Part]:
    """Measure every branch, the shared top with the logits, and the whole dense part.

    Args:
        config: of the model.
        schema: gives the widths of fields and groups.
        rows: of the batch that is timed.
        device: where.
    """
    layout = replace(input_layout(schema), wide="wide" in config.branches)
    torch.manual_seed(0)
    arch = BranchArch(config, layout).to(device).eval()
    names = (ALL, *layout.groups, *((WIDE,) if layout.wide else ()))
    features = {name: torch.randn(rows, layout.width(name), device=device) for name in names}
    parts = [
        _measure(name, FORMULAS.get(name, ""), branch, lambda branch=branch: branch(features), rows, device)
        for name, branch in arch.branches.items()
    ]
    hidden = torch.randn(len(arch.branches) * rows, config.branch_dim, device=device)
    parts.append(_measure("shared top, all branches", "", arch.top, lambda: arch.top(hidden), rows, device))
    parts.append(_measure("whole dense part", "", arch, lambda: arch(features), rows, device))
    return parts


def _measure(
    name: str,
    complexity: str,
    module: torch.nn.Module,
    call: Callable[[], Tensor | Any],
    rows: int,
    device: torch.device,
) -> Part:
    with torch.inference_mode():
        with FlopCounterMode(display=False) as counter:
            call()
        seconds = [_timed(call, device) for _ in range(WARM_UP + ROUNDS)][WARM_UP:]
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return Part(
        name, complexity, parameters, counter.get_total_flops() / rows, 1e3 * statistics.median(seconds)
    )


def _timed(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
