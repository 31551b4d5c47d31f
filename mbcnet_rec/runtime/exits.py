"""Why a run stopped before its end, and the exit code that says so to a scheduler. Imports no torch.

0    done
2    a mistake that the user can fix (data.errors.InputError): config, schema, data, plan, run folder
74   a file could not be written: disk full, no permission, storage away
75   asked to stop (SIGTERM or SIGUSR1); a checkpoint of the last step is written
76   the loss is not finite
77   another rank is stopped, dead or out of reach
130  Ctrl-C
143  SIGTERM, where nothing is trained
"""

import errno
import os
import signal
from typing import Self

from data.whole_folder import NO_ROOM

CANNOT_WRITE, PREEMPTED, NON_FINITE, LOST_RANK = 74, 75, 76, 77
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class RunStoppedError(RuntimeError):
    """The run ends here; the text is one line for the operator."""

    exit_code = 1  # of this process

    def __init__(self, line: str, *, reported: bool = True) -> None:
        super().__init__(line)
        self.reported = reported  # whether this rank prints the line; where all ranks know the same, one of them does


class CannotWriteError(RunStoppedError):
    """A checkpoint, a metrics line or a dump could not be written on some rank."""

    exit_code = CANNOT_WRITE


class PreemptedError(RunStoppedError):
    """Some rank got SIGTERM or SIGUSR1; every step that was trained is in a checkpoint."""

    exit_code = PREEMPTED


class NonFiniteLossError(RunStoppedError):
    """The loss of a step is NaN or infinite on some rank; no row has been written by that step."""

    exit_code = NON_FINITE


class LostRankError(RunStoppedError):
    """A collective failed: another rank is stopped, dead or out of reach."""

    exit_code = LOST_RANK


def no_room(error: BaseException) -> str:
    """What to say of an error that a full disk or a quota caused, in whichever library it was met; an empty string of any other error."""
    cause: BaseException | None = error
    while cause is not None:
        text = str(cause).lower()
        number = cause.errno if isinstance(cause, OSError) and cause.errno in NO_ROOM else None
        # safetensors and SQLite keep no errno
        number = number or next((each for each in NO_ROOM if os.strerror(each).lower() in text), None)
        if number or "disk is full" in text or "disk i/o error" in text:
            place = (cause.filename or "standard output, or a file") if isinstance(cause, OSError) else "a file"
            reason = os.strerror(number or errno.ENOSPC)
            return f"{place}: cannot be written ({reason}); free space or choose another place, then start again"
        cause = cause.__cause__ or cause.__context__
    return ""


class StopRequest:
    """A stop request, honoured at the next step boundary: one of SIGNALS arrived. The previous handlers are restored on exit. For the main thread."""

    signal_name = ""  # of the first that came

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        return bool(self.signal_name)

    def _note(self, number: int, _frame: object) -> None:
        self.signal_name = self.signal_name or signal.Signals(number).name

    def __enter__(self) -> Self:
        self._former = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_error: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
