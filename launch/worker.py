"""Where each process of a job begins: `python -m launch.worker COMMAND ...`, one rank of `mbcnet`.

A restarted rank continues from the checkpoint, an error is reported once for the whole job, and no rank outlives its agent.
"""

import contextlib
import ctypes
import importlib
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path

from launch.interrupt import end_with, heed_interrupts

if __name__ == "__main__":
    heed_interrupts()  # before torch is imported

from torch.distributed import TCPStore

from launch.job import INTERRUPTED, LOST_RANK, PREEMPTED

COMMAND_LINE = "mbcnet_rec.cli"
# The agent's folder for messages of its ranks: exit_RANK holds a rank's exit code, said_RANK what to print on the terminal.
NOTES = "LAUNCH_NOTES"
STOPPED = (0, PREEMPTED, INTERRUPTED)  # Done, stopped with a checkpoint, stopped by Ctrl-C: no errors
# A rank's error after another rank has failed; the cause is the other rank's error.
SECONDARY_ERROR = re.compile("Connection (closed|reset)|Broken pipe|remote process exited|NCCL|Timed out waiting")
SECONDARY_WAIT_SECONDS = 2.0  # how long a rank whose error is secondary waits for the rank with the cause to report it
CLAIM_SECONDS = 5.0
PR_SET_PDEATHSIG = 1


def resumed(args: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """A rank's arguments: if started before, by torchelastic, Slurm or AWS Batch, it resumes, and never removes what it has trained."""
    starts = ("TORCHELASTIC_RESTART_COUNT", 0), ("SLURM_RESTART_COUNT", 0), ("AWS_BATCH_JOB_ATTEMPT", 1)
    again = any(int(environ.get(name) or first) > first for name, first in starts)
    if not again or not args or args[0] != "train":
        return list(args)
    kept = [arg for arg in args if arg != "--overwrite"]
    return kept if "--resume" in kept else [*kept, "--resume"]


def claim_first(environ: Mapping[str, str]) -> bool:
    """Whether this rank is the job's first to fail. All hosts ask the same store, that of the rendezvous."""
    address, port = environ.get("MASTER_ADDR"), environ.get("MASTER_PORT")
    if not address or not port or int(environ.get("WORLD_SIZE", "1")) == 1:
        return True
    # On one host all restarts share a store; several hosts count their restarts each on its own and have a store for each.
    attempt = environ.get("TORCHELASTIC_RESTART_COUNT") if environ.get("GROUP_WORLD_SIZE") == "1" else ""
    key = f"launch/first_error/{environ.get('TORCHELASTIC_RUN_ID')}/{attempt}"
    try:
        store = TCPStore(address, int(port), is_master=False, timeout=timedelta(seconds=CLAIM_SECONDS))
        return store.add(key, 1) == 1
    except Exception:  # the store's host is gone: better reported twice than never
        return True


def describe(error: Exception, environ: Mapping[str, str]) -> str:
    """One line for an error with an exit code of its own, which the user or operator can fix; else the traceback."""
    if hasattr(error, "exit_code"):
        notes = getattr(error, "__notes__", [])  # the rank whose rows are faulty
        return f"mbcnet: {notes[0]}: {error}\n" if notes else f"mbcnet: {error}\n"
    frame = error.__traceback__
    while frame is not None and frame.tb_frame.f_code.co_filename == __file__:
        frame = frame.tb_next  # from where the command begins
    text = "".join(traceback.format_exception(type(error), error, frame))
    return f"rank {environ.get('RANK', '0')} failed:\n{text}"


def leave(error: Exception, environ: Mapping[str, str]) -> int:
    """Report why the command ended, once for the whole job, and return the exit code."""
    code, text = int(getattr(error, "exit_code", 1)), describe(error, environ)
    reported = getattr(error, "reported", True)
    if not reported or code == LOST_RANK or (code == 1 and SECONDARY_ERROR.search(text)):
        time.sleep(SECONDARY_WAIT_SECONDS)
    if code in STOPPED:
        first = reported
    else:
        first = reported and claim_first(environ)
        record(code, first, environ)
    if first:
        tell(text, environ)
    return code


def tell(text: str, environ: Mapping[str, str]) -> None:
    """Write to the terminal. Under our agent only local rank 0 has one; the agent prints what the others leave in files."""
    sys.stderr.write(text)
    sys.stderr.flush()
    if environ.get("LOCAL_RANK", "0") != "0":
        note("said", text, environ)


def note(kind: str, text: str, environ: Mapping[str, str]) -> None:
    """Leave the agent a message of this rank, whole or not at all."""
    folder, rank = environ.get(NOTES), environ.get("LOCAL_RANK", "0")
    if folder:
        with contextlib.suppress(OSError):
            draft = Path(folder) / f".{kind}_{rank}"
            draft.write_text(text, encoding="utf-8")
            draft.rename(Path(folder) / f"{kind}_{rank}")


def record(code: int, first: bool, environ: Mapping[str, str]) -> None:
    """Write an error where the agent reads it, in torchelastic's form; `first` is our own key."""
    extra = {"py_callstack": "", "timestamp": str(int(time.time()))}
    message = {"message": f"exit code {code}", "extraInfo": extra}
    if path := environ.get("TORCHELASTIC_ERROR_FILE"):
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": message, "first": first}), encoding="utf-8")


def signal_after_parent(signum: signal.Signals) -> None:
    """Have the kernel send this process a signal when its parent has ended. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signum)


def run(argv: Sequence[str]) -> int:
    """Run the command line in this process; return its exit code. What goes wrong is raised."""
    try:
        return int(importlib.import_module(COMMAND_LINE).run(argv))
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        return INTERRUPTED


def main(argv: Sequence[str] | None = None) -> int:
    """Run one rank; return the command's exit code, 1 after an exception without one."""
    environ = os.environ
    if NOTES in environ:
        signal_after_parent(signal.SIGKILL)  # no rank outlives its agent
    try:
        code = run(resumed(sys.argv[1:] if argv is None else argv, environ))
        if code not in STOPPED:
            record(code, claim_first(environ), environ)
    except Exception as error:
        code = leave(error, environ)
    note("exit", str(code), environ)  # torchelastic does not collect it after a signal
    return code


if __name__ == "__main__":
    code = main()
    end_with(code)
    sys.stdout.flush()
    sys.stderr.flush()
    # A rank that has failed may still hold a process group whose threads wait for the others.
    os._exit(code) if code else sys.exit(0)
