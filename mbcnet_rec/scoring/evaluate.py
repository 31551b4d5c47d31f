"""`mbcnet evaluate`: metrics of a run's best checkpoint on any rows, with confidence intervals, by slice, at any world size.

Slices are by the values of columns, and the same on every rank: one pass over just these columns, before any scoring, counts their values. The
MAX_SLICES most frequent values of a column are slices of their own; all others are one slice together.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data.errors import InputError
from data.reading.conditions import select_files
from data.reading.decode import RowReader
from data.reading.files import files_in_words, resolve_files
from data.reading.storage import DataFile, FileList, open_parquet
from data.schema import Schema
from mbcnet_rec.checkpoints.run_folder import CONFIG
from mbcnet_rec.logs.metrics_log import finite_or_none
from mbcnet_rec.model.models import tasks_of
from mbcnet_rec.report.page import Table, text_table, with_half
from mbcnet_rec.runtime.process import Process, agreed, from_all_ranks
from mbcnet_rec.scoring.chunks import Chunk, deal, labelled_rows, score_chunks
from mbcnet_rec.scoring.metrics import NOT_KNOWN, Estimate, why_no_auc
from mbcnet_rec.scoring.ranking import require_groups, title_of
from mbcnet_rec.scoring.tally import EXACT_ROWS, Answer, Answers, Scores, Tallies
from mbcnet_rec.scoring.tasks import joined
from mbcnet_rec.scoring.trained_run import TrainedRun, known_best, opened_run

MAX_SLICES = 50  # of one column
MAX_VALUES = 1_000_000  # different ones of one column, which are counted
COUNTED_ROWS = 65_536  # at a time
BYTES_OF = {
    pa.string(): pa.binary(), pa.large_string(): pa.large_binary(),
    pa.string_view(): pa.large_binary(), pa.binary_view(): pa.large_binary(),
}  # fmt: skip
REST, NULL = "(other)", "(null)"


@dataclass(frozen=True)
class Question:
    """What to evaluate."""

    split: str = "test"  # of the run's config, where no data is named
    data: tuple[str, ...] = ()  # files, folders, globs or URIs; none: the split's
    where: tuple[str, ...] = ()  # conditions on `data`
    by: tuple[str, ...] = ()  # columns whose values cut the rows into slices
    exact_rows: int = EXACT_ROWS  # up to which all logits are kept
    max_slices: int = MAX_SLICES  # of one column
    ranking_k: tuple[int, ...] = ()  # places of ranking metrics; none: the run's train.ranking_k


def run_evaluation(run_folder: str, question: Question, *, as_json: bool = False) -> int:
    """On every rank, score a run's best checkpoint, print it beside what was logged; InputError if run, checkpoint, rows or column are missing."""
    folder, split, data = Path(run_folder), question.split, question.data
    with opened_run(folder) as (run, process):
        tally, files = score_rows(run, process, question)
        answers = tally.answer(process)
        if answers is None:
            return 0
        if as_json:
            source = {"data": list(data)} if data else {"split": split}
            print(json.dumps(source | {"step": run.step, "files": len(files)} | to_json(answers)))
            return 0
        best = None if data else known_best(run.schema, split, tally.num_rows)
        rows = f"{tally.num_rows:,} rows of {files_in_words(files)}"
        print(f"{folder}: {', '.join(data) or split}, {rows}, weights of step {run.step}")
        for task, answer in answers.items():
            if task:
                print(f"\n{task}, {answer.everything.rows:,} rows:")
            print("\n".join(tables(answer, run.config.model.branch_names, best)))
    return 0


def score_rows(run: TrainedRun, process: Process, question: Question) -> tuple[Tallies, FileList]:
    """Build the run's model on this world size and score rows of files; InputError if a row, a column or the checkpoint is faulty."""
    schema, data = run.schema, run.config.data
    files, where = files_of(run, question)
    by = slice_columns(files, question.by, schema)
    reader, chunks = labelled_rows(files, schema, data.eval_options(where), tuple(by.values()))
    dealt = deal(chunks, process.world_size)
    slices = count_slices(tuple(by), reader, dealt[process.rank], process, question.max_slices)
    scorer, batch_rows = run.scorer(process)
    num_rows, model = sum(chunk.num_rows for chunk in chunks), run.config.model
    ks = question.ranking_k or run.config.train.ranking_k
    require_groups(schema, ks)
    tally = Tallies(
        tuple(tasks_of(model, schema)), num_rows, model.branch_names, has_groups=bool(schema.group_column),
        slices=slices, exact_rows=question.exact_rows, ranking_k=ks,
    )  # fmt: skip
    with closing(score_chunks(scorer, reader, dealt, process, batch_rows, title="evaluate")) as scored:
        for batch in scored:
            tally.add(batch.logits, batch.labels, batch.group_ids, slice_codes(slices, batch.rows))
    return tally, files


