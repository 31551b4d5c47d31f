"""`mbcnet compare --log`: the click rates of the two arms of `mbcnet serve --split`, from clicks logged beside the arm (Table 4, Figure 3).

    CTR = clicks / rows of an arm;   relative change = CTR_b / CTR_a - 1, its interval by the logarithm of the ratio

A row's influence on CTR is (y - CTR) / rows of its arm. Influences are summed over the rows of one value of the split's key, which are not
independent draws; error, interval and p follow as in paired.py.

Shapes: B rows.
"""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from data.errors import InputError
from data.reading.files import NOT_PARQUET, files_in_words, resolve_files
from data.reading.storage import DataFile, for_each_file, open_parquet
from mbcnet_rec.scoring.compare import CTR, LIFT, Comparison, Found, Slices, check_page, correct, tell
from mbcnet_rec.scoring.evaluate import Question
from mbcnet_rec.scoring.paired import Difference, difference_of
from mbcnet_rec.scoring.slices import MAX_SLICES, REST, distinct

ARM = "arm"
UNKNOWN = Difference(math.nan, math.nan, math.nan, math.nan)


def run_arms(question: Question, label: str, key: str, command_line: str, *, as_json: bool, page: Path | None) -> int:
    """Print by how much the click rate of arm b differs from that of arm a, on all rows and by slice; and write a page.

    `key`: by which the scorer split; empty: rows are taken as independent.

    Raises:
        InputError: no such file or column, an arm that is neither a nor b, or a label that is neither 0 nor 1.
    """
    check_page(page)
    files, by = resolve_files(question.data), question.by
    names: list[str] = list(dict.fromkeys([ARM, label, key or label, *by]))
    tables = for_each_file(files, partial(_read, names), NOT_PARQUET, attempts=3)
    if (rows := sum(map(len, tables))) > question.exact_rows:
        raise InputError(f"--log: {rows:,} rows; name fewer, or raise --exact-rows {question.exact_rows:,}")
    arms, in_arm = _codes([table[ARM] for table in tables])
    if odd := sorted({*arms} - {"a", "b"}):
        raise InputError(
            f"--log: column {ARM!r} = {odd[0]!r}: wanted a or b, as the scorer answers; leave other rows out"
        )
    in_b = np.asarray([name == "b" for name in arms], bool)[in_arm]
    labels = np.concatenate([_labels(table, file, label) for table, file in zip(tables, files, strict=True)])
    clusters = _codes([table[key] for table in tables])[1] if key else np.arange(rows)
    slices: Slices = {}
    for column in by:
        values, places = _codes([table[column] for table in tables])
        common = np.argsort(-np.bincount(places), kind="stable")[:MAX_SLICES].tolist()
        chosen = {values[place]: places == place for place in common}
        if len(values) > len(common):
            chosen[REST] = ~np.isin(places, common)
        slices[column] = {name: compare_arms(in_b[own], labels[own], clusters[own]) for name, own in chosen.items()}
    correct(slices)
    taken = (
        f"rows of one {key} are taken together" if key else "rows are taken as independent (--key names the split's)"
    )
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


def _labels(table: pa.Table, file: DataFile, name: str) -> np.ndarray:
    values = table[name].to_numpy()
    bad = ~np.isin(values, (0, 1)) if values.dtype.kind in "biuf" else np.ones(len(values), bool)
    if bad.any():
        row = int(bad.argmax())
        raise InputError(
            f"{file}: row {row}, column {name!r} = {values[row]}: wanted 0 or 1; fix it, or name another --label"
        )
    return values.astype(np.float64)
