"""How the dense part moves beside Adam: learning rates over steps, gradients of several batches, the average of its weights, and branches' gradients."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mbcnet_rec.checkpoints.shards import AVERAGE, Saved, TensorShard, whole_shard
from mbcnet_rec.model.kinds import dense_arch_of
from mbcnet_rec.training.built import Built
from mbcnet_rec.training.config import ScheduleConfig

PLATEAU_FLOOR = 1e-6  # of a learning rate, as in the BARS protocol
GRADIENT = "grad/"  # before a parameter's name: what batches have added since the last step


class Rates:
    """The learning rates of a model's parts, those of the tables too."""

    def __init__(self, built: Built) -> None:
        optim = built.optim
        schedules = {"dense": optim.dense_schedule}
        self._groups: list[tuple[Any, float, ScheduleConfig]] = [
            (group, group["lr"], schedules.get(part, optim.embedding.schedule))
            for part, optimizer in built.optimizer.optimizers
            for group in optimizer.param_groups
        ]

    def set(self, done: int, scale: float) -> None:
        """Set each for the step after `done` steps: its base times `scale`, but not below PLATEAU_FLOOR, as its schedule says."""
        for group, rate, schedule in self._groups:
            group["lr"] = max(rate * scale, min(rate, PLATEAU_FLOOR)) * schedule.share(done)


class DensePart:
    """The dense part's gradients over `optim.accumulate` batches and its average by `optim.dense_average`, which checkpoints keep."""

    def __init__(self, built: Built) -> None:
        own = {id(parameter) for parameter in built.dense}
        named = built.model.named_parameters()
        self._live = {name: parameter for name, parameter in named if id(parameter) in own and parameter.numel()}
        self.every, self._decay = built.optim.accumulate, built.optim.dense_average
        self._average = {name: each.detach().clone() for name, each in self._live.items()} if self._decay else {}

    def is_due(self, done: int) -> bool:
        """Whether the dense part moves at the step after `done` steps."""
        return (done + 1) % self.every == 0

    def divide(self) -> None:
        """Make the sum of the batches' gradients their mean."""
        for parameter in self._live.values() if self.every > 1 else ():
            if parameter.grad is not None:
                parameter.grad.div_(self.every)

    @torch.no_grad()
    def note_step(self) -> None:
        """Move the average after a step of the optimizer."""
        if self._average:
            get_ema_multi_avg_fn(self._decay)([*self._average.values()], [*self._live.values()], 0)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Let the model have the average in place of its weights."""
        kept = {name: self._live[name].detach().clone() for name in self._average}
        try:
            self._copy(self._average)
            yield
        finally:
            self._copy(kept)

    def shards(self, done: int) -> list[TensorShard]:
        """What a checkpoint after `done` steps keeps."""
        gradients = self._live.items() if done % self.every else ()
        return [
            *(whole_shard(f"{AVERAGE}{name}", each) for name, each in self._average.items()),
            *(whole_shard(f"{GRADIENT}{name}", each.grad) for name, each in gradients if each.grad is not None),
        ]

    @torch.no_grad()
    def restore(self, saved: Saved, done: int) -> None:
        """Restore what `shards` gave; what the checkpoint has not begins with the weights that were loaded, and without a gradient."""
        for name, parameter in self._live.items():
            gradient = f"{GRADIENT}{name}"
            if self.every > 1:
                parameter.grad = None
            if done % self.every and saved.shapes.get(gradient) == tuple(parameter.shape):
                parameter.grad = saved.whole(gradient).to(parameter.device)
            if name in self._average:
                average = f"{AVERAGE}{name}"
                found = saved.shapes.get(average) == tuple(parameter.shape)
                self._average[name].copy_(saved.whole(average) if found else parameter.detach())

    @torch.no_grad()
    def _copy(self, values: dict[str, torch.Tensor]) -> None:
        for name, value in values.items():
            self._live[name].copy_(value)


def branch_parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Branch -> its own parameters, without the shared top and the tables; empty for a model without branches."""
    branches = getattr(dense_arch_of(model), "branches", nn.ModuleDict())
    return {name: list(branch.parameters()) for name, branch in branches.items()}


def gradient_shares(branches: dict[str, list[nn.Parameter]]) -> dict[str, Tensor]:
    """Share of each branch in the sum of the branches' gradient norms: s_k = ||g_k|| / sum_j ||g_j||; 0 where all are 0.

    Gradients are those after the average over ranks, so shares are equal on all ranks; a clip by the total norm leaves them.
    """
    norms = {
        name: get_total_norm([each.grad for each in parameters if each.grad is not None], foreach=True)
        for name, parameters in branches.items()
        if any(each.grad is not None for each in parameters)
    }
    if not norms:
        return {}
    total = torch.stack(list(norms.values())).sum().clamp(min=torch.finfo(torch.float32).tiny)
    return {name: norm / total for name, norm in norms.items()}
