"""SIGTERM and SIGUSR1 as a stop request, honoured at the next step boundary."""

import signal
from typing import Any, Self

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Records that one of SIGNALS arrived; the previous handlers are restored on exit. For the main thread."""

    def __init__(self) -> None:
        self.signal_name = ""  # of the first that came
        self._former: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        return bool(self.signal_name)

    def _note(self, number: int, _frame: object) -> None:
        self.signal_name = self.signal_name or signal.Signals(number).name

    def __enter__(self) -> Self:
        for number in SIGNALS:
            self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_error: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
