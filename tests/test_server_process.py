"""Proves `mbcnet serve` as it is started: what it refuses, two workers that serve and change models together, one that is killed, SIGTERM.

Scores, limits and models are proven without processes by test_server_score.py and test_server_models.py.
"""

import concurrent.futures
import importlib.metadata
import os
import re
import shutil
import signal
import socket
import statistics
import threading
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from serve_process import children, started
from serving_data import artifact_of, bare_environment, printed_by
from tiny_run import wait_for

from mbcnet_rec.server.models import load_model
from mbcnet_rec.serving import loader
from mbcnet_rec.serving.delta import write_delta


def test_what_start_refuses(artifact, tmp_path):
    damaged = shutil.copytree(artifact, tmp_path / "damaged")
    (damaged / "vocabulary.json").write_text("{}")
    (tmp_path / "empty").write_text("\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for argv, words in (
            ((damaged,), "vocabulary.json: changed since it was written"),
            ((tmp_path / "none",), "not an artifact of `mbcnet export`"),
            (
                (artifact, "--port", port),
                f"--port {port}: cannot listen there (Address already in use); choose another",
            ),
            ((artifact, "--port", "70000"), "--port 70000: wanted"),
            ((artifact, "--host", "203.0.113.7"), "cannot listen there"),
            ((artifact, "--workers", "0"), "--workers 0: wanted 1 or more"),
            (
                (artifact, "--split", "user=0.1"),
                "--split user=0.1: wanted KEY=SHARE, such as user_id=0.1, and --shadow OTHER",
            ),
            ((artifact, "--split", "user=2", "--shadow", artifact), "--split user=2: wanted"),
            ((artifact, "--watch"), "--watch: wanted --models FOLDER"),
            ((artifact, "--models", tmp_path / "none"), "not a folder; make it"),
            ((artifact, "--models", tmp_path, "--host", "0.0.0.0"), "give --models-token-file"),
            ((artifact, "--score-token-file", tmp_path / "empty"), "wanted a token"),
            ((artifact, "--models-token-file", tmp_path / "none"), "wanted a token"),
        ):
            code, _, err = printed_by("serve", *argv)
            assert code == 2 and words in err and len(err.splitlines()) == 1, (argv, err)


@pytest.mark.long
def test_two_workers(runs, artifact, tmp_path):
    """In an environment that has nothing of the training code's needs."""
    folder = tmp_path / "models"
    folder.mkdir()
    shutil.copytree(artifact_of(runs, "row_wise", "int8"), folder / "int8")
    rows = pq.read_table(runs / "test.parquet").slice(0, 2).drop_columns(["click", "unread"]).to_pylist()
    expected = pq.read_table(runs / "row_wise_predicted_1" / "test.parquet")["probability"].to_pylist()[:2]
    arguments = artifact, "--workers", "2", "--models", folder
    fbgemm = importlib.metadata.packages_distributions()["fbgemm_gpu"]  # its name tells the CPU build
    bare = [
        "torch",
        "numpy",
        "pyarrow",
        "safetensors",
        *fbgemm,
        "uvicorn",
        "starlette",
        "prometheus-client",
        "httptools",
        "uvloop",
    ]
    python = bare_environment(tmp_path / "venv", bare)
    tokens = {"MBCNET_SCORE_TOKEN": "one", "MBCNET_MODELS_TOKEN": "two"}
    with started(*arguments, python=python, **tokens) as (process, client):
        one, two = {"Authorization": "Bearer one"}, {"Authorization": "Bearer two"}
        assert client("POST", "/score", {"rows": rows}, **two).status == 401
        assert client("POST", "/models", {"folder": "int8"}, **one).status == 401
        answer = client("POST", "/score", {"rows": rows}, **one)
        assert answer.json["probability"] == pytest.approx(expected, abs=1e-6)
        before, workers = answer.json["model"], children(process)
        assert len(workers) == 2
        swapped = client("POST", "/models", {"folder": "int8"}, **two)
        assert swapped.status == 200 and swapped.json["faults"] == [], swapped
        assert {client("POST", "/score", {"rows": rows}, **one).json["model"] for _ in range(20)} == {
            swapped.json["model"]
        }
        os.kill(workers[0], signal.SIGKILL)
        lost = 0
        for _ in range(20):
            try:
                assert client("POST", "/score", {"rows": rows}, **one).status == 200
            except OSError:
                lost += 1
        assert lost <= 1
        wait_for(lambda: len(now := children(process)) == 2 and workers[0] not in now, "not started again")
        assert {client("GET", "/health/ready").json["model"] for _ in range(20)} <= {swapped.json["model"], None}
        wait_for(lambda: {client("GET", "/health/ready").status for _ in range(20)} == {200}, "not ready again")
        assert {client("POST", "/score", {"rows": rows}, **one).json["model"] for _ in range(20)} == {
            swapped.json["model"]
        }
        assert client("POST", "/models", {"rollback": True}, **two).json["model"] == before
        text = client("GET", "/metrics").body.decode()
        assert 'mbcnet_answers_total{status="401"} 1.0' in text  # of both workers and the one that is gone
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = [pool.submit(client, "POST", "/score", {"rows": rows}, **one) for _ in range(200)]
            process.send_signal(signal.SIGTERM)
            statuses = [each.result().status for each in answers if not each.exception()]
        assert set(statuses) == {200}
        assert process.wait(30) == 0


