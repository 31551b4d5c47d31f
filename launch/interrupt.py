"""Ctrl-C while a program loads its libraries: it leaves at once. Imports nothing of weight, and is called before torch is imported."""

import atexit
import os
import signal
import sys
import threading
from contextlib import suppress
from types import FrameType

INTERRUPTED, TERMINATED = 130, 143
# What a command runs before its work begins
BEGINNINGS = ("__main__", "runpy", "importlib", "argparse", "launch.", "mbcnet_rec.cli", "mbcnet_rec.commands.")
AGAIN_SECONDS = 0.1


def heed_interrupts() -> None:
    """Make Ctrl-C end this process with code 130, also where Python's KeyboardInterrupt would be lost.

    Inside an import the library may swallow it, or its C++ abort. So an import with which a command begins is left at once: nothing has
    been written by then. Anywhere else Ctrl-C is a KeyboardInterrupt. A process that ignores it, as a shell's background jobs do, still does.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return

    def stop(number: int, frame: FrameType | None) -> None:
        if _begins(frame):
            with suppress(OSError):
                os.write(2, b"mbcnet: stopped\n")
            os._exit(INTERRUPTED)
        raise KeyboardInterrupt

    def lost(what: "sys.UnraisableHookArgs") -> None:
        if not isinstance(what.exc_value, KeyboardInterrupt):
            shown(what)
            return
        # raised in a finalizer, it ended nothing: once more, outside of it
        again = threading.Timer(AGAIN_SECONDS, os.kill, (os.getpid(), signal.SIGINT))
        again.daemon = True
        again.start()

    shown, sys.unraisablehook = sys.unraisablehook, lost
    signal.signal(signal.SIGINT, stop)


def heed_termination() -> None:
    """Make SIGTERM end this process with code 143 and clean up on the way, where nothing else does: the trainer takes it as a stop request."""
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(TERMINATED))


def end_with(code: int) -> None:
    """From now on Ctrl-C only hurries the end of this process, whose work is done and whose exit code is known."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(code))
        # while the interpreter itself ends, no handler runs
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)


def _begins(frame: FrameType | None) -> bool:
    """Whether an import is under way which no work, but a command's own beginning, has asked for."""
    importing, around = False, []
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            importing, around = True, []
        else:
            around.append(frame.f_globals.get("__name__", ""))
        frame = frame.f_back
    return importing and all(name.startswith(BEGINNINGS) for name in around)
