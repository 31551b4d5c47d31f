"""Scored rows of all ranks -> metrics: exact from every row up to EXACT_ROWS of them, beyond that from counts in bins of the logit.

Binned, log-loss, NE and calibration stay exact, an AUC carries the bound that metrics.py derives, and GAUC is that of a sample of
whole groups. Either way rank 0 never holds more than about EXACT_ROWS rows.

Shapes: n rows of one batch, O outputs (the fused one first, then the branches), C columns that cut rows into slices.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from mbcnet_rec.runtime.process import Process, gather_rows
from mbcnet_rec.scoring.metrics import Estimate, Histogram, gauc

EXACT_ROWS = 10_000_000  # 4 outputs: 280 MB of logits, labels and groups on rank 0
NUM_BINS = 2**20  # of all rows: an AUC's bound is then near 1e-6
SLICE_BINS = 2**14  # of each slice: near 1e-4


class Rows(NamedTuple):
    """Rows of all ranks, rank after rank."""

    logits: np.ndarray  # (N, O) float32
    labels: np.ndarray  # (N,) float32
    group_ids: np.ndarray | None  # (N,) int64; None without a group column
    slices: np.ndarray  # (N, C) int64


class KeptRows:
    """Keeps every row.

    Args:
        num_outputs: O.
        has_groups: whether rows have group ids.
        num_columns: C.
    """

    def __init__(self, num_outputs: int, *, has_groups: bool, num_columns: int = 0) -> None:
        self._has_groups = has_groups
        self._rows = [np.zeros((0, num_outputs + 1), np.float32)]  # logits, label
        self._keys = [np.zeros((0, has_groups + num_columns), np.int64)]  # group id, slices

    def add(
        self,
        logits: np.ndarray,
        labels: np.ndarray,
        group_ids: np.ndarray | None,
        slices: np.ndarray | None = None,
    ) -> None:
        """Take the rows of one batch: logits (n, O), labels (n,), group ids (n,), slices (n, C)."""
        self._rows.append(np.concatenate([logits, labels[:, None]], axis=1))
        groups = group_ids[:, None] if group_ids is not None else np.zeros((len(labels), 0), np.int64)
        self._keys.append(groups if slices is None else np.concatenate([groups, slices], axis=1))

    def gathered(self, process: Process) -> Rows | None:
        """All ranks' rows on rank 0, None elsewhere. Every rank calls it, once."""
        rows = gather_rows(np.concatenate(self._rows), process)
        keys = gather_rows(np.concatenate(self._keys), process)
        if rows is None or keys is None:
            return None
        groups = keys[:, 0] if self._has_groups else None
        return Rows(rows[:, :-1], rows[:, -1], groups, keys[:, int(self._has_groups) :])


class BinnedRows:
    """Counts rows in bins and forgets them, but for a sample of the groups.

    Args:
        branches: names of the outputs after the fused one.
        group_stride: GAUC is that of the groups whose id is a multiple of it, about one in `group_stride` (ids are hashes); 0:
            there are no groups.
        slices: number of slices of each of the C columns; each slice has a histogram of its own.
    """

    def __init__(self, branches: tuple[str, ...], group_stride: int, slices: Sequence[int] = ()) -> None:
        self.branches, self._stride = branches, group_stride
        outputs = 1 + len(branches)
        self.everything = Histogram(outputs, NUM_BINS)
        self.slices = [[Histogram(outputs, SLICE_BINS) for _ in range(count)] for count in slices]
        self.sample = KeptRows(1, has_groups=True)

    def add(
        self,
        logits: np.ndarray,
        labels: np.ndarray,
        group_ids: np.ndarray | None,
        slices: np.ndarray | None = None,
    ) -> None:
        """Take the rows of one batch, as KeptRows does."""
        self.everything.add(logits, labels)
        if slices is not None:
            for histograms, column in zip(self.slices, slices.T, strict=True):
                for number in np.unique(column):
                    chosen = column == number
                    histograms[number].add(logits[chosen], labels[chosen])
        if self._stride and group_ids is not None:
            taken = group_ids % self._stride == 0
            self.sample.add(logits[taken, :1], labels[taken], group_ids[taken])

    def metrics(self, process: Process) -> dict[str, Estimate]:
        """Metrics of all ranks' rows; GAUC on rank 0 only. Adds up every histogram over ranks: every rank calls it, once."""
        for histogram in (self.everything, *(each for column in self.slices for each in column)):
            if process.world_size > 1:
                dist.all_reduce(torch.from_numpy(histogram.counts))
                dist.all_reduce(torch.from_numpy(histogram.sums))
        found = self.everything.metrics(self.branches)
        sample = self.sample.gathered(process)
        if sample is not None and sample.group_ids is not None and len(sample.labels):
            found["gauc"] = gauc(sample.logits[:, 0], sample.labels, sample.group_ids)
        return found


def group_stride(num_rows: int, exact_rows: int) -> int:
    """The stride of a sample of groups that has about `exact_rows` of `num_rows` rows."""
    return -(-num_rows // max(1, exact_rows))
