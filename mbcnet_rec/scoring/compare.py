"""`mbcnet compare`: two runs on the same rows: paired differences of their metrics, by slice, and the clicks that either ranking would get.

With --log the click rates of the two arms of `mbcnet serve --split`, from clicks logged beside the arm (Table 4, Figure 3):

    CTR = clicks / rows of an arm;   relative change = CTR_b / CTR_a - 1, its interval by the logarithm of the ratio

A row's influence on CTR is (y - CTR) / rows of its arm. Influences are summed over the rows of one value of the split's key, which are not
independent draws; error, interval and p follow as in paired.py.

Shapes: B rows.
"""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from data.errors import InputError
from data.reading.column_types import is_number
from data.reading.columns import NO_GROUP, Place
from data.reading.files import NOT_PARQUET, files_in_words, resolve_files
from data.reading.numbers import read_labels
from data.reading.storage import DataFile, FileList, for_each_file, open_parquet
from data.schema import Schema
from data.whole_folder import write_whole
from mbcnet_rec.logs.metrics_log import finite_or_none
from mbcnet_rec.report import figures
from mbcnet_rec.report.page import Block, Code, Heading, Picture, Table, Text, shown, text_table, to_html, with_half
from mbcnet_rec.runtime.process import joined_process
from mbcnet_rec.scoring.evaluate import MAX_SLICES, REST, Question, distinct, score_rows
from mbcnet_rec.scoring.paired import Difference, clusters_of, difference_of, expected_clicks, holm, paired_differences
from mbcnet_rec.scoring.ranking import title_of
from mbcnet_rec.scoring.tally import Rows
from mbcnet_rec.scoring.trained_run import TrainedRun, find_best, load_run

CLICKS, CTR, LIFT, SIGNIFICANT = "expected_clicks", "ctr", "relative_ctr", 0.05
METRICS = {"auc": "AUC", "gauc": "GAUC", "log_loss": "log-loss", "calibration": "calibration", CLICKS: "clicks on top"}
METRICS |= {CTR: "CTR", LIFT: "relative change"}
SHOWN_TEXT = 40  # letters of a slice's name where room is short
ARM = "arm"
UNKNOWN = Difference(math.nan, math.nan, math.nan, math.nan)


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
    """On every rank, score two runs' best checkpoints on the same rows, print, write a page; InputError if they score other rows or lack groups."""
    folders, question = (comparison.ours, comparison.theirs), comparison.question
    configs = [load_run(folder) for folder in folders]
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
    told = {"ours": str(folders[0]), "theirs": str(folders[1])}
    told |= {"steps": [run.step for run in runs], "files": len(files)}
    notes = _notes(runs, files, question.where)
    tell(comparison, [lead, *notes], everything, slices, told if as_json else None, page)
    return 0


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
    titles = {name: title_of(name) or METRICS[name] for name in everything.metrics}
    rows = [_of_all(titles[name], each) for name, each in everything.metrics.items()]
    blocks: list[Block] = [Heading("All rows"), Table(header, tuple(rows))]
    for column, values in slices.items():
        blocks.append(Heading(f"By {column}"))
        for name in ("auc", CLICKS, LIFT) if pictures else ():
            known = [(value, found.metrics[name]) for value, found in values.items() if name in found.metrics]
            known = [(value[:SHOWN_TEXT], each) for value, each in known if np.isfinite(each.high)]
            drawn = {value: (each[:3], is_significant(each)) for value, each in known}
            what = f"{METRICS[name]} by {column}"
            caption = f"{what}: differences with 95 % intervals. Right of 0, {comparison.names[0]} is ahead; red: significant."
            blocks += [Picture(what, figures.intervals_figure(drawn), caption)] if drawn else []
        cells = ((name, each.rows, map(_cell, each.metrics.values())) for name, each in values.items())
        lines = [(name[:SHOWN_TEXT], f"{rows:,}", *own) for name, rows, own in cells]
        blocks.append(Table((f"by {column}", "rows", *titles.values()), tuple(lines)))
    return [*blocks, *map(Text, legend(comparison, everything, slices))]


def _of_all(name: str, difference: Difference) -> tuple[str, ...]:
    value, low, high = (shown(each, "+.5f") for each in difference[:3])
    ours, theirs = (shown(each, ".5f") for each in (difference.ours, difference.theirs))
    return name, ours, theirs, value, f"{low} to {high}" if low != "-" else "-", p_text(difference.p)


def _cell(difference: Difference) -> str:
    return with_half(difference.value, difference.high, "+.4f") + (" *" if is_significant(difference) else "")


def legend(comparison: Comparison, everything: Found, slices: Slices) -> list[str]:
    """What the tables' signs mean."""
    told, every = [], [everything, *(found for values in slices.values() for found in values.values())]
    if slices:
        test = f"p below {SIGNIFICANT} after Holm's correction for {len(every) - 1} slices"
        told.append(f"*: {test}. +- is half a 95 % interval.")
    if not all(np.isfinite(each.high) for found in every for each in found.metrics.values()):
        told.append("-, or no interval: not defined; too few rows of a class, or too few groups.")
    if comparison.top:
        words = f"expected clicks on the {comparison.top} highest rows of a group, mean over groups; in a slice, of its rows."
        told.append(f"{METRICS[CLICKS]}: {words}")
    return told


