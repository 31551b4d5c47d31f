"""`mbcnet compare`: two runs on the same rows: paired differences of their metrics, by slice, and the clicks that either ranking would get."""

import json
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.errors import InputError
from data.reading.files import files_in_words, resolve_files
from data.reading.storage import FileList
from data.schema import Schema
from data.whole_folder import write_whole
from mbcnet_rec.config import RunConfig
from mbcnet_rec.logs.metrics_log import finite_or_none
from mbcnet_rec.report import figures
from mbcnet_rec.report.page import Block, Code, Heading, Picture, Table, Text, text_table, to_html
from mbcnet_rec.runtime.process import joined_process
from mbcnet_rec.scoring.evaluate import Question, score_rows
from mbcnet_rec.scoring.paired import Difference, expected_clicks, holm, paired_differences
from mbcnet_rec.scoring.tally import Rows
from mbcnet_rec.scoring.trained_run import find_step, load_run, run_schema

CLICKS, SIGNIFICANT = "expected_clicks", 0.05
METRICS = {"auc": "AUC", "gauc": "GAUC", "log_loss": "log-loss", "calibration": "calibration", CLICKS: "clicks on top"}
SHOWN_TEXT = 40  # letters of a slice's name where room is short


@dataclass(frozen=True)
class Comparison:
    """What to compare."""

    ours: Path
    theirs: Path
    question: Question  # of which rows
    top: int = 0  # rows of each group whose clicks are counted; 0: none are

    @property
    def names(self) -> tuple[str, str]:
        """The runs' names in tables."""
        names = self.ours.name, self.theirs.name
        return names if names[0] != names[1] and all(names) else ("ours", "theirs")

    def command(self) -> str:
        """The line that does it again."""
        asked = self.question
        words = ["mbcnet", "compare", str(self.ours), str(self.theirs)]
        words += ["--data", *asked.data] if asked.data else ["--split", asked.split]
        words += [word for name in asked.by for word in ("--by", name)]
        return shlex.join([*words, *(["--expected-clicks", str(self.top)] if self.top else [])])


class Line(NamedTuple):
    """A metric of both runs on the rows of one slice."""

    column: str  # that cuts the rows; "" for all of them
    value: str  # of that column
    rows: int
    metric: str
    difference: Difference
    p: float  # of the difference, corrected for the number of slices

    @property
    def is_significant(self) -> bool:
        """Whether the two runs differ, after the correction."""
        return self.p < SIGNIFICANT


def run_comparison(comparison: Comparison, *, as_json: bool = False, page: Path | None = None) -> int:
    """Score the best checkpoints of two runs on the same rows; print what differs, and write a page. One call per rank.

    Raises:
        InputError: the runs do not score the same rows, or there is no group column for the clicks.
    """
    folders, question = (comparison.ours, comparison.theirs), comparison.question
    configs = [load_run(folder) for folder in folders]
    if page is not None and (page.is_dir() or not page.parent.is_dir()):
        raise InputError(
            f"--out {page}: wanted a file in a folder that is there; choose another, or make {page.parent}"
        )
    if not question.data:  # the same files for both
        data = configs[0].data
        paths, where = getattr(data, question.split), getattr(data, f"{question.split}_where")
        question = replace(question, data=tuple(paths), where=tuple(where))
    files, found, names = FileList([], []), [], {}
    with joined_process(configs[0].train.device) as process:
        steps = [find_step(config, folder, process) for config, folder in zip(configs, folders, strict=True)]
        runs = list(zip(configs, folders, steps, strict=True))
        groups = groups_in_words(comparison, [run_schema(*run) for run in runs])
        for run in runs:
            try:
                tally, files = score_rows(*run, process, question)
            except InputError as error:  # which may tell of a schema
                raise InputError(f"{run[1]}: {error}") from None
            if not tally.exact:
                raise InputError(
                    f"{files_in_words(files)}: more rows than {question.exact_rows:,}, which are compared one by one; name fewer with "
                    "--data, or raise --exact-rows"
                )
            found.append(tally.kept(process))
            names = dict(tally.names)
    ours, theirs = found
    if ours is None or theirs is None:  # not the first rank
        return 0
    if not np.array_equal(ours.labels, theirs.labels) or not np.array_equal(ours.slices, theirs.slices):
        raise InputError(
            f"{folders[0]} and {folders[1]} do not read the same rows of {files_in_words(files)}; do not change the files meanwhile"
        )
    if ours.group_ids is None:
        ours = ours._replace(group_ids=theirs.group_ids)
    lines = compare_rows(ours, theirs, names, comparison.top)
    lead = f"{folders[0]} less {folders[1]} on {len(ours.labels):,} rows of {files_in_words(files)}; {groups}."
    notes = _notes(runs, files, question.where)
    if page is not None:
        blocks = [*map(Text, notes), *report_blocks(comparison, lines, pictures=True)]
        again = [Heading("Again"), Code(comparison.command())]
        write_whole(page, to_html(" and ".join(comparison.names), lead, [*blocks, *again]))
    if as_json:
        told = {"ours": str(folders[0]), "theirs": str(folders[1]), "steps": steps, "files": len(files), "notes": notes}
        print(json.dumps(told | to_json(lines)))
        return 0
    print("\n".join([lead, *notes]))
    for block in report_blocks(comparison, lines):
        if not isinstance(block, Heading):
            print(f"\n{text_table(block)}" if isinstance(block, Table) else block.text)
    if page is not None:
        print(f"wrote {page}")
    return 0


