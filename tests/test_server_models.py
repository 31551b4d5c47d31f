"""Proves that models change under traffic without a lost or mixed answer, by POST /models and by a watched folder, that one call goes back,
and that damaged artifacts and paths elsewhere are refused while what serves, serves on.
"""

import fcntl
import json
import os
import re
import shutil
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from asgi_calls import serving
from serving_data import artifact_of
from tiny_run import wait_for

from mbcnet_rec.server.models import load_model, read_json, write_json
from mbcnet_rec.server.requests import arm_of
from mbcnet_rec.serving import loader
from mbcnet_rec.serving.delta import write_delta


@pytest.fixture
def folder(runs, tmp_path):
    """Two models below one folder."""
    (tmp_path / "models").mkdir()
    for kind in ("fp32", "int8"):
        shutil.copytree(artifact_of(runs, "row_wise", kind), tmp_path / "models" / kind)
    return tmp_path / "models"


@pytest.fixture(scope="module")
def body(runs):
    return {"rows": pq.read_table(runs / "test.parquet").slice(0, 3).drop_columns(["click", "unread"]).to_pylist()}


def test_swap_and_rollback_under_load(folder, body, tmp_path):
    versions = {name: load_model(folder / name).version for name in ("fp32", "int8")}
    assert versions["fp32"] != versions["int8"] and versions["fp32"].startswith("small-")
    with serving(folder / "fp32", tmp_path / "state", models=folder) as call:
        score = ("POST", "/score", body)
        found = {
            name: load_model(folder / name).model.predict(
                {k: [row[k] for row in body["rows"]] for k in body["rows"][0]}
            )
            for name in versions
        }
        assert abs(found["fp32"] - found["int8"]).max() > 1e-5
        seen = set()
        for number in range(6):
            change = {"rollback": True} if number % 2 else {"folder": "int8"}
            *answers, swapped = call([score] * 20 + [("POST", "/models", change)])
            assert swapped.status == 200, swapped
            assert swapped.json["model"] == versions["fp32" if number % 2 else "int8"]
            assert call(*score).json["model"] == swapped.json["model"]
            for each in answers:
                name = next(name for name, version in versions.items() if version == each.json["model"])
                seen.add(name)
                assert each.json["probability"] == pytest.approx(found[name].tolist(), abs=1e-6)
        assert seen == {"fp32", "int8"}
        assert call("POST", "/models", {"rollback": True}).status == 409


def test_swaps_and_a_worker_that_starts(folder, body, tmp_path, monkeypatch):
    """It says that it is here before it reads what to load, and a swap waits for it: after the answer nothing has the model before."""
    state, moved = tmp_path / "state", shutil.move(folder / "fp32", tmp_path / "moved")
    monkeypatch.setattr("mbcnet_rec.server.app.START_SECONDS", 0.5)
    own, other = (state / f"{pid}.json" for pid in (os.getpid(), os.getppid()))
    with serving(folder / "fp32", state, wait=False, named=False, models=folder) as call:
        wait_for(lambda: call("GET", "/health/live") and own.exists(), "not joined")
        assert read_json(own)["number"] == -1
        write_json(state / "wanted.json", {"number": 0, "chain": [str(folder / "fp32")], "before": []})
        wait_for(lambda: call("GET", "/health/live") and "fp32" in read_json(own)["error"], "not tried")
        assert call("POST", "/models", {"folder": "int8"}).status == 503, "its start may take the place of the other"
        shutil.move(moved, folder / "fp32")
        wait_for(lambda: call("GET", "/health/ready").status == 200, "not tried again")
        write_json(other, {"number": -1, "error": ""})
        ready = threading.Timer(0.5, write_json, (other, {"number": 1, "error": ""}))
        ready.start()
        swapped = call("POST", "/models", {"folder": "int8"})
        assert read_json(other)["number"] == 1, "answered before"
        ready.join()
        assert (
            swapped.json["model"] == load_model(folder / "int8").version == call("POST", "/score", body).json["model"]
        )


