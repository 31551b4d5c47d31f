"""Draw data sets as users have them, run the whole pipeline on each, and compare what it did with plain code that calls none of ours.

    python benchmarks/pipeline_fuzz.py --seed 1 --cases 500

Case i is drawn from the number S + i (pipeline_case.py): columns of many Arrow types that change from day to day, odd names, nulls,
partitions, hidden files, conditions, labels; and in many cases one more day that is damaged or holds something forbidden. It runs schema
infer (or writes a schema), fit, check --full, train, evaluate, predict, export and the artifact's loader, in one process.
A finding is printed as `seed K: command: what`: a traceback, rows or files miscounted, commands that disagree, a score that depends on the
type or form of a value, a field that counts for nothing, an accepted fault, a refusal that names no file or field, leftovers.
"""

import gc
import io
import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
import tomllib
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pipeline_case import BATCH, CONFIG, Case
from pipeline_faults import Fault
from side_by_side import parser_of, print_figures, settings

from mbcnet_rec.cli import main as mbcnet
from mbcnet_rec.run_training import run_training  # noqa: F401 (imports torchrec once, before the forks)
from mbcnet_rec.serving.loader import load

CODES = (0, 2, 74, 130)
SECONDS = 120.0  # of one case
WARM_UP = 20  # cases before memory is compared; about 1 MiB a case is torch.export's cache and the hooks of TorchRec's optimisers
ALL = 7  # commands that accept where a case runs to its end
Said = tuple[int | str, str, str]  # exit code or traceback, stdout, stderr
Runner = Callable[[Sequence[str]], Said]


