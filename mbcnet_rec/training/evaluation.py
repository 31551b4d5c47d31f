"""What is computed from a model's outputs: the numbers of a log line, and the metrics of a whole split."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Any

import numpy as np
import torch

from data.stream import Batch, ParquetStream
from mbcnet_rec.model.losses import branch_pairs, disagreement_rates
from mbcnet_rec.model.objective import Outputs
from mbcnet_rec.runtime.process import (
    Process,
    averaged_buffers,
    blamed_on,
    broadcast_value,
    gather_rows,
    mean_over_ranks,
)
from mbcnet_rec.scoring.metrics import evaluate_predictions
from mbcnet_rec.scoring.reliability import reliability
from mbcnet_rec.training.built import Built
from mbcnet_rec.training.pipeline import evaluate_batches


class EvaluationGivenUpError(Exception):
    """Somebody asked the run to stop while it evaluated."""


def autocast_of(dtype: str, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """Return what makes the context of a forward pass: bf16 matrix products, or float32."""
    if dtype == "bf16":
        return lambda: torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext


def bf16_in_hardware() -> bool:
    """Whether oneDNN has bf16 products for this CPU: AVX-512, AMX or their like. Without, a DNN trained at a seventh of float32's speed."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def average_terms(outputs: list[Outputs]) -> dict[str, float]:
    """Average each loss term over steps and ranks."""
    names = list(outputs[0].terms)
    stacked = torch.stack([torch.stack([each.terms[name] for name in names]) for each in outputs])
    means = mean_over_ranks(stacked.double().mean(0).cpu())
    return dict(zip(names, means.tolist(), strict=True))


def own_rows(outputs: list[Outputs]) -> tuple[np.ndarray, np.ndarray]:
    """Join logits (B, 1 + K) and labels (B,) of this rank's real rows."""
    logits = torch.cat([each.logits for each in outputs])
    labels = torch.cat([each.labels for each in outputs])
    real = torch.cat([each.weights for each in outputs]) > 0
    return logits[real].float().cpu().numpy(), labels[real].cpu().numpy()


def diagnostics(
    logits: np.ndarray, labels: np.ndarray, last: Outputs, names: tuple[str, ...], threshold: float
) -> dict[str, float]:
    """Of the branches: disagreement rates of each directed pair; norms of latents and the transforms' distance from the identity.

    Args:
        logits: of this rank's rows since the last line of the log, as `own_rows` gives them.
        labels: likewise.
        last: of the last step, which measured the norms and distances of its batch.
        names: of the branches.
        threshold: below it a branch's BCE is strong, above it weak.
    """
    norms = zip(names, last.latent_norms.tolist(), strict=False)
    values = {f"latent_norm/{name}": norm for name, norm in norms}
    if len(names) < 2:
        return values
    branches = torch.from_numpy(np.ascontiguousarray(logits[:, 1:].T))
    rates = disagreement_rates(branches, torch.from_numpy(labels), threshold).tolist()
    values |= {
        f"disagreement/{names[i]}>{names[j]}": rates[i][j]
        for i in range(len(names))
        for j in range(len(names))
        if i != j
    }
    distances = last.transform_distance.tolist()
    for (i, j), distance in zip(branch_pairs(len(names)), distances, strict=False):
        values[f"transform_distance/{names[i]}-{names[j]}"] = distance
    return values


def evaluate_stream(
    built: Built,
    stream: ParquetStream,
    process: Process,
    autocast: Callable[[], Any],
    give_up: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Score every row of a stream once; return its metrics, equal on every rank. Training goes on as if it had not happened.

    Args:
        built: the model.
        stream: of rows.
        process: this rank.
        autocast: context of the forward pass.
        give_up: asked after each batch, with the same answer on every rank.

    Raises:
        EvaluationGivenUpError: as asked.
    """
    rows, groups = [], []
    with averaged_buffers(built.model):
        batches = _with_groups(iter(stream), groups)
        with (
            blamed_on(process),
            closing(evaluate_batches(built.model, built.optimizer, batches, autocast)) as scored,
        ):
            for outputs in scored:
                columns = [outputs.logits.float(), outputs.labels[:, None], outputs.weights[:, None]]
                rows.append(torch.cat(columns, dim=1).cpu().numpy())
                if give_up():
                    raise EvaluationGivenUpError
    width = 3 + len(built.branch_names)
    gathered = gather_rows(np.concatenate(rows) if rows else np.zeros((0, width), np.float32), process)
    ids = gather_rows(np.concatenate(groups)[:, None], process) if stream.schema.group_column else None
    metrics: dict[str, Any] = {}
    if gathered is not None:
        real = gathered[:, -1] > 0
        metrics = evaluate_predictions(
            gathered[real, :-2],
            gathered[real, -2],
            built.branch_names,
            None if ids is None else ids[real, 0],
        )
        metrics["rows"] = int(real.sum())
        metrics["reliability"] = reliability(gathered[real, 0], gathered[real, -2])
    return broadcast_value(metrics, process)


def _with_groups(batches: Iterator[Batch], groups: list[np.ndarray]) -> Iterator[Batch]:
    """Note each batch's group ids on the way: the model has no use for them."""
    for batch in batches:
        if batch.group_ids is not None:
            groups.append(batch.group_ids.numpy())
        yield batch
