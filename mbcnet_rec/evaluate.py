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
import pyarrow as pa
import torch
import torch.distributed as dist
from tqdm import tqdm

from data.arrow import Encoder
from data.errors import InputError
from data.files import read_contents, resolve_files
from data.schema import Schema, load_schema
from data.selection import Selection, select_files
from data.storage import DataFile, open_parquet
from mbcnet_rec.build import quieten_libraries
from mbcnet_rec.config import RunConfig
from mbcnet_rec.pieces import Piece, Reader, Scored, Scorer, deal, pieces_of_groups
from mbcnet_rec.train import CONFIG, known_best
from mbcnet_rec.trained import branch_names, find_step, load_built, load_run, scoring_options
from mbcnet_rec.training.metrics import Estimate, Histogram, exact_metrics, gauc
from mbcnet_rec.training.process import Process, broadcast_value, gather_rows, joined_process
from mbcnet_rec.training.records import METRICS, finite_or_none

EXACT_ROWS = 10_000_000  # 4 outputs: 280 MB of logits, labels and groups on rank 0
NUM_BINS = 2**20  # of all rows: an AUC's bound is then near 1e-6
SLICE_BINS = 2**14  # of each slice: near 1e-4
MAX_SLICES = 50  # of one field; the others are one slice together
REST, NULL = "(other)", "(null)"


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
        slices: column -> value -> (rows, positives, metrics), the largest first.
    """

    rows: int
    exact: bool
    metrics: dict[str, Estimate]
    slices: dict[str, dict[str, tuple[int, int, dict[str, Estimate]]]]


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
    quieten_libraries()
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
    selection = Selection(config.data.eval_options(where), schema, files)
    contents = read_contents(files, schema, selection, warn=process.is_first)
    total = sum(group.num_rows for group in contents.row_groups)
    pieces = pieces_of_groups((group.file, group.index, group.stored_rows) for group in contents.row_groups)
    built = load_built(config, schema, folder, step, process)
    reader = Reader(files, Encoder(schema), has_labels=True, extra=tuple(by.values()), selection=selection)
    scorer = Scorer(built, process, reader, *scoring_options(config, process))
    dealt = deal(pieces, process.world_size)
    bar = tqdm(
        total=total, unit="row", unit_scale=True, desc="evaluate", disable=None if process.is_first else True
    )
    scored = _with_bar(scorer, dealt, bar)
    if total <= question.exact_rows:
        return exact_answer(scored, built.branch_names, tuple(by), process)
    keep_groups = -(-total // question.exact_rows) if schema.group_column else 0
    return streamed_answer(scored, built.branch_names, tuple(by), process, keep_groups)


def _with_bar(scorer: Scorer, dealt: Sequence[Sequence[Piece]], bar: Any) -> Iterable[Scored]:
    total = bar.total
    with bar:
        for item in scorer.score(dealt, lambda rows: bar.update(min(rows * len(dealt), total - bar.n))):
            if isinstance(item, Scored):
                yield item


def slice_columns(files: Sequence[DataFile], by: Sequence[str], schema: Schema) -> dict[str, str]:
    """Names of slices -> columns of the files; a field's name stands for its column.

    Raises:
        InputError: a column is missing, or holds lists.
    """
    columns = {name: next((f.source_column for f in schema.features if f.name == name), name) for name in by}
    for file in files if by else ():
        with open_parquet(file) as parquet:
            found = parquet.schema_arrow
        for name, column in columns.items():
            if column not in found.names:
                raise InputError(
                    f"{file}: --by {name}: no such column; it has {', '.join(found.names[:8])}, ..."
                )
            if pa.types.is_nested(found.field(column).type):
                raise InputError(
                    f"{file}: --by {name}: column {column!r} is {found.field(column).type}; wanted one value a row: "
                    "choose another column"
                )
    return columns


class _Slicer:
    """Turns slice values into small numbers, one space a column, and back."""

    def __init__(self, num_columns: int) -> None:
        self.numbers: list[dict[str, int]] = [{} for _ in range(num_columns)]

    def codes(self, rows: pa.RecordBatch) -> np.ndarray:
        """(n, columns) int64: this rank's number of each row's value."""
        codes = np.zeros((rows.num_rows, len(self.numbers)), np.int64)
        for index, numbers in enumerate(self.numbers):
            column = rows.column(index)
            encoded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode("encode")
            own = [
                numbers.setdefault(NULL if value is None else str(value), len(numbers))
                for value in encoded.dictionary.to_pylist()
            ]
            if encoded.indices.null_count:
                own.append(numbers.setdefault(NULL, len(numbers)))
            places = (
                encoded.indices.fill_null(len(own) - 1) if encoded.indices.null_count else encoded.indices
            )
            codes[:, index] = np.asarray(own or [0], np.int64)[places.to_numpy(zero_copy_only=False)]
        return codes

    def merge(self, process: Process) -> list[list[str]]:
        """Names of the values of each column over all ranks; afterwards `renumber` gives numbers that all ranks share."""
        everyone: list[Any] = [self.numbers]
        if process.world_size > 1:
            everyone = [None] * process.world_size
            dist.all_gather_object(everyone, self.numbers)
        names = [
            sorted({name for numbers in everyone for name in numbers[index]})
            for index in range(len(self.numbers))
        ]
        self._shared = [
            np.asarray([ordered.index(name) for name in numbers] or [0], np.int64)
            for ordered, numbers in zip(names, self.numbers, strict=True)
        ]
        return names

    def renumber(self, codes: np.ndarray) -> np.ndarray:
        """This rank's numbers -> the shared ones."""
        columns = [shared[codes[:, index]] for index, shared in enumerate(self._shared)]
        return np.stack(columns, axis=1) if columns else codes


