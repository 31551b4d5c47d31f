"""torchrun, made readable: the same launcher with the same arguments.

Rank 0 of each host writes to the terminal, the others to files; the job's first error is told once, where torchrun prints
its own traceback and a table of ranks; the exit code is the worker's; and nothing is left running.
"""

import ctypes
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import parse_args, run

from launch.worker import NOTES, PR_SET_PDEATHSIG, USER_MISTAKE

PREEMPTED = 75  # a worker has written a checkpoint and left; start the job again
# Codes with which a worker leaves after it has said why (docs/operations.md).
SAID = (1, USER_MISTAKE, 74, PREEMPTED, 76, 77, 128 + signal.SIGINT)
LOGS = "logs"
TAIL_LINES = 5
# torchx kills a local job 10 seconds after Ctrl-C; workers must be gone before.
LOCAL_SHUTDOWN_SECONDS = 8
# On a cluster workers may write a checkpoint for as long as the scheduler lets them.
SHUTDOWN_SECONDS = 600


def default_threads(cores: int, workers: int) -> int:
    """Threads for each worker so that all of them together fill the cores, at least 1."""
    return max(1, cores // max(1, workers))


def first_failure(failures: dict[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """The rank that failed first: the one that claimed so, else the earliest not stopped by the launcher itself."""
    for rank, failure in failures.items():
        if failure.error_file_data.get("first"):
            return rank, failure
    own = {rank: failure for rank, failure in failures.items() if failure.exitcode != -signal.SIGTERM}
    return min((own or failures).items(), key=lambda item: item[1].timestamp)


def describe(rank: int, failure: ProcessFailure) -> str:
    """What the terminal has yet to hear of a failed rank; empty where it, or the rank to blame, has said all."""
    data, code = failure.error_file_data, failure.exitcode
    if data.get("first"):
        traceback_text = data["message"]["extraInfo"]["py_callstack"].rstrip()
        if traceback_text:
            return f"rank {rank} failed:\n{traceback_text}"
        if failure.local_rank > 0:  # it has said why, in its own log
            return last_lines(Path(failure.error_file).parent / "stderr.log")
    if code in SAID:
        return ""
    if code >= 0:
        return f"rank {rank} ended with exit code {code}"
    name = signal.Signals(-code).name
    hint = (
        "; most often the machine ran out of memory: a smaller batch, smaller tables or fewer workers need less"
        if name == "SIGKILL"
        else ""
    )
    return f"rank {rank} was ended by {name}{hint}"


def last_lines(path: Path) -> str:
    """The end of a rank's own log: what it said before it left."""
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-TAIL_LINES:])
    except OSError:
        return ""


def code_after_signal(signum: int, notes: Path) -> int:
    """Exit code of a job that was told to stop: PREEMPTED where every worker of this host left so, else 128 + the signal."""
    codes = [path.read_text() for path in notes.glob("exit_*")]
    preempted = (
        bool(codes) and all(code in (str(PREEMPTED), "0") for code in codes) and str(PREEMPTED) in codes
    )
    return PREEMPTED if preempted else 128 + signum


def keep_quiet(processes: int) -> str:
    """What --redirects of torchrun takes: every local rank but 0 writes to a file."""
    return ",".join(f"{rank}:3" for rank in range(1, processes)) or "0"


def is_local() -> bool:
    """Whether torchx runs this job on the machine at which the user sits."""
    return os.environ.get("TORCHX_JOB_ID", "").startswith("local")


def die_with_torchx() -> None:
    """Ask the kernel for a SIGTERM should torchx be killed outright. Linux only."""
    if sys.platform == "linux" and is_local():
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def main(argv: Sequence[str] | None = None) -> int:
    """Run torchrun's command line.

    Args:
        argv: torchrun's arguments; the process's own when None.

    Returns:
        0, or the exit code of the worker that failed first (128 + n for signal n).
    """
    args = parse_args(list(sys.argv[1:] if argv is None else argv))
    if str(args.nproc_per_node).isdigit():
        # torchrun itself would set 1 and warn. Counted here, on the machine where the workers run, not where the job was sent from.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        os.environ.setdefault("OMP_NUM_THREADS", str(default_threads(cores, int(args.nproc_per_node))))
        if args.redirects == args.tee == "0":
            args.redirects = keep_quiet(int(args.nproc_per_node))
    args.log_dir = args.log_dir or LOGS
    if args.shutdown_timeout is None:
        args.shutdown_timeout = LOCAL_SHUTDOWN_SECONDS if is_local() else SHUTDOWN_SECONDS
    # Half of torchelastic's loggers take LOGLEVEL, the others this
    logging.getLogger("torch.distributed.elastic").setLevel(os.environ.get("LOGLEVEL", "WARNING"))
    die_with_torchx()
    notes = Path(tempfile.mkdtemp(prefix="launch_"))
    os.environ[NOTES] = str(notes)
    try:
        run(args)
    except ChildFailedError as error:
        rank, failure = first_failure(error.failures)
        text = describe(rank, failure)
        if text:
            print(text, file=sys.stderr, flush=True)
        return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
    except SignalException as error:
        return code_after_signal(int(error.sigval), notes)
    finally:
        shutil.rmtree(notes, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
