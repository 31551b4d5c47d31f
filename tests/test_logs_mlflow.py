"""Proves that numbers reach an MLflow server through MLflow's own client, and that a run continues without one: away, failing, or no client."""

import importlib.util
import json
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, urlsplit

import pytest
from tiny_run import free_ports

from data.errors import InputError
from mbcnet_rec.config import DataConfig, RunConfig, TrainConfig
from mbcnet_rec.logs.metrics_log import Records
from mbcnet_rec.logs.mlflow import RUN_ID, MlflowSink, require_client
from mbcnet_rec.runtime.exits import PreemptedError

API = "/api/2.0/mlflow/"
NUMBERS = {"loss": 0.5, "disagreement/efgc>deep": 3, "grad_norm": float("nan"), "mark": "x"}
with_client = pytest.mark.skipif(
    importlib.util.find_spec("mlflow") is None, reason="needs the client: pip install -e .[mlflow]"
)


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch):
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


def run(folder, address, step, split="train", error=None):
    """One start of a run that writes one line, and how it ends."""
    folder.mkdir(exist_ok=True)
    config = RunConfig(
        "tiny", "schema.toml", DataConfig(train=("rows",)), train=TrainConfig(out=str(folder), tracking=address)
    )
    records = Records(folder, 0, MlflowSink(config))
    try:
        records.add(step, split, NUMBERS)
        if error is not None:
            raise error
    except PreemptedError:
        records.close()
    else:
        records.close()


class Stub(ThreadingHTTPServer):
    """Answers as an MLflow server does, and keeps what it was told."""

    daemon_threads = False
    broken = False

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.run = {"info": {"run_id": "r1", "experiment_id": "7", "status": "RUNNING"}, "data": defaultdict(list)}
        self.experiments = set()

    def answer(self, path, body):
        info, data = self.run["info"], self.run["data"]
        match path:
            case "experiments/create" if body["name"] in self.experiments:
                return 400, {"error_code": "RESOURCE_ALREADY_EXISTS", "message": "there is one"}
            case "experiments/create":
                self.experiments.add(body["name"])
                return 200, {"experiment_id": "7"}
            case "experiments/get-by-name" if body["experiment_name"] not in self.experiments:
                return 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "there is none"}
            case "experiments/get-by-name":
                return 200, {"experiment": {"experiment_id": "7", "name": body["experiment_name"]}}
            case "runs/create":
                info |= {"run_name": body["run_name"]}
            case "runs/update":
                info |= {"status": body["status"]}
                return 200, {"run_info": info}
            case "runs/log-batch" if self.broken:
                return 500, {"error_code": "INTERNAL_ERROR", "message": "disk full"}
            case "runs/log-batch":
                data["params"] += body.get("params", [])
                latest = {each["key"]: each for each in [*data["metrics"], *body.get("metrics", [])]}
                data["metrics"] = list(latest.values())
                return 200, {}
        return 200, {"run": self.run}  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        parts = urlsplit(self.path)
        text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = json.loads(text) if text else dict(parse_qsl(parts.query))
        status, answer = self.server.answer(parts.path.removeprefix(API), body)
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_GET


@pytest.fixture
def stub():
    with Stub() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        server.address = f"http://127.0.0.1:{server.server_address[1]}"
        yield server
        server.shutdown()
        thread.join()


@with_client
def test_a_server_has_every_number_and_a_resumed_run_goes_on(stub, tmp_path):
    folder, info, data = tmp_path / "run", stub.run["info"], stub.run["data"]
    run(folder, stub.address, 20, error=PreemptedError("stopped"))
    run_id = (folder / RUN_ID).read_text().strip()
    assert info["status"] == "KILLED" and info["run_name"] == "tiny"
    run(folder, stub.address, 40, split="valid")
    run(folder, stub.address, 60)
    assert (folder / RUN_ID).read_text().strip() == run_id and info["status"] == "FINISHED"
    assert {each["key"]: (each["value"], each["step"]) for each in data["metrics"]} == {
        "train/loss": (0.5, 60), "train/disagreement/efgc_to_deep": (3.0, 60),
        "valid/loss": (0.5, 40), "valid/disagreement/efgc_to_deep": (3.0, 40),
    }  # fmt: skip
    params = {each["key"]: each["value"] for each in data["params"]}
    assert params["train.epochs"] == "1" and params["data.batch_size"] == "1024"
    run(tmp_path / "another", stub.address, 20)  # in the experiment that is there now


def trouble(tmp_path, capsys, address):
    """What is said while a run of one line continues without its server."""
    run(tmp_path / "run", address, 20)
    said = capsys.readouterr().err
    assert said.count("train.tracking") == 1 and "the run continues" in said and "Traceback" not in said
    assert (tmp_path / "run/metrics.jsonl").read_text().count("\n") == 1
    assert list((tmp_path / "run/tb").iterdir())
    return said


def test_a_server_that_is_away_is_told_once_and_the_run_goes_on(tmp_path, capsys):
    (port,) = free_ports(1)
    assert "is it up, and the address right?" in trouble(tmp_path, capsys, f"http://127.0.0.1:{port}")


@with_client
def test_a_server_that_fails_is_told_once_and_the_run_goes_on(stub, tmp_path, capsys):
    stub.broken = True
    assert "cannot be used (" in trouble(tmp_path, capsys, stub.address)


def test_without_the_option_there_is_tensorboard_alone(tmp_path):
    run(tmp_path / "run", "", 20)
    assert list((tmp_path / "run/tb").iterdir()) and not (tmp_path / "run" / RUN_ID).exists()


def test_a_missing_client_and_what_is_no_server_are_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    require_client("")
    with pytest.raises(InputError, match="run `pip install mlflow-skinny`"):
        require_client("http://host:5000")
    with pytest.raises(InputError, match="http://HOST:5000"):
        TrainConfig(tracking="mlruns")
