"""What each run of a study says of each test row, kept beside its checkpoints, so that models can be compared row by row."""

import os
from collections.abc import Mapping
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from data.errors import InputError
from mbcnet_rec.config import RunConfig
from mbcnet_rec.runtime.process import joined_process
from mbcnet_rec.scoring.evaluate import Question, score_rows
from mbcnet_rec.scoring.metrics import softplus
from mbcnet_rec.scoring.paired import Difference, mean_difference, paired_differences
from mbcnet_rec.scoring.trained_run import find_best

ROW_SCORES = "row_scores.npz"


class RowScores(NamedTuple):
    """Of one run; B rows, O outputs."""

    outputs: tuple[str, ...]  # "" for the fused one, then the branches
    logits: np.ndarray  # (B, O) float32
    labels: np.ndarray  # (B,) of 0 and 1
    groups: np.ndarray | None  # (B,) int64

    def of(self, output: str) -> np.ndarray:
        """Logits of one output, (B,)."""
        return self.logits[:, self.outputs.index(output)]


def keep_row_scores(config: RunConfig) -> None:
    """Score the test rows of a finished run, or its validation rows where it has no others; too many to keep leave an empty file.

    InputError if a score is not a number.
    """
    folder = config.run_folder
    with joined_process(config.train.device) as process:
        question = Question("test" if config.data.test else "valid")
        tallies, _ = score_rows(find_best(config, folder, process), process, question)
        (tally,) = tallies.of.values()
        rows = tally.kept(process)
    assert rows is not None  # of one process
    some = slice(None) if tally.exact else slice(0)
    kept = {"outputs": np.array(["", *tally.branches]), "logits": rows.logits[some], "labels": rows.labels[some]}
    if rows.group_ids is not None:
        kept["groups"] = rows.group_ids[some]
    draft = folder / f".{ROW_SCORES}.partial"
    with draft.open("wb") as file:
        np.savez(file, **kept)  # pyright: ignore[reportArgumentType]
    os.replace(draft, folder / ROW_SCORES)


def read_row_scores(config: RunConfig) -> RowScores | None:
    """What `keep_row_scores` has kept of a run, which is scored now if it was interrupted before; None where that cannot be, or there are too many rows."""
    path = config.run_folder / ROW_SCORES
    if not path.is_file():
        with suppress(InputError):  # its checkpoints are gone, say
            keep_row_scores(config)
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as kept:
        found = RowScores(tuple(kept["outputs"].tolist()), kept["logits"], kept["labels"], kept.get("groups"))
    return found if len(found.labels) else None


def row_differences(
    ours: Mapping[int, RowScores], theirs: Mapping[int, RowScores], outputs: tuple[str, str] = ("", "")
) -> dict[str, Difference]:
    """Compare two variants row by row over the seeds that both have: AUC of their mean logits, and the mean of their log-losses.

    Log-loss is not that of the mean logits, which are better calibrated than any of them. Empty where the rows are not the same.
    """
    shared = sorted(ours.keys() & theirs.keys())
    scores = [each[seed] for each in (ours, theirs) for seed in shared]
    if not scores or not all(np.array_equal(each.labels, scores[0].labels) for each in scores):
        return {}
    labels, groups = scores[0].labels, scores[0].groups
    own, other = (
        np.stack([each[seed].of(output) for seed in shared]).astype(np.float64)
        for each, output in zip((ours, theirs), outputs, strict=True)
    )
    losses = softplus(own) - softplus(other) - labels * (own - other)  # (seeds, B)
    area = paired_differences(own.mean(0), other.mean(0), labels, groups)["auc"]
    return {"auc": area, "log_loss": mean_difference(losses.mean(0), groups)}
