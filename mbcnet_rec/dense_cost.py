"""What a model's dense part costs, counted on the meta device: no weights, no data, any config."""

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

from data.schema import Schema
from mbcnet_rec.model.models import ModelConfig, build_model, model_layout
from sharding.plan.constraints import ShardingConfig
from sharding.plan.placement import DenseCost
from sharding.search.candidates import pooling_factor

ROWS = 8  # the batch that is counted


class _Features(nn.Module):
    """Stands in for the tables: features of the right widths."""

    def __init__(self, widths: dict[str, int]) -> None:
        super().__init__()
        self.widths = widths

    def forward(
        self, dense_features: Tensor, sparse_features: object = None, weighted_features: object = None
    ) -> dict[str, Tensor]:
        """Map anything to (B, width) tensors that want gradients."""
        rows = dense_features.shape[0]
        return {
            name: torch.empty(rows, width, device="meta", requires_grad=True) for name, width in self.widths.items()
        }


def dense_cost(config: ModelConfig, schema: Schema, sharding: ShardingConfig) -> DenseCost:
    """Count parameters, and of one row forward FLOPs and the float32 bytes that autograd keeps, most of which autocast halves."""
    layout = model_layout(config, schema)
    widths = layout.tensor_widths()
    with torch.device("meta"):
        model = build_model(config, _Features(widths), layout)  # type: ignore[arg-type]
    small, flops = _kept_bytes(model, ROWS)
    large, _ = _kept_bytes(model, 2 * ROWS)
    activations = (large - small) / ROWS  # the slope: what does not grow with the batch is no activation
    pooled = 2 * 4 * sum(widths.values())  # regrouped features and their gradients
    values = sum(
        feature.width if feature.kind == "vector" else pooling_factor(feature, sharding) for feature in schema.features
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return DenseCost(parameters, flops / ROWS, activations + pooled, values + 1)


def _kept_bytes(model: nn.Module, rows: int) -> tuple[int, float]:
    """Bytes that autograd keeps from a forward pass of so many rows, and its FLOPs."""
    kept: dict[int, torch.UntypedStorage] = {}  # once each, since several operations may keep one

    def keep(tensor: Tensor) -> None:
        # not the tensor: what an operation keeps of its own output would hold the whole graph for ever
        storage = tensor.untyped_storage()
        kept[StorageWeakRef(storage).cdata] = storage

    with FlopCounterMode(display=False) as counter, saved_tensors_hooks(keep, lambda kept: kept):
        model(torch.empty(rows, 1, device="meta"), None, None)
    return sum(storage.nbytes() for storage in kept.values()), counter.get_total_flops()
