"""Marks for profilers cost nothing while no profiler listens.

TorchRec and torch's optimizers wrap what they do in record_function, seventeen times a step: two calls through the dispatcher each,
whether somebody listens or not, and a twentieth of a small model's step.
"""

from functools import wraps
from typing import Any

from torch.autograd import profiler


def mark_for_profilers_only() -> None:
    """Let record_function do nothing outside of a profiler (torch.profiler, emit_nvtx), in this process from now on."""
    enter, leave = profiler.record_function.__enter__, profiler.record_function.__exit__
    if hasattr(enter, "__wrapped__"):
        return

    @wraps(enter)
    def enter_if_heard(self: Any) -> Any:
        return enter(self) if profiler._is_profiler_enabled else self

    @wraps(leave)
    def leave_if_entered(self: Any, *error: Any) -> None:
        if self.record is not None:
            leave(self, *error)

    profiler.record_function.__enter__ = enter_if_heard  # type: ignore[method-assign]
    profiler.record_function.__exit__ = leave_if_entered  # type: ignore[method-assign]
