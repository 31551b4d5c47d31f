"""A sharded model with its optimizers, and what it was built from: what the composition root hands to everyone."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torchrec.distributed import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from mbcnet_rec.training.config import OptimConfig
from mbcnet_rec.training.pipeline import CheckedStep, Pipeline
from sharding.plan.constraints import ShardingConfig
from sharding.plan.placement import Plan


@dataclass
class Built:
    """A model ready to train or to be loaded."""

    model: DistributedModelParallel  # the sharded objective
    optimizer: CombinedOptimizer  # fused, dense and replicated parts
    plan: Plan  # where the tables live
    branch_names: tuple[str, ...]  # of the model's outputs after the fused one
    tasks: tuple[str, ...]  # of several labels, each of which has all these outputs
    dense: list[nn.Parameter]  # parameters that are in no table
    optim: OptimConfig  # this and the next two: of the config that it was built from
    sharding: ShardingConfig
    seed: int
    pipeline: Callable[[CheckedStep], Pipeline]  # makes what takes training steps
