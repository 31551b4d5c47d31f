"""`mbcnet compare`: two runs on the same rows: paired differences of their metrics, by slice, and the clicks that either ranking would get."""

import json
from collections.abc import Mapping, Sequence
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
from mbcnet_rec.logs.metrics_log import finite_or_none
from mbcnet_rec.report import figures
from mbcnet_rec.report.page import Block, Code, Heading, Picture, Table, Text, text_table, to_html
from mbcnet_rec.runtime.process import joined_process
from mbcnet_rec.scoring.evaluate import Question, score_rows
from mbcnet_rec.scoring.paired import Difference, expected_clicks, holm, paired_differences
from mbcnet_rec.scoring.ranking import title_of
from mbcnet_rec.scoring.tally import Rows
from mbcnet_rec.scoring.trained_run import TrainedRun, find_best, load_run

CLICKS, CTR, LIFT, SIGNIFICANT = "expected_clicks", "ctr", "relative_ctr", 0.05
METRICS = {"auc": "AUC", "gauc": "GAUC", "log_loss": "log-loss", "calibration": "calibration", CLICKS: "clicks on top"}
METRICS |= {CTR: "CTR", LIFT: "relative change"}
SHOWN_TEXT = 40  # letters of a slice's name where room is short


@dataclass(frozen=True)
class Comparison:
    """What to compare."""

    ours: Path
    theirs: Path
    question: Question  # of which rows
    top: int = 0  # rows of each group whose clicks are counted; 0: none are
    command_line: str = ""  # that asked for it

    @property
    def names(self) -> tuple[str, str]:
        """The runs' names in tables."""
        names = self.ours.name, self.theirs.name
        return names if names[0] != names[1] and all(names) else ("ours", "theirs")


class Found(NamedTuple):
    """What was found on some rows."""

    rows: int
    metrics: dict[str, Difference]  # by the keys of METRICS


Slices = dict[str, dict[str, Found]]  # column -> its value


def run_comparison(comparison: Comparison, *, as_json: bool = False, page: Path | None = None) -> int:
    """Score the best checkpoints of two runs on the same rows; print what differs, and write a page. One call per rank.

    Raises:
        InputError: the runs do not score the same rows, or there is no group column for the clicks.
    """
    folders, question = (comparison.ours, comparison.theirs), comparison.question
    configs = [load_run(folder) for folder in folders]
    check_page(page)
    if not question.data:  # the same files for both
        data = configs[0].data
        paths, where = getattr(data, question.split), getattr(data, f"{question.split}_where")
        question = replace(question, data=tuple(paths), where=tuple(where))
    files, found, names = FileList([], []), [], {}
    with joined_process(configs[0].train.device) as process:
        runs = [find_best(config, folder, process) for config, folder in zip(configs, folders, strict=True)]
        groups = groups_in_words(comparison, [run.schema for run in runs])
        for run in runs:
            try:
                tally, files = score_rows(run, process, question)
            except InputError as error:  # which may tell of a schema
                raise InputError(f"{run.folder}: {error}") from None
            (own,) = tally.of.values()
            if not own.exact:
                raise InputError(
                    f"{files_in_words(files)}: more rows than {question.exact_rows:,}, which are compared one by one; name fewer with "
                    "--data, or raise --exact-rows"
                )
            found.append(own.kept(process))
            names = dict(own.names)
    ours, theirs = found
    if ours is None or theirs is None:  # not the first rank
        return 0
    if not np.array_equal(ours.labels, theirs.labels) or not np.array_equal(ours.slices, theirs.slices):
        raise InputError(
            f"{folders[0]} and {folders[1]} do not read the same rows of {files_in_words(files)}; do not change the files meanwhile"
        )
    if ours.group_ids is None:
        ours = ours._replace(group_ids=theirs.group_ids)
    ks = question.ranking_k or configs[0].train.ranking_k
    everything, slices = compare_rows(ours, theirs, names, comparison.top, ks)
    lead = f"{folders[0]} less {folders[1]} on {len(ours.labels):,} rows of {files_in_words(files)}; {groups}."
    told = {
        "ours": str(folders[0]),
        "theirs": str(folders[1]),
        "steps": [run.step for run in runs],
        "files": len(files),
    }
    notes = _notes(runs, files, question.where)
    tell(comparison, [lead, *notes], everything, slices, told if as_json else None, page)
    return 0