def exact_answer(
    scored: Iterable[Scored], branches: tuple[str, ...], by: tuple[str, ...], process: Process
) -> Answer:
    """Keep every row's logits, gather them on rank 0 and compute all metrics there."""
    slicer = _Slicer(len(by))
    rows, ids, codes = [np.zeros((0, 2 + len(branches)), np.float32)], [np.zeros(0, np.int64)], []
    codes.append(np.zeros((0, len(by)), np.int64))
    has_groups = False
    for batch in scored:
        rows.append(np.concatenate([batch.logits, batch.columns.labels[:, None]], axis=1))
        codes.append(slicer.codes(batch.rows))
        if batch.columns.group_ids is not None:
            ids.append(batch.columns.group_ids)
    has_groups = bool(broadcast_value(_any_groups(ids, process), process))
    names = slicer.merge(process)
    gathered = gather_rows(np.concatenate(rows), process)
    sliced = gather_rows(slicer.renumber(np.concatenate(codes)), process) if by else None
    groups = gather_rows(np.concatenate(ids)[:, None], process) if has_groups else None
    answer = None
    if gathered is not None:
        logits, labels = gathered[:, :-1], gathered[:, -1]
        group_ids = None if groups is None else groups[:, 0]

        def metrics(chosen: Any) -> tuple[int, int, dict[str, Estimate]]:
            own = None if group_ids is None else group_ids[chosen]
            found = exact_metrics(logits[chosen], labels[chosen], branches, own)
            return len(labels[chosen]), int(labels[chosen].sum()), found

        slices = {}
        for index, column in enumerate(by):
            assert sliced is not None
            slices[column] = {
                name: metrics(np.isin(sliced[:, index], numbers))
                for name, numbers in largest(sliced[:, index], names[index]).items()
            }
        answer = Answer(len(labels), True, metrics(slice(None))[2], slices)
    return broadcast_value(answer, process)


def _any_groups(ids: Sequence[np.ndarray], process: Process) -> bool:
    present = torch.tensor([float(sum(map(len, ids)))])
    if process.world_size > 1:
        dist.all_reduce(present)
    return bool(present.item())


def largest(codes: np.ndarray, names: Sequence[str]) -> dict[str, list[int]]:
    """Slice name -> its numbers, by falling size: the MAX_SLICES largest, and the rest as one."""
    counts = np.bincount(codes, minlength=len(names))
    order = [int(number) for number in np.argsort(-counts, kind="stable") if counts[number]]
    found = {names[number]: [number] for number in order[:MAX_SLICES]}
    return found | ({REST: order[MAX_SLICES:]} if len(order) > MAX_SLICES else {})


def streamed_answer(
    scored: Iterable[Scored],
    branches: tuple[str, ...],
    by: tuple[str, ...],
    process: Process,
    group_stride: int,
) -> Answer:
    """Count rows in bins and forget them.

    Args:
        scored: batches of this rank.
        branches: names.
        by: slice columns. The first MAX_SLICES values that a rank meets have a histogram of their own, the others share one.
        process: this rank.
        group_stride: GAUC is computed exactly on the groups whose id is a multiple of it, about every such-and-such-th one
            (ids are hashes); 0: no groups.
    """
    slicer = _Slicer(len(by))
    outputs = 1 + len(branches)
    everything = Histogram(outputs, NUM_BINS)
    own: list[dict[str, Histogram]] = [{} for _ in by]
    sample: list[np.ndarray] = [np.zeros((0, 2), np.float32)]
    sample_ids: list[np.ndarray] = [np.zeros((0, 1), np.int64)]
    for batch in scored:
        labels = batch.columns.labels
        everything.add(batch.logits, labels)
        codes = slicer.codes(batch.rows)
        for index in range(len(by)):
            for name, number in slicer.numbers[index].items():
                chosen = codes[:, index] == number
                if chosen.any():
                    known = name if number < MAX_SLICES else REST
                    histogram = own[index].setdefault(known, Histogram(outputs, SLICE_BINS))
                    histogram.add(batch.logits[chosen], labels[chosen])
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
    for column, histograms in zip(by, own, strict=True):
        slices[column] = _merged_slices(histograms, branches, process)
    answer = Answer(int(everything.counts[:, 0].sum()), False, metrics, slices)
    return broadcast_value(answer, process)


def _merged_slices(
    own: dict[str, Histogram], branches: tuple[str, ...], process: Process
) -> dict[str, tuple[int, int, dict[str, Estimate]]]:
    everyone: list[Any] = [sorted(own)]
    if process.world_size > 1:
        everyone = [None] * process.world_size
        dist.all_gather_object(everyone, sorted(own))
    found = {}
    for name in sorted({name for names in everyone for name in names}):
        histogram = own.get(name) or Histogram(1 + len(branches), SLICE_BINS)
        add_over_ranks(histogram, process)
        negatives, positives = histogram.counts[:, 0].sum(axis=1)
        found[name] = (int(negatives + positives), int(positives), histogram.metrics(branches))
    return dict(sorted(found.items(), key=lambda item: (item[0] == REST, -item[1][0])))


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
