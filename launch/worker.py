"""Where each process of a job begins: `python -m launch.worker COMMAND ...`, one rank of `mbcnet`.

Around the command it does what only a rank among many needs: a restarted rank goes on from the checkpoint; an exception is
told once for the whole job, not once for each rank; and no rank outlives its agent.
"""

import contextlib
import ctypes
import json
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path

from torch.distributed import TCPStore

COMMAND_LINE = "mbcnet_rec.cli"
# The agent's folder for notes of its ranks: exit_RANK holds the code with which a rank left.
NOTES = "LAUNCH_NOTES"
USER_MISTAKE = 2
# Done, left with a checkpoint, stopped by Ctrl-C: no errors.
STOPPED = (0, 75, 130)
LOST_RANK = 77
# What a rank says when another one has gone; the true cause is that other one's.
ECHOES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exited",
    "NCCL",
    "Timed out waiting",
)
ECHO_SECONDS = 2.0
CLAIM_SECONDS = 5.0
PR_SET_PDEATHSIG = 1


def resumed(args: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """Arguments of a rank that may have been started before: it goes on, and never removes what it has trained.

    torchelastic counts its restarts, Slurm its requeues, AWS Batch its attempts (from 1).
    """
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
    key = (
        f"launch/first_error/{environ.get('TORCHELASTIC_RUN_ID')}/{environ.get('TORCHELASTIC_RESTART_COUNT')}"
    )
    try:
        store = TCPStore(address, int(port), is_master=False, timeout=timedelta(seconds=CLAIM_SECONDS))
        return store.add(key, 1) == 1
    except Exception:  # the store's host is gone: better told twice than never
        return True


def traceback_text(error: Exception) -> str:
    """The traceback from where the command begins."""
    frame = error.__traceback__
    while frame is not None and frame.tb_frame.f_code.co_filename in (__file__, "<frozen runpy>"):
        frame = frame.tb_next
    return "".join(traceback.format_exception(type(error), error, frame))


def record(message: str, text: str, first: bool, environ: Mapping[str, str]) -> None:
    """Leave an error where the agent reads it, in torchelastic's form; `first` is ours."""
    path = environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
    with contextlib.suppress(OSError):
        Path(path).write_text(
            json.dumps({"message": {"message": message, "extraInfo": extra}, "first": first})
        )


def note_exit(code: int, environ: Mapping[str, str]) -> None:
    """Tell the agent how this rank ended: after a signal torchelastic does not ask."""
    folder = environ.get(NOTES)
    if folder:
        with contextlib.suppress(OSError):
            (Path(folder) / f"exit_{environ.get('LOCAL_RANK', '0')}").write_text(str(code))


def refused_before(environ: Mapping[str, str]) -> bool:
    """Whether an earlier start ended with the user's mistake: torchelastic restarts for it too, and it would be told again."""
    folder = environ.get(NOTES)
    if not folder or environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return False
    return any(path.read_text() == str(USER_MISTAKE) for path in Path(folder).glob("exit_*"))


def die_with_parent() -> None:
    """Ask the kernel to end this process should its agent be killed outright. Linux only; elsewhere nothing happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def run(argv: Sequence[str]) -> int:
    """Run the command line in this process; return its exit code.

    Raises:
        Exception: what the command let through.
    """
    sys.argv = [COMMAND_LINE, *argv]
    try:
        runpy.run_module(COMMAND_LINE, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one rank.

    Returns:
        The command's exit code, 1 after an exception.
    """
    environ = os.environ
    if NOTES in environ:
        die_with_parent()
    if refused_before(environ):
        return USER_MISTAKE
    try:
        code = run(resumed(sys.argv[1:] if argv is None else argv, environ))
        if code not in STOPPED:
            if code == LOST_RANK:
                time.sleep(ECHO_SECONDS)
            record(f"exit code {code}", "", claim_first(environ), environ)
    except Exception as error:
        code, text = 1, traceback_text(error)
        if any(echo in text for echo in ECHOES):
            time.sleep(ECHO_SECONDS)  # the rank that this one echoes speaks first
        first = claim_first(environ)
        record(f"{type(error).__name__}: {error}", text, first, environ)
        # The agent prints the first one; local rank 0 shares its terminal, the others write to files of their own.
        # Under plain torchrun all share it.
        if environ.get("LOCAL_RANK") != "0" if NOTES in environ else first:
            sys.stderr.write(text)
    note_exit(code, environ)
    return code


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # A rank that has failed may still hold a process group whose threads wait for the others.
    os._exit(code) if code else sys.exit(0)