def groups_in_words(comparison: Comparison, schemas: Sequence[Schema]) -> str:
    """Check that two schemas ask for the same labels, and say which rows are taken together."""
    labels, groups = ([getattr(each, name) for each in schemas] for name in ("label", "group_column"))
    if labels[0] != labels[1]:
        raise InputError(
            f"{comparison.ours} was trained on label {labels[0]!r}, {comparison.theirs} on {labels[1]!r}: their scores tell of "
            "different things; compare runs of one label"
        )
    if comparison.top and not any(groups):
        raise InputError(
            f"--expected-clicks {comparison.top}: neither run's schema names a group_column, whose rows are ranked; leave it out"
        )
    column = groups[0] or groups[1]
    other = f" (the second run's group_column is {groups[1]})" if groups[1] not in ("", column) else ""
    return f"rows of one {column} are taken together{other}" if column else "rows are taken as independent"


def _notes(runs: Sequence[tuple[RunConfig, Path, int]], files: FileList, where: tuple[str, ...]) -> list[str]:
    """What makes a comparison unfair."""
    notes = []
    for config, folder, _ in runs:
        with suppress(InputError):  # training files that are gone tell nothing
            seen = set(resolve_files(config.data.train)) & set(files)
            if seen and config.data.train_where in ((), where):
                notes.append(f"note: {folder} was trained on rows of {len(seen)} of these files")
    first, second = (config.data for config, _, _ in runs)
    if (first.train, first.train_where) != (second.train, second.train_where):
        notes.append("note: the two were not trained on the same rows: data.train or data.train_where differs")
    return notes


def compare_rows(ours: Rows, theirs: Rows, names: dict[str, Any], top: int = 0) -> list[Line]:
    """Differences of every metric on all rows and on each slice; `names`: column -> its slices, as `Rows.slices` counts them."""
    slices = [
        _of_slice(ours, theirs, places == place, (column, value), top)
        for (column, values), places in zip(names.items(), ours.slices.T, strict=True)
        for place, value in enumerate(values)
        if (places == place).any()
    ]
    corrected = [holm([line.p for line in alike]) for alike in zip(*slices, strict=True)]  # a metric's, on every slice
    return [
        *_of_slice(ours, theirs, np.ones(len(ours.labels), bool), ("", ""), top),
        *(
            line._replace(p=corrected[metric][place])
            for place, own in enumerate(slices)
            for metric, line in enumerate(own)
        ),
    ]


def _of_slice(ours: Rows, theirs: Rows, chosen: np.ndarray, slice_: tuple[str, str], top: int) -> list[Line]:
    labels = ours.labels[chosen]
    groups = None if ours.group_ids is None else ours.group_ids[chosen]
    a, b = ours.logits[chosen, 0], theirs.logits[chosen, 0]
    found = paired_differences(a, b, labels, groups)
    if top and groups is not None:
        found[CLICKS] = expected_clicks(a, b, labels, groups, top)
    return [Line(*slice_, len(labels), name, found[name], found[name].p) for name in METRICS if name in found]


