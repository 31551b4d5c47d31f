"""The public seam for fault injection: what tests pass to `run_training` to break one rank of a run."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from mbcnet_rec.model.objective import Outputs

OnLoss = Callable[[Tensor, Outputs], tuple[Tensor, Outputs]]


def unchanged(loss: Tensor, outputs: Outputs) -> tuple[Tensor, Outputs]:
    """Return both as they are."""
    return loss, outputs


@dataclass(frozen=True)
class Hooks:
    """Called at points of a run, where a test raises, sleeps, kills the process or changes the loss."""

    # with each place that the watchdog is told of, such as `step 12`, just before
    on_place: Callable[[str], None] = lambda place: None
    # with the loss and outputs of every training step; the step continues with what it returns
    on_loss: OnLoss = unchanged
    on_write: Callable[[], None] = lambda: None  # before a checkpoint's tensors are written, in the writing thread
    on_rows: Callable[[], None] = lambda: None  # before training rows are read, in the thread that reads them
