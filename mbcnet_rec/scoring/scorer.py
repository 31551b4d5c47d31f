"""The one scorer: batches in, logits out, on every rank together; all that evaluates, predicts or probes folds over it.

Shapes: B rows of one rank's batch, n of them real (weight above 0), K branches.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.train_pipeline import EvalPipelineSparseDist

from data.stream import Batch
from mbcnet_rec.model.objective import Outputs
from sharding.bridge.allocated import release_cache_lines

T = TypeVar("T")
Autocast = Callable[[], AbstractContextManager[Any]]


class Scored(NamedTuple, Generic[T]):
    """One scored batch of this rank."""

    note: T  # what came with the batch
    logits: np.ndarray  # (n, 1 + K) float32, the fused one first
    labels: np.ndarray  # (n,) float32
    real: np.ndarray  # (B,) bool: rows that are no padding


def autocast_of(dtype: str, device: torch.device) -> Autocast:
    """Return what makes the context of a forward pass: bf16 matrix products, or float32."""
    if dtype == "bf16":
        return lambda: torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext


class Scorer:
    """Runs a sharded model without gradients. Lookups are collective: every rank scores equally many batches."""

    def __init__(self, model: DistributedModelParallel, autocast: Autocast = nullcontext) -> None:
        self.model, self.autocast = model, autocast

    def score(self, batches: Iterable[tuple[Batch, T]]) -> Generator[Scored[T], None, None]:
        """Score batches, each with a note of the caller's; the model is in evaluation mode meanwhile.

        `batches` is read in another thread, a few batches ahead, and what it raises is raised. Close the generator where it is left early.
        """
        notes: deque[T] = deque()
        errors: list[BaseException] = []

        def read() -> Iterator[Batch]:
            try:
                for batch, note in batches:
                    notes.append(note)
                    yield batch.pin_memory() if self.model.device.type == "cuda" else batch
            except BaseException as error:  # TorchRec's loading thread would swallow it
                errors.append(error)

        was_training = self.model.training
        self.model.eval()
        no_optimizer = cast(torch.optim.Optimizer, None)  # evaluation steps none
        pipeline = EvalPipelineSparseDist(self.model, no_optimizer, self.model.device)
        source = read()
        try:
            with torch.no_grad(), self.autocast():
                while True:
                    try:
                        outputs: Outputs = pipeline.progress(source)
                    except StopIteration:
                        break
                    yield Scored(notes.popleft(), *real_rows([outputs]))
            if errors:
                raise errors[0]
        finally:
            pipeline.detach()
            pipeline.reset()
            release_cache_lines(self.model)
            self.model.train(was_training)

    def score_batch(self, batch: Batch) -> Tensor:
        """Logits (B, 1 + K) of one batch on the device, in the caller's thread: for a model that marks the rows of another one's stream."""
        with torch.no_grad(), self.autocast():
            return self.model(batch)[1].logits.float()


def real_rows(outputs: list[Outputs]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Join steps without their padding: logits (n, 1 + K) float32, labels (n,), and which rows are real (B,). Of tasks (n, T (1 + K)), (n, T)."""
    ends = [outputs[0].logits.shape[1], -1]
    columns = [
        [each.logits.float(), each.labels.reshape(len(each.labels), -1), each.weights[:, None]] for each in outputs
    ]
    rows = torch.cat([torch.cat(each, dim=1) for each in columns]).cpu().numpy()
    real = rows[:, -1] > 0
    logits, labels, _ = np.split(rows[real], ends, axis=1)
    return logits, labels if outputs[0].labels.dim() > 1 else labels[:, 0], real