def test_a_worker_that_could_not_load_is_asked_again(folder, body, tmp_path, monkeypatch):
    """The same POST once more does not say that all is well while a worker serves the model before; a worker tries again by itself, too."""
    monkeypatch.setattr("mbcnet_rec.server.models.RETRY_SECONDS", 0.1)
    state, versions = tmp_path / "state", {name: load_model(folder / name).version for name in ("fp32", "int8")}
    other = state / f"{os.getppid()}.json"
    with serving(folder / "fp32", state, models=folder) as call:
        write_json(other, {"number": 1, "error": "no memory"})
        answer = call("POST", "/models", {"folder": "int8"})
        assert answer.status == 500 and answer.json["faults"] == [f"worker {os.getppid()}: no memory"]
        threading.Timer(0.3, write_json, (other, {"number": 2, "error": ""})).start()
        again = call("POST", "/models", {"folder": "int8"})
        assert again.status == 200 and read_json(other)["number"] == 2 == read_json(state / "wanted.json")["number"]
        other.unlink()
        assert call("POST", "/models", {"rollback": True}).json["model"] == versions["fp32"]
        moved = shutil.move(folder / "int8", tmp_path / "moved")
        wanted = {"number": 9, "chain": [str(folder / "int8")], "before": []}
        write_json(state / "wanted.json", wanted)  # as another worker has switched
        wait_for(
            lambda: call("GET", "/health/live") and "int8" in read_json(state / f"{os.getpid()}.json")["error"], ""
        )
        assert call("POST", "/score", body).json["model"] == versions["fp32"]
        shutil.move(moved, folder / "int8")
        wait_for(lambda: call("POST", "/score", body).json["model"] == versions["int8"], "not tried again")


def test_a_swap_that_others_cannot_be_told_of_is_none(folder, body, tmp_path):
    """As on a full disk."""
    draft = tmp_path / "state" / f".wanted.json.{os.getpid()}"
    with serving(folder / "fp32", tmp_path / "state", models=folder) as call:
        before = call("POST", "/score", body).json["model"]
        draft.mkdir()
        answer = call("POST", "/models", {"folder": "int8"})
        assert answer.status == 500 and "make room" in answer.json["error"]
        assert call("POST", "/score", body).json["model"] == before == call("GET", "/models").json["model"]
        draft.rmdir()
        assert call("POST", "/models", {"folder": "int8"}).json["model"] == load_model(folder / "int8").version


