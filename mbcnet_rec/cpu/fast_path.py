"""The one switch: what building a run takes from this room where `train.cpu_fast_path` is set and the run is on a CPU.

A single process takes the shorter way to its rows on a GPU too.
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torchrec.distributed.model_parallel import DataParallelWrapper

from data.stream import Batch
from mbcnet_rec.cpu.adagrad import use_own_update
from mbcnet_rec.cpu.cross import FastCross, FastLowRankMixture
from mbcnet_rec.cpu.layers import INTEL, Dropout, Linear
from mbcnet_rec.cpu.mlp import FastMLP, FastRegroup
from mbcnet_rec.cpu.whole_adam import WholeAdam
from mbcnet_rec.model.layers import MLP, Cross, LowRankMixture
from mbcnet_rec.model.objective import Outputs
from mbcnet_rec.model.sparse_arch import FeatureRegroup
from mbcnet_rec.training.optim import fused_adam
from mbcnet_rec.training.pipeline import CheckedStep, Pipeline, train_pipeline
from sharding.bridge.one_process import NoCopies, shorten_lookups
from sharding.plan.placement import Plan

# Of glibc's mallopt. Blocks below the first size come from the heap; free memory below the second stays there.
_MMAP_THRESHOLD, _MMAP_BYTES = -3, 256 * 2**20
_TRIM_THRESHOLD, _TRIM_BYTES = -1, 2**31 - 1

FAST = {nn.Linear: Linear, nn.Dropout: Dropout, MLP: FastMLP, LowRankMixture: FastLowRankMixture, Cross: FastCross}


@dataclass(frozen=True)
class FastPath:
    """What a run is built with: the fast parts for a CPU where `on`, else TorchRec's and torch's. `plan` says whether it is one process."""

    on: bool
    plan: Plan

    @property
    def _alone(self) -> bool:
        return self.plan.world_size == 1 and (self.on or self.plan.device == "cuda")

    def prepare(self, model: nn.Module) -> None:
        """Change how a model's layers compute, before it is sharded."""
        if self.on:
            use_fast_layers(model)
            keep_freed_memory()

    def shorten(self, sharded: nn.Module) -> None:
        """Change how a sharded model looks rows up and updates them."""
        if self._alone:
            shorten_lookups(sharded)
        if self.on and INTEL:
            use_own_update(sharded)

    @property
    def data_parallel_wrapper(self) -> DataParallelWrapper | None:
        """What averages the gradients of the dense part; None: TorchRec's own."""
        return NoCopies() if self._alone else None

    @property
    def adam(self) -> Callable[..., torch.optim.Optimizer]:
        """Makes Adam of parameters and torch.optim.Adam's options."""
        return WholeAdam if self.on else fused_adam

    @property
    def pipeline(self) -> Callable[[CheckedStep], Pipeline]:
        """Makes what takes training steps."""
        if self._alone and self.on:
            return PlainPipeline
        return partial(train_pipeline, prefetch=self.plan.prefetch, alone=self._alone)


def use_fast_layers(model: nn.Module) -> None:
    """Let a model's regroup, MLPs and cross networks compute so; parameters and their names stay."""
    for owner in model.modules():
        if isinstance(owner, FeatureRegroup):
            owner.__class__ = FastRegroup
        if isinstance(owner, MLP | Cross):
            for layer in owner.modules():
                # the new class adds no parameter or buffer to the old one
                layer.__class__ = FAST.get(type(layer), type(layer))
                if isinstance(layer, FastMLP):
                    layer.note_size()


def keep_freed_memory() -> None:
    """Let the allocator keep large blocks that one step frees for the next, in this process from now on.

    A step at the paper's size and 1,024 rows faults 30,000 pages in again without this: 4 % of its time in float32, 8 % under bf16.
    """
    with suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, _MMAP_BYTES)
        mallopt(_TRIM_THRESHOLD, _TRIM_BYTES)


class PlainPipeline:
    """One step after the other, for one process on a CPU: no copy and no exchange could run beside the forward pass.

    The steps are those of TorchRec's pipeline, at two thirds of what that costs around a small model.
    """

    def __init__(self, step: CheckedStep) -> None:
        self._step = step

    def progress(self, batches: Iterator[Batch], /) -> Outputs:
        """Run one step; raises StopIteration where no batch is left."""
        batch = next(batches)
        self._step.zero_grad()
        loss, outputs = self._step.forward(batch)
        if not self._step.skipped:
            loss.backward()
        self._step.step()
        return outputs

    def detach(self) -> None:
        """Nothing is attached."""
