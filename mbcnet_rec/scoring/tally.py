"""Scored rows of all ranks -> metrics: exact from every row up to EXACT_ROWS of them, beyond that from counts in bins of the logit.

Binned, log-loss, NE and calibration stay exact, as do the metrics of ranking.py at the places `ranking_k`, whose rows wait on the disk, and an AUC
carries the bound that metrics.py derives. Either way rank 0 never holds more than about EXACT_ROWS rows.

Shapes: n rows of one batch, O outputs (the fused one first, then the branches), C columns that cut rows into slices.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from mbcnet_rec.runtime.process import Process, gather_rows
from mbcnet_rec.scoring.metrics import Estimate, Histogram, exact_metrics, reliability
from mbcnet_rec.scoring.ranking import group_estimates, group_metrics, group_sums, grouped
from mbcnet_rec.scoring.tasks import by_task, joined

EXACT_ROWS = 10_000_000  # 4 outputs: 280 MB of logits, labels and groups on rank 0
NUM_BINS = 2**20  # of all rows: an AUC's bound is then near 1e-6
SLICE_BINS = 2**14  # of each slice: near 1e-4
ROW = np.dtype([("group", np.int64), ("logit", np.float32), ("label", np.float32)])
MOST_SHARES = 512  # files that are open at once


class Rows(NamedTuple):
    """Rows of all ranks, rank after rank."""

    logits: np.ndarray  # (N, O) float32
    labels: np.ndarray  # (N,) float32
    group_ids: np.ndarray | None  # (N,) int64; None without a group column
    slices: np.ndarray  # (N, C) int64


class Scores(NamedTuple):
    """Metrics of some rows, named as metrics.exact_metrics names them."""

    rows: int
    positives: int
    metrics: dict[str, Estimate]


@dataclass(frozen=True)
class Answer:
    """What came out."""

    exact: bool  # whether all logits were kept
    everything: Scores  # of all rows
    slices: dict[str, dict[str, Scores]]  # column -> value, the largest first and the rest last
    reliability: list[list[float]]  # of the fused output, as metrics.reliability gives it

    @property
    def values(self) -> dict[str, Any]:
        """What training logs."""
        values = {name: estimate.value for name, estimate in self.everything.metrics.items()}
        return values | {"rows": self.everything.rows, "reliability": self.reliability}


class GroupShares:
    """The fused logits, labels and group ids of this rank's rows, 16 bytes a row in temporary files. `shares`: that they are cut into."""

    def __init__(self, shares: int, ranking_k: Sequence[int]) -> None:
        # closed by `metrics`, and without a name, so that they are gone with the process
        self._files = [tempfile.TemporaryFile() for _ in range(min(shares, MOST_SHARES))]  # noqa: SIM115
        self._ranking_k = ranking_k

    def add(self, logits: np.ndarray, labels: np.ndarray, group_ids: np.ndarray) -> None:
        """Take rows: all (B,)."""
        logits, labels, group_ids = grouped(logits, labels, group_ids)
        rows = np.empty(len(labels), ROW)
        rows["group"], rows["logit"], rows["label"] = group_ids, logits, labels
        shares = group_ids % len(self._files)
        for share in np.unique(shares).tolist():
            self._files[share].write(rows[shares == share].tobytes())

    def metrics(self, process: Process) -> dict[str, Estimate]:
        """Exact metrics of all ranks' rows, whatever rank has them, on rank 0; nothing elsewhere. Every rank calls it, once."""
        sums: dict[str, np.ndarray] = {}
        for file in self._files:
            with file:
                file.seek(0)
                rows = gather_rows(np.frombuffer(file.read(), ROW), process)
            if rows is not None:
                of_share = group_sums(rows["logit"], rows["label"], rows["group"], self._ranking_k)
                sums = {name: each + sums.get(name, 0) for name, each in of_share.items()}
        return group_estimates(sums)


