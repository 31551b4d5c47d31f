"""`mbcnet plan`: every action from the command line; reading a plan imports no torch; mistakes are one line with the fix."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mbcnet_rec.cli import main

ROOT = Path(__file__).parents[1]
DEMO = str(ROOT / "data/schemas/pailitao_demo.toml")
CLUSTER = "2x2:h100-80g"


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """A plan of the demo's schema."""
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    assert main(["plan", "--schema", DEMO, "--cluster", CLUSTER, "--batch-size", "256", "-o", str(path)]) == 0
    return str(path)


def run(capsys, *args):
    """Exit code, output, errors of one command."""
    code = main(["plan", *args])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_bare_plan_and_make_say_the_same(capsys, plan, tmp_path):
    again = str(tmp_path / "again.json")
    task = ["--schema", DEMO, "--cluster", CLUSTER, "--batch-size", "256"]
    code, out, err = run(capsys, "make", *task, "-o", again)
    assert code == 0 and Path(again).read_text() == Path(plan).read_text()
    for words in ("ranks, busiest", "balance: time", "lower bound", "critical path", "dense part: 7,1"):
        assert words in out
    assert f"wrote {again}; next: " in err


def test_show_in_every_form(capsys, plan, tmp_path):
    code, out, _ = run(capsys, "show", plan, "--json")
    values = json.loads(out)
    assert code == 0 and len(values["ranks"]) == 4
    assert values["dense"]["parameters"] > 7_000_000  # the plan file carries what it was made beside
    page = tmp_path / "p.html"
    assert run(capsys, "show", plan, "--all", "--html", str(page))[0] == 0 and "user_id" in page.read_text()


def test_explain_says_why_and_the_next_best(capsys, plan):
    code, out, _ = run(capsys, "explain", "user_id", plan)
    assert code == 0 and out.startswith("user_id: ") and "planned: " in out and "next best: " in out
    code, _, err = run(capsys, "explain", "usr_id", plan)
    assert code == 2 and "did you mean 'user_id'?" in err


def test_diff_exits_as_diff_does(capsys, plan, tmp_path):
    assert run(capsys, "diff", plan, plan)[:2] == (0, "no difference\n")
    other = tmp_path / "other.json"
    other.write_text(Path(plan).read_text().replace('"data_type": "fp32"', '"data_type": "fp16"'))
    code, out, _ = run(capsys, "diff", plan, str(other))
    assert code == 1 and "data_type: fp32 -> fp16" in out
    found = json.loads(run(capsys, "diff", plan, str(other), "--json")[1])
    assert found["head"] == {"data_type": ["fp32", "fp16"]}


def test_check_names_every_difference(capsys, plan):
    assert run(capsys, "check", plan, "--schema", DEMO)[0] == 0
    code, out, _ = run(capsys, "check", plan, "--schema", str(ROOT / "data/schemas/adult.toml"))
    assert code == 2 and "table age is not planned" in out and "table user_id is not in the schema" in out
    code, _, err = run(capsys, "check", plan, "--cluster", "4x8:h200")
    assert code == 2 and "for 2x2 on cuda, but --cluster 4x8:h200 is 4x8" in err


def test_min_gpus(capsys):
    task = ["--schema", DEMO, "--cluster", "h100-80g", "--batch-size", "64"]
    code, out, _ = run(capsys, "min-gpus", *task)
    assert code == 0 and out.startswith("smallest: 1x1:h100-80g, 1 devices")


def test_constraints_file_and_overrides(capsys, tmp_path):
    constraints, out = tmp_path / "c.toml", tmp_path / "p.json"
    table = '[tables.user_id]\nsharding_types = ["row_wise"]\npooling_factor = 2.0\n'
    constraints.write_text(f'data_type = "fp16"\n{table}')
    args = ["--schema", DEMO, "--cluster", "1x2:cpu", "--batch-size", "64", "-o", str(out)]
    args += ["--constraints", str(constraints)]
    assert run(capsys, *args, "--set", "search_seconds=5")[0] == 0
    written = json.loads(out.read_text())
    user = written["tables"]["user_id"]
    assert (written["data_type"], user["sharding_type"], user["ids"]) == ("fp16", "row_wise", 2.0)


def test_what_does_not_fit_leaves_no_file(capsys, tmp_path):
    out, paper = tmp_path / "p.json", str(ROOT / "data/schemas/pailitao.toml")
    code, _, err = run(capsys, "--schema", paper, "--cluster", "1x4:h100-80g", "-o", str(out))
    assert code == 2 and not out.exists() and "bytes short; largest: item" in err and "min-gpus" in err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--cluster", CLUSTER], "no schema; add --schema FILE"),
        (["--schema", DEMO], "no cluster; add --cluster"),
        (["--schema", "absent.toml", "--cluster", CLUSTER], "no such file"),
        (["--schema", DEMO, "--cluster", CLUSTER, "--batch-size", "0"], "--batch-size 0: wanted 1 or more, and less than"),
        (["min-gpus", "--schema", DEMO, "--cluster", CLUSTER, "--headroom", "1.5"], "--headroom 1.5: wanted 0 or more, and less than 1"),
        (["show", "absent.json"], "cannot be read"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(capsys, args, said):
    code, out, err = run(capsys, *args)
    assert code == 2 and not out and said in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("args", [["show", "PLAN"], ["explain", "user_id", "PLAN"], ["diff", "PLAN", "PLAN"], ["check", "PLAN", "--schema", DEMO], ["--schema", DEMO], ["--help"]])  # fmt: skip
def test_reading_plans_and_usage_errors_import_no_torch(plan, args):
    code = (
        "import sys\nfrom mbcnet_rec.cli import main\n"
        "try:\n    main(['plan', *sys.argv[1:]])\nexcept SystemExit:\n    pass\n"
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    args = [plan if each == "PLAN" else each for each in args]
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr.strip().splitlines()[-1] == "False", done.stderr