def test_swaps_that_wait_keep_nothing_else_waiting(folder, tmp_path):
    """Else those of one worker could hold all threads in which it would load what another, whom they wait for, waits for."""
    state, followed = tmp_path / "state", []
    with serving(folder / "fp32", state, models=folder) as call, (state / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as the other worker does, which switches

        def switch():
            write_json(state / "wanted.json", {"number": 1, "chain": [str(folder / "int8")], "before": []})
            end = time.monotonic() + 20
            while time.monotonic() < end and read_json(state / f"{os.getpid()}.json")["number"] < 1:
                time.sleep(0.02)
            followed.append(read_json(state / f"{os.getpid()}.json")["number"])
            fcntl.flock(lock, fcntl.LOCK_UN)

        switching = threading.Timer(0.5, switch)
        switching.start()
        answers = call([("POST", "/models", {"folder": "int8"})] * 40)
        switching.join()
        assert followed == [1] and {each.status for each in answers} == {200}


def test_models_elsewhere_are_refused(folder, body, tmp_path):
    shutil.copytree(folder / "int8", folder / "damaged")
    with (folder / "damaged" / "dense.safetensors").open("r+b") as file:
        file.seek(-8, 2)
        file.write(b"damaged!")
    shutil.copytree(folder / "int8", folder / "unlisted")
    spec = json.loads((folder / "unlisted" / "model.json").read_text())
    del spec["files"]["tables.safetensors"]
    (folder / "unlisted" / "model.json").write_text(json.dumps(spec))
    shutil.copytree(folder / "int8", tmp_path / "outside")
    (folder / "link").symlink_to(tmp_path / "outside")
    shutil.copytree(folder / "int8", folder / "inner")
    (folder / "inner" / "dense.safetensors").unlink()
    (folder / "inner" / "dense.safetensors").symlink_to(tmp_path / "outside" / "dense.safetensors")
    (folder / "empty").mkdir()
    with serving(folder / "fp32", tmp_path / "state", models=folder, models_token="m") as call:
        own = {"authorization": "Bearer m"}
        assert call("POST", "/models", {"folder": "int8"}).status == 401 and call("GET", "/models").status == 401
        for name, status, words in (
            ("damaged", 400, "SHA-256 differs"), ("unlisted", 400, "no SHA-256 of tables"), ("empty", 400, "not an artifact"),
            ("link", 403, "link"), ("inner", 403, "link"), ("../outside", 403, "below --models"), ("int8/../../outside", 403, "below --models"),
            (str(tmp_path / "outside"), 403, "below --models"), (".", 403, "below --models"), ("", 403, "below --models"), ("a\0b", 403, "below"),
        ):  # fmt: skip
            answer = call("POST", "/models", {"folder": name}, own)
            assert answer.status == status and words in answer.json["error"], (name, answer)
        for wrong in ({}, {"folder": 3}, {"folder": "int8", "more": 1}, {"rollback": False}, [], b"{"):
            assert call("POST", "/models", wrong, own).status == 400
        assert call("POST", "/models", {"folder": "int8"}, own | {"content-type": "text/plain"}).status == 415
        assert call("GET", "/models", None, own).json["model"] == load_model(folder / "fp32").version
        assert call("POST", "/score", body).status == 200
    with serving(folder / "fp32", tmp_path / "state2") as call:
        assert "--models" in call("POST", "/models", {"folder": "int8"}).json["error"]


@pytest.fixture
def deltas(folder):
    """monday leads from fp32 to int8, tuesday back."""
    for name, (parent, child) in {"monday": ("fp32", "int8"), "tuesday": ("int8", "fp32")}.items():
        write_delta(loader.load(folder / parent), folder / parent, folder / child, folder / name)
    return folder


def test_deltas(deltas, body, tmp_path):
    """A delta makes the artifact that it leads to, in each worker's eyes; in another order it is refused; rollbacks go back one by one."""
    versions = {name: load_model(deltas / name).version for name in ("fp32", "int8")}
    with serving(deltas / "fp32", tmp_path / "state", models=deltas) as call:

        def serves(change, name):
            answer = call("POST", "/models", change)
            assert answer.status == 200 and answer.json["model"] == versions[name], answer
            score = call("POST", "/score", body).json
            columns = {column: [row[column] for row in body["rows"]] for column in body["rows"][0]}
            assert score["model"] == versions[name]
            assert score["probability"] == load_model(deltas / name).model.predict(columns).tolist()
            return answer.json["folder"]

        first = call("POST", "/score", body).json
        answer = call("POST", "/models", {"folder": "tuesday"})
        assert answer.status == 400 and "apply deltas in their order" in answer.json["error"], answer
        assert call("POST", "/score", body).json == first
        assert serves({"folder": "monday"}, "int8") == str(deltas / "monday")
        serves({"folder": "tuesday"}, "fp32")
        serves({"folder": "int8"}, "int8")
        made = tmp_path / "state" / "made"
        assert len(list(made.iterdir())) == 1, "a rollback needs tuesday's only"
        serves({"rollback": True}, "fp32")
        serves({"rollback": True}, "int8")  # monday's, made again
        serves({"rollback": True}, "fp32")
        assert list(made.iterdir()) == []
        damaged = deltas / "monday" / "changes.safetensors"
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
        answer = call("POST", "/models", {"folder": "monday"})
        assert answer.status == 400 and "SHA-256 differs" in answer.json["error"]
        assert call("POST", "/score", body).json == first and list(made.iterdir()) == []


def test_watched_folder_takes_deltas(deltas, body, tmp_path):
    shutil.move(deltas / "monday", tmp_path / "monday")
    version = load_model(deltas / "int8").version
    with serving(deltas / "fp32", tmp_path / "state", models=deltas, watch=True) as call:
        wait_for(lambda: call("GET", "/health/live") and (tmp_path / "state" / "seen.json").exists(), "not looked")
        shutil.copytree(tmp_path / "monday", deltas / "monday")
        wait_for(lambda: call("POST", "/score", body).json["model"] == version, "not taken")


def test_watched_folder_takes_deltas_in_their_order(deltas, tmp_path, capfd):
    """Both come between two looks, and what takes long to appear is tried again after what it waits for."""
    for name in ("monday", "tuesday"):
        shutil.move(deltas / name, tmp_path / name)
    with serving(deltas / "fp32", tmp_path / "state", models=deltas, watch=True) as call:
        shutil.move(tmp_path / "tuesday", deltas / "tuesday")
        told = "tuesday: not taken"
        wait_for(lambda: call("GET", "/health/live") and told in capfd.readouterr().out, "not tried")
        shutil.move(tmp_path / "monday", deltas / "monday")
        wait_for(lambda: call("GET", "/models").json["folder"] == str(deltas / "tuesday"), "not taken")


def test_old_models_that_are_touched_are_not_taken_again(folder, body, tmp_path):
    shutil.move(folder / "int8", tmp_path / "int8")
    with serving(folder / "fp32", tmp_path / "state", models=folder, watch=True) as call:
        shutil.copytree(folder / "fp32", folder / "same")
        wait_for(lambda: call("GET", "/models").json["folder"] == str(folder / "same"), "not taken")
        for file in filter(Path.is_file, (folder / "fp32").iterdir()):  # as `cp -al` and `chmod -R` do
            os.link(file, tmp_path / file.name)
            file.chmod(0o600)
        (folder / "fp32" / "check.json").write_text("{}")
        shutil.move(tmp_path / "int8", folder / "int8")
        seen = set()

        def has_come(name):
            while str(folder / name) not in seen:
                seen.add(call("GET", "/models").json["folder"])
                call("POST", "/score", body)

        has_come("int8")
        shutil.copytree(folder / "int8", folder / "last")
        has_come("last")
        assert {Path(each).name for each in seen} <= {"same", "int8", "last"}


def test_watched_folder(folder, body, tmp_path, capfd):
    """What comes is served; a copy that is not whole is taken when it is; a rollback stays."""
    first, second = (load_model(folder / name).version for name in ("fp32", "int8"))
    shutil.move(folder / "int8", tmp_path / "made")
    with serving(folder / "fp32", tmp_path / "state", models=folder, watch=True) as call:
        wait_for(lambda: call("GET", "/health/live") and (tmp_path / "state" / "seen.json").exists(), "not looked")
        assert call("GET", "/health/ready").json["model"] == first
        (folder / "new").mkdir()
        for file in ("model.json", "check.json", "dense.safetensors"):
            shutil.copy(tmp_path / "made" / file, folder / "new")

        def serves(version):
            call([("POST", "/score", body)] * 3)
            return call("GET", "/health/ready").json["model"] == version

        wait_for(lambda: serves(first) and "new: not taken" in capfd.readouterr().out, "not tried")
        shutil.copytree(tmp_path / "made", folder / "new", dirs_exist_ok=True)
        wait_for(lambda: serves(second), "not taken")
        assert call("POST", "/models", {"rollback": True}).json["model"] == first
        shutil.copytree(tmp_path / "made", folder / ".new.earlier-1")  # of an export that replaces it
        for _ in range(20):
            assert serves(first)


def test_metrics(folder, body, tmp_path):
    with serving(folder / "fp32", tmp_path / "state", shadow=folder / "int8", shadow_share=1.0) as call:
        rows = [dict(each) for each in body["rows"]]
        rows[0]["city"] = "nowhere"
        for row in rows[1:]:
            row["city"] = "city 1"
        probability = call("POST", "/score", {"rows": rows}).json["probability"]
        wait_for(lambda: b"mbcnet_shadow_difference_count 3.0" in call("GET", "/metrics").body, "no shadow")
        text = call("GET", "/metrics").body.decode()
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        assert float(values['mbcnet_out_of_vocabulary_share{field="city"}']) == pytest.approx(1 / 3)
        mean = sum(probability) / 3
        check = json.loads((folder / "fp32" / "check.json").read_text())
        assert float(values['mbcnet_score_mean{arm=""}']) == pytest.approx(mean, abs=1e-6)
        drift = (mean - check["mean_score"]) / check["score_deviation"]
        assert float(values['mbcnet_score_drift{arm=""}']) == pytest.approx(drift, abs=1e-4)
        assert values["mbcnet_pass_rows_sum"] == "6.0" and values["mbcnet_shadow_difference_count"] == "3.0"
        assert abs(float(values["mbcnet_shadow_mean_change"])) < 5e-3
        for stage in ("decode", "lookup", "dense", "wait", "whole"):
            assert float(values[f'mbcnet_seconds_count{{stage="{stage}"}}']) >= 1
        assert values['mbcnet_answers_total{status="200"}'] == "1.0"
        version = load_model(folder / "fp32").version
        assert float(values[f'mbcnet_model_age_seconds{{model="{version}"}}']) > 0


def test_split(folder, body, tmp_path):
    """Half of the users have the second model, always the same ones; answers name arm and model, in passes that arms do not share."""
    versions = {"a": load_model(folder / "fp32").version, "b": load_model(folder / "int8").version}
    users = [[dict(body["rows"][0], user=user)] for user in range(100)]
    options = {"shadow": folder / "int8", "split": "user=0.5", "window_us": 20_000}
    with serving(folder / "fp32", tmp_path / "state", **options) as call:
        answers = call([("POST", "/score", {"rows": rows}) for rows in users])
        arms = [each.json["arm"] for each in answers]
        assert [each.json["model"] for each in answers] == [versions[arm] for arm in arms] and 35 <= arms.count(
            "b"
        ) <= 65
        text, means = call("GET", "/metrics").body.decode(), {"a": [], "b": []}
        for each in answers:
            means[each.json["arm"]] += each.json["probability"]
        for arm, own in means.items():
            found = re.search(f'mbcnet_score_mean{{arm="{arm}"}} (.*)', text)
            assert float(found[1]) == pytest.approx(sum(own) / len(own), abs=1e-4)
        shared = {"shared": {"user": 7}, "rows": [{k: v for k, v in body["rows"][1].items() if k != "user"}] * 2}
        assert call("POST", "/score", shared).json["arm"] == arms[7]
        mixed = call("POST", "/score", {"rows": [*users[0], *users[1]]})
        assert mixed.status == 400 and mixed.json["field"] == "user"
        assert "mbcnet_shadow_difference_count 0.0" in call("GET", "/metrics").body.decode()
    with serving(folder / "fp32", tmp_path / "other", **options | {"split": "session=0.5"}) as call:
        assert call("POST", "/score", {"rows": users[0]}).json["field"] == "session"
        assert call("POST", "/score", {"rows": [users[0][0] | {"session": "x"}]}).json["arm"] in "ab"


def test_an_id_has_one_arm_whatever_the_type_of_its_column():
    """7 and 7.0 in JSON and Arrow are one id; other values keep the arms that they had."""
    arms = [arm_of({"u": [user]}, "u", 0.3, 0) for user in range(-50, 200)]
    assert "".join(arms[50:70]) == "aaaabaabaaaaaaabaaba"
    assert [arm_of({"u": [float(user)]}, "u", 0.3, 0) for user in range(-50, 200)] == arms
    assert [arm_of(pa.table({"u": pa.array([user], pa.float32())}), "u", 0.3, 0) for user in range(-50, 200)] == arms
    assert arm_of({"u": [7, 7.0]}, "u", 0.3, 0) == arms[57]
    others = ["7", "7.0", 7.5, None, float("nan"), 2**64 - 1]
    assert [arm_of({"u": [each]}, "u", 0.3, 0) for each in others] == list("babaab")
