"""Proves what a fault does to a run of two ranks: killed, stopped, absent and stuck ranks, losses that are not finite, full disks, readers that
fail. Nothing hangs, the guilty rank and part are named in time, the last checkpoint stands, nothing half-written stays, exit codes are those of
runtime/exits.py, and the run that is started again ends bit for bit like one that nothing happened to. The scenarios are in fault_ranks.py."""

import json

import pytest
from forked_ranks import run_script

CLEAN = {"codes": [0, 0], "partial": []}


# scenarios of the long lane; the default lane has one of each kind of end
RARE = [
    "usr1_in_evaluation", "nan_cap", "spike", "stopped_rank", "stuck_rank", "absent_rank", "port_taken", "reader_is_stuck",
    "reader_dies", "log_is_full", "disk_full_in_save", "disk_full_in_metrics",
]  # fmt: skip
USUAL = ["killed_rank", "sigterm", "sigterm_in_reading", "nan_stops", "nan_skipped", "reader_raises"]


def results_of(folder, names):
    run_script("fault_ranks.py", str(folder), *names)
    found = json.loads((folder / "results.json").read_text())
    assert found["calm"]["codes"] == [0, 0], found["calm"]
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return results_of(tmp_path_factory.mktemp("faults"), USUAL)


@pytest.fixture(scope="module")
def rare(tmp_path_factory):
    return results_of(tmp_path_factory.mktemp("rare"), RARE)


def ended_as_calm(result):
    """The second start goes through, and tensors and metrics are those of the calm run."""
    again = result["again"]
    assert {key: again[key] for key in CLEAN} == CLEAN, again
    assert result["equal"] == {"tensors": True, "metrics": True}


def line_of(result, rank):
    """What a rank said of the end: one line, never a traceback."""
    words = result["words"][rank]
    assert "Traceback" not in words, words
    found = [line for line in words.splitlines() if line.startswith("mbcnet: ") and "warning" not in line]
    assert len(found) == 1, words
    return found[0]


def test_a_killed_rank(results):
    first = results["killed_rank"]["first"]
    assert first["codes"] == [77, -9] and first["seconds"] < 60
    assert "at step 8: rank 1 gives no sign of life, it is stopped or dead (rank 1 last seen at " in line_of(first, 0)
    # on a loaded machine the checkpoint of step 6 may still be on its way when rank 1 dies at step 8
    assert first["steps"] in ([5, 6], [5]), "the checkpoints before stand"
    ended_as_calm(results["killed_rank"])
    assert not results["killed_rank"]["stale"], "what the killed run had begun"


@pytest.mark.parametrize(
    ("name", "step", "lane"),
    [("sigterm", 9, "results"), pytest.param("usr1_in_evaluation", 6, "rare", marks=pytest.mark.long)],
)
def test_a_stop_request_is_granted_at_the_step_boundary(request, name, step, lane):
    result = request.getfixturevalue(lane)[name]
    first = result["first"]
    assert first["codes"] == [75, 75], "both ranks leave, although one was asked"
    assert f"after step {step}; its checkpoint is written" in line_of(first, 0) and first["words"][1] == ""
    assert max(first["steps"]) == step, "no step is lost"
    assert first.get("seconds_after", 0) < 10, "from the signal to the last rank's end, the checkpoint included"
    ended_as_calm(result)


def test_a_stop_request_while_rows_to_score_are_read_is_granted_there(results):
    """All ranks leave the reading, although one was asked, and a start after that reads the rows to their ends."""
    result = results["sigterm_in_reading"]
    first, at = result["first"], "reading rows to score at step 6"
    assert first["codes"] == [75, 75] and first["steps"] == [6]
    assert "after step 6; its checkpoint is written" in line_of(first, 0) and first["words"][1] == ""
    assert [places.count(at) for places in first["places"]] == [1, 1], "of 10 batches"
    assert all("evaluation at step 6" not in places for places in first["places"])
    assert result["whole"]["codes"] == [0, 0]
    ended_as_calm(result)


def test_a_loss_that_is_not_finite_stops_both_ranks_before_a_row_is_written(results):
    first = results["nan_stops"]["first"]
    assert first["codes"] == [76, 76]
    said = line_of(first, 1)
    assert "rank 1: step 8: the loss is not finite (its batch is in " in said and "no row was written" in said
    assert "mbcnet: " not in first["words"][0], "the guilty rank says it"
    assert first["faults"] == ["step_8_rank_1.json", "step_8_rank_1.safetensors"]
    assert max(first["steps"]) == 7
    ended_as_calm(results["nan_stops"])  # its checkpoint is that of step 7: one more row written would show


def test_a_step_passed_over_writes_no_row(results):
    result = results["nan_skipped"]
    assert result["codes"] == [0, 0]
    assert "loss not finite on rank 1; passed over, no row written (1 of at most 10)" in result["words"][0]
    assert result["changed"] == [], "every tensor of step 8 is that of step 7, bit by bit, on both ranks"
    assert result["next_changed"]


@pytest.mark.long
def test_steps_passed_over_have_a_cap(rare):
    result = rare["nan_cap"]
    assert result["codes"] == [76, 76] and "rank 1: step 3: the loss is not finite" in line_of(result, 1)
    assert result["steps"] == [2]


