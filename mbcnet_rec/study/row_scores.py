"""What each run of a study says of each test row, kept beside its checkpoints, so that models can be compared row by row."""

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mbcnet_rec.config import RunConfig
from mbcnet_rec.runtime.process import joined_process
from mbcnet_rec.scoring.evaluate import Question, score_rows
from mbcnet_rec.scoring.paired import Difference, paired_differences
from mbcnet_rec.scoring.trained_run import find_step

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
    """Score the test rows of a finished run, or its validation rows where it has no others; those that are too many to keep leave an empty file.

    Raises:
        InputError: a score is not a number.
    """
    folder = config.run_folder
    with joined_process(config.train.device) as process:
        step = find_step(config, folder, process)
        question = Question("test" if config.data.test else "valid")
        tally, _ = score_rows(config, folder, step, process, question)
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
    """What `keep_row_scores` has kept of a run, which is scored now if it was interrupted before; None where there are too many rows, or none."""
    if not (config.data.test or config.data.valid):
        return None
    if not (config.run_folder / ROW_SCORES).is_file():
        keep_row_scores(config)
    with np.load(config.run_folder / ROW_SCORES, allow_pickle=False) as kept:
        found = RowScores(tuple(kept["outputs"].tolist()), kept["logits"], kept["labels"], kept.get("groups"))
    return found if len(found.labels) else None


def row_differences(
    ours: Mapping[int, RowScores], theirs: Mapping[int, RowScores], outputs: tuple[str, str] = ("", "")
) -> dict[str, Difference]:
    """Compare the scores of two variants, each the mean logit of the seeds that both have, row by row; empty where that cannot be."""
    shared = sorted(ours.keys() & theirs.keys())
    if not shared or not _same_rows([each[seed] for each in (ours, theirs) for seed in shared]):
        return {}
    own, other = (
        np.mean([each[seed].of(output) for seed in shared], axis=0)
        for each, output in zip((ours, theirs), outputs, strict=True)
    )
    first = ours[shared[0]]
    return paired_differences(own, other, first.labels, first.groups)


def _same_rows(scores: Sequence[RowScores]) -> bool:
    return all(np.array_equal(each.labels, scores[0].labels) for each in scores)
