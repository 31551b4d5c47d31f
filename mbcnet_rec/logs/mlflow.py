"""Sends the numbers of metrics.jsonl to an MLflow server as well, through MLflow's own client and its environment variables.

Nothing here delays or ends a run: a thread sends, and a server that fails is reported once.
"""

import importlib.util
import os
import queue
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import requests

from data.errors import InputError
from data.schema.parse import to_toml_value
from mbcnet_rec.config import RunConfig, flat
from mbcnet_rec.logs.progress import tell
from mbcnet_rec.runtime.exits import PreemptedError

RUN_ID = "mlflow_run"
EXPERIMENT = "mbcnet-rec"
ANSWER_SECONDS = 10.0  # for the first answer
CLOSE_SECONDS = 20.0  # for what is left to send when the run ends
WAITING_LINES = 1000
PARAMS_AT_ONCE = 100  # MLflow takes so many in a request


def require_client(address: str) -> None:
    """Refuse `train.tracking`, by an InputError, where MLflow's client is not installed."""
    if address and importlib.util.find_spec("mlflow") is None:
        raise InputError(
            f"train.tracking = {address!r}: MLflow's client is not installed; run `pip install mlflow-skinny`, or set train.tracking = ''"
        )


class MlflowSink:
    """One run on the MLflow server http://HOST:PORT that train.tracking names. The run folder keeps its id, so that a resumed run adds to it."""

    def __init__(self, config: RunConfig) -> None:
        self._address, self._config = config.train.tracking, config
        self._lines: queue.Queue[tuple[int, int, dict[str, float]] | None] = queue.Queue(WAITING_LINES)
        self._status, self._failed = "FINISHED", False
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def add(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """Send the numbers of one line of metrics.jsonl, later."""
        plain = {key: each for key, each in values.items() if isinstance(each, (int, float))}
        numbers = {curve_name(split, key): float(each) for key, each in plain.items()}
        try:
            self._lines.put_nowait((step, int(time.time() * 1000), numbers))
        except queue.Full:
            self._fail(f"takes longer than training: more than {WAITING_LINES:,} lines wait")

    def close(self, error: BaseException | None) -> None:
        """Send what is left, and how the run ended: `error`, or None after the last step."""
        if error is not None:
            self._status = "KILLED" if isinstance(error, (PreemptedError, KeyboardInterrupt, SystemExit)) else "FAILED"
        try:
            self._lines.put_nowait(None)
        except queue.Full:
            return
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._fail(f"did not take the last lines within {CLOSE_SECONDS:g} s")

    def _work(self) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # a run reports to nobody but this server
        try:
            requests.get(self._address, timeout=ANSWER_SECONDS)  # the client alone would try for minutes
            # takes seconds, and few runs want it
            from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]
            from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]

            client = MlflowClient(self._address)
            run_id = self._find_run(client)
            while (line := self._lines.get()) is not None:
                step, now, numbers = line
                client.log_batch(run_id, [Metric(key, each, now, step) for key, each in numbers.items()])
            client.set_terminated(run_id, self._status)
        except requests.ConnectionError:
            self._fail("does not answer: is it up, and the address right?")
        except Exception as error:  # of the client, which wraps whatever the server says
            self._fail(f"cannot be used ({' '.join(str(error).split())[:300] or type(error).__name__})")

    def _fail(self, why: str) -> None:
        if self._failed:
            return
        self._failed = True
        words = f"train.tracking: {self._address} {why}; the run continues without it: metrics.jsonl and tb/ have every number"
        tell(f"mbcnet: warning: {words}", sys.stderr)

    def _find_run(self, client: Any) -> str:
        """The run that the run folder names, else a new one."""
        from mlflow.entities import Param  # pyright: ignore[reportMissingImports]
        from mlflow.exceptions import MlflowException  # pyright: ignore[reportMissingImports]

        path = self._config.run_folder / RUN_ID
        with suppress(FileNotFoundError, MlflowException):  # a new run, or one that was removed or is of another server
            run_id = path.read_text(encoding="utf-8").strip()
            client.update_run(run_id, "RUNNING")
            return run_id
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        found = client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else client.create_experiment(name)
        run_id = client.create_run(experiment, run_name=self._config.name).info.run_id
        params = [Param(key, str(each)) for key, each in flat(to_toml_value(self._config))]
        for start in range(0, len(params), PARAMS_AT_ONCE):
            client.log_batch(run_id, params=params[start : start + PARAMS_AT_ONCE])
        path.write_text(run_id + "\n", encoding="utf-8")
        return run_id


def curve_name(split: str, key: str) -> str:
    """`split/key` in letters that MLflow and TensorBoard take: disagreement/efgc>deep -> train/disagreement/efgc_to_deep."""
    return f"{split}/{key.replace('>', '_to_')}"
