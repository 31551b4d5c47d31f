"""The clock and the manners of benchmarks/peers.py, the same for both sides. Knows torch only, so that any peer's Python can run it."""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook


class StepClock:
    """Notes when each optimizer's step ends, whoever calls it: the trainers themselves stay as they are."""

    def __init__(self) -> None:
        self._ends: dict[int, list[float]] = {}

    def __enter__(self) -> "StepClock":
        self._handle = register_optimizer_step_post_hook(self._note)
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.remove()

    def _note(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._ends.setdefault(id(optimizer), []).append(time.perf_counter())

    def seconds_a_step(self, warm_up: int, steps: int) -> float:
        """Mean over `steps` steps after the first `warm_up`: all that a trainer does between them counts.

        Raises:
            ValueError: fewer steps were made.
        """
        ends = max(self._ends.values(), key=len, default=[])
        if len(ends) < warm_up + steps:
            raise ValueError(f"{len(ends)} steps were made, wanted {warm_up + steps}")
        return (ends[warm_up + steps - 1] - ends[warm_up - 1]) / steps


def answer_tasks(train: Callable[[dict[str, Any]], None]) -> None:
    """Read tasks from standard input, a JSON object a line; train each; answer each with a line.

    What training prints goes to standard error.

    Args:
        train: task with "warm_up" and "steps" -> one whole run of at least as many steps.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        task = json.loads(line)
        with StepClock() as clock:
            train(task)
        seconds = clock.seconds_a_step(task["warm_up"], task["steps"])
        print(json.dumps({"samples_per_second": task["batch"] / seconds}), file=answers, flush=True)
