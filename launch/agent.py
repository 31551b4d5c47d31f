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

import torch.distributed.launcher.api as launcher
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from launch.elastic import Agent, describe, first_failure, pass_on, say
from launch.job import PREEMPTED
from launch.worker import NOTES, PR_SET_PDEATHSIG

LOGS = "logs"
# torchx kills a local job 10 seconds after Ctrl-C; workers must be gone before.
LOCAL_SHUTDOWN_SECONDS = 8
# On a cluster workers may write a checkpoint for as long as the scheduler lets them.
SHUTDOWN_SECONDS = 600


def default_threads(cores: int, workers: int) -> int:
    """Threads for each worker so that all of them together fill the cores, at least 1."""
    return max(1, cores // max(1, workers))


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
    launcher.LocalElasticAgent = Agent
    notes = Path(tempfile.mkdtemp(prefix="launch_"))
    os.environ[NOTES] = str(notes)
    try:
        run(args)
    except ChildFailedError as error:
        rank, failure = first_failure(error.failures)
        pass_on()
        say(describe(rank, failure))
        return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
    except SignalException as error:
        pass_on()
        return code_after_signal(int(error.sigval), notes)
    finally:
        shutil.rmtree(notes, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
