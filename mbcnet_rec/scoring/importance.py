"""`mbcnet importance`: what a run loses on held-out rows where the values of a field, or of all fields of a group, are those of other rows.

Rows change places within a batch, the same way for all fields of a group. What is lost is AUC before less after, and log-loss after less before;
a repeat draws the places anew, and intervals are Student's t over repeats: they tell how sure the figure of these rows is, not of other rows.

Shapes: n rows of a batch, K branches.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import stats
from tqdm import tqdm

from data.errors import InputError
from data.reading.columns import Columns, Lists
from data.reading.conditions import select_files
from data.reading.files import files_in_words, resolve_files
from data.schema import Schema
from data.stream.batch import Batch, gather
from data.whole_folder import write_whole
from mbcnet_rec.report.page import Table, text_table
from mbcnet_rec.report.run_report import IMPORTANCE, importance_cells, write_run_report
from mbcnet_rec.runtime.process import Process
from mbcnet_rec.scoring.chunks import labelled_rows
from mbcnet_rec.scoring.evaluate import Question
from mbcnet_rec.scoring.metrics import evaluate_predictions
from mbcnet_rec.scoring.trained_run import TrainedRun

SHOWN = 15  # fields in the terminal
Target = tuple[str, str]  # "fields" or "groups", and a name
Lost = dict[str, dict[str, list[float]]]  # name -> metric -> mean, low, high


@dataclass(frozen=True)
class Effort:
    """How much is scored."""

    rows: int = 10_000
    repeats: int = 5


def run_importance(
    run: TrainedRun, process: Process, question: Question, effort: Effort, *, as_json: bool = False
) -> int:
    """Permute each field and each group, print what is lost, keep it in RUN/importance.json, and write the report again.

    Raises:
        InputError: no rows, or rows of one class.
    """
    if process.world_size > 1:
        raise InputError("importance: wanted one process; start it without torchrun")
    schema, config = run.schema, run.config.data
    where = getattr(config, f"{question.split}_where") if not question.data else ()
    files = select_files(resolve_files(question.data or getattr(config, question.split)), where, schema)
    names = run.config.model.branch_names
    measured: dict[Target, list[dict[str, float]]] = {}
    rows = 0
    for target, logits, labels in _scored(
        run, process, effort, labelled_rows(files, schema, config.eval_options(where), ())
    ):
        rows = len(labels)
        measured.setdefault(target, []).append(evaluate_predictions(logits, labels, names))
    (before,) = measured.pop(("", ""))
    if np.isnan(before["auc"]):
        raise InputError(
            f"{files_in_words(files)}: AUC is not defined on {rows:,} rows; raise --rows, or name other --data"
        )
    found: dict[str, Lost] = {"fields": {}, "groups": {}}
    for (kind, name), after in measured.items():
        found[kind][name] = {
            metric: _interval(metric, before[metric], [each[metric] for each in after])
            for metric in before
            if metric.startswith(("auc", "log_loss"))
        }
    told: dict[str, Any] = {
        "split": question.split,
        "data": list(question.data),
        "step": run.step,
        "rows": rows,
        "repeats": effort.repeats,
    }
    told |= {"before": before, **found}
    write_whole(run.folder / IMPORTANCE, json.dumps(told))
    page = write_run_report(run.folder)
    if as_json:
        print(json.dumps(told))
        return 0
    print(
        f"{run.folder}: lost on {rows:,} rows of {files_in_words(files)}, {effort.repeats} repeats, weights of step {run.step}"
    )
    for kind, own in found.items():
        if own:
            print(f"\n{text_table(Table(*importance_cells(kind, own, SHOWN)))}")
    print(f"wrote {page}")
    return 0


def _interval(metric: str, before: float, after: list[float]) -> list[float]:
    lost = (before - np.asarray(after)) * (1 if metric.startswith("auc") else -1)
    half = stats.t.ppf(0.975, len(lost) - 1) * lost.std(ddof=1) / len(lost) ** 0.5
    return [float(lost.mean()), float(lost.mean() - half), float(lost.mean() + half)]


def _scored(
    run: TrainedRun, process: Process, effort: Effort, source: Any
) -> Iterator[tuple[Target, np.ndarray, np.ndarray]]:
    """Logits (rows, 1 + K) and labels of the rows as they are, ("", ""), and of each target and repeat."""
    schema = run.schema
    scorer, batch_rows = run.scorer(process)
    reader, chunks = source
    kept, left = [], effort.rows
    for group in (group for chunk in chunks for group in chunk.row_groups):
        for rows, place in reader.batches(group, batch_rows, reader.columns) if left else ():
            rows = rows.slice(0, left)
            left -= rows.num_rows
            kept.append((rows, place, reader.encoder.encode(rows, place)))
    groups = {("groups", name): fields for name, fields in schema.groups.items()}
    targets = {("fields", each.name): (each.name,) for each in schema.features} | groups
    choices = {target: chosen(schema, fields) for target, fields in targets.items()}

    def batches() -> Iterator[tuple[Batch, Target]]:
        yield from ((of(columns), ("", "")) for _, _, columns in kept)
        for repeat in range(effort.repeats):
            orders = [
                np.random.default_rng([repeat, n]).permutation(rows.num_rows) for n, (rows, _, _) in enumerate(kept)
            ]
            others = [
                reader.encoder.encode(rows.take(order), place)
                for (rows, place, _), order in zip(kept, orders, strict=True)
            ]
            for target, choice in choices.items():
                for (_, _, columns), other in zip(kept, others, strict=True):
                    yield of(mixed(columns, other, choice)), target

    def of(columns: Columns) -> Batch:
        return gather([(columns, 0, columns.num_rows)], batch_rows, schema)

    total = len(kept) * (1 + effort.repeats * len(targets))
    with (
        closing(scorer.score(batches())) as scored,
        tqdm(scored, total=total, unit="batch", desc="importance", disable=None) as bar,
    ):
        parts = []
        for each in bar:
            parts.append(each)
            if len(parts) == len(kept):
                yield (
                    each.note,
                    np.concatenate([part.logits for part in parts]),
                    np.concatenate([part.labels for part in parts]),
                )
                parts = []


def chosen(schema: Schema, fields: tuple[str, ...]) -> Mapping[str, np.ndarray]:
    """Which rows of each part of Columns belong to these fields."""
    parts = {
        "single_ids": [each for each in schema.sparse if each.is_single],
        "lists": [each for each in schema.sparse if not each.is_single],
        "weighted_lists": list(schema.weighted),
        "dense": [each for each in schema.dense for _ in range(each.dense_width)],
    }
    return {part: np.asarray([each.name in fields for each in own], bool) for part, own in parts.items()}


def mixed(columns: Columns, other: Columns, choice: Mapping[str, np.ndarray]) -> Columns:
    """Rows with the chosen fields of other rows, as many."""

    def lists(part: str) -> Lists:
        own, new, mask = getattr(columns, part), getattr(other, part), choice[part]
        values, weights = (
            tuple(b if is_new else a for a, b, is_new in zip(*pair, mask[: len(pair[0])], strict=True))
            for pair in ((own.values, new.values), (own.weights, new.weights))
        )
        return Lists(values, np.where(mask[:, None], new.offsets, own.offsets), weights)

    return replace(
        columns,
        single_ids=np.where(choice["single_ids"][:, None], other.single_ids, columns.single_ids),
        dense=np.where(choice["dense"], other.dense, columns.dense),
        lists=lists("lists"),
        weighted_lists=lists("weighted_lists"),
    )
