"""torchrun, with one line in place of its failure table.

When a worker fails, torchrun prints its own traceback and a table of ranks, about forty lines, after the one line with
which the worker said what was wrong. This runs the same launcher with the same arguments and keeps that line the last one.
"""

import os
import signal
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import parse_args, run

# A worker that leaves with this code has already said, in one line, what the user can mend.
USER_MISTAKE = 2


def default_threads(cores: int, workers: int) -> int:
    """Threads for each worker so that all of them together fill the cores, at least 1."""
    return max(1, cores // max(1, workers))


def first_failure(failures: dict[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """The rank that failed by itself; those that the launcher stopped because of it end with SIGTERM."""
    own = {rank: failure for rank, failure in failures.items() if failure.exitcode != -signal.SIGTERM}
    return min((own or failures).items(), key=lambda item: item[1].timestamp)


def describe(rank: int, exitcode: int) -> str:
    """One line on how a rank ended, empty where the worker has said it all."""
    if exitcode == USER_MISTAKE:
        return ""
    if exitcode >= 0:
        return f"rank {rank} ended with exit code {exitcode}; its own message stands above"
    name = signal.Signals(-exitcode).name
    hint = (
        "; most often the machine ran out of memory: a smaller batch, smaller tables or fewer workers need less"
        if name == "SIGKILL"
        else ""
    )
    return f"rank {rank} was ended by {name}{hint}"


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
    try:
        run(args)
    except ChildFailedError as error:
        rank, failure = first_failure(error.failures)
        line = describe(rank, failure.exitcode)
        if line:
            print(line, file=sys.stderr, flush=True)
        return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
    return 0


if __name__ == "__main__":
    sys.exit(main())