class Tally:
    """Keeps every row, and is `exact`; or, where they are more than `exact_rows`, counts them in bins, and leaves groups to the disk.

    `num_rows` are of all ranks, `branches` the outputs after the fused one, `slices` the names of the slices of each of the C columns.
    """

    def __init__(
        self,
        num_rows: int,
        branches: tuple[str, ...],
        *,
        has_groups: bool,
        slices: Mapping[str, Sequence[str]] | None = None,
        exact_rows: int = EXACT_ROWS,
        ranking_k: Sequence[int] = (),
    ) -> None:
        self.exact = num_rows <= exact_rows
        self._groups: GroupShares | None = None
        self.ranking_k = ranking_k
        self.branches, self._has_groups, self.names = branches, has_groups, slices or {}
        self._rows = [np.zeros((0, len(branches) + 2), np.float32)]  # logits, label
        self._keys = [np.zeros((0, has_groups + len(self.names)), np.int64)]  # group id, slices
        if not self.exact:
            self._everything = Histogram(1 + len(branches), NUM_BINS)
            shares = -(-num_rows // max(1, exact_rows))  # ids of groups are hashes, so shares are about equal
            self._groups = GroupShares(shares, ranking_k) if has_groups else None
            self._slices = [[Histogram(1 + len(branches), SLICE_BINS) for _ in names] for names in self.names.values()]

    def add(
        self, logits: np.ndarray, labels: np.ndarray, group_ids: np.ndarray | None, slices: np.ndarray | None = None
    ) -> None:
        """Take the rows of one batch: logits (n, O), labels (n,), group ids (n,), slices (n, C)."""
        rows = np.concatenate([logits, labels[:, None]], axis=1)
        keys = np.zeros((len(labels), 0), np.int64) if slices is None else slices
        if group_ids is not None:
            keys = np.concatenate([group_ids[:, None], keys], axis=1)
        if not self.exact:
            self._count(logits, labels, slices)
            if self._groups is not None and group_ids is not None:
                self._groups.add(logits[:, 0], labels, group_ids)
            return
        self._rows.append(rows)
        self._keys.append(keys)

    def _count(self, logits: np.ndarray, labels: np.ndarray, slices: np.ndarray | None) -> None:
        self._everything.add(logits, labels)
        for histograms, places in zip(self._slices, slices.T if slices is not None else (), strict=True):
            for place in np.unique(places):
                chosen = places == place
                histograms[place].add(logits[chosen], labels[chosen])

    def kept(self, process: Process) -> Rows | None:
        """All ranks' kept rows on rank 0, None elsewhere. Every rank calls it, once."""
        rows = gather_rows(np.concatenate(self._rows), process)
        keys = gather_rows(np.concatenate(self._keys), process)
        if rows is None or keys is None:
            return None
        groups = keys[:, 0] if self._has_groups else None
        return Rows(rows[:, :-1], rows[:, -1], groups, keys[:, int(self._has_groups) :])

    def answer(self, process: Process, *, errors: bool = True) -> Answer | None:
        """The metrics on rank 0, None elsewhere; exact ones without `errors` in a third of the time. Every rank calls it, once."""
        if self.exact:
            rows = self.kept(process)
            return None if rows is None else self._of_rows(rows, errors)
        if process.world_size > 1:
            for histogram in (self._everything, *(each for column in self._slices for each in column)):
                dist.all_reduce(torch.from_numpy(histogram.counts))
                dist.all_reduce(torch.from_numpy(histogram.sums))
        of_groups = self._groups.metrics(process) if self._groups is not None else {}
        return self._of_counts(of_groups) if process.is_first else None

    def _of_rows(self, rows: Rows, errors: bool) -> Answer:
        def scores(chosen: Any) -> Scores:
            labels = rows.labels[chosen]
            metrics = exact_metrics(rows.logits[chosen], labels, self.branches, errors=errors)
            if rows.group_ids is not None:
                fused, groups = rows.logits[chosen, 0], rows.group_ids[chosen]
                metrics |= group_metrics(fused, labels, groups, self.ranking_k)
            return Scores(len(labels), int((labels > 0).sum()), metrics)

        slices = {
            column: {name: scores(places == place) for place, name in enumerate(names)}
            for (column, names), places in zip(self.names.items(), rows.slices.T, strict=True)
        }
        return Answer(True, scores(slice(None)), slices, reliability(rows.logits[:, 0], rows.labels))

    def _of_counts(self, of_groups: dict[str, Estimate]) -> Answer:
        def scores(histogram: Histogram) -> Scores:
            negatives, positives = map(int, histogram.counts[:, 0].sum(axis=1))
            return Scores(negatives + positives, positives, histogram.metrics(self.branches))

        slices = {
            column: dict(zip(names, map(scores, histograms), strict=True))
            for (column, names), histograms in zip(self.names.items(), self._slices, strict=True)
        }
        everything = scores(self._everything)
        everything.metrics.update(of_groups)
        return Answer(False, everything, slices, self._everything.reliability())


Answers = dict[str, Answer]  # task -> what came out; "" of one label


def values_of(answers: Answers) -> dict[str, Any]:
    """What training logs of all tasks."""
    return joined({task: answer.values for task, answer in answers.items()})


class Tallies:
    """A Tally for each task, of the rows that have its label; of one label a single one, of task ""."""

    def __init__(self, tasks: Sequence[str], num_rows: int, branches: tuple[str, ...], **options: Any) -> None:
        """`num_rows`, `branches` and options as of each Tally."""
        self.tasks, self.num_rows = tuple(tasks), num_rows
        self.of = {task: Tally(num_rows, branches, **options) for task in tasks or ("",)}

    def add(
        self, logits: np.ndarray, labels: np.ndarray, group_ids: np.ndarray | None, slices: np.ndarray | None = None
    ) -> None:
        """Take the rows of one batch, of T tasks logits (n, T O) and labels (n, T); the rest as `Tally.add`."""
        for task, known, own, own_labels in by_task(self.tasks, logits, labels):
            more = [None if each is None else each[known] for each in (group_ids, slices)]
            self.of[task].add(own, own_labels, *more)

    def answer(self, process: Process, *, errors: bool = True) -> Answers | None:
        """As `Tally.answer`, of each task."""
        found = {task: tally.answer(process, errors=errors) for task, tally in self.of.items()}
        return {task: answer for task, answer in found.items() if answer} or None