def to_json(lines: Sequence[Line]) -> dict[str, Any]:
    """One object: rows and each metric of all rows; `slices`, column -> value, of the same form. What is not defined is null."""
    found: dict[str, Any] = {}
    for line in lines:
        place = found
        for key in ("slices", line.column, line.value) if line.column else ():
            place = place.setdefault(key, {})
        value, low, high, p, ours, theirs = map(finite_or_none, line.difference)
        place["rows"] = line.rows
        place[line.metric] = {"ours": ours, "theirs": theirs, "difference": value, "interval": [low, high], "p": p}
        place[line.metric] |= {"p_corrected": finite_or_none(line.p), "significant": line.is_significant}
    return found


def report_blocks(comparison: Comparison, lines: Sequence[Line], *, pictures: bool = False) -> list[Block]:
    """A table of all rows, and one for each column that cuts them, with pictures where wanted."""
    rows = [_of_all(line) for line in lines if not line.column]
    header = ("all rows", *comparison.names, "difference", "95 % interval", "p")
    blocks: list[Block] = [Heading("All rows"), Table(header, tuple(rows))]
    for column in dict.fromkeys(line.column for line in lines if line.column):
        own = [line for line in lines if line.column == column]
        blocks.append(Heading(f"By {column}"))
        for metric in ("auc", CLICKS) if pictures else ():
            alike = [line for line in own if line.metric == metric and np.isfinite(line.difference.high)]
            drawn = {line.value[:SHOWN_TEXT]: (line.difference[:3], line.is_significant) for line in alike}
            what = f"{METRICS[metric]} by {column}"
            caption = f"{what}: differences with 95 % intervals. Right of 0, {comparison.names[0]} is ahead; red: significant."
            blocks += [Picture(what, figures.intervals_figure(drawn), caption)] if drawn else []
        blocks.append(_by_column(column, own))
    return [*blocks, *map(Text, legend(comparison, lines))]


def _of_all(line: Line) -> tuple[str, ...]:
    signs = ("+", "+", "+", "", "", "")
    numbers = (
        f"{each:{sign}.5f}" if np.isfinite(each) else "-" for each, sign in zip(line.difference, signs, strict=True)
    )
    value, low, high, _, ours, theirs = numbers
    return METRICS[line.metric], ours, theirs, value, f"{low} to {high}" if low != "-" else "-", p_text(line.p)


def _by_column(column: str, lines: Sequence[Line]) -> Table:
    """A row for each slice: differences, with half their interval."""
    slices: dict[str, list[Line]] = {}
    for line in lines:
        slices.setdefault(line.value, []).append(line)
    rows = [(name[:SHOWN_TEXT], f"{own[0].rows:,}", *map(_cell, own)) for name, own in slices.items()]
    metrics = [METRICS[line.metric] for line in next(iter(slices.values()))]
    return Table((f"by {column}", "rows", *metrics), tuple(rows))


def _cell(line: Line) -> str:
    value, _, high = line.difference[:3]
    half = f" +-{high - value:.4f}" if np.isfinite(high) else ""
    return f"{value:+.4f}{half}{' *' if line.is_significant else ''}" if np.isfinite(value) else "-"


def legend(comparison: Comparison, lines: Sequence[Line]) -> list[str]:
    """What the tables' signs mean."""
    told, slices = [], len({line[:2] for line in lines if line.column})
    if slices:
        told.append(
            f"*: p below {SIGNIFICANT} after Holm's correction for {slices} slices. +- is half a 95 % interval."
        )
    if not all(np.isfinite(line.difference.high) for line in lines):
        told.append("-, or no interval: not defined; too few rows of a class, or too few groups.")
    if comparison.top:
        words = f"expected clicks on the {comparison.top} highest rows of a group, mean over groups; in a slice, of its rows."
        told.append(f"{METRICS[CLICKS]}: {words}")
    return told


def p_text(p: float) -> str:
    """A p for people."""
    return "-" if p != p else "<.001" if p < 0.001 else f"{p:.3f}"
