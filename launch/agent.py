"""The launcher of one host: torchrun's arguments, with readable output and the worker's exit code.

Rank 0 of each host writes to the terminal, the others to files; the job's first error is printed once, where torchrun prints
its own traceback and a table of ranks; the exit code is the worker's; and no process is left running.
"""

import logging
import os
import signal
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from launch.interrupt import heed_interrupts

if __name__ == "__main__":
    heed_interrupts()  # before torch is imported

from torch.distributed.elastic.agent.server import WorkerSpec
from torch.distributed.elastic.agent.server.api import RunResult
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler
from torch.distributed.run import config_from_args, parse_args

from launch.elastic import Agent, describe, first_failure, pass_on, say
from launch.job import EXIT_CODES, LOGS, PREEMPTED
from launch.worker import NOTES, signal_after_parent

# torchx kills a local job 10 seconds after Ctrl-C; workers must be gone before.
LOCAL_SHUTDOWN_SECONDS = 8
# On a cluster workers may write a checkpoint for as long as the scheduler lets them.
SHUTDOWN_SECONDS = 600


def code_after_signal(signum: int, notes: Path) -> int:
    """Exit code after a signal: PREEMPTED where every worker of this host left with a checkpoint, else 128 + the signal."""
    preempted, codes = str(PREEMPTED), {path.read_text(encoding="utf-8") for path in notes.glob("exit_*")}
    return PREEMPTED if preempted in codes and codes <= {preempted, "0"} else 128 + signum


def run_workers(args: Namespace) -> RunResult:
    """Start this host's workers and wait for them, as `torchrun` would with these arguments.

    Raises:
        SignalException: this process was told to stop; the rendezvous stays open for the other hosts.
    """
    config, command, words = config_from_args(args)
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = config.signals_to_handle
    parameters = RendezvousParameters(
        backend=config.rdzv_backend,
        endpoint=config.rdzv_endpoint,
        run_id=config.run_id,
        min_nodes=config.min_nodes,
        max_nodes=config.max_nodes,
        local_addr=config.local_addr,
        **config.rdzv_configs,
    )
    spec = WorkerSpec(
        role=config.role,
        local_world_size=config.nproc_per_node,
        entrypoint=command,
        args=tuple(words),
        rdzv_handler=get_rendezvous_handler(parameters),
        max_restarts=config.max_restarts,
        monitor_interval=config.monitor_interval,
        local_addr=config.local_addr,
    )
    assert config.logs_specs is not None and config.shutdown_timeout is not None  # config_from_args sets both
    agent = Agent(spec, config.logs_specs, start_method=config.start_method, shutdown_timeout=config.shutdown_timeout)
    agent.stop_seconds = config.shutdown_timeout
    stopped = False
    try:
        return agent.run()  # pyright: ignore[reportReturnType] (a decorator hides its type)
    except SignalException:
        stopped = True
        raise
    finally:
        if not stopped:
            spec.rdzv_handler.shutdown()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the workers of this host by torchrun's arguments; return 0, or the code of the one that failed first (128 + n for signal n)."""
    args = parse_args(list(sys.argv[1:] if argv is None else argv))
    if str(args.nproc_per_node).isdigit():
        workers = int(args.nproc_per_node)
        # All workers together fill the cores of the machine where they run; torchrun itself would set 1 and warn.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // max(1, workers))))
        if args.redirects == args.tee == "0" and workers > 1:
            args.redirects = ",".join(f"{rank}:3" for rank in range(1, workers))
    args.log_dir = args.log_dir or LOGS
    # whether torchx runs this job on the machine at which the user sits
    local = os.environ.get("TORCHX_JOB_ID", "").startswith("local")
    if args.shutdown_timeout is None:
        args.shutdown_timeout = LOCAL_SHUTDOWN_SECONDS if local else SHUTDOWN_SECONDS
    if local:
        signal_after_parent(signal.SIGTERM)
    # Half of torchelastic's loggers read LOGLEVEL, the others this
    logging.getLogger("torch.distributed.elastic").setLevel(os.environ.get("LOGLEVEL", "WARNING"))
    with tempfile.TemporaryDirectory(prefix="launch_") as folder:
        os.environ[NOTES] = folder
        code = exit_code(args, Path(folder))
    if codes := os.environ.get(EXIT_CODES):
        # `torchx run` of a local job ends with it
        Path(codes, str(os.getpid())).write_text(str(code), encoding="utf-8")
    return code


def exit_code(args: Namespace, notes: Path) -> int:
    """Run the workers; print what is left to say of a failure, and return the exit code."""
    try:
        result = run_workers(args)
    except SignalException as error:
        return code_after_signal(int(error.sigval), notes)
    finally:
        pass_on()
    if not result.is_failed():
        return 0
    rank, failure = first_failure(result.failures)
    say(describe(rank, failure))
    return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode


if __name__ == "__main__":
    sys.exit(main())
