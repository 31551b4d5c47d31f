"""What is kept of a batch whose loss is not finite, and when a loss is an alarm."""

import json
import math
from pathlib import Path

from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from data.engine import write_result
from data.stream import Batch
from mbcnet_rec.checkpoints.shards import write_tensors
from mbcnet_rec.logs.metrics_log import finite_or_none
from mbcnet_rec.training.state import TrainState

FAULTS = "faults"
SPIKE_DECAY = 0.9
SPIKE_LINES = 8  # logged losses before the alarm is armed


def batch_tensors(batch: Batch) -> dict[str, Tensor]:
    """A batch as named tensors in CPU memory."""
    tensors = {}
    for name, value in vars(batch).items():
        if isinstance(value, KeyedJaggedTensor):
            tensors |= {f"{name}/values": value.values(), f"{name}/lengths": value.lengths()}
            tensors[f"{name}/weights"] = value.weights_or_none()
        elif isinstance(value, Tensor):
            tensors[name] = value
    return {name: tensor.detach().cpu() for name, tensor in tensors.items() if tensor is not None}


def dump_batch(folder: Path, step: int, rank: int, batch: Batch, loss: Tensor) -> Path:
    """Write RUN/faults/step_N_rank_R.safetensors and a .json beside it: keys of the features, cursor, loss.

    Returns:
        The file of tensors.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    target = folder / FAULTS / f"step_{step}_rank_{rank}.safetensors"
    target.parent.mkdir(parents=True, exist_ok=True)
    with write_result(target) as draft, draft.open("wb") as file:
        write_tensors(batch_tensors(batch), file)
    weighted, numbers = batch.weighted_features, batch.dense_features
    about = {
        "step": step,
        "rank": rank,
        "losses": [finite_or_none(float(loss.detach()))],
        "next_cursor": [batch.cursor.epoch, batch.cursor.step],
        "sparse_keys": batch.sparse_features.keys(),
        "weighted_keys": [] if weighted is None else weighted.keys(),
        "rows_with_numbers_not_finite": numbers.isfinite().all(1).logical_not().nonzero().flatten().tolist(),
    }
    target.with_suffix(".json").write_text(json.dumps(about) + "\n", encoding="utf-8")
    return target


def loss_spike(state: TrainState, loss: float, sigmas: float) -> float | None:
    """Compare a logged loss with those before it, and take it into their running moments.

    m <- d m + (1 - d) L,  v <- d (v + (1 - d) (L - m)^2) with d = 0.9; the alarm is z = (L - m) / sqrt(v) > sigmas.

    Returns:
        z if it is an alarm, else None.
    """
    if not math.isfinite(loss):
        return None
    gap = loss - state.loss_mean
    z = gap / math.sqrt(state.loss_variance) if state.loss_variance > 0 else 0.0
    alarm = sigmas > 0 and state.loss_lines >= SPIKE_LINES and z > sigmas
    if state.loss_lines == 0:
        state.loss_mean = loss
    else:
        state.loss_variance = SPIKE_DECAY * (state.loss_variance + (1 - SPIKE_DECAY) * gap * gap)
        state.loss_mean += (1 - SPIKE_DECAY) * gap
    state.loss_lines += 1
    return z if alarm else None
