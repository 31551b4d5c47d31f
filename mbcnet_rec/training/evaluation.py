"""What is computed from a model's outputs: the numbers of a log line, and the metrics of a whole split."""

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from itertools import permutations
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from data.stream import ParquetStream
from mbcnet_rec.model.losses import Threshold, branch_pairs, disagreement_rates
from mbcnet_rec.model.objective import Outputs
from mbcnet_rec.runtime.process import (
    Process,
    agreed,
    any_rank,
    averaged_buffers,
    blamed_on,
    broadcast_value,
    max_over_ranks,
    mean_over_ranks,
)
from mbcnet_rec.scoring.scorer import Autocast, Scorer
from mbcnet_rec.scoring.tally import EXACT_ROWS, Tallies, values_of
from mbcnet_rec.training.built import Built


class EvaluationStoppedError(Exception):
    """A stop request came during an evaluation."""


def read_first(stream: ParquetStream, process: Process, asked: Callable[[], bool]) -> None:
    """Read the rows once before several ranks score them: a rank that met a fault on the way would leave the others waiting for it.

    `asked` tells whether this rank is to stop. Raises EvaluationStoppedError, on every rank, if one is, and what `agreed` raises.
    """
    if process.world_size == 1:
        return
    store, stopped = process.store, False
    assert store is not None
    with agreed(process):
        for _ in stream:
            # no collective: ranks that met a fault, or that are through, would not join it
            if asked():
                store.set("stop", "")
            if stopped := store.check(["stop"]):
                break
    if any_rank(stopped):
        raise EvaluationStoppedError
    stream.counters.clear()
    stream.nulls.clear()


def average_terms(outputs: list[Outputs]) -> dict[str, float]:
    """Average each loss term over steps and ranks."""
    names = list(outputs[0].terms)
    stacked = torch.stack([each.terms[name] for each in outputs for name in names]).view(len(outputs), -1)
    means = mean_over_ranks(stacked.double().mean(0).cpu())
    return dict(zip(names, means.tolist(), strict=True))


def disagreements(
    logits: np.ndarray, labels: np.ndarray, names: tuple[str, ...], threshold: Threshold
) -> dict[str, float]:
    """Disagreement rates of each directed pair of branches. Below the threshold a branch's BCE is strong, above it weak.

    Logits (B, 1 + K) and labels (B,) are of this rank's real rows since the last line of the log.
    """
    if len(names) < 2:
        return {}
    branches = torch.from_numpy(np.ascontiguousarray(logits[:, 1:].T))
    rates = disagreement_rates(branches, torch.from_numpy(labels), threshold).tolist()
    return {f"disagreement/{names[i]}>{names[j]}": rates[i][j] for i, j in permutations(range(len(names)), 2)}


def latent_measures(last: Outputs, names: tuple[str, ...]) -> dict[str, float]:
    """Norms of latents and the transforms' distance from the identity, of the last step's batch."""
    norms = zip(names, last.latent_norms.tolist(), strict=False)
    distances = zip(branch_pairs(len(names)), last.transform_distance.tolist(), strict=False)
    values = {f"latent_norm/{name}": norm for name, norm in norms}
    return values | {f"transform_distance/{names[i]}-{names[j]}": distance for (i, j), distance in distances}


def dead_outputs(outputs: list[Outputs], names: Sequence[str]) -> list[str]:
    """Those of all `names` of outputs that in each of these steps said the same of all ranks' rows, as where latents are 0.

    Steps in which no rank has two rows say nothing. Every rank calls it.
    """
    if not outputs:
        return []
    logits = pad_sequence([each.logits for each in outputs], batch_first=True)  # (steps, B, 1 + K)
    real = pad_sequence([each.weights for each in outputs], batch_first=True) > 0
    bounds = torch.cat([logits, -logits], dim=2).masked_fill(~real.unsqueeze(2), -math.inf).amax(1)
    # greatest and negated least logits, rows
    found = max_over_ranks(torch.cat([bounds, real.sum(1, keepdim=True).to(bounds.dtype)], dim=1).cpu())
    highest, lowest = found[found[:, -1] > 1, :-1].unflatten(1, (2, -1)).unbind(1)  # (steps, 1 + K) each
    rounding = 4 * torch.finfo(found.dtype).eps * highest.abs()  # of equal rows in one product of matrices
    same = (highest + lowest <= rounding).all(0) & (len(highest) > 0)
    return [name for name, dead in zip(names, same.tolist(), strict=True) if dead]


def evaluate_stream(
    built: Built,
    stream: ParquetStream,
    process: Process,
    autocast: Autocast,
    stop_requested: Callable[[], bool] = lambda: False,
    exact_rows: int = EXACT_ROWS,
    ranking_k: Sequence[int] = (),
) -> dict[str, Any]:
    """Score every row of a stream once; return its metrics, equal on every rank. Training continues as if it had not happened.

    `stop_requested` is asked after each batch, with the same answer on every rank. Up to `exact_rows` all rows are gathered on rank 0;
    beyond, AUC is binned, and metrics of groups are of rows that wait on the disk.

    Raises:
        EvaluationStoppedError: `stop_requested` returned True.
    """
    has_groups = bool(stream.schema.group_column)
    options = {"has_groups": has_groups, "exact_rows": exact_rows, "ranking_k": ranking_k}
    tally = Tallies(built.tasks, stream.num_rows, built.branch_names, **options)
    with (
        averaged_buffers(built.model),
        blamed_on(process),
        closing(Scorer(built.model, autocast).score((batch, batch.group_ids) for batch in stream)) as scored,
    ):
        for each in scored:
            groups = None if each.note is None else each.note.numpy()[each.real]
            tally.add(each.logits, each.labels, groups)
            if stop_requested():
                raise EvaluationStoppedError
    answers = tally.answer(process, errors=False)
    return broadcast_value(values_of(answers) if answers else {}, process)
