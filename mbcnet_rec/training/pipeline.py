"""TorchRec's train and evaluation pipelines, with a verdict of all ranks between forward and backward.

The tables' optimizers run inside backward: once it starts, rows are written. So a loss that is not finite must
stop every rank before it.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.train_pipeline import (
    PrefetchTrainPipelineSparseDist,
    TrainPipelineSparseDist,
)
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper

from data.stream import Batch
from mbcnet_rec.model.objective import Outputs
from sharding.bridge.zch import collisions_of


class GuardedForward:
    """The forward pass of a step that may be taken back.

    Attributes:
        batch: of the step that runs, or ran last.

    Args:
        model: the sharded objective.
        autocast: context of the forward pass.
    """

    def __init__(self, model: DistributedModelParallel, autocast: Callable[[], Any]) -> None:
        self.batch: Batch | None = None
        self._model, self._autocast = model, autocast
        # which row an id has stays as this step has left it: rows have changed with it, and there are as many as in the tables
        ids = {id(buffer) for module in collisions_of(model) for buffer in module.buffers()}
        buffers = [buffer for buffer in model.buffers() if id(buffer) not in ids]
        self._buffers = [(buffer, buffer.detach().clone()) for buffer in buffers]

    def __call__(self, batch: Batch | None) -> tuple[Tensor, Outputs]:
        """Run the model."""
        self.batch = batch
        for buffer, copy in self._buffers:
            copy.copy_(buffer)
        with self._autocast():
            return self._model(batch)

    def take_back(self) -> None:
        """Undo what the last forward pass did to running statistics."""
        for buffer, copy in self._buffers:
            buffer.copy_(copy)


class PlainPipeline:
    """A step after the other, for one process on a CPU: there is no copy and no exchange that could run beside the forward pass.

    The step is CheckedPipeline's, at two thirds of what TorchRec's pipeline costs around a small model.

    Attributes:
        forward: holds the batch of the step that runs, or ran last.
        skipped: whether the last step was passed over.

    Args:
        model, optimizer, autocast, verdict, after_backward: as CheckedPipeline's.
    """

    def __init__(
        self,
        model: DistributedModelParallel,
        optimizer: Any,
        autocast: Callable[[], Any],
        verdict: Callable[[Tensor], bool | None],
        after_backward: Callable[[], None],
    ) -> None:
        self.forward, self.skipped = GuardedForward(model, autocast), False
        self._optimizers, self._verdict, self._after_backward = (
            inner_optimizers(optimizer),
            verdict,
            after_backward,
        )

    def progress(self, batches: Iterator[Batch]) -> Outputs:
        """Run one step.

        Raises:
            StopIteration: no batch is left. Whatever the verdict raises.
        """
        batch = next(batches)
        for optimizer in self._optimizers:
            optimizer.zero_grad()
        loss, outputs = self.forward(batch)
        self.skipped = bool(self._verdict(loss))
        if not self.skipped:
            loss.backward()
            self._after_backward()
            for optimizer in self._optimizers:
                optimizer.step()
        return outputs

    def detach(self) -> None:
        """Nothing is attached."""


def inner_optimizers(optimizer: Any) -> list[Any]:
    """The optimizers that optimizers by name only pass calls on to: each of these is a torch optimizer, with hooks around its step."""
    if isinstance(optimizer, CombinedOptimizer):
        return [inner for _, own in optimizer.optimizers for inner in inner_optimizers(own)]
    return [optimizer._optimizer if isinstance(optimizer, KeyedOptimizerWrapper) else optimizer]


class CheckedPipeline(TrainPipelineSparseDist[Batch, Outputs]):
    """TrainPipelineSparseDist with a check before backward and a dense gradient clip after it.

    Attributes:
        forward: holds the batch of the step that runs, or ran last.
        skipped: whether the last step was passed over.

    Args:
        model: the sharded objective.
        optimizer: of all parts.
        autocast: context of the forward pass.
        verdict: called with the loss of every step before backward; raises to stop, or returns True to pass over the step: no
            backward, no optimizer.
        after_backward: called between backward and the optimizers' step.
    """

    def __init__(
        self,
        model: DistributedModelParallel,
        optimizer: Any,
        autocast: Callable[[], Any],
        verdict: Callable[[Tensor], bool | None],
        after_backward: Callable[[], None],
    ) -> None:
        self.forward, self.skipped = GuardedForward(model, autocast), False
        super().__init__(
            model, optimizer, model.device, execute_all_batches=True, custom_model_fwd=self.forward
        )
        self._verdict = verdict
        self._after_backward = after_backward

    def _backward(self, losses: Tensor) -> None:
        self.skipped = bool(self._verdict(losses))
        if not self.skipped:
            super()._backward(losses)
            self._after_backward()

    def _optimizer_step(self) -> None:
        if not self.skipped:
            super()._optimizer_step()


class PrefetchingPipeline(CheckedPipeline, PrefetchTrainPipelineSparseDist[Batch, Outputs]):
    """The same, and the rows of the next batch are fetched into the tables' HBM caches during this one. cuda only.

    TorchRec's prefetching pipeline runs backward and the optimizer in one go, so the verdict is asked for at the end of the forward
    pass, and what is due after backward is done at the beginning of the optimizer's step.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        forward = self._model_fwd
        self._optimizer = _AfterBackward(self, self._optimizer)

        def judged(batch: Batch | None) -> tuple[Tensor, Outputs]:
            losses, outputs = forward(batch)
            if self._model.training:
                self.skipped = bool(self._verdict(losses))
                if self.skipped:
                    losses = torch.zeros_like(losses, requires_grad=True)  # its backward reaches no row
            return losses, outputs

        self._model_fwd = judged

    def progress(self, dataloader_iter: Iterator[Batch]) -> Outputs:
        """Run one step; after `detach` the model is attached again, as the other pipeline does by itself."""
        if not self._model_attached:
            self.attach(self._model)
        return super().progress(dataloader_iter)


def pipeline_for(
    prefetch: bool, world_size: int, device: torch.device
) -> type[PlainPipeline] | type[CheckedPipeline]:
    """Choose the pipeline of a run. `prefetch`: whether the plan has tables in HBM caches."""
    if prefetch:
        return PrefetchingPipeline
    return PlainPipeline if world_size == 1 and device.type == "cpu" else CheckedPipeline


class _AfterBackward:
    """An optimizer of a pipeline, with something to do first."""

    def __init__(self, pipeline: CheckedPipeline, optimizer: Any) -> None:
        self._pipeline, self._optimizer = pipeline, optimizer

    def zero_grad(self) -> None:
        """As the optimizer's."""
        self._optimizer.zero_grad()

    def step(self) -> None:
        """As the optimizer's, but for a step that is passed over."""
        if not self._pipeline.skipped:
            self._pipeline._after_backward()
            self._optimizer.step()


@torch.no_grad()
def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients so that their joint L2 norm is at most `max_norm` (infinite: leave them); return the norm before.

    As torch.nn.utils.clip_grad_norm_, which sorts the gradients by device and dtype first; ours are of one.
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    if norm.device.type == "cpu":  # nothing to wait for, and gradients are seldom so long
        scale = max_norm / (norm.item() + 1e-6)
        if scale < 1.0:
            torch._foreach_mul_(grads, scale)
    elif max_norm < float("inf"):
        torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp_(max=1.0))
    return norm