def p_text(p: float) -> str:
    """A p for people."""
    return "<.001" if p < 0.001 else shown(p, ".3f")


def run_arms(question: Question, label: str, key: str, command_line: str, *, as_json: bool, page: Path | None) -> int:
    """Print, by slice too, by how much arm b's click rate differs from arm a's, and write a page; rows of one `key` are taken together.

    InputError if there is no such file or column, an arm is neither a nor b, or a label neither 0 nor 1.
    """
    files, by = resolve_files(question.data), question.by
    names: list[str] = list(dict.fromkeys([ARM, label, key or label, *by]))
    tables = for_each_file(files, partial(_read, names), NOT_PARQUET, attempts=3)
    if (rows := sum(map(len, tables))) > question.exact_rows:
        raise InputError(f"--log: {rows:,} rows; name fewer, or raise --exact-rows {question.exact_rows:,}")
    arms, in_arm = _codes([table[ARM] for table in tables])
    if odd := sorted({*arms} - {"a", "b"}):
        raise InputError(f"--log: column {ARM!r} = {odd[0]!r}: wanted a or b, as the scorer answers; keep those only")
    in_b = np.asarray([name == "b" for name in arms], bool)[in_arm]
    labels = np.concatenate([_labels(table[label], file, label) for table, file in zip(tables, files, strict=True)])
    clusters = np.arange(rows)
    if key:
        missing = np.concatenate([table[key].is_null(nan_is_null=True).to_numpy() for table in tables])
        clusters = clusters_of(np.where(missing, NO_GROUP, _codes([table[key] for table in tables])[1]), rows)
    slices: Slices = {}
    for column in by:
        values, places = _codes([table[column] for table in tables])
        common = np.argsort(-np.bincount(places), kind="stable")[:MAX_SLICES].tolist()
        chosen = {values[place]: places == place for place in common}
        if len(values) > len(common):
            chosen[REST] = ~np.isin(places, common)
        slices[column] = {name: compare_arms(in_b[own], labels[own], clusters[own]) for name, own in chosen.items()}
    correct(slices)
    alone = "rows are taken as independent (--key names the split's)"
    taken = f"rows of one {key} are taken together" if key else alone
    lines = [f"arm b less arm a on {rows:,} rows of {files_in_words(files)}; {taken}."]
    if key and (both := len(np.intersect1d(clusters[in_b], clusters[~in_b]))):
        lines.append(f"note: {both:,} values of {key} are in both arms: the split has changed, or is by another key")
    comparison = Comparison(Path("arm b"), Path("arm a"), question, command_line=command_line)
    told = {"ours": "b", "theirs": "a", "files": len(files)} if as_json else None
    tell(comparison, lines, compare_arms(in_b, labels, clusters), slices, told, page)
    return 0


def compare_arms(in_b: np.ndarray, labels: np.ndarray, clusters: np.ndarray) -> Found:
    """Difference and relative change of the click rate; all (B,). Not known where an arm has no row, or, of the change, no click."""
    rows = len(labels)
    counts, clicks = (np.asarray([each[~in_b].sum(), each[in_b].sum()]) for each in (np.ones(rows), labels))
    if not counts.all():
        return Found(rows, {CTR: UNKNOWN, LIFT: UNKNOWN})
    rates = clicks / counts
    own = in_b.astype(int)
    influence = np.where(in_b, 1, -1) * (labels - rates[own]) / counts[own]
    place = np.unique(clusters, return_inverse=True)[1]
    found = {CTR: difference_of(rates[1], rates[0], np.bincount(place, influence)), LIFT: UNKNOWN}
    if clicks.all():
        log = difference_of(math.log(rates[1]), math.log(rates[0]), np.bincount(place, influence / rates[own]))
        value, low, high = (math.expm1(each) for each in log[:3])
        found[LIFT] = Difference(value, low, high, log.p, corrected=log.p)
    return Found(rows, found)


def _read(names: Sequence[str], _: int, file: DataFile) -> pa.Table:
    with open_parquet(file) as parquet:
        if missing := [name for name in names if parquet.schema_arrow.names.count(name) != 1]:
            have = ", ".join(parquet.schema_arrow.names[:8])
            raise InputError(f"{file}: wanted one column {missing[0]!r}; it has {have}, ...: join it, or name another")
        return parquet.read(columns=list(names))


def _codes(columns: Sequence[pa.ChunkedArray]) -> tuple[list[str], np.ndarray]:
    """The different values of a column of all files as text, and each row's place among them, (B,)."""
    place_of: dict[str, int] = {}
    parts = [np.zeros(0, np.int64)]
    for chunk in (chunk for column in columns for chunk in column.chunks):
        values, places = distinct(chunk)
        own = np.asarray([place_of.setdefault(value, len(place_of)) for value in values], np.int64)
        parts.append(own[places])
    return list(place_of), np.concatenate(parts)


def _labels(column: pa.ChunkedArray, file: DataFile, name: str) -> np.ndarray:
    if not is_number(column.type):
        raise InputError(f"{file}: column {name!r} is {column.type}: wanted numbers 0 and 1; name another --label")
    return read_labels(column.combine_chunks(), name, Place(str(file), None)).astype(np.float64)