def test_workers_end_with_their_parent_however_it_went(artifact, tmp_path):
    """Else they would hold the port, and nobody would start one of them again."""
    with started(artifact, "--workers", "2", TMPDIR=str(tmp_path)) as (process, client):
        workers = children(process)
        assert len(workers) == 2 and len(list(tmp_path.glob("mbcnet_serve_*"))) == 1
        process.kill()
        process.wait()

        def run(pid):
            try:
                return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
            except OSError:
                return False

        wait_for(lambda: not any(map(run, workers)), "still there")
        assert not list(tmp_path.glob("mbcnet_serve_*"))
        with pytest.raises(OSError):
            client("GET", "/health/live")


@pytest.mark.long
def test_swaps_under_load(runs, artifact, tmp_path):
    """Whole artifacts, a delta and rollbacks in turn, in two workers: no request fails or has another model's scores, and memory stays.

    benchmarks/serve.py --swaps 1000 is the long one.
    """
    folder = tmp_path / "models"
    folder.mkdir()
    for kind in ("fp32", "int8"):
        shutil.copytree(artifact_of(runs, "row_wise", kind), folder / kind)
    models = {name: loader.load(folder / name) for name in ("fp32", "int8")}
    write_delta(models["fp32"], folder / "fp32", folder / "int8", folder / "delta")
    table = pq.read_table(runs / "test.parquet").slice(0, 2).drop_columns(["click", "unread"])
    known = {load_model(folder / name).version: models[name].predict(table).tolist() for name in models}
    memory, stop, wrong = [], threading.Event(), []

    def ask(client):
        count = 0
        while not stop.is_set():
            answer = client("POST", "/score", {"rows": table.to_pylist()})
            if answer.status != 200 or answer.json["probability"] != pytest.approx(
                known[answer.json["model"]], abs=1e-6
            ):
                wrong.append(answer)
            count += 1
        return count

    with (
        started(folder / "fp32", "--workers", "2", "--models", folder) as (process, client),
        concurrent.futures.ThreadPoolExecutor(2) as pool,
    ):
        wait_for(lambda: {client("GET", "/health/ready").status for _ in range(20)} == {200}, "not ready")
        try:
            clients = [pool.submit(ask, client) for _ in range(2)]
            for turn in range(90):
                change = ({"folder": "fp32"}, {"folder": "delta"}, {"rollback": True})[turn % 3]
                answer = client("POST", "/models", change)
                assert answer.status == 200 and answer.json["faults"] == [], answer
                status = [Path(f"/proc/{pid}/status").read_text() for pid in children(process)]
                memory.append(sum(int(re.search(r"RssAnon:\s+(\d+)", each)[1]) for each in status) / 1024)
        finally:
            stop.set()
        assert sum(each.result() for each in clients) > 100 and not wrong, wrong[:2]
    assert statistics.median(memory[-30:]) - statistics.median(memory[30:60]) < 5, memory
