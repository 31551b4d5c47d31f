"""Numbers go to an MLflow server: its own one where `mlflow` is installed, one that fails, and none at all."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import requests
from tiny_run import REPOSITORY, free_ports

from data.errors import InputError
from mbcnet_rec.config import DataConfig, RunConfig, TrainConfig
from mbcnet_rec.logs.metrics_log import Records
from mbcnet_rec.logs.mlflow import API, RUN_ID, open_sink, parameters
from mbcnet_rec.runtime.exits import PreemptedError

# A folder of its own: MLflow's requirements contradict our pins
PROGRAM = shutil.which("mlflow", path=f"{REPOSITORY}/.mlflow/bin:{os.environ['PATH']}")


def config(folder: Path, tracking: str) -> RunConfig:
    train = TrainConfig(out=str(folder), tracking=tracking)
    return RunConfig("tiny", "schema.toml", DataConfig(train=("rows",)), train=train)


def run(config: RunConfig, step: int, split: str = "train", error: BaseException | None = None) -> None:
    """One start of a run that writes one line, and how it ends."""
    config.run_folder.mkdir(exist_ok=True)
    records = Records(config.run_folder, 0, open_sink(config))
    try:
        records.add(
            step, split, {"loss": 0.5, "disagreement/efgc>deep": 3, "grad_norm": float("nan"), "mark": "x"}
        )
        if error is not None:
            raise error
    except type(error) if error is not None else ():
        records.close()
    else:
        records.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """MLflow's own server on a database of its own."""
    if PROGRAM is None:
        pytest.skip("mlflow is not installed; python -m venv .mlflow && .mlflow/bin/pip install mlflow")
    folder = tmp_path_factory.mktemp("mlflow")
    (port,) = free_ports(1)
    words = [
        PROGRAM,
        "server",
        "--port",
        str(port),
        "--workers",
        "1",
        "--backend-store-uri",
        f"sqlite:///{folder}/db",
    ]
    started = subprocess.Popen(
        [*words, "--default-artifact-root", str(folder)], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    uri, end = f"http://127.0.0.1:{port}", time.monotonic() + 120
    while True:
        try:
            if requests.get(f"{uri}/health", timeout=2).ok:
                break
        except requests.RequestException:
            assert time.monotonic() < end and started.poll() is None, "MLflow's server does not answer"
            time.sleep(0.3)
    yield uri
    os.killpg(started.pid, 9)


def test_mlflows_own_server_has_every_number_and_a_resumed_run_goes_on(server, tmp_path):
    tracked = config(tmp_path / "run", server)
    run(tracked, 20, error=PreemptedError("stopped"))
    run_id = (tmp_path / "run" / RUN_ID).read_text().strip()

    def now() -> dict:
        return requests.get(f"{server}{API}runs/get", params={"run_id": run_id}, timeout=10).json()["run"]

    assert now()["info"]["status"] == "KILLED" and now()["info"]["run_name"] == "tiny"
    run(tracked, 40, split="valid")
    run(tracked, 60)
    assert (tmp_path / "run" / RUN_ID).read_text().strip() == run_id and now()["info"]["status"] == "FINISHED"
    metrics = {each["key"]: (each["value"], each["step"]) for each in now()["data"]["metrics"]}
    assert metrics == {
        "train/loss": (0.5, 60), "train/disagreement/efgc_to_deep": (3.0, 60),
        "valid/loss": (0.5, 40), "valid/disagreement/efgc_to_deep": (3.0, 40),
    }  # fmt: skip
    params = {each["key"]: each["value"] for each in now()["data"]["params"]}
    assert params["train.epochs"] == "1" and params["data.batch_size"] == "1024"


def test_a_server_that_is_away_is_told_once_and_the_run_goes_on(tmp_path, capsys):
    (port,) = free_ports(1)
    run(config(tmp_path / "run", f"http://127.0.0.1:{port}"), 20)
    said = capsys.readouterr().err
    assert said.count("train.tracking") == 1 and "the run goes on" in said
    assert (tmp_path / "run/metrics.jsonl").read_text().count("\n") == 1 and list(
        (tmp_path / "run/tb").iterdir()
    )


def test_without_the_option_there_is_tensorboard_alone(tmp_path):
    assert open_sink(config(tmp_path / "run", "")) is None
    run(config(tmp_path / "run", ""), 20)
    assert list((tmp_path / "run/tb").iterdir()) and not (tmp_path / "run" / RUN_ID).exists()


def test_what_is_no_server_is_refused():
    with pytest.raises(InputError, match="http://HOST:5000"):
        TrainConfig(tracking="mlruns")


def test_parameters_are_the_configs_keys():
    assert parameters({"a": {"b": [1, 2]}, "c": "x" * 900}) == [
        {"key": "a.b", "value": "[1, 2]"},
        {"key": "c", "value": "x" * 500},
    ]