def files_of(run: TrainedRun, question: Question) -> tuple[FileList, tuple[str, ...]]:
    """The files that are asked for, and the conditions on their rows; InputError if there are none."""
    data = run.config.data
    paths = question.data or getattr(data, question.split)
    if not paths:
        raise InputError(f"{run.folder}/{CONFIG}: data.{question.split} is empty; name its files, or pass --data")
    where = question.where if question.data else getattr(data, f"{question.split}_where")
    return select_files(resolve_files(paths), where, run.schema), where


def to_json(answers: Answers) -> dict[str, Any]:
    """One flat object: each metric's value; `intervals` and, where binned, `bounds`; `slices` of the same form."""
    first = next(iter(answers.values()))

    def plain(scores: Mapping[str, Scores]) -> dict[str, Any]:
        estimates = joined({task: each.metrics for task, each in scores.items()}).items()
        found: dict[str, Any] = joined({task: {"rows": each.rows} for task, each in scores.items()})
        found |= {name: finite_or_none(estimate.value) for name, estimate in estimates}
        found["intervals"] = {name: [finite_or_none(end) for end in each.interval()] for name, each in estimates}
        bounds = {name: estimate.bound for name, estimate in estimates if estimate.bound}
        return found | ({"bounds": bounds} if bounds else {})

    found = plain({task: each.everything for task, each in answers.items()}) | {"exact": first.exact}
    if first.slices:
        found["slices"] = {}
        for column, values in first.slices.items():
            of_value = {name: {task: each.slices[column][name] for task, each in answers.items()} for name in values}
            found["slices"][column] = {
                name: plain(each) | joined({task: {"positives": own.positives} for task, own in each.items()})
                for name, each in of_value.items()
            }
    return found


def tables(answer: Answer, branches: tuple[str, ...], best: tuple[float, float] | None) -> list[str]:
    """Tables for people: outputs, then the slices of each column. Numbers behind +- are half a 95 % interval."""
    header = ("AUC", "log-loss", "NE", "calibration")
    found = answer.everything.metrics
    rows = [("fused", *_cells(found)), *((name, *_cells(found, f"/{name}")) for name in branches)]
    if best:
        rows.append(("best reachable", f"{best[0]:.4f}", f"{best[1]:.4f}", "", ""))
    if "gauc" in found:
        rows.append(("GAUC, fused", _cell(found["gauc"]), "", "", ""))
    rows += [(f"{title}, fused", _cell(each), "", "", "") for key, each in found.items() if (title := title_of(key))]
    lines = [text_table(Table(("output", *header), tuple(rows)))]
    if not answer.exact:
        bound = max(estimate.bound for estimate in found.values())
        lines.append(f"binned: an AUC is at most {bound:.1e} from the exact one")
    values = {name: estimate.value for name, estimate in found.items()}
    if reason := why_no_auc(values):
        lines.append(f"-: not defined, since {reason}")
    elif math.isnan(values.get("gauc", 0.0)):
        lines.append("GAUC is not defined: no group has rows of both classes")
    for column, slices in answer.slices.items():
        rows = [
            (name[:40], f"{each.rows:,}", f"{each.positives / max(each.rows, 1):.3f}", *_cells(each.metrics))
            for name, each in slices.items()
        ]
        lines += ["", text_table(Table((f"by {column}", "rows", "rate", *header), tuple(rows)))]
        if any(math.isnan(scores.metrics["auc"].value) for scores in slices.values()):
            lines.append("-: not defined, since the rows of that value are all of one class")
    return lines


def _cells(metrics: Mapping[str, Estimate], suffix: str = "") -> tuple[str, ...]:
    return tuple(_cell(metrics.get(key + suffix, NOT_KNOWN)) for key in ("auc", "log_loss", "ne", "calibration"))


