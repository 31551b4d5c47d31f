"""`mbcnet evaluate`: metrics of a run's best checkpoint on any rows, with confidence intervals, by slice, at any world size."""

import json
import math
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import InputError
from data.reading.conditions import select_files
from data.reading.files import files_in_words, resolve_files
from data.reading.storage import FileList
from mbcnet_rec.checkpoints.run_folder import CONFIG
from mbcnet_rec.logs.metrics_log import METRICS, finite_or_none
from mbcnet_rec.model.models import tasks_of
from mbcnet_rec.report.page import Table, text_table
from mbcnet_rec.runtime.process import Process
from mbcnet_rec.scoring.chunks import deal, labelled_rows, score_chunks
from mbcnet_rec.scoring.metrics import NOT_KNOWN, Estimate, why_no_auc
from mbcnet_rec.scoring.ranking import require_groups, title_of
from mbcnet_rec.scoring.slices import MAX_SLICES, count_slices, slice_codes, slice_columns
from mbcnet_rec.scoring.tally import EXACT_ROWS, Answer, Answers, Scores, Tallies
from mbcnet_rec.scoring.tasks import joined
from mbcnet_rec.scoring.trained_run import TrainedRun, known_best, opened_run


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
    """Score a run's best checkpoint, print its metrics, and compare with what training logged. One call per rank.

    Raises:
        InputError: no such run, no checkpoint, no rows, or no such column.
    """
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
        if not data:
            print(compare_with_log(folder, split, run.step, answers))
    return 0


def score_rows(run: TrainedRun, process: Process, question: Question) -> tuple[Tallies, FileList]:
    """Build the run's model on this world size and score rows of files; InputError if a row, a column or the checkpoint is faulty."""
    schema, data = run.schema, run.config.data
    paths = question.data or getattr(data, question.split)
    if not paths:
        raise InputError(f"{run.folder}/{CONFIG}: data.{question.split} is empty; name its files, or pass --data")
    where = question.where if question.data else getattr(data, f"{question.split}_where")
    files = select_files(resolve_files(paths), where, schema)
    by = slice_columns(files, question.by, schema)
    reader, chunks = labelled_rows(files, schema, data.eval_options(where), tuple(by.values()))
    dealt = deal(chunks, process.world_size)
    slices = count_slices(tuple(by), reader, dealt[process.rank], process, question.max_slices)
    scorer, batch_rows = run.scorer(process)
    num_rows, model = sum(chunk.num_rows for chunk in chunks), run.config.model
    ks = question.ranking_k or run.config.train.ranking_k
    require_groups(schema, ks)
    options = {
        "has_groups": bool(schema.group_column),
        "slices": slices,
        "exact_rows": question.exact_rows,
        "ranking_k": ks,
    }
    tally = Tallies(tuple(tasks_of(model, schema)), num_rows, model.branch_names, **options)
    with closing(score_chunks(scorer, reader, dealt, process, batch_rows, title="evaluate")) as scored:
        for batch in scored:
            tally.add(batch.logits, batch.labels, batch.group_ids, slice_codes(slices, batch.rows))
    return tally, files


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
    low, high = estimate.interval()
    half = f" +-{(high - low) / 2:.4f}" if math.isfinite(high) else ""
    return f"{estimate.value:.4f}{half}" if math.isfinite(estimate.value) else "-"


def compare_with_log(folder: Path, split: str, step: int, answers: Answers) -> str:
    """Say how far the metrics are from those that training logged for the same rows and step."""
    entries = [json.loads(line) for line in (folder / METRICS).read_text(encoding="utf-8").splitlines()]
    logged = next((e for e in reversed(entries) if e["split"] == split and e["step"] == step), {})
    found = joined({task: answer.everything.metrics for task, answer in answers.items()})
    gaps = [abs(value - found[key].value) for key, value in logged.items() if key in found and isinstance(value, float)]
    if not gaps:
        return f"training logged no {split} metrics of step {step} to compare with"
    return f"largest difference from what training logged: {max(gaps):.1e}"
