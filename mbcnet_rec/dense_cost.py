"""What a model's dense part costs, counted on the meta device: no weights, no data, any config."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

from data.schema import Schema
from mbcnet_rec.model.models import ModelConfig, build_arch, model_layout
from mbcnet_rec.model.sequences import SequencePooling
from sharding.plan.constraints import ShardingConfig
from sharding.plan.placement import DenseCost
from sharding.search.candidates import pooling_factor

ROWS = 8  # the batch that is counted


def dense_cost(config: ModelConfig, schema: Schema, sharding: ShardingConfig) -> DenseCost:
    """Count parameters, and of one row forward FLOPs and the float32 bytes that autograd keeps, most of which autocast halves."""
    layout = model_layout(config, schema)
    widths = layout.tensor_widths()
    with torch.device("meta"):
        arch, sequences = build_arch(config, layout), SequencePooling(layout)

    def forward(rows: int) -> None:
        arch({name: _meta(rows, width) for name, width in widths.items()})
        if layout.sequences:
            lengths = sequences.lengths.items()
            padded = {field: _meta(rows, length, layout.embedding_dims[field]) for field, length in lengths}
            sequences.pooled(padded, {each.fields[0]: _meta(rows) for each in layout.sequences})

    small, flops = _kept_bytes(forward, ROWS)
    large, _ = _kept_bytes(forward, 2 * ROWS)
    activations = (large - small) / ROWS  # the slope: what does not grow with the batch is no activation
    pooled = 2 * 4 * sum(widths.values())  # regrouped features and their gradients
    values = sum(each.width if each.kind == "vector" else pooling_factor(each, sharding) for each in schema.features)
    parameters = sum(parameter.numel() for part in (arch, sequences) for parameter in part.parameters())
    return DenseCost(parameters, flops / ROWS, activations + pooled, values + 1)


def _meta(*shape: int) -> Tensor:
    return torch.empty(*shape, device="meta", requires_grad=True)


def _kept_bytes(forward: Callable[[int], None], rows: int) -> tuple[int, float]:
    """Bytes that autograd keeps from a forward pass of so many rows, and its FLOPs."""
    kept: dict[int, torch.UntypedStorage] = {}  # once each, since several operations may keep one

    def keep(tensor: Tensor) -> None:
        # not the tensor: what an operation keeps of its own output would hold the whole graph for ever
        storage = tensor.untyped_storage()
        kept[StorageWeakRef(storage).cdata] = storage

    with FlopCounterMode(display=False) as counter, saved_tensors_hooks(keep, lambda kept: kept):
        forward(rows)
    return sum(storage.nbytes() for storage in kept.values()), counter.get_total_flops()
