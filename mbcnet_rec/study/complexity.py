"""Table 8: parameters, FLOPs and measured latency of each part of an MBCnet, on this machine, in the forward pass."""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from data.schema import Schema, load_schema
from mbcnet_rec.config import RunConfig
from mbcnet_rec.model.mbcnet import BranchArch, MBCNetConfig
from mbcnet_rec.model.models import ModelConfig, model_layout
from mbcnet_rec.report import figures
from mbcnet_rec.report.page import Block, Table, Text
from mbcnet_rec.runtime.process import choose_device

MIN_SECONDS = 0.2  # that each part is timed for
FORMULAS = {"efgc": "O(N_g L_EFGC d^2)", "cross": "O(L_CrossNet N_experts F d)", "deep": "O(L_Deep d^2)"}


class Part(NamedTuple):
    """What a branch, the shared top or the whole dense part costs."""

    name: str
    parameters: int
    flops: float  # of one row's forward pass
    milliseconds: float  # median of a batch's forward pass


def complexity_blocks(config: RunConfig) -> list[Block]:
    """Measure the dense part of a config's MBCnet, and say what EFGC adds."""
    device = choose_device(config.train.device, 0)
    rows = config.data.eval_batch_size or config.data.batch_size
    parts = measure_parts(config.model.mbcnet, load_schema(config.schema), rows, device)
    lines = [
        (figures.label(name), FORMULAS.get(name, ""), f"{parameters:,}", f"{flops:,.0f}", f"{milliseconds:.2f}")
        for name, parameters, flops, milliseconds in parts
    ]
    header = ("part", "time, by the paper", "parameters", "FLOPs a row", f"ms a batch of {rows:,}")
    text = f"Table 8, measured: dense part only, {device.type}, {torch.get_num_threads()} threads, without the tables."
    for part in parts:
        if part.name == "efgc":
            text += (
                f" Without EFGC the dense part would have {parts[-1].parameters - part.parameters:,} parameters; the branch adds "
                f"{part.milliseconds:.2f} ms to a batch. The paper: 2.2 million parameters and 1 ms."
            )
    return [Text(text), Table(header, tuple(lines))]


def measure_parts(config: MBCNetConfig, schema: Schema, rows: int, device: torch.device) -> list[Part]:
    """Measure every branch, the shared top with the logits, and the whole dense part, on a batch of so many rows."""
    layout = model_layout(ModelConfig(mbcnet=config), schema)
    torch.manual_seed(0)
    arch = BranchArch(config, layout).to(device).eval()
    features = {name: torch.randn(rows, width, device=device) for name, width in layout.tensor_widths().items()}
    hidden = torch.randn(len(arch.branches) * rows, config.branch_dim, device=device)
    return [
        *(
            _measure(name, branch, {group: features[own] for group, own in layout.reads(name).items()}, rows)
            for name, branch in arch.branches.items()
        ),
        _measure("shared top, all branches", arch.top, hidden, rows),
        _measure("whole dense part", arch, features, rows),
    ]


def _measure(name: str, part: nn.Module, inputs: Any, rows: int) -> Part:
    with torch.inference_mode():
        with FlopCounterMode(display=False) as counter:
            part(inputs)
        names = {"part": part, "inputs": inputs}
        timer = Timer("part(inputs)", globals=names, num_threads=torch.get_num_threads())
        seconds = timer.blocked_autorange(min_run_time=MIN_SECONDS).median
    parameters = sum(parameter.numel() for parameter in part.parameters())
    return Part(name, parameters, counter.get_total_flops() / rows, 1e3 * seconds)
