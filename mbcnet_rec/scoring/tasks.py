"""Several labels: each task's rows, and the names of its metrics.

METRIC/TASK and METRIC/TASK/BRANCH: auc/click, log_loss/buy/efgc. METRIC alone is that of the first task. Shapes: n rows, T tasks, O outputs of a task.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from data.errors import InputError
from mbcnet_rec.scoring.metrics import exact_metrics, why_no_auc
from mbcnet_rec.scoring.ranking import names_of

T = TypeVar("T")
LOWER = ("log_loss", "ne")  # metrics that are better where they are lower


class TaskRows(NamedTuple):
    """The rows that have a task's label; all of them where there is one label, whose task is ""."""

    task: str
    known: Any  # index of these rows
    logits: np.ndarray  # (n, O)
    labels: np.ndarray  # (n,)


def by_task(tasks: Sequence[str], logits: np.ndarray, labels: np.ndarray) -> Iterator[TaskRows]:
    """Take apart logits (n, T O) and labels (n, T), NaN where there is none; or (n, O) and (n,) of one label, without tasks."""
    if not tasks:
        yield TaskRows("", slice(None), logits, labels)
        return
    for place, (task, own) in enumerate(zip(tasks, np.split(logits, len(tasks), axis=1), strict=True)):
        known = ~np.isnan(labels[:, place])
        yield TaskRows(task, known, own[known], labels[known, place])


def named(task: str, values: Mapping[str, T]) -> dict[str, T]:
    """A task's metrics by their names among those of all: auc/efgc -> auc/TASK/efgc."""
    parts = ((*key.partition("/"), value) for key, value in values.items())
    return {f"{metric}/{task}{slash}{rest}" if task else metric + slash + rest: v for metric, slash, rest, v in parts}


def joined(found: Mapping[str, Mapping[str, T]]) -> dict[str, T]:
    """Task -> its metrics, to those of all by name; the first's also without its name."""
    first = {key: value for key, value in next(iter(found.values())).items() if "/" not in key or "" in found}
    return first | {key: value for task, values in found.items() for key, value in named(task, values).items()}


def output_names(tasks: Sequence[str], branches: Sequence[str]) -> list[str]:
    """Every output in the order of the logits: "" for the fused one, BRANCH; TASK and TASK/BRANCH of tasks."""
    return ["/".join(part for part in (task, branch) if part) for task in tasks or ("",) for branch in ("", *branches)]


class Judge:
    """Says by one metric of all tasks which evaluation is better; InputError if there is none, or it is better neither high nor low.

    `ranking_k`: places of rankings that are measured; None: there is no group column.
    """

    def __init__(
        self, key: str, tasks: Sequence[str], branches: tuple[str, ...], *, ranking_k: Sequence[int] | None
    ) -> None:
        own = dict.fromkeys(exact_metrics(np.zeros((0, 1 + len(branches))), np.zeros(0), branches, errors=False))
        own |= dict.fromkeys(() if ranking_k is None else ("gauc", *names_of(ranking_k)))
        known = joined(dict.fromkeys(tasks or ("",), own))
        fit = [each for each in known if each.partition("/")[0] != "calibration"]
        if key not in fit:
            raise InputError(f"train.early_stop = {key!r}: wanted one of {', '.join(fit)}; change it")
        metric, slash, rest = key.partition("/")
        self.key, self._suffix, self._sign = key, slash + rest, -1.0 if metric in LOWER else 1.0
        self.title = "AUC" if key == "auc" else key

    def value(self, metrics: Mapping[str, Any]) -> float:
        """Of an evaluation: the larger the better; NaN where the metric is not defined."""
        return self._sign * metrics[self.key]

    def log_loss(self, metrics: Mapping[str, Any]) -> float:
        """Of the output that is judged."""
        return metrics[f"log_loss{self._suffix}"]

    def why_none(self, metrics: Mapping[str, Any]) -> str:
        """Why the metric is not defined, in words."""
        own = {name: metrics[name + self._suffix] for name in ("auc", "log_loss", "calibration")}
        return why_no_auc(own) or "no group has rows of both classes"