def check_page(page: Path | None) -> None:
    """Raise InputError where a page could not be written there."""
    if page is not None and (page.is_dir() or not page.parent.is_dir()):
        raise InputError(f"--out {page}: wanted a file in a folder that is there; choose one, or make {page.parent}")


def tell(
    comparison: Comparison,
    lines: Sequence[str],
    everything: Found,
    slices: Slices,
    told: Mapping[str, Any] | None,
    page: Path | None,
) -> None:
    """Print tables, below `lines`, or one JSON object that has `told` too; and write a page."""
    lead, *notes = lines
    if page is not None:
        blocks = [*map(Text, notes), *report_blocks(comparison, everything, slices, pictures=True)]
        again = [Heading("Again"), Code(comparison.command_line)]
        write_whole(page, to_html(" and ".join(comparison.names), lead, [*blocks, *again]))
    if told is not None:
        print(json.dumps({**told, "notes": notes} | to_json(everything, slices)))
        return
    print("\n".join(lines))
    for block in report_blocks(comparison, everything, slices):
        if not isinstance(block, Heading):
            print(f"\n{text_table(block)}" if isinstance(block, Table) else block.text)
    if page is not None:
        print(f"wrote {page}")


def groups_in_words(comparison: Comparison, schemas: Sequence[Schema]) -> str:
    """Check that two schemas ask for the same labels, and say which rows are taken together."""
    for each in schemas:
        each.require_one_label("compare")
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


def _notes(runs: Sequence[TrainedRun], files: FileList, where: tuple[str, ...]) -> list[str]:
    """What makes a comparison unfair."""
    notes = []
    for run in runs:
        with suppress(InputError):  # training files that are gone tell nothing
            seen = set(resolve_files(run.config.data.train)) & set(files)
            if seen and run.config.data.train_where in ((), where):
                notes.append(f"note: {run.folder} was trained on rows of {len(seen)} of these files")
    first, second = (run.config.data for run in runs)
    if (first.train, first.train_where) != (second.train, second.train_where):
        notes.append("note: the two were not trained on the same rows: data.train or data.train_where differs")
    return notes


def compare_rows(
    ours: Rows, theirs: Rows, names: Mapping[str, Sequence[str]], top: int = 0, ks: Sequence[int] = ()
) -> tuple[Found, Slices]:
    """Differences of every metric on all rows and on each slice; `names`: column -> its slices, as `Rows.slices` counts them."""
    slices = {
        column: {value: _of_rows(ours, theirs, places == place, top, ks) for place, value in enumerate(values)}
        for (column, values), places in zip(names.items(), ours.slices.T, strict=True)
    }
    correct(slices)
    return _of_rows(ours, theirs, np.ones(len(ours.labels), bool), top, ks), slices


def correct(slices: Slices) -> None:
    """Fill in the p corrected for the number of slices."""
    every = [found.metrics for values in slices.values() for found in values.values()]
    for name in every[0] if every else ():
        corrected = holm([metrics[name].p for metrics in every])
        for metrics, p in zip(every, corrected, strict=True):
            metrics[name] = metrics[name]._replace(corrected=p)


def _of_rows(ours: Rows, theirs: Rows, chosen: np.ndarray, top: int, ks: Sequence[int]) -> Found:
    labels = ours.labels[chosen]
    groups = None if ours.group_ids is None else ours.group_ids[chosen]
    a, b = ours.logits[chosen, 0], theirs.logits[chosen, 0]
    found = paired_differences(a, b, labels, groups, ks)
    if top and groups is not None:
        found[CLICKS] = expected_clicks(a, b, labels, groups, top)
    order = [name for name in (*METRICS, *found) if name in found]
    return Found(len(labels), {name: found[name] for name in dict.fromkeys(order)})


