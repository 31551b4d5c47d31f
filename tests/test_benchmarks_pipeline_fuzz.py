"""Proves that pipeline_fuzz reports commands that drop, mix up or miscount rows, accept a fault, end in a traceback or leave half of their output,
and that it finds nothing in seeds that once found a fault."""

import contextlib
import importlib
import io
import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PLAIN_SEED = 104  # of a case that runs to its end: folders, a schema by hand, and a day with an id of 1.5
SEEDS = [9]  # a second
LONG_SEEDS = [1, 2, 5, 7, 10, 12, 23, 43, 49, 69, 72, 144, 161, 172, 289, 314, 318, 370, 484]


@pytest.fixture
def fuzz(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("pipeline_fuzz")


def change_scores(change):
    """Change the table of every file that predict wrote."""
    for path in Path("scores").rglob("*.parquet"):
        pq.write_table(change(pq.ParquetFile(path).read()), path)


def test_rows_that_predict_drops_are_found(fuzz, tmp_path):
    def run(words):
        said = fuzz.run_command(words)
        if words[0] == "predict":
            change_scores(lambda table: table.slice(1))
        return said

    findings, _ = fuzz.try_case(PLAIN_SEED, tmp_path / "case", run)
    assert len(findings) == 1
    assert re.match(rf"seed {PLAIN_SEED}: predict: .*: rows: \d+, by plain reading \d+", findings[0])


def test_rows_out_of_order_wrong_counts_and_an_accepted_fault_are_found(fuzz, tmp_path):
    def run(words):
        code, out, err = fuzz.run_command(words)
        if words[0] == "predict":
            change_scores(lambda table: table.take(list(reversed(range(len(table))))))
        if words[0] == "evaluate" and not code:
            answer = json.loads(out.splitlines()[-1])
            out = json.dumps(answer | {"rows": answer["rows"] + 1, "auc": 0.9})
        return (0 if "bad" in words else code), out, err

    findings, _ = fuzz.try_case(PLAIN_SEED, tmp_path / "case", run)
    found = "\n".join(findings)
    for wanted in (
        "evaluate: test rows: ",
        "evaluate --data: auc 0.9, by hand",
        "loader: as Arrow, other scores than predict's",
        "loader: as lists, other scores than predict's",
        "data check: accepts ",
        "predict: accepts ",
    ):
        assert wanted in found


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        (("Traceback (most recent call last)\nKeyError: 'x'", "", ""), "traceback: .*KeyError: 'x'"),
        ((2, "", "mbcnet: no\nmbcnet: and no\n"), "refuses in 2 lines"),
        ((3, "", "mbcnet: no\n"), "exit code 3"),
        ((2, "", "mbcnet: no\n"), "refuses, and should not: mbcnet: no"),
        ((2, "", "mbcnet: no\n"), "refused, and left fitted"),
        ((0, "", "mbcnet: warning: /a 1\nmbcnet: warning: /b 2\n"), "says a warning 2 times"),
    ],
)
def test_what_no_command_may_say_or_leave_is_found(fuzz, tmp_path, answer, wanted):
    def run(words):
        Path("fitted").write_text("half of a schema")
        return answer

    findings, accepted = fuzz.try_case(PLAIN_SEED, tmp_path / "case", run)
    assert bool(accepted) == (answer[0] == 0)
    assert any(re.match(rf"seed {PLAIN_SEED}: schema fit: {wanted}", line) for line in findings), findings


def test_a_case_that_ends_its_process_is_found_and_the_next_ones_run(fuzz, tmp_path):
    outcomes = list(fuzz.outcomes([1, 2, 3], tmp_path, dying_worker))
    assert [each[0] for each in outcomes] == [["1"], ["seed 2: process: ended by 7 (-9: not over after 120 s)"], ["3"]]


def dying_worker(seeds, folder, results):
    """Stands for the worker: the second case ends it."""
    for seed in seeds:
        if seed == 2:
            raise SystemExit(7)
        results.send(([str(seed)], 0, 1.0, 1))


@pytest.mark.parametrize("seed", [*SEEDS, *(pytest.param(seed, marks=pytest.mark.long) for seed in LONG_SEEDS)])
def test_a_seed_that_found_a_fault_finds_none(fuzz, tmp_path, seed):
    with contextlib.redirect_stdout(io.StringIO()):
        findings, _ = fuzz.try_case(seed, tmp_path / "case")
    assert not findings
