"""Optimizers: embedding tables are updated during backward, the dense part by Adam; a table's optimizer does not depend on its plan."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torchrec.distributed import DistributedModelParallel
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from data.errors import InputError
from mbcnet_rec.training.config import EmbeddingOptimConfig, OptimConfig

TABLE_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "rowwise_adagrad": RowWiseAdagrad,
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
}


def fuse_table_optimizer(parameters: Iterable[nn.Parameter], config: EmbeddingOptimConfig) -> None:
    """Ask TorchRec to update tables in backward. Call before sharding.

    Raises:
        InputError: adam is asked for, which is for data-parallel tables: a batch's rows alone do not tell how the others move.
    """
    parameters = list(parameters)
    if config.name == "adam" and parameters:
        raise InputError(
            f"optim.embedding.name = 'adam': the plan shards {len(parameters)} tables, wanted every table data_parallel, since dense "
            "Adam moves rows that no batch looked up; set sharding.sharding_types = ['data_parallel'], or use rowwise_adagrad"
        )
    # A fresh dict: sharding adds keys of its own to it.
    apply_optimizer_in_backward(TABLE_OPTIMIZERS[config.name], parameters, dict(_options(config)))


def fused_adam(params: Iterable[nn.Parameter], **options: Any) -> torch.optim.Optimizer:
    """Torch's Adam, one kernel over all parameters."""
    return torch.optim.Adam(params, fused=True, **options)


def build_optimizer(
    model: DistributedModelParallel,
    replicated: set[str],
    config: OptimConfig,
    adam: Callable[..., torch.optim.Optimizer] = fused_adam,
) -> CombinedOptimizer:
    """Join the fused table optimizer, the same optimizer for replicated tables, and Adam for the dense part.

    TorchRec leaves data-parallel tables (`replicated`: their parameter names) to the dense optimizer; here they keep the tables' own.
    """
    sharded = {name for name, _ in model.fused_optimizer.params.items()}
    others = {name: param for name, param in model.named_parameters() if name not in sharded}
    dense = {name: param for name, param in others.items() if name not in replicated}
    options: dict[str, Any] = {"lr": config.dense_lr, "eps": config.dense_eps}
    options |= {"weight_decay": config.weight_decay, "decoupled_weight_decay": True}  # AdamW
    optimizers: list[Any] = [("fused", model.fused_optimizer)] if sharded else []
    optimizers.append(("dense", KeyedOptimizerWrapper(dense, lambda params: adam(params, **options))))
    if tables := {name: param for name, param in others.items() if name in replicated}:
        chosen: Any = adam if config.embedding.name == "adam" else TABLE_OPTIMIZERS[config.embedding.name]
        own = _options(config.embedding)
        optimizers.append(("replicated", KeyedOptimizerWrapper(tables, lambda params: chosen(params, **own))))
    return CombinedOptimizer(optimizers)


def _options(config: EmbeddingOptimConfig) -> dict[str, float]:
    match config.name:
        case "sgd":
            return {"lr": config.lr}
        case "adam":
            # the gradient of lambda / 2 ||E||^2 is added to that of the loss, as FuxiCTR's penalty adds it
            return {"lr": config.lr, "eps": config.eps, "weight_decay": config.l2}
        case _:
            return {"lr": config.lr, "eps": config.eps}
