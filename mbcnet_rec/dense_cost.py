"""What a model's dense part costs, counted on the meta device: no weights, no data, any config."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

from data.schema import Schema
from mbcnet_rec.model.models import ModelConfig, build_arch, model_layout
from sharding.plan.constraints import ShardingConfig
from sharding.plan.placement import DenseCost
from sharding.search.candidates import pooling_factor

ROWS = 8  # the batch that is counted


def dense_cost(config: ModelConfig, schema: Schema, sharding: ShardingConfig) -> DenseCost:
    """Count parameters, and of one row forward FLOPs and the float32 bytes that autograd keeps, most of which autocast halves."""
    layout = model_layout(config, schema)
    widths = layout.tensor_widths()
    with torch.device("meta"):
        arch = build_arch(config, layout)
    small, flops = _kept_bytes(arch, widths, ROWS)
    large, _ = _kept_bytes(arch, widths, 2 * ROWS)
    activations = (large - small) / ROWS  # the slope: what does not grow with the batch is no activation
    pooled = 2 * 4 * sum(widths.values())  # regrouped features and their gradients
    values = sum(each.width if each.kind == "vector" else pooling_factor(each, sharding) for each in schema.features)
    parameters = sum(parameter.numel() for parameter in arch.parameters())
    return DenseCost(parameters, flops / ROWS, activations + pooled, values + 1)


def _kept_bytes(arch: nn.Module, widths: Mapping[str, int], rows: int) -> tuple[int, float]:
    """Bytes that autograd keeps from a forward pass of so many rows, and its FLOPs."""
    kept: dict[int, torch.UntypedStorage] = {}  # once each, since several operations may keep one

    def keep(tensor: Tensor) -> None:
        # not the tensor: what an operation keeps of its own output would hold the whole graph for ever
        storage = tensor.untyped_storage()
        kept[StorageWeakRef(storage).cdata] = storage

    features = {name: torch.empty(rows, width, device="meta", requires_grad=True) for name, width in widths.items()}
    with FlopCounterMode(display=False) as counter, saved_tensors_hooks(keep, lambda kept: kept):
        arch(features)
    return sum(storage.nbytes() for storage in kept.values()), counter.get_total_flops()
