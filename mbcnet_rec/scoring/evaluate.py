"""`mbcnet evaluate`: metrics of a run's best checkpoint on any rows, with confidence intervals, by slice, at any world size."""

import json
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import InputError
from data.reading.files import resolve_files
from data.reading.selection import select_files
from data.schema import load_schema
from mbcnet_rec.checkpoints.run_folder import CONFIG
from mbcnet_rec.config import RunConfig
from mbcnet_rec.logs.metrics_log import METRICS, finite_or_none
from mbcnet_rec.runtime.process import Process, broadcast_value, joined_process
from mbcnet_rec.scoring.chunks import deal, labelled_rows, score_chunks
from mbcnet_rec.scoring.metrics import Estimate, exact_metrics
from mbcnet_rec.scoring.slices import MAX_SLICES, REST, Slicer, count_slices, slice_columns
from mbcnet_rec.scoring.tally import EXACT_ROWS, BinnedRows, KeptRows, group_stride
from mbcnet_rec.scoring.trained_run import (
    branch_names,
    find_step,
    known_best,
    load_built,
    load_run,
    scorer_of,
)

Slice = tuple[int, int, dict[str, Estimate]]  # rows, positives, metrics


@dataclass(frozen=True)
class Question:
    """What to evaluate.

    Attributes:
        split: of the run's config, where no data is named.
        data: files, folders, globs or URIs; none: the split's.
        by: columns whose values cut the rows into slices.
        exact_rows: up to which all logits are kept.
        max_slices: of one column.
    """

    split: str = "test"
    data: tuple[str, ...] = ()
    by: tuple[str, ...] = ()
    exact_rows: int = EXACT_ROWS
    max_slices: int = MAX_SLICES


@dataclass(frozen=True)
class Answer:
    """What came out; equal on every rank.

    Attributes:
        rows: scored.
        exact: whether all logits were kept.
        metrics: name -> estimate, as metrics.exact_metrics names them.
        slices: column -> value -> slice, the largest first.
    """

    rows: int
    exact: bool
    metrics: dict[str, Estimate]
    slices: dict[str, dict[str, Slice]]


def run_evaluation(run_folder: str, question: Question, *, as_json: bool = False) -> int:
    """Score a run's best checkpoint, print its metrics, and compare with what training logged. One call per rank.

    Args:
        run_folder: that `mbcnet train` wrote.
        question: what to evaluate.
        as_json: print one JSON object instead of tables.

    Raises:
        InputError: no such run, no checkpoint, no rows, or no such column.
    """
    folder, split, data = Path(run_folder), question.split, question.data
    config = load_run(folder)
    with joined_process(config.train.device) as process:
        step = find_step(config, folder, process)
        answer = evaluate_run(config, folder, step, process, question)
        if not process.is_first:
            return 0
        if as_json:
            source = {"data": list(data)} if data else {"split": split}
            print(json.dumps(source | {"step": step} | to_json(answer)))
            return 0
        best = None if data else known_best(load_schema(config.schema), split, answer.rows)
        print(f"{folder}: {', '.join(data) or split}, {answer.rows:,} rows, weights of step {step}")
        print("\n".join(tables(answer, branch_names(config.model), best)))
        if not data:
            print(compare_with_log(folder, split, step, answer))
    return 0


def evaluate_run(config: RunConfig, folder: Path, step: int, process: Process, question: Question) -> Answer:
    """Build the run's model on this world size, load a checkpoint and score rows.

    Raises:
        InputError: there are no rows, a row is faulty, a slice column is missing, or the checkpoint is damaged.
    """
    schema = load_schema(config.schema)
    paths = question.data or getattr(config.data, question.split)
    if not paths:
        raise InputError(
            f"{folder}/{CONFIG}: data.{question.split} is empty; name the files of that split, or pass --data"
        )
    where = () if question.data else getattr(config.data, f"{question.split}_where")
    files = select_files(resolve_files(paths), where, schema)
    by = slice_columns(files, question.by, schema)
    options = config.data.eval_options(where)
    reader, chunks = labelled_rows(files, schema, options, tuple(by.values()), warn=process.is_first)
    dealt = deal(chunks, process.world_size)
    slicer = count_slices(tuple(by), reader, dealt[process.rank], process, question.max_slices)
    built = load_built(config, schema, folder, step, process)
    names, has_groups = built.branch_names, bool(schema.group_column)
    kept = KeptRows(1 + len(names), has_groups=has_groups, num_columns=len(by))
    binned = None
    num_rows = sum(chunk.num_rows for chunk in chunks)
    if num_rows > question.exact_rows:
        stride = group_stride(num_rows, question.exact_rows) if has_groups else 0
        binned = BinnedRows(names, stride, [len(each) for each in slicer.names.values()])
    scorer, batch_rows = scorer_of(config, built, process)
    scored = score_chunks(scorer, reader, dealt, process, batch_rows, title="evaluate")
    with closing(scored):
        for batch in scored:
            (binned or kept).add(batch.logits, batch.labels, batch.group_ids, slicer.codes(batch.rows))
    if binned is not None:
        answer: Answer | None = binned_answer(binned, slicer, process)
    else:
        answer = exact_answer(kept, names, slicer, process)
    return broadcast_value(answer, process)


