"""TorchRec's train and evaluation pipelines, with a verdict of all ranks between forward and backward.

Embedding tables are updated during backward, so a loss that is not finite must stop every rank before it.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.train_pipeline import (
    PrefetchTrainPipelineSparseDist,
    TrainPipelineBase,
    TrainPipelineSparseDist,
)

from data.stream import Batch
from mbcnet_rec.model.objective import Outputs
from mbcnet_rec.training.hooks import OnLoss, unchanged
from sharding.bridge.allocated import release_cache_lines
from sharding.bridge.zch import collisions_of


class CheckedStep:
    """What a train pipeline calls in a step: a forward pass that may be taken back, and an optimizer that may be passed over.

    `verdict` is called with the loss of every step before backward; it raises to stop, or returns True to pass over the step: no gradient,
    no optimizer. `after_backward` is called between backward and the optimizers' step.
    """

    def __init__(
        self,
        model: DistributedModelParallel,
        optimizer: Any,
        autocast: Callable[[], Any],
        verdict: Callable[[Tensor], bool | None] = lambda loss: None,
        after_backward: Callable[[], None] = lambda: None,
    ) -> None:
        self.batch: Batch | None = None  # of the step that runs, or ran last
        self.skipped = False  # whether the last step was passed over
        self.on_loss: OnLoss = unchanged  # see training/hooks.py
        # whether this batch is the first, and the last, of those whose gradients are one step of the dense part
        self.begins = self.moves_dense = True
        self.model, self._optimizer, self._autocast = model, optimizer, autocast
        self._verdict, self._after_backward = verdict, after_backward
        # which row an id has stays as this step has left it: rows have changed with it, and there are as many as in the tables
        ids = {id(buffer) for module in collisions_of(model) for buffer in module.buffers()}
        buffers = [buffer for buffer in model.buffers() if id(buffer) not in ids]
        self._buffers = [(buffer, buffer.detach().clone()) for buffer in buffers]

    def forward(self, batch: Batch | None) -> tuple[Tensor, Outputs]:
        """Run the model and ask for the verdict; the loss of a step that is passed over is a 0 that no parameter is part of."""
        self.batch = batch
        for buffer, copy in self._buffers:
            copy.copy_(buffer)
        with self._autocast():
            loss, outputs = self.on_loss(*self.model(batch))
        self.skipped = bool(self._verdict(loss))
        if self.skipped:
            release_cache_lines(self.model)  # a prefetch pipeline fetches the next batch's rows after this
            loss = torch.zeros_like(loss, requires_grad=True)
        return loss, outputs

    def take_back(self) -> None:
        """Undo what the last forward pass did to running statistics."""
        for buffer, copy in self._buffers:
            buffer.copy_(copy)

    # TrainPipelineBase takes this for the model
    __call__ = forward

    @property
    def training(self) -> bool:
        """Of the model."""
        return self.model.training

    def zero_grad(self) -> None:
        """Forget all gradients, but those of the dense part that more batches add to."""
        for part, optimizer in self._optimizer.optimizers:
            if self.begins or part != "dense":
                optimizer.zero_grad(set_to_none=False)

    @property
    def moved_dense(self) -> bool:
        """Whether the last step moved the dense part: it does where the last of several batches is passed over, too."""
        return self.moves_dense and not (self.skipped and self.begins)

    def step(self) -> None:
        """Move the parameters, unless the step is passed over."""
        if self.moved_dense:
            self._after_backward()
        for part, optimizer in self._optimizer.optimizers:
            if self.moved_dense if part == "dense" else not self.skipped:
                optimizer.step()


class Pipeline(Protocol):
    """What the trainer asks of a pipeline."""

    def progress(self, dataloader_iter: Iterator[Batch], /) -> Outputs:
        """Run one step; raises StopIteration where no batch is left."""
        ...

    def detach(self) -> Any:
        """Give the model back its own forward pass, for an evaluation."""
        ...


class _ReattachedPrefetchPipeline(PrefetchTrainPipelineSparseDist[Batch, Outputs]):
    """After `detach` the model is attached again, as TrainPipelineSparseDist does by itself."""

    def progress(self, dataloader_iter: Iterator[Batch]) -> Outputs:
        """Run one step."""
        if not self._model_attached:
            self.attach(self._model)
        return super().progress(dataloader_iter)


class _CopyAheadPipeline(TrainPipelineBase[Batch, Outputs]):
    """Copies the next batch to the device during a step, and exchanges nothing."""

    def detach(self) -> None:
        """Take what the next call of `progress` gives for a new start."""
        self.reset()


def train_pipeline(step: CheckedStep, *, prefetch: bool, alone: bool = False) -> Pipeline:
    """Make TorchRec's pipeline.

    `prefetch`: whether the plan has tables in HBM caches, whose next rows are then fetched ahead; `alone`: whether this process is the
    only one. Batches are copied into memory of the computing stream.
    """
    model: Any = step
    if alone and not prefetch:
        return _CopyAheadPipeline(model, model, step.model.device, enable_inplace_copy_batch=True)
    kind = _ReattachedPrefetchPipeline if prefetch else TrainPipelineSparseDist
    return kind(
        step.model, model, step.model.device, custom_model_fwd=step.forward, enable_inplace_copy_batch=True,
    )  # fmt: skip
