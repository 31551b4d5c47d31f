"""`mbcnet importance`: what a run loses on held-out rows where the values of a field, or of all fields of a group, are those of other rows.

Rows change places within a batch, the same way for all fields of a group. A sequence and the fields beside it change together, in every group that
has one of them: their lists belong to the same events. What is lost is AUC before less after, and log-loss after less before;
a repeat draws the places anew, and intervals are Student's t over repeats: they tell how sure the figure of these rows is, not of other rows.

Shapes: n rows of a batch, K branches.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace

import numpy as np
from scipy import stats
from tqdm import tqdm

from data.errors import InputError
from data.reading.columns import Columns, Lists
from data.reading.decode import RowReader, Rows
from data.reading.files import files_in_words
from data.schema import Schema
from data.stream.batch import Batch, gather
from data.whole_folder import write_whole
from mbcnet_rec.report.page import Table, text_table
from mbcnet_rec.report.run_report import IMPORTANCE, importance_cells, write_run_report
from mbcnet_rec.runtime.process import Process
from mbcnet_rec.scoring.chunks import Chunk, labelled_rows
from mbcnet_rec.scoring.evaluate import Question, files_of
from mbcnet_rec.scoring.metrics import evaluate_predictions
from mbcnet_rec.scoring.trained_run import TrainedRun

SHOWN = 15  # fields in the terminal
Target = tuple[str, str]  # "fields" or "groups", and a name
Lost = dict[str, dict[str, list[float]]]  # name -> metric -> mean, low, high


def run_importance(
    run: TrainedRun, process: Process, question: Question, rows: int, repeats: int, *, as_json: bool = False
) -> int:
    """Permute each field and group; print and keep what is lost, and write the report again. InputError if rows are lacking, or of one class."""
    if process.world_size > 1:
        raise InputError("importance: wanted one process; start it without torchrun")
    run.schema.require_one_label("importance")
    files, where = files_of(run, question)
    reader, chunks = labelled_rows(files, run.schema, run.config.data.eval_options(where), ())
    measured: dict[Target, list[dict[str, float]]] = {}
    for target, logits, labels in _scored(run, process, reader, chunks, rows, repeats):
        rows = len(labels)
        measured.setdefault(target, []).append(evaluate_predictions(logits, labels, run.config.model.branch_names))
    (before,) = measured.pop(("", ""))
    words = f"{rows:,} rows of {files_in_words(files)}"
    if np.isnan(before["auc"]):
        raise InputError(f"importance: AUC is not defined on {words}; raise --rows, or name other --data")
    found: dict[str, Lost] = {"fields": {}, "groups": {}}
    for (kind, name), after in measured.items():
        metrics = [metric for metric in before if metric.startswith(("auc", "log_loss"))]
        found[kind][name] = {each: _interval(each, before[each], [own[each] for own in after]) for each in metrics}
    told = {"taken": words, "step": run.step, "rows": rows, "repeats": repeats, "before": before, **found}
    write_whole(run.folder / IMPORTANCE, json.dumps(told))
    page = write_run_report(run.folder)
    if as_json:
        print(json.dumps(told))
        return 0
    print(f"{run.folder}: what is lost on {words}, {repeats} repeats, weights of step {run.step}")
    for kind, own in found.items():
        print(f"\n{text_table(Table(*importance_cells(kind, own, SHOWN)))}" if own else "")
    print(f"wrote {page}")
    return 0


def _interval(metric: str, before: float, after: list[float]) -> list[float]:
    lost = (before - np.asarray(after)) * (1 if metric.startswith("auc") else -1)
    half = stats.t.ppf(0.975, len(lost) - 1) * lost.std(ddof=1) / len(lost) ** 0.5
    return [float(lost.mean()), float(lost.mean() - half), float(lost.mean() + half)]


def _scored(
    run: TrainedRun, process: Process, reader: RowReader, chunks: Sequence[Chunk], most: int, repeats: int
) -> Iterator[tuple[Target, np.ndarray, np.ndarray]]:
    """Logits (rows, 1 + K) and labels of the first rows as they are, ("", ""), and of each target and repeat."""
    schema, encode = run.schema, reader.encoder.encode
    scorer, batch_rows = run.scorer(process)
    read = (
        rows
        for chunk in chunks
        for group in chunk.row_groups
        for rows in reader.batches(group, batch_rows, reader.columns)
    )
    kept: list[Rows] = []
    while most > 0 and (found := next(read, None)):
        kept.append((found[0].slice(0, most), found[1]))
        most -= found[0].num_rows
    read.close()
    groups = {("groups", name): fields for name, fields in schema.groups.items()}
    targets = {("fields", each.name): (each.name,) for each in schema.features if not each.beside} | groups
    choices = {target: chosen(schema, fields) for target, fields in targets.items()}

    def batches() -> Iterator[tuple[Batch, Target]]:
        own = [encode(*each) for each in kept]
        yield from ((of(columns), ("", "")) for columns in own)
        for repeat in range(repeats):
            draw = np.random.default_rng(repeat)
            others = [encode(rows.take(draw.permutation(rows.num_rows)), place) for rows, place in kept]
            for target, choice in choices.items():
                yield from ((of(mixed(*pair, choice)), target) for pair in zip(own, others, strict=True))

    def of(columns: Columns) -> Batch:
        return gather([(columns, 0, columns.num_rows)], batch_rows, schema)

    total = len(kept) * (1 + repeats * len(targets))
    with closing(scorer.score(batches())) as scored:
        parts = []
        for each in tqdm(scored, total=total, unit="batch", desc="importance", disable=None):
            parts.append(each)
            if len(parts) == len(kept):
                logits, labels = ([getattr(part, name) for part in parts] for name in ("logits", "labels"))
                yield each.note, np.concatenate(logits), np.concatenate(labels)
                parts = []


def chosen(schema: Schema, fields: tuple[str, ...]) -> Mapping[str, np.ndarray]:
    """Which rows of each part of Columns belong to these fields, and to the whole of a sequence that one of them is of."""
    wanted = {each.beside or each.name for each in schema.features if each.name in fields}
    parts = {
        "single_ids": [each for each in schema.sparse if each.is_single],
        "lists": [each for each in schema.sparse if not each.is_single],
        "weighted_lists": list(schema.weighted),
        "dense": [each for each in schema.dense for _ in range(each.dense_width)],
    }
    return {
        part: np.asarray([(each.beside or each.name) in wanted for each in own], bool) for part, own in parts.items()
    }


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