def to_json(everything: Found, slices: Slices) -> dict[str, Any]:
    """One object: rows and each metric of all rows; `slices`, column -> value, of the same form. What is not defined is null."""

    def plain(found: Found) -> dict[str, Any]:
        told: dict[str, Any] = {"rows": found.rows}
        for name, each in found.metrics.items():
            value, low, high, p, ours, theirs, corrected = map(finite_or_none, each)
            told[name] = {"ours": ours, "theirs": theirs, "difference": value, "interval": [low, high], "p": p}
            told[name] |= {"p_corrected": corrected, "significant": is_significant(each)}
        return told

    cut = {column: {value: plain(found) for value, found in values.items()} for column, values in slices.items()}
    return plain(everything) | ({"slices": cut} if cut else {})


def is_significant(difference: Difference) -> bool:
    """Whether the two runs differ, after the correction."""
    return difference.corrected < SIGNIFICANT


def report_blocks(comparison: Comparison, everything: Found, slices: Slices, *, pictures: bool = False) -> list[Block]:
    """A table of all rows, and one for each column that cuts them, with pictures where wanted."""
    header = ("all rows", *comparison.names, "difference", "95 % interval", "p")
    rows = [_of_all(title_of(name) or METRICS[name], each) for name, each in everything.metrics.items()]
    blocks: list[Block] = [Heading("All rows"), Table(header, tuple(rows))]
    for column, values in slices.items():
        blocks.append(Heading(f"By {column}"))
        for name in ("auc", CLICKS, LIFT) if pictures else ():
            known = {value: found.metrics[name] for value, found in values.items() if name in found.metrics}
            drawn = {
                value[:SHOWN_TEXT]: (each[:3], is_significant(each))
                for value, each in known.items()
                if np.isfinite(each.high)
            }
            what = f"{METRICS[name]} by {column}"
            caption = f"{what}: differences with 95 % intervals. Right of 0, {comparison.names[0]} is ahead; red: significant."
            blocks += [Picture(what, figures.intervals_figure(drawn), caption)] if drawn else []
        cells = [
            (value[:SHOWN_TEXT], f"{found.rows:,}", *map(_cell, found.metrics.values()))
            for value, found in values.items()
        ]
        blocks.append(
            Table(
                (f"by {column}", "rows", *(title_of(name) or METRICS[name] for name in everything.metrics)),
                tuple(cells),
            )
        )
    return [*blocks, *map(Text, legend(comparison, everything, slices))]


def _of_all(name: str, difference: Difference) -> tuple[str, ...]:
    value, low, high = (f"{each:+.5f}" if np.isfinite(each) else "-" for each in difference[:3])
    ours, theirs = (f"{each:.5f}" if np.isfinite(each) else "-" for each in (difference.ours, difference.theirs))
    return name, ours, theirs, value, f"{low} to {high}" if low != "-" else "-", p_text(difference.p)


def _cell(difference: Difference) -> str:
    """A difference with half its interval."""
    value, _, high = difference[:3]
    half = f" +-{high - value:.4f}" if np.isfinite(high) else ""
    return f"{value:+.4f}{half}{' *' if is_significant(difference) else ''}" if np.isfinite(value) else "-"


def legend(comparison: Comparison, everything: Found, slices: Slices) -> list[str]:
    """What the tables' signs mean."""
    told, every = [], [everything, *(found for values in slices.values() for found in values.values())]
    if slices:
        told.append(
            f"*: p below {SIGNIFICANT} after Holm's correction for {len(every) - 1} slices. +- is half a 95 % interval."
        )
    if not all(np.isfinite(each.high) for found in every for each in found.metrics.values()):
        told.append("-, or no interval: not defined; too few rows of a class, or too few groups.")
    if comparison.top:
        words = f"expected clicks on the {comparison.top} highest rows of a group, mean over groups; in a slice, of its rows."
        told.append(f"{METRICS[CLICKS]}: {words}")
    return told


def p_text(p: float) -> str:
    """A p for people."""
    return "-" if p != p else "<.001" if p < 0.001 else f"{p:.3f}"
