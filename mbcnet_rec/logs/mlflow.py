"""A sink for numbers besides metrics.jsonl and TensorBoard: an MLflow server, by its REST API.

MLflow's own client is not used: its requirements contradict this project's pins, and four requests are all it takes. The
environment variables are that client's: MLFLOW_EXPERIMENT_NAME, MLFLOW_TRACKING_TOKEN, MLFLOW_TRACKING_USERNAME and
MLFLOW_TRACKING_PASSWORD. Nothing here holds up or ends a run: a thread sends, and a server that fails is reported once.
"""

import os
import queue
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

import requests

from data.schema.parse import to_toml_value
from mbcnet_rec.config import RunConfig
from mbcnet_rec.runtime.exits import PreemptedError
from mbcnet_rec.logs.progress import tell

API = "/api/2.0/mlflow/"
RUN_ID = "mlflow_run"
EXPERIMENT = "mbcnet-rec"
TIMEOUT_SECONDS = 10.0
ATTEMPTS = 3
WAITING_LINES = 1000
LONGEST_VALUE = 500
# MLflow takes so many a request
PARAMS_AT_ONCE, METRICS_AT_ONCE = 100, 1000


def open_sink(config: RunConfig) -> "MlflowSink | None":
    """The sink that `train.tracking` names; None without one. For the rank that writes."""
    return MlflowSink(config) if config.train.tracking else None


class MlflowSink:
    """One run on an MLflow server; a resumed run goes on in the same one, whose id is kept in the run folder.

    Args:
        config: of the run; its keys become the parameters.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._uri = config.train.tracking.rstrip("/")
        self._session = requests.Session()
        self._session.headers.update(_credentials(os.environ))
        user = os.environ.get("MLFLOW_TRACKING_USERNAME")
        if user:
            self._session.auth = (user, os.environ.get("MLFLOW_TRACKING_PASSWORD", ""))
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue(WAITING_LINES)
        self._run_id, self._failed = "", False
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def add(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """Send the numbers of one line of metrics.jsonl, later."""
        now = int(time.time() * 1000)
        metrics = [
            {"key": metric_name(split, key), "value": float(value), "timestamp": now, "step": step}
            for key, value in values.items()
            if isinstance(value, (int, float))
        ]
        try:
            for start in range(0, len(metrics), METRICS_AT_ONCE):
                self._lines.put_nowait({"metrics": metrics[start : start + METRICS_AT_ONCE]})
        except queue.Full:
            self._fail(f"takes longer than training: more than {WAITING_LINES:,} lines wait")

    def close(self, error: BaseException | None) -> None:
        """Send what is left and say how the run ended.

        Args:
            error: by which it ended; None after the last step.
        """
        stopped = isinstance(error, (PreemptedError, KeyboardInterrupt))
        status = "FINISHED" if error is None else "KILLED" if stopped else "FAILED"
        try:
            self._lines.put_nowait({"status": status, "end_time": int(time.time() * 1000)})
            self._lines.put_nowait(None)
        except queue.Full:
            return
        self._thread.join(2 * TIMEOUT_SECONDS)

    def _work(self) -> None:
        """Send one line after the other."""
        try:
            self._run_id = self._find_run()
            while (line := self._lines.get()) is not None:
                self._call(
                    "runs/update" if "status" in line else "runs/log-batch", run_id=self._run_id, **line
                )
        except (requests.RequestException, OSError, KeyError, ValueError) as error:
            self._fail(f"cannot be used ({_reason(error)})")

    def _fail(self, why: str) -> None:
        if not self._failed:
            self._failed = True
            tell(
                f"mbcnet: warning: train.tracking: {self._uri} {why}; the run goes on without it: metrics.jsonl and tb/ have "
                "every number",
                sys.stderr,
            )

    def _find_run(self) -> str:
        """The run that the run folder names, else a new one."""
        path = self._config.run_folder / RUN_ID
        if path.exists():
            run_id = path.read_text().strip()
            if self._send("POST", "runs/update", {"run_id": run_id, "status": "RUNNING"}).ok:
                return run_id
        run = self._call(
            "runs/create",
            experiment_id=self._experiment(),
            run_name=self._config.name,
            start_time=int(time.time() * 1000),
        )
        run_id = str(run["run"]["info"]["run_id"])
        params = parameters(to_toml_value(self._config))
        for start in range(0, len(params), PARAMS_AT_ONCE):
            self._call("runs/log-batch", run_id=run_id, params=params[start : start + PARAMS_AT_ONCE])
        path.write_text(run_id + "\n")
        return run_id

    def _experiment(self) -> str:
        """Id of the experiment; made if it is not there."""
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        for _ in range(2):  # another run may make it between our two questions
            answer = self._send("GET", "experiments/get-by-name", {"experiment_name": name})
            if answer.ok:
                return str(answer.json()["experiment"]["experiment_id"])
            answer = self._send("POST", "experiments/create", {"name": name})
            if answer.ok:
                return str(answer.json()["experiment_id"])
        raise ValueError(f"experiment {name!r}: {_answer(answer)}")

    def _call(self, path: str, **body: Any) -> dict[str, Any]:
        answer = self._send("POST", path, body)
        if not answer.ok:
            raise ValueError(f"{path}: {_answer(answer)}")
        return answer.json()

    def _send(self, method: str, path: str, body: dict[str, Any]) -> requests.Response:
        """Send one request, again where the server is away or busy for a moment."""
        params, json = (body, None) if method == "GET" else (None, body)
        for attempt in range(ATTEMPTS):
            try:
                answer = self._session.request(
                    method, self._uri + API + path, params=params, json=json, timeout=TIMEOUT_SECONDS
                )
                if answer.status_code < 500 or attempt == ATTEMPTS - 1:
                    return answer
            except requests.ConnectionError:
                if attempt == ATTEMPTS - 1:
                    raise
            time.sleep(1.0 + attempt)
        raise AssertionError


def metric_name(split: str, key: str) -> str:
    """`split/key` in letters that MLflow takes, as on TensorBoard: disagreement/efgc>deep -> disagreement/efgc_to_deep."""
    return f"{split}/{key.replace('>', '_to_')}"


def parameters(table: Mapping[str, Any], prefix: str = "") -> list[dict[str, str]]:
    """The config's keys with their paths: [{"key": "train.epochs", "value": "1"}, ...]."""
    found = []
    for key, value in table.items():
        if isinstance(value, Mapping):
            found += parameters(value, f"{prefix}{key}.")
        else:
            found.append({"key": prefix + key, "value": str(value)[:LONGEST_VALUE]})
    return found


def _credentials(environ: Mapping[str, str]) -> dict[str, str]:
    token = environ.get("MLFLOW_TRACKING_TOKEN")
    return {"Authorization": f"Bearer {token}"} if token else {}


def _answer(answer: requests.Response) -> str:
    return f"{answer.status_code} {' '.join(answer.text.split())[:200]}"


def _reason(error: Exception) -> str:
    if isinstance(error, requests.ConnectionError):
        return "no answer: is it up, and the address right?"
    return " ".join(str(error).split())[:300] or type(error).__name__
