"""`mbcnet evaluate`: metrics of a run's best checkpoint on any rows, with confidence intervals, by slice, at any world size.

Up to EXACT_ROWS rows every logit is kept, and all metrics are exact. Beyond, rows are counted in bins of the logit and forgotten:
log-loss, NE and calibration stay exact, AUC carries the bound that training/metrics.py derives, and GAUC is that of a sample of groups.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from data.errors import InputError
from data.reading.files import resolve_files
from data.reading.selection import select_files
from data.schema import load_schema
from mbcnet_rec.config import RunConfig
from mbcnet_rec.logs.metrics_log import METRICS, finite_or_none
from mbcnet_rec.runtime.process import Process, broadcast_value, gather_rows, joined_process
from mbcnet_rec.scoring.metrics import Estimate, Histogram, exact_metrics, gauc
from mbcnet_rec.scoring.scorer import Piece, Scored, Scorer, deal, labelled_rows
from mbcnet_rec.scoring.slices import REST, Slicer, count_slices, slice_columns
from mbcnet_rec.scoring.trained_run import branch_names, find_step, load_built, load_run, scoring_options
from mbcnet_rec.train import CONFIG, known_best

EXACT_ROWS = 10_000_000  # 4 outputs: 280 MB of logits, labels and groups on rank 0
NUM_BINS = 2**20  # of all rows: an AUC's bound is then near 1e-6
SLICE_BINS = 2**14  # of each slice: near 1e-4
Slice = tuple[int, int, dict[str, Estimate]]  # rows, positives, metrics


@dataclass(frozen=True)
class Question:
    """What to evaluate.

    Attributes:
        split: of the run's config, where no data is named.
        data: files, folders, globs or URIs; none: the split's.
        by: columns whose values cut the rows into slices.
        exact_rows: up to which all logits are kept.
    """

    split: str = "test"
    data: tuple[str, ...] = ()
    by: tuple[str, ...] = ()
    exact_rows: int = EXACT_ROWS


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


def run_evaluation(
    run_folder: str,
    split: str = "test",
    *,
    data: Sequence[str] = (),
    by: Sequence[str] = (),
    as_json: bool = False,
    exact_rows: int = EXACT_ROWS,
) -> int:
    """Score a run's best checkpoint, print its metrics, and compare with what training logged. One call per rank.

    Args:
        run_folder: that `mbcnet train` wrote.
        split: train, valid or test, of the run's config.
        data: files to score instead.
        by: columns to slice by.
        as_json: print one JSON object instead of tables.
        exact_rows: up to which all logits are kept.

    Raises:
        InputError: no such run, no checkpoint, no rows, or no such column.
    """
    folder = Path(run_folder)
    config = load_run(folder)
    question = Question(split, tuple(data), tuple(dict.fromkeys(by)), exact_rows)
    with joined_process(config.train.device) as process:
        step = find_step(config, folder, process)
        answer = evaluate_run(config, folder, step, process, question)
        if process.is_first:
            logged = "" if data else compare_with_log(folder, split, step, values_of(answer))
            best = known_best(load_schema(config.schema), split, answer.rows) if not data else None
            if as_json:
                source = {"data": list(data)} if data else {"split": split}
                print(json.dumps(source | {"step": step} | to_json(answer)))
            else:
                print(f"{folder}: {', '.join(data) or split}, {answer.rows:,} rows, weights of step {step}")
                print("\n".join(tables(answer, branch_names(config.model), best)))
                if logged:
                    print(logged)
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
    rows = labelled_rows(files, schema, options, tuple(by.values()), warn=process.is_first)
    dealt = deal(rows.pieces, process.world_size)
    slicer = count_slices(tuple(by), rows.reader, dealt[process.rank], process)
    built = load_built(config, schema, folder, step, process)
    scorer = Scorer(built, process, rows.reader, *scoring_options(config, process))
    scored = _with_bar(scorer, dealt, rows.num_rows, process)
    has_groups = bool(schema.group_column)
    if rows.num_rows <= question.exact_rows:
        return exact_answer(scored, built.branch_names, slicer, process, has_groups=has_groups)
    stride = -(-rows.num_rows // max(1, question.exact_rows)) if has_groups else 0
    return streamed_answer(scored, built.branch_names, slicer, process, stride)


def _with_bar(
    scorer: Scorer, dealt: Sequence[Sequence[Piece]], total: int, process: Process
) -> Iterable[Scored]:
    hidden = None if process.is_first else True
    with tqdm(total=total, unit="row", unit_scale=True, desc="evaluate", disable=hidden) as bar:
        for item in scorer.score(dealt, lambda rows: bar.update(min(rows * len(dealt), total - bar.n))):
            if isinstance(item, Scored):
                yield item


def exact_answer(
    scored: Iterable[Scored], branches: tuple[str, ...], slicer: Slicer, process: Process, *, has_groups: bool
) -> Answer:
    """Keep every row's logits, gather them on rank 0 and compute all metrics there."""
    rows = [np.zeros((0, 2 + len(branches)), np.float32)]
    keys = [np.zeros((0, has_groups + len(slicer.names)), np.int64)]  # group ids, then slices
    for batch in scored:
        rows.append(np.concatenate([batch.logits, batch.columns.labels[:, None]], axis=1))
        groups = [batch.columns.group_ids[:, None]] if batch.columns.group_ids is not None else []
        keys.append(np.concatenate([*groups, slicer.codes(batch.rows)], axis=1))
    gathered = gather_rows(np.concatenate(rows), process)
    gathered_keys = gather_rows(np.concatenate(keys), process)
    answer = None
    if gathered is not None and gathered_keys is not None:
        logits, labels = gathered[:, :-1], gathered[:, -1]
        groups = gathered_keys[:, 0] if has_groups else None

        def metrics(chosen: Any) -> tuple[int, int, dict[str, Estimate]]:
            own = None if groups is None else groups[chosen]
            found = exact_metrics(logits[chosen], labels[chosen], branches, own)
            return len(labels[chosen]), int(labels[chosen].sum()), found

        slices = {}
        for index, (column, names) in enumerate(slicer.names.items()):
            codes = gathered_keys[:, has_groups + index]
            entries = {name: metrics(codes == number) for number, name in enumerate(names)}
            slices[column] = by_falling_size(entries)
        answer = Answer(len(labels), True, metrics(slice(None))[2], slices)
    return broadcast_value(answer, process)