@pytest.mark.long
def test_a_loss_that_jumps_is_an_alarm(rare):
    result = rare["spike"]
    assert result["codes"] == [0, 0]
    alarms = [line for line in result["words"][0].splitlines() if "ALARM" in line]
    assert len(alarms) == 1 and alarms[0].startswith("step 11: ALARM: loss "), alarms
    assert "standard deviations above the lines before" in alarms[0]


@pytest.mark.long
def test_a_stopped_rank_is_named(rare):
    """SIGSTOP: within stall_seconds (1) by the watchdog, within timeout_seconds (4) by the end of the run."""
    result = rare["stopped_rank"]
    assert result["codes"] == [77, -9] and result["seconds"] < 60
    said = [line for line in result["words"][0].splitlines() if "gives no sign of life" in line]
    assert "step 5 has taken" in said[0] and "rank 1 gives no sign of life" in said[0]
    assert said[-1].startswith("mbcnet: rank 0: at step 5: rank 1 gives no sign of life")
    assert "Timeout" in result["stacks"] and "training/pipeline.py" in result["stacks"], "where rank 0 waits"


@pytest.mark.long
def test_the_stacks_of_all_ranks_are_written_when_a_step_stalls(rare):
    result = rare["stuck_rank"]
    waiting, guilty = result["stacks"]
    assert "in slow" not in waiting and "Timeout" in waiting
    assert "in slow" in guilty, "the line that holds everyone up"
    words = "".join(result["first"]["words"])
    assert "rank 0: step 8 has taken" in words and "rank 1: step 8 has taken" in words
    assert result["first"]["codes"] == [0, 0] and result["equal"] == {"tensors": True, "metrics": True}


@pytest.mark.long
def test_a_rank_that_never_comes(rare):
    result = rare["absent_rank"]
    assert result["codes"] == [77, -9] and result["seconds"] < 60
    assert "rank 0: not all of 2 ranks came together within 3 s" in line_of(result, 0)


@pytest.mark.long
def test_a_port_in_use(rare):
    result = rare["port_taken"]
    assert result["codes"] == [2, 77] and result["seconds"] < 60
    assert "another program listens there; start with another port" in line_of(result, 0)
    assert "rank 1: not all of 2 ranks came together within 3 s" in line_of(result, 1)
    assert "does not answer as a meeting point" in line_of(result, 1)


@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_reader_that_raises_names_rank_file_and_row(results, split):
    result = results["reader_raises"][split]
    # validation rows are read before they are scored, so all ranks know; training rows are read ahead by one
    assert result["codes"] == ([77, 2] if split == "train" else [2, 2]), result
    said = line_of(result, split == "train")
    assert "rank 1: " in said and f"bad_{split}.parquet: row group" in said and "999" in said
    if split == "train":
        assert "rank 1 gives no sign of life" in line_of(result, 0) or "rank 1 is at" in line_of(result, 0)
    assert result["partial"] == []


@pytest.mark.long
def test_a_reader_that_is_stuck_is_named_in_time(rare):
    result = rare["reader_is_stuck"]
    assert result["codes"] == [77, 2] and result["seconds"] < 60
    said = line_of(result, 1)
    assert said.startswith("mbcnet: rank 1: ") and "train.parquet: row group" in said
    assert "no rows for 2 s (data.timeout_seconds)" in said


@pytest.mark.long
def test_a_reader_that_dies(rare):
    result = rare["reader_dies"]
    assert result["codes"] == [77, 1] and result["seconds"] < 60
    assert "data-worker-0 ended by SystemExit" in result["words"][1]
    assert "rank 1 gives no sign of life" in line_of(result, 0)


@pytest.mark.long
def test_a_disk_that_is_full_in_a_save(rare):
    first = rare["disk_full_in_save"]["first"]
    assert first["codes"] == [74, 74] and first["partial"] == []
    said = line_of(first, 1)
    assert "rank 1: checkpoint of step" in said and "could not be written (No space left on device)" in said
    assert "earlier checkpoints are intact" in said and "rank 1" in line_of(first, 0)
    ended_as_calm(rare["disk_full_in_save"])


@pytest.mark.long
def test_a_disk_that_is_full_in_metrics(rare):
    first = rare["disk_full_in_metrics"]["first"]
    assert first["codes"] == [74, 77]
    assert "metrics.jsonl: cannot be written (File too large)" in line_of(first, 0)
    lines = first["text"].splitlines()
    assert first["text"].endswith("}\n") and all(json.loads(line)["step"] for line in lines), "whole lines only"
    ended_as_calm(rare["disk_full_in_metrics"])


@pytest.mark.long
def test_a_log_that_cannot_be_written_stops_nobody(rare):
    result = rare["log_is_full"]
    assert result["first"]["codes"] == [0, 0] and result["done"]
    assert result["equal"] == {"tensors": True, "metrics": True}


@pytest.mark.parametrize("lane", ["results", pytest.param("rare", marks=pytest.mark.long)])
def test_no_fault_leaves_half_written_files(request, lane):
    def walk(value):
        if isinstance(value, dict):
            yield from ([value] if "partial" in value else [each for v in value.values() for each in walk(v)])

    runs = list(walk(request.getfixturevalue(lane)))
    assert len(runs) >= 10
    for each in runs:
        if -9 not in each["codes"]:  # a killed run's are removed by the next start
            assert each["partial"] == [], each["partial"]
        assert "overdue" not in each["codes"], "no process outlives its run"