def _cell(estimate: Estimate) -> str:
    return with_half(estimate.value, estimate.interval()[1])


def slice_codes(slices: dict[str, list[str]], rows: pa.RecordBatch) -> np.ndarray:
    """(n, columns) int64: each row's place in the list of slices of each column, which are those of `count_slices`."""
    codes = np.zeros((rows.num_rows, len(slices)), np.int64)
    for index, names in enumerate(slices.values()):
        place_of = {name: place for place, name in enumerate(names)}
        values, places = distinct(rows.column(index))
        numbers = np.asarray([place_of.get(value, len(names) - 1) for value in values], np.int64)
        codes[:, index] = numbers[places] if len(values) else 0
    return codes


def slice_columns(files: Sequence[DataFile], by: Sequence[str], schema: Schema) -> dict[str, str]:
    """Names of slices -> columns of the files; a field's name stands for its column. InputError if one is missing, there twice, or nested."""
    columns = {name: next((f.source_column for f in schema.features if f.name == name), name) for name in by}
    for file in files if by else ():
        with open_parquet(file) as parquet:
            found = parquet.schema_arrow
        for name, column in columns.items():
            if (count := found.names.count(column)) != 1:
                problem = f"{count} columns of this name" if count else "no such column"
                raise InputError(f"{file}: --by {name}: {problem}; it has {', '.join(found.names[:8])}, ...")
            if pa.types.is_nested(found.field(column).type):
                raise InputError(
                    f"{file}: --by {name}: column {column!r} is {found.field(column).type}; wanted one value a row: "
                    "choose another column"
                )
    return columns


def count_slices(
    by: Sequence[str], reader: RowReader, own: Sequence[Chunk], process: Process, max_slices: int = MAX_SLICES
) -> dict[str, list[str]]:
    """For each extra column of `by`, the names of its slices by falling frequency, REST last, counted on every rank over its `own` chunks.

    InputError on every rank if a file is damaged or a column has more than MAX_VALUES values.
    """
    counts: list[Counter[str]] = [Counter() for _ in by]
    with agreed(process):
        for group in (group for chunk in own if by for group in chunk.row_groups):
            for rows, _ in reader.batches(group, COUNTED_ROWS, reader.extra):
                for name, counter, column in zip(by, counts, rows.select(reader.extra).columns, strict=True):
                    values, places = distinct(column)
                    frequency = np.bincount(places, minlength=len(values)).tolist()
                    for value, count in zip(values, frequency, strict=True):
                        counter[value] += count
                    if len(counter) > MAX_VALUES:
                        raise InputError(f"--by {name}: more than {MAX_VALUES:,} different values; choose another")
    slices = {}
    for name, *each in zip(by, *(from_all_ranks(counts, process) if by else ()), strict=True):
        counter = sum(each, Counter())
        ordered = sorted(counter, key=lambda value: (-counter[value], value))  # equal ones by name
        slices[name] = ordered[:max_slices] + ([REST] if len(ordered) > max_slices else [])
    return slices


def distinct(column: pa.Array) -> tuple[list[str], np.ndarray]:
    """The different values of a column as text, and each row's place among them; a text may be there twice, as for 0.0 and -0.0."""
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    # bytes, which Python takes even where they are no UTF-8; a null of a view would become an empty text
    column = column.cast(BYTES_OF.get(column.type, column.type))
    encoded = column.dictionary_encode(null_encoding="encode")
    values = encoded.dictionary
    if getattr(values.type, "unit", "") == "ns" and not pa.types.is_duration(values.type):
        values = values.cast(pa.string())  # Python's times end with microseconds
    found = values.to_pylist()
    if pa.types.is_float32(values.type) or pa.types.is_float16(values.type):
        narrow = values.type.to_pandas_dtype()  # whose text is 0.1, and not 0.10000000149
        found = [None if value is None else narrow(value) for value in found]
    return [_text(value) for value in found], encoded.indices.to_numpy().astype(np.int64)


def _text(value: Any) -> str:
    """One name for one value, whatever type the column has in a file: 7 for 7.0, 0.1 of any float type, and text for its bytes."""
    if value is None:
        return NULL
    if isinstance(value, (float, np.floating, Decimal)) and math.isfinite(value) and value == int(value):
        return str(int(value))
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else str(value)
