"""Dropout whose masks two processes draw alike, for benchmarks/same_start.py. Imports nothing of ours and nothing of a peer's."""

from functools import partial

import numpy as np
import torch
from torch import Tensor, nn


def give_masks(model: nn.Module, seed: int) -> None:
    """Let the dropout of a model take its masks, call by call, from one generator.

    Two models that call it in the same order on tensors of the same shapes so drop the same elements.
    """
    generator = np.random.default_rng(seed)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.forward = partial(drop, module, generator)  # type: ignore[method-assign]


def drop(module: nn.Dropout, generator: np.random.Generator, x: Tensor) -> Tensor:
    """Map x to x m / (1 - p); the identity outside training."""
    if not module.training or module.p == 0:
        return x
    kept = generator.random(tuple(x.shape), dtype=np.float32) >= module.p
    return x * torch.from_numpy(kept) / (1 - module.p)
