"""Proves that training runs a reviewed plan to the letter, says after some steps how plan and run compare, and refuses another plan."""

import json
import re

import pytest
from forked_ranks import run_script
from small_data import write_small
from tiny_run import train

from mbcnet_rec.cli import main
from sharding.plan.placement import read_plan

LINE = re.compile(
    r"after 20 steps, planned against held \(rank \d of \d, the farthest off\): rows \S+ KiB -> \S+ KiB \((\S+) %\), "
    r"optimizer state \S+ KiB -> \S+ KiB \((\S+) %\); step at least \S+ ms on \S+, measured \S+ ms"
)


def scenarios(folder, *flags):
    run_script("planned_ranks.py", str(folder), flags=flags)
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return scenarios(tmp_path_factory.mktemp("planned"))


@pytest.fixture(scope="module")
def replicas(tmp_path_factory):
    return scenarios(tmp_path_factory.mktemp("replicas"), "-O")["replicas"]


def said(result):
    """The two deviations, in per cent, of the line that rank 0 prints once and no other rank prints."""
    assert set(result["codes"]) == {0}, result["words"]
    assert not LINE.search(result["words"][1])
    (found,) = LINE.findall(result["words"][0])
    return [abs(float(each)) for each in found]


def test_a_reviewed_plan_with_half_rows_and_half_precision_is_run_to_the_letter(found):
    result = found["reviewed_plan"]
    assert result["same_file"], "the run folder keeps the plan byte by byte"
    assert max(said(result)) < 1
    again = result["again"]
    assert again["codes"] == [0, 0], again["words"]
    assert len(again["before"]) == 6
    assert again["after"] == again["before"], "half rows come back from a checkpoint as they were"


def test_ranks_without_an_agent_join_again(found):
    assert found["joined_twice"]["codes"] == [0, 0], found["joined_twice"]["words"]


def test_without_a_plan_the_run_plans_and_keeps_what_it_used(found):
    result = found["no_plan"]
    assert max(said(result)) < 1, "replicated tables' state counts too"
    plan = result["plan"]
    assert plan["optimizer"] == "adam" and plan["dense"]["parameters"] > 0
    assert {table["sharding_type"] for table in plan["tables"].values()} == {"data_parallel"}
    counts = [line["invalid/user"] for line in result["lines"] if line["split"] == "train"]
    assert counts == [result["above"]] * 4 and counts[0] > 300, "repaired values of all ranks, each line's window"


def test_the_prefetching_pipeline_takes_the_same_steps(found):
    result = found["prefetching"]
    assert result["codes"] == result["plain"]["codes"] == [0, 0], result["words"]
    assert result["equal"]
    assert [line["skipped_steps"] for line in result["lines"] if "skipped_steps" in line] == [1, 1, 1, 1]


@pytest.mark.long
def test_replicated_groups_train_save_and_resume(replicas):
    again = replicas["again"]
    assert again["codes"] == [0, 0, 0, 0], again["words"]
    assert max(said(replicas)) < 1
    # to some bits: over four ranks gloo adds in another order in the first step of a start, in which DDP's buckets are others
    losses = {when: [line.get("loss", line.get("log_loss")) for line in again[when]] for when in ("before", "after")}
    assert len(losses["before"]) == 6 and losses["after"] == pytest.approx(losses["before"], rel=1e-6)
    blocks = [(name, tuple(offsets)) for name, offsets in replicas["blocks"]]
    tables = [block for block in blocks if "embedding_bags" in block[0]]
    assert tables and len(tables) == len(set(tables)), "each block is written by one of the ranks that hold it"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    config = write_small(tmp_path_factory.mktemp("refused"), 400, 100)
    path = config.parent / "plan.json"
    assert main(["plan", "--config", str(config), "--cluster", "1x1:cpu", "-o", str(path)]) == 0
    return config, path


REFUSED = {
    "optimizer": (["optim.embedding.name=sgd"], "optimizer = 'rowwise_adagrad', but this run's tables use 'sgd'"),
    "constraints": (
        ['sharding.tables.user.sharding_types=["row_wise"]', "sharding.data_type=fp16"],
        'this run\'s [sharding] asks for something else: data_type: plan "fp32", run "fp16"; tables.user.sharding_types: plan "table_wise", run ["row_wise"]',
    ),
    "wide tables": (["model.kind=wide_deep"], "made for another schema: table wide_user is not planned"),
    "another plan": (["sharding.plan=other.json"], "the config's sharding.plan is 'other.json'; remove one of the two"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(REFUSED))
def test_another_plan_is_refused_with_the_difference(case, small, tmp_path, capfd):
    config, path = small
    settings, words = REFUSED[case]
    arguments = ["train", "--config", str(config), "--plan", str(path), "--set", f"train.out={tmp_path}/run"]
    for setting in settings:
        arguments += ["--set", setting]
    assert main(arguments) == 2
    error = capfd.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and words in error, error
    assert not (tmp_path / "run").exists()


def test_the_planner_sees_the_tables_of_a_wide_model(small, tmp_path):
    config, _ = small
    text = config.read_text().replace("[model.mbcnet]", '[model]\nkind = "wide_deep"\n[model.mbcnet]')
    wide = tmp_path / "wide.toml"
    wide.write_text(text)
    plan = tmp_path / "plan.json"
    assert main(["plan", "--config", str(wide), "--cluster", "1x1:cpu", "-o", str(plan)]) == 0
    assert {"wide_user", "wide_history"} <= read_plan(plan).tables.keys()
    assert main(["plan", "check", str(plan), "--config", str(wide)]) == 0
    assert train(wide, f"sharding.plan={plan}", f"train.out={tmp_path}/run") == 0
    assert (tmp_path / "run" / "plan.json").read_text() == plan.read_text()