def run_command(words: Sequence[str]) -> Said:
    """Run `mbcnet` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code: int | str = mbcnet(words)
        except Exception:  # what a user would see as a traceback
            code = traceback.format_exc()
    return code, out.getvalue(), err.getvalue()


class Stop(Exception):
    """The case ends here: a command has refused, or failed."""


class Trial:
    """One case: its commands, and what was found."""

    def __init__(self, case: Case, run: Runner = run_command) -> None:
        self.case, self.run, self.accepted = case, run, 0
        self.findings: list[str] = []
        self.kinds: set[tuple[str, str]] = set()
        self.fields: dict[str, dict[str, Any]] = {}

    def note(self, command: str, what: str) -> None:
        """Write a finding down, once where several differ in names and numbers only."""
        kind = (command, re.sub(r"\S*/\S*|\d+|'[^']*'", "", what)[:60])
        if kind not in self.kinds:
            self.kinds.add(kind)
            self.findings.append(f"seed {self.case.seed}: {command}: {' '.join(what.split())[:700]}")

    def count(self, command: str, what: str, found: Any, wanted: Any) -> None:
        """Compare what a command tells with a plain reading."""
        if found != wanted:
            self.note(command, f"{what}: {found}, by plain reading {wanted} ({self.case.words})")

    def command(self, *words: str, refused: Fault | None = None, out: str = "") -> str:
        """Run a command that must accept, or refuse a fault by name; return what it printed. `out` must not be there after a refusal.

        Raises:
            Stop: it refused what it must accept.
        """
        name = " ".join(words[: 1 + (words[0] in ("schema", "data"))])
        code, printed, told = self.run(words)
        lines = [line for line in told.splitlines() if line.startswith("mbcnet: ")]
        errors = [line for line in lines if not line.startswith("mbcnet: warning: ")]
        if isinstance(code, str) or "Traceback" in told:
            self.note(name, f"traceback: {' / '.join(str(code or told).strip().splitlines()[-3:])} ({self.case.words})")
            raise Stop
        if code not in CODES and (name, code) != ("data check", 1):
            self.note(name, f"exit code {code}: {told[-300:]}")
        warned = Counter(re.sub(r"\S*/\S*|\d+", "", line) for line in lines if line not in errors)
        if warned and max(warned.values()) > 1:
            self.note(name, f"says a warning {max(warned.values())} times: {warned.most_common(1)[0][0]}")
        if code == 2 and len(errors) != 1:
            self.note(name, f"refuses in {len(errors)} lines: {told[-300:]}")
        said = printed if code == 1 else " ".join(errors)
        if code and out and Path(out).exists():
            self.note(name, f"refused, and left {out}: {said[-300:]}")
        if refused:
            unnamed = [each for each in refused.names if each not in said]
            if not code:
                self.note(name, f"accepts {refused.words}; types {refused.types}")
            elif unnamed:
                self.note(name, f"refuses {refused.words} without naming {unnamed}: {said[-500:]}")
        elif code:
            too_late = self.accepted and not self.case.twice
            if too_late or not self.case.may_refuse or self.case.may_refuse not in said:
                self.note(name, f"refuses, and should not: {said[-500:]} ({self.case.words})")
            raise Stop
        self.accepted += not code and not refused
        return printed

    def whole(self) -> None:
        """The whole pipeline."""
        case = self.case
        schema = self.schema()
        self.command("schema", "fit", schema, *case.train_paths, "-o", "fitted", out="fitted")
        self.fields = tomllib.loads(Path("fitted/schema.toml").read_text("utf-8"))["fields"]
        files, rows = len(case.files), sum(part.num_rows for part in case.files)
        printed = self.command("data", "check", *case.paths, "--schema", "fitted/schema.toml", "--full")
        self.count(
            "data check", "files and rows", numbers(r"in ([\d,]+) file.*?, ([\d,]+) rows", printed), [files, rows]
        )
        self.train()
        tested = json.loads(self.command("evaluate", "run", "--json").splitlines()[-1])
        self.count("evaluate", "test rows", tested["rows"], case.num_test)
        every = json.loads(self.command("evaluate", "run", "--json", "--data", *case.paths).splitlines()[-1])
        self.count("evaluate --data", "rows", every["rows"], rows)
        keep = ["--keep", "rid"] if case.keeps_rid else []
        self.command("predict", "run", "--data", *case.paths, "--out", "scores", *keep)
        scores = self.scores()
        self.equal_rows(scores)
        self.metrics(every, scores)
        self.command("export", "run", "--out", "served", "--no-aot", "--rows", "fp32", out="served")
        self.loader(scores)
        bad = case.write_bad(self.fields)
        if bad:
            self.refusals(bad)

    def schema(self) -> str:
        """Infer a schema, or write the case's own; return its path."""
        case, file = self.case, Path("own.toml")
        if not case.is_inferred:
            file.write_text(case.schema_text(), "utf-8")
            return str(file)
        try:
            self.command("schema", "infer", *case.paths, "-o", str(file), "--label", "label", out=str(file))
        except Stop:
            if self.findings or case.twice:
                raise
            file.write_text(case.schema_text(), "utf-8")  # it has named what it cannot infer: a user goes on by hand
            return str(file)
        text, rows = file.read_text("utf-8"), sum(part.num_rows for part in case.files)
        found = numbers(r"Inferred from ([\d,]+) of ([\d,]+) rows of (\d+) file", text)
        self.count("schema infer", "rows read, rows, files", found, [rows, rows, len(case.files)])
        if case.time_column:  # as a user would add it
            text = re.sub(r"(?m)^time_column = .*\n", "", text)
            text = re.sub(r"(?m)^(label = .*)$", rf'\1\ntime_column = "{case.time_column}"', text, count=1)
            file.write_text(text, "utf-8")
        return str(file)

    def train(self) -> None:
        """Train one epoch; its steps and test rows tell what it has read."""
        case = self.case
        Path("run.toml").write_text(CONFIG.format(model=case.model, data=case.data_text()), "utf-8")
        nothing = Fault("conditions that leave no row", (), "")
        refused = None if case.num_train and case.num_test else nothing
        printed = self.command("train", "--config", "run.toml", refused=refused, out="run/DONE")
        if refused:
            raise Stop
        self.count("train", "steps", numbers(r"([\d,]+) steps of", printed), [-(-case.num_train // BATCH)])
        self.count("train", "test rows", numbers(r"test: ([\d,]+) rows", printed), [case.num_test])

    def scores(self) -> list[np.ndarray]:
        """Read predict's output; its kept column must be the input's, in the same order."""
        found = {str(path.relative_to("scores")): path for path in Path("scores").rglob("*.parquet") if path.is_file()}
        shared = os.path.commonpath([part.path.parent for part in self.case.files])
        scores = []
        for part in self.case.files:
            name = str(part.path.relative_to(shared))
            if name not in found:
                self.note("predict", f"no output {name} for {part.path}; there are {sorted(found)}")
                raise Stop
            table = pq.ParquetFile(found.pop(name)).read()
            self.count("predict", f"{name}: rows", len(table), part.num_rows)
            if len(table) != part.num_rows:
                raise Stop
            probability = table["probability"].to_numpy()
            if not np.isfinite(probability).all():
                self.note("predict", f"{name}: a probability is not finite ({self.case.words})")
            for column in ["rid"] * self.case.keeps_rid:
                self.count("predict", f"{name}: kept {column}", table[column].to_pylist(), part.columns[column])
            scores.append(probability)
        self.count("predict", "other outputs", sorted(found), [])
        return scores

    def columns(self) -> list[str]:
        """Columns that fields read."""
        read = [(entry.get("column", name), entry.get("weights")) for name, entry in self.fields.items()]
        return sorted({column for both in read for column in both if column})

    def equal_rows(self, scores: list[np.ndarray]) -> None:
        """Rows of equal values have equal scores, whatever the types of their day are."""
        seen: dict[str, Any] = {}
        columns = self.columns()
        for part, own in zip(self.case.files, scores, strict=True):
            for row, score in enumerate(own):
                values = repr([self.case.canonical(name, part.columns[name][row]) for name in columns])
                first, other, at = seen.setdefault(values, (score, part, row))
                if abs(first - score) > 1e-6:
                    types = {name: (str(part.types[name]), str(other.types[name])) for name in columns}
                    unlike = {name: each for name, each in types.items() if each[0] != each[1]}
                    where = f"{part.path} row {row}, {other.path} row {at}: {score:.6f}, {first:.6f}"
                    self.note("predict", f"equal rows score differently: {where}; types {unlike}; {values[:200]}")
                    return

    def metrics(self, answer: dict[str, Any], scores: list[np.ndarray]) -> None:
        """AUC, log-loss and GAUC of all rows, by hand."""
        rows = [
            (float(score), label, group)
            for part, own in zip(self.case.files, scores, strict=True)
            for score, label, group in zip(own, part.columns["label"], part.columns["user_id"], strict=True)
        ]
        if not all(1e-6 < row[0] < 1 - 1e-6 for row in rows):
            return  # float32 has lost what the metrics are computed from
        wanted = {"auc": auc(rows), "log_loss": (log_loss(rows), 2e-3)}
        if "gauc" in answer:
            groups: dict[Any, list[Any]] = {}
            for row in rows:
                if row[2] is not None:
                    groups.setdefault(row[2], []).append(row)
            of_groups = [(*auc(own), len(own)) for own in groups.values()]
            kept = [each for each in of_groups if each[0] is not None]
            total = sum(n for _, _, n in kept)
            mean, slack = sum((v or 0.0) * n for v, _, n in kept), sum(s * n for _, s, n in kept)
            wanted["gauc"] = (mean / total, slack / total) if kept else (None, 0.0)
        for name, (value, slack) in wanted.items():
            found = answer[name]
            if (found is None) != (value is None) or abs((found or 0) - (value or 0)) > slack + 1e-9:
                self.note("evaluate --data", f"{name} {found}, by hand {value} ({self.case.words})")

    def loader(self, scores: list[np.ndarray]) -> None:
        """The artifact's loader gives predict's scores for each form of the rows."""
        model, names = load("served"), self.columns()
        for part, wanted in zip(self.case.files, scores, strict=True):
            stored = read(part.path)
            lists = {name: stored[name].to_pylist() for name in names}
            values = {name: as_json(part.columns[name], part.types[name]) for name in names}
            arrays = {name: np.asarray(each) if is_flat(each) else each for name, each in values.items()}
            forms = {"Arrow": stored, "lists": lists, "JSON": json.loads(json.dumps(values)), "NumPy": arrays}
            types = {name: str(part.types[name]) for name in names}
            for form, rows in forms.items() if part.num_rows else ():
                found = self.predicted(model, rows, f"{part.path} as {form}")
                same = found is not None and len(found) == len(wanted) and np.abs(found - wanted).max() <= 1e-6
                if found is not None and not same:
                    self.note(
                        "loader",
                        f"as {form}, other scores than predict's: {part.path}, {types}, {found[:3]}, {wanted[:3]}",
                    )
        self.counts_for_something(model)

    def counts_for_something(self, model: Any) -> None:
        """Another value of a field changes a score; else the field would be read as missing, unseen by what only compares."""
        columns, total = self.case.files[0].columns, self.case.files[0].num_rows
        rows = {name: columns[name] for name in self.columns()}
        for name, entry in self.fields.items():
            column = entry.get("column", name)
            pair = self.case.two_values(column, entry)
            if not pair or not total or entry.get("encoding") == "zch" or self.case.has_large:  # ids of zch share rows
                continue
            found = []
            for value in pair:
                weights = {entry["weights"]: [[1.0] * len(value)] * total} if "weights" in entry else {}
                changed = {**rows, column: [value] * total, **weights}
                found.append(self.predicted(model, changed, f"field {name!r} = {value!r}"))
            if found[0] is not None and found[1] is not None and np.array_equal(*found):
                what = f"{pair} score alike; {entry}, types {self.case.types_of(column)}"
                self.note("loader", f"field {name!r} counts for nothing: {what}")

    def predicted(self, model: Any, rows: Any, what: str) -> np.ndarray | None:
        """The loader's scores of right rows; it must take them."""
        try:
            return model.predict(rows)
        except Exception as error:
            self.note("loader", f"{type(error).__name__}: {error}: {what}")
            return None

    def refusals(self, bad: Fault) -> None:
        """One more day with a fault: no command may take it, each says what and where, and the run stays as it is."""
        before = contents("run")
        changes = settings('data.train=["bad"]', "data.train_where=[]", "train.out=bad-run")
        for words in (
            ("data", "check", "bad", "--schema", "fitted/schema.toml", "--full"),
            ("evaluate", "run", "--json", "--data", "bad"),
            ("predict", "run", "--data", "bad", "--out", "bad-scores"),
            ("train", "--config", "run.toml", *changes),
        ):
            taken = words[0] == "predict" and bad.of_label
            try:
                self.command(*words, refused=None if taken else bad, out="bad-run/DONE" if words[0] == "train" else "")
            except Stop:
                continue
        left = [str(path) for path in Path().rglob("*partial*")]
        left += [] if bad.of_label else [str(path) for path in Path("bad-scores").glob("*.parquet")]
        if left:
            self.note("predict", f"left {left} after {bad.words}")
        if contents("run") != before:
            self.note("train", f"a refused command changed the trained run ({bad.words})")
        if bad.of_label or bad.is_damage:
            return
        try:
            scores = load("served").predict(read(next(Path("bad").rglob("*.parquet"))))
            self.note("loader", f"accepts {bad.words}: {scores[:3]}; types {bad.types}")
        except ValueError as error:
            if any(name not in str(error) for name in bad.names[1:]):  # which file it has not been told
                self.note("loader", f"refuses {bad.words} without naming {bad.names[-1]}: {error}")
        except Exception as error:
            self.note("loader", f"{bad.words}: {type(error).__name__}: {error}")


def read(path: Path) -> pa.Table:
    """A file's rows, row group by row group: Arrow joins no dictionaries inside of lists."""
    with pq.ParquetFile(path) as file:
        groups = [file.read_row_group(index) for index in range(file.num_row_groups)]
        return pa.concat_tables(groups).unify_dictionaries().combine_chunks() if groups else file.read()


def as_json(values: Sequence[Any], kind: pa.DataType) -> Sequence[Any]:
    """Values as JSON has them: whole numbers of a column of integers without a point."""
    return [int(value) if pa.types.is_integer(kind) and isinstance(value, float) else value for value in values]


def numbers(pattern: str, text: str) -> list[int] | None:
    """The numbers that a pattern finds in what a command said."""
    found = re.search(pattern, text)
    return [int(each.replace(",", "")) for each in found.groups()] if found else None


def contents(folder: str) -> dict[str, tuple[int, int]]:
    """Size and time of every file of a folder."""
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def is_flat(values: Sequence[Any]) -> bool:
    """Whether NumPy can hold the values as numbers or text of one type."""
    kinds = {type(value) for value in values}
    return (
        len(kinds) == 1
        and kinds <= {int, float, str}
        and all(type(v) is not int or -(2**63) <= v < 2**63 for v in values)
    )


def auc(rows: Sequence[tuple[float, int, Any]]) -> tuple[float | None, float]:
    """Share of pairs in order, ties counting half; and how far it may be off: pairs a rounding apart may stand in any order."""
    ones = np.array([score for score, label, _ in rows if label == 1])
    zeros = np.array([score for score, label, _ in rows if label != 1])
    if not len(ones) or not len(zeros):
        return None, 0.0
    gaps = ones[:, None] - zeros[None]
    return float((np.sign(gaps) / 2 + 0.5).mean()), float((np.abs(gaps) < 1e-6).mean())


def log_loss(rows: Sequence[tuple[float, int, Any]]) -> float:
    """Mean negative log-likelihood."""
    likely = np.array([score if label == 1 else 1 - score for score, label, _ in rows])
    return float(-np.log(np.maximum(likely, 1e-12)).mean())


def try_case(seed: int, folder: Path, run: Runner = run_command) -> tuple[list[str], int]:
    """Run one case in a folder that it makes; return its findings and how many commands have accepted."""
    trial = Trial(Case(seed), run)
    folder.mkdir(parents=True)
    with chdir(folder):
        trial.case.write()
        before = contents("logs")
        try:
            trial.whole()
        except Stop:
            pass
        except Exception:  # of this script, or of a command's output that it cannot read
            trial.note("fuzz", " / ".join(traceback.format_exc().strip().splitlines()[-4:]))
        if contents("logs") != before:
            trial.note("all", "a command changed the data")
    return trial.findings, trial.accepted


def worker(seeds: Sequence[int], folder: Path, results: Any) -> None:
    """Run cases, and send what each found, how many commands accepted, resident MiB and open files."""
    torch.set_num_threads(1)
    for seed in seeds:
        found = try_case(seed, folder / str(seed))
        shutil.rmtree(folder / str(seed), ignore_errors=True)
        gc.collect()
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
        results.send((*found, resident, len(os.listdir("/proc/self/fd"))))


def outcomes(
    seeds: Sequence[int], folder: Path, work: Callable[..., None] = worker
) -> Iterator[tuple[list[str], int, float, int]]:
    """What each case sends. Where one ends the process or hangs, that is found, and another process goes on."""
    left = list(seeds)
    while left:
        here, there = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(target=work, args=(left, folder, there))
        process.start()
        there.close()
        try:
            while left:
                if not here.poll(SECONDS):
                    process.kill()
                found = here.recv()
                left.pop(0)
                yield found
        except EOFError:
            process.join()
            yield (
                [f"seed {left.pop(0)}: process: ended by {process.exitcode} (-9: not over after {SECONDS:g} s)"],
                0,
                0.0,
                0,
            )
        process.join()


def run(folder: Path, cases: int, seed: int) -> dict[str, Any]:
    """Try cases; return how many ran to their end, what was found, and what one costs and leaves in memory."""
    findings, ends, start = [], 0, time.perf_counter()
    used: list[tuple[float, int]] = []
    for found, accepted, resident, files in outcomes(range(seed, seed + cases), folder):
        for line in found:
            print(line, flush=True)
        findings += found
        ends += accepted >= ALL
        used += [(resident, files)] if resident else []
    warm, last = used[min(WARM_UP, len(used) - 1)], used[-1]
    return {
        "cases": cases, "to_the_end": ends, "findings": len(findings), "seed": seed,
        "seconds_per_case": (time.perf_counter() - start) / cases,
        "mebibytes_added_per_case": (last[0] - warm[0]) / max(1, len(used) - WARM_UP),
        "open_files_added": last[1] - warm[1],
    }  # fmt: skip


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--cases", type=int, default=500, help="at most 10 with --quick")
    parser.add_argument("--seed", type=int, default=1, help="of the first case")
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="run the first case alone, there, and leave its files"
    )
    args = parser.parse_args()
    if args.keep:
        found, accepted = try_case(args.seed, args.keep.resolve())
        print("\n".join([Case(args.seed).words, *found]))
        print_figures({"seed": args.seed, "accepted": accepted, "findings": len(found)}, args.json)
        return int(bool(found))
    with tempfile.TemporaryDirectory(prefix="pipeline-fuzz-") as name:
        result = run(Path(name), min(args.cases, 10) if args.quick else args.cases, args.seed)
    print_figures(result, args.json)
    return int(result["findings"] > 0)


if __name__ == "__main__":
    sys.exit(main())
