"""`mbcnet compare`: two runs on the same rows: paired differences of their metrics, by slice, and the clicks that either ranking would get."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.errors import InputError
from data.reading.files import files_in_words
from data.whole_folder import write_whole
from mbcnet_rec.logs.metrics_log import finite_or_none
from mbcnet_rec.report import figures
from mbcnet_rec.report.page import Block, Code, Heading, Picture, Table, Text, to_html
from mbcnet_rec.runtime.process import joined_process
from mbcnet_rec.scoring.evaluate import Question, score_rows
from mbcnet_rec.scoring.metrics import exact_metrics
from mbcnet_rec.scoring.paired import Difference, expected_clicks, holm, paired_differences
from mbcnet_rec.scoring.tally import Rows
from mbcnet_rec.scoring.trained_run import find_step, load_run, run_schema

METRICS = {
    "auc": "AUC",
    "gauc": "GAUC",
    "log_loss": "log-loss",
    "ne": "normalised entropy",
    "calibration": "calibration",
}
CLICKS = "expected_clicks"
ALL_ROWS = "all rows"


@dataclass(frozen=True)
class Comparison:
    """What to compare."""

    ours: Path
    theirs: Path
    question: Question  # of which rows
    top: int = 0  # rows of each group whose clicks are counted; 0: none are

    def command(self) -> str:
        """The line that does it again."""
        words = ["mbcnet compare", str(self.ours), str(self.theirs)]
        words += (
            [f"--data {' '.join(self.question.data)}"] if self.question.data else [f"--split {self.question.split}"]
        )
        words += [f"--by {name}" for name in self.question.by]
        return " ".join([*words, *([f"--expected-clicks {self.top}"] if self.top else [])])


class Line(NamedTuple):
    """A metric of both runs on the rows of one slice; p is corrected for the number of slices of its column."""

    column: str  # that cuts the rows; "" for all of them
    value: str  # of that column
    rows: int
    metric: str
    ours: float
    theirs: float
    difference: Difference


def run_comparison(comparison: Comparison, *, as_json: bool = False, page: Path | None = None) -> int:
    """Score the best checkpoints of two runs on the same rows; print what differs, and write a page. One call per rank.

    Raises:
        InputError: the runs do not score the same rows, or there is no group column for the clicks.
    """
    question, found = comparison.question, []
    files: Any = []
    names: dict[str, Any] = {}
    config = load_run(comparison.ours)
    if not question.data:  # the same files for both
        paths, where = getattr(config.data, question.split), getattr(config.data, f"{question.split}_where")
        question = replace(question, data=tuple(paths), where=tuple(where))
    with joined_process(config.train.device) as process:
        for folder in (comparison.ours, comparison.theirs):
            config = load_run(folder)
            step = find_step(config, folder, process)
            if comparison.top and not run_schema(config, folder, step).group_column:
                raise InputError(
                    f"--expected-clicks {comparison.top}: the schema of {folder} names no group_column, whose rows are ranked; leave it out"
                )
            tally, files = score_rows(config, folder, step, process, question)
            if not tally.exact:
                raise InputError(
                    f"{files_in_words(files)}: too many rows to compare row by row; name fewer with --data"
                )
            found.append(tally.kept(process))
            names = dict(tally.names)
        if not process.is_first:
            return 0
    ours, theirs = found
    if not np.array_equal(ours.labels, theirs.labels) or not np.array_equal(ours.slices, theirs.slices):
        raise InputError(
            f"{comparison.ours} and {comparison.theirs} do not score the same rows: their labels differ; name rows that both can read with --data"
        )
    lines = compare_rows(ours, theirs, names, comparison.top)
    if as_json:
        plain = [
            {
                **line._asdict(),
                "difference": {key: finite_or_none(each) for key, each in line.difference._asdict().items()},
            }
            for line in lines
        ]
        print(
            json.dumps(
                {
                    "ours": str(comparison.ours),
                    "theirs": str(comparison.theirs),
                    "rows": len(ours.labels),
                    "lines": [{key: finite_or_none(each) for key, each in line.items()} for line in plain],
                }
            )
        )
    else:
        print(f"{comparison.ours} less {comparison.theirs}: {len(ours.labels):,} rows of {files_in_words(files)}")
        print("\n".join(table_lines(lines)))
    if page is not None:
        write_whole(
            page,
            to_html(
                f"{comparison.ours.name} and {comparison.theirs.name}",
                f"{len(ours.labels):,} rows of {files_in_words(files)}.",
                page_blocks(comparison, lines),
            ),
        )
        print(f"wrote {page}")
    return 0


def compare_rows(ours: Rows, theirs: Rows, names: dict[str, Any], top: int = 0) -> list[Line]:
    """Differences of every metric on all rows and on each slice; `names`: column -> its slices, as `Rows.slices` counts them."""
    lines = _of_slice(ours, theirs, np.ones(len(ours.labels), bool), ("", ALL_ROWS), top)
    for (column, values), places in zip(names.items(), ours.slices.T, strict=True):
        own = [
            _of_slice(ours, theirs, places == place, (column, value), top)
            for place, value in enumerate(values)
            if (places == place).any()
        ]
        for alike in zip(*own, strict=True):  # one metric on every slice
            corrected = holm([line.difference.p for line in alike])
            lines += [
                line._replace(difference=line.difference._replace(p=p))
                for line, p in zip(alike, corrected, strict=True)
            ]
    return lines


def _of_slice(ours: Rows, theirs: Rows, chosen: np.ndarray, slice_: tuple[str, str], top: int) -> list[Line]:
    labels, rows = ours.labels[chosen], int(chosen.sum())
    groups = None if ours.group_ids is None else ours.group_ids[chosen]
    a, b = ours.logits[chosen, 0], theirs.logits[chosen, 0]
    values = [exact_metrics(each[:, None], labels, (), groups, errors=False) for each in (a, b)]
    differences = paired_differences(a, b, labels, groups)
    lines = [
        Line(*slice_, rows, metric, values[0][metric].value, values[1][metric].value, differences[metric])
        for metric in METRICS
        if metric in differences
    ]
    if top and groups is not None:
        clicks, difference = expected_clicks(a, b, labels, groups, top)
        lines.append(Line(*slice_, rows, CLICKS, clicks["ours"], clicks["theirs"], difference))
    return lines


def table_lines(lines: list[Line]) -> list[str]:
    """A table for people."""
    shown = [f"  {'rows':<34}{'metric':<20}{'ours':>9}{'theirs':>9}{'difference':>12}   95 % interval         p"]
    for line in lines:
        low, high = line.difference.low, line.difference.high
        shown.append(
            f"  {_where(line)[:33]:<34}{_metric(line):<20}{line.ours:>9.4f}{line.theirs:>9.4f}{line.difference.value:>+12.5f}"
            f"   [{low:+.5f}, {high:+.5f}]  {p_text(line.difference.p)}"
        )
    if any(line.column for line in lines):
        shown.append("  p of slices is corrected for their number (Holm)")
    return shown


def _where(line: Line) -> str:
    return f"{line.column} = {line.value}" if line.column else line.value


def _metric(line: Line) -> str:
    return METRICS.get(line.metric, "clicks on top")


def p_text(p: float) -> str:
    """A p for people."""
    return "<.001" if p < 0.001 else f"{p:.3f}"


def page_blocks(comparison: Comparison, lines: list[Line]) -> list[Block]:
    """The page: a table of all rows, and for each column that cuts them a picture and a table."""
    blocks: list[Block] = [Heading("All rows"), _page_table([line for line in lines if not line.column])]
    for column in dict.fromkeys(line.column for line in lines if line.column):
        own = [line for line in lines if line.column == column]
        area = {line.value: line.difference for line in own if line.metric == "auc"}
        caption = f"Difference of AUC by {column}, with 95 % intervals. Right of 0, {comparison.ours.name} is ahead."
        blocks += [
            Heading(f"By {column}"),
            Picture(f"by {column}", figures.intervals_figure(area), caption),
            _page_table(own),
        ]
    told = "Intervals are of paired differences: both runs see the same rows, and rows of one group are taken together. p of slices is corrected for their number (Holm)."
    return [*blocks, Text(told), Heading("Again"), Code(comparison.command())]


def _page_table(lines: list[Line]) -> Table:
    cells = tuple(
        (
            _where(line), f"{line.rows:,}", _metric(line), f"{line.ours:.4f}", f"{line.theirs:.4f}",
            f"{line.difference.value:+.5f} [{line.difference.low:+.5f}, {line.difference.high:+.5f}]", p_text(line.difference.p),
        )
        for line in lines
    )  # fmt: skip
    return Table(("rows", "number", "metric", "ours", "theirs", "difference", "p"), cells)
