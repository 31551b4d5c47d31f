"""Optimizers: tables learn inside backward, the dense part by Adam, and a table's optimizer does not depend on its plan."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torchrec.distributed import DistributedModelParallel
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from mbcnet_rec.training.optim_config import EmbeddingOptimConfig, OptimConfig

TABLE_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "rowwise_adagrad": RowWiseAdagrad,
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
}


def fuse_table_optimizer(parameters: Iterable[nn.Parameter], config: EmbeddingOptimConfig) -> None:
    """Ask TorchRec to update tables in backward. Call before sharding."""
    # A fresh dict: sharding adds keys of its own to it.
    apply_optimizer_in_backward(TABLE_OPTIMIZERS[config.name], parameters, dict(_options(config)))


def build_optimizer(
    model: DistributedModelParallel, replicated: set[str], config: OptimConfig
) -> CombinedOptimizer:
    """Join the fused table optimizer, the same optimizer for replicated tables, and Adam for the dense part.

    TorchRec leaves data-parallel tables to the dense optimizer; here they keep the tables' own.

    Args:
        model: the sharded model.
        replicated: parameter names of data-parallel tables.
        config: rates.
    """
    sharded = {name for name, _ in model.fused_optimizer.params.items()}
    dense = {
        name: param
        for name, param in model.named_parameters()
        if name not in sharded and name not in replicated
    }
    adam = torch.optim.AdamW if config.weight_decay > 0 else torch.optim.Adam
    extra: dict[str, Any] = {"weight_decay": config.weight_decay} if config.weight_decay > 0 else {}
    optimizers: list[Any] = [
        ("fused", model.fused_optimizer),
        (
            "dense",
            KeyedOptimizerWrapper(
                dense, lambda params: adam(params, lr=config.dense_lr, eps=config.dense_eps, **extra)
            ),
        ),
    ]
    tables = {name: param for name, param in model.named_parameters() if name in replicated}
    if tables:
        chosen = TABLE_OPTIMIZERS[config.embedding.name]
        options: dict[str, Any] = _options(config.embedding)
        optimizers.append(
            ("replicated", KeyedOptimizerWrapper(tables, lambda params: chosen(params, **options)))
        )
    return CombinedOptimizer(optimizers)


def _options(config: EmbeddingOptimConfig) -> dict[str, float]:
    return {"lr": config.lr} if config.name == "sgd" else {"lr": config.lr, "eps": config.eps}