def by_falling_size(entries: dict[str, Slice]) -> dict[str, Slice]:
    """Order slices by rows, the rest last; those without a kept row are left out."""
    kept = [(name, entry) for name, entry in entries.items() if entry[0]]
    return dict(sorted(kept, key=lambda item: (item[0] == REST, -item[1][0])))


def streamed_answer(
    scored: Iterable[Scored],
    branches: tuple[str, ...],
    slicer: Slicer,
    process: Process,
    group_stride: int,
) -> Answer:
    """Count rows in bins and forget them.

    Args:
        scored: batches of this rank.
        branches: names.
        slicer: each slice has a histogram of its own.
        process: this rank.
        group_stride: GAUC is computed exactly on the groups whose id is a multiple of it, about every such-and-such-th one
            (ids are hashes); 0: no groups.
    """
    outputs = 1 + len(branches)
    everything = Histogram(outputs, NUM_BINS)
    own = [[Histogram(outputs, SLICE_BINS) for _ in names] for names in slicer.names.values()]
    sample: list[np.ndarray] = [np.zeros((0, 2), np.float32)]
    sample_ids: list[np.ndarray] = [np.zeros((0, 1), np.int64)]
    for batch in scored:
        labels = batch.columns.labels
        everything.add(batch.logits, labels)
        codes = slicer.codes(batch.rows)
        for histograms, column in zip(own, codes.T, strict=True):
            for number in np.unique(column):
                chosen = column == number
                histograms[number].add(batch.logits[chosen], labels[chosen])
        if group_stride and batch.columns.group_ids is not None:
            taken = batch.columns.group_ids % group_stride == 0
            sample.append(np.stack([batch.logits[taken, 0], labels[taken]], axis=1))
            sample_ids.append(batch.columns.group_ids[taken, None])
    add_over_ranks(everything, process)
    metrics = everything.metrics(branches)
    rows = gather_rows(np.concatenate(sample), process)
    ids = gather_rows(np.concatenate(sample_ids), process)
    if rows is not None and ids is not None and len(rows):
        metrics["gauc"] = gauc(rows[:, 0], rows[:, 1], ids[:, 0])
    slices = {}
    for (column, names), histograms in zip(slicer.names.items(), own, strict=True):
        for histogram in histograms:
            add_over_ranks(histogram, process)
        entries = {
            name: (*each.rows_and_positives(), each.metrics(branches))
            for name, each in zip(names, histograms, strict=True)
        }
        slices[column] = by_falling_size(entries)
    answer = Answer(everything.rows_and_positives()[0], False, metrics, slices)
    return broadcast_value(answer, process)


def add_over_ranks(histogram: Histogram, process: Process) -> None:
    """Add up every rank's histogram, in place."""
    if process.world_size > 1:
        for array in (histogram.counts, histogram.sums):
            dist.all_reduce(torch.from_numpy(array))


def values_of(answer: Answer) -> dict[str, float]:
    """Metric -> value, without errors."""
    return {name: estimate.value for name, estimate in answer.metrics.items()}


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


def compare_with_log(folder: Path, split: str, step: int, metrics: dict[str, float]) -> str:
    """Say how far the metrics are from those that training logged for the same rows and step."""
    logged: dict[str, Any] = {}
    for line in (folder / METRICS).read_text().splitlines():
        entry = json.loads(line)
        if entry["split"] == split and entry["step"] == step:
            logged = entry
    shared = [key for key, value in logged.items() if key in metrics and isinstance(value, float)]
    if not shared:
        return f"training logged no {split} metrics of step {step} to compare with"
    gap = max(abs(logged[key] - metrics[key]) for key in shared)
    return f"largest difference from what training logged: {gap:.1e}"