def exact_answer(
    kept: KeptRows, branches: tuple[str, ...], slicer: Slicer, process: Process
) -> Answer | None:
    """All metrics, on rank 0, where all rows are gathered; None elsewhere."""
    rows = kept.gathered(process)
    if rows is None:
        return None

    def entry(chosen: Any) -> Slice:
        labels, groups = rows.labels[chosen], None if rows.group_ids is None else rows.group_ids[chosen]
        return len(labels), int(labels.sum()), exact_metrics(rows.logits[chosen], labels, branches, groups)

    slices = {}
    for codes, (column, names) in zip(rows.slices.T, slicer.names.items(), strict=True):
        slices[column] = by_falling_size({name: entry(codes == i) for i, name in enumerate(names)})
    return Answer(len(rows.labels), True, entry(slice(None))[2], slices)


def binned_answer(binned: BinnedRows, slicer: Slicer, process: Process) -> Answer:
    """All metrics, from counts of all ranks."""
    metrics = binned.metrics(process)
    slices = {}
    for (column, names), histograms in zip(slicer.names.items(), binned.slices, strict=True):
        entries = {
            name: (*each.rows_and_positives(), each.metrics(binned.branches))
            for name, each in zip(names, histograms, strict=True)
        }
        slices[column] = by_falling_size(entries)
    return Answer(binned.everything.rows_and_positives()[0], False, metrics, slices)


def by_falling_size(entries: dict[str, Slice]) -> dict[str, Slice]:
    """Order slices by rows, the rest last; those without a kept row are left out."""
    kept = [(name, entry) for name, entry in entries.items() if entry[0]]
    return dict(sorted(kept, key=lambda item: (item[0] == REST, -item[1][0])))


def to_json(answer: Answer) -> dict[str, Any]:
    """One flat object: each metric's value; `intervals` and, where binned, `bounds`; `slices` of the same form."""

    def plain(rows: int, positives: int | None, metrics: dict[str, Estimate]) -> dict[str, Any]:
        found: dict[str, Any] = {"rows": rows} | ({} if positives is None else {"positives": positives})
        found |= {name: finite_or_none(estimate.value) for name, estimate in metrics.items()}
        found["intervals"] = {
            name: [finite_or_none(end) for end in estimate.interval()] for name, estimate in metrics.items()
        }
        bounds = {name: estimate.bound for name, estimate in metrics.items() if estimate.bound}
        return found | ({"bounds": bounds} if bounds else {})

    found = plain(answer.rows, None, answer.metrics) | {"exact": answer.exact}
    if answer.slices:
        found["slices"] = {
            column: {name: plain(*entry) for name, entry in values.items()}
            for column, values in answer.slices.items()
        }
    return found


def tables(answer: Answer, branches: tuple[str, ...], best: tuple[float, float] | None) -> list[str]:
    """Tables for people: outputs, then the slices of each column. Numbers behind +- are half a 95 % interval."""
    lines = [f"  {'output':<16}{'AUC':>16}{'log-loss':>17}{'NE':>17}{'calibration':>17}"]
    columns = ("auc", "log_loss", "ne", "calibration")
    for suffix, name in (("", "fused"), *((f"/{name}", name) for name in branches)):
        lines.append(
            f"  {name:<16}" + "".join(_cell(answer.metrics.get(key + suffix)) for key in columns)[1:]
        )
    if best:
        lines.append(f"  {'best reachable':<16}{best[0]:>8.4f}        {best[1]:>9.4f}")
    if "gauc" in answer.metrics:
        lines.append(f"  {'GAUC, fused':<16}{_cell(answer.metrics['gauc'])[1:]}")
    if not answer.exact:
        bound = max(estimate.bound for estimate in answer.metrics.values())
        lines.append(
            f"  binned: an AUC is at most {bound:.1e} from the exact one; GAUC is of a sample of groups"
        )
    for column, values in answer.slices.items():
        lines += [
            "",
            f"  by {column:<20}{'rows':>10}{'rate':>8}{'AUC':>12}{'log-loss':>17}{'NE':>17}{'calibration':>17}",
        ]
        for name, (rows, positives, metrics) in values.items():
            cells = "".join(_cell(metrics.get(key)) for key in columns)
            lines.append(f"  {name[:22]:<23}{rows:>10,}{positives / max(rows, 1):>8.3f}{cells}")
    return lines


def _cell(estimate: Estimate | None) -> str:
    if estimate is None or not np.isfinite(estimate.value):
        return f"{'-':>17}"
    low, high = estimate.interval()
    half = (high - low) / 2
    return f"{estimate.value:>9.4f} +-{half:.4f}" if np.isfinite(half) else f"{estimate.value:>9.4f}        "


def compare_with_log(folder: Path, split: str, step: int, answer: Answer) -> str:
    """Say how far the metrics are from those that training logged for the same rows and step."""
    entries = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    logged = next((e for e in reversed(entries) if e["split"] == split and e["step"] == step), {})
    gaps = [
        abs(value - answer.metrics[key].value)
        for key, value in logged.items()
        if key in answer.metrics and isinstance(value, float)
    ]
    if not gaps:
        return f"training logged no {split} metrics of step {step} to compare with"
    return f"largest difference from what training logged: {max(gaps):.1e}"
