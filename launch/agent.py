"""The launcher of one host: torchrun's arguments, with readable output and the worker's exit code.

Rank 0 of each host writes to the terminal, the others to files; the job's first error is printed once, where torchrun prints
its own traceback and a table of ranks; the exit code is the worker's; and no process is left running. The only file of `launch` that
names private parts of a library.
"""

import logging
import os
import signal
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from launch.interrupt import heed_interrupts

if __name__ == "__main__":
    heed_interrupts()  # before torch is imported

from torch.distributed.elastic.agent.server import WorkerSpec
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler
from torch.distributed.run import config_from_args, parse_args

from launch.job import CANNOT_WRITE, EXIT_CODES, INTERRUPTED, LOGS, LOST_RANK, NON_FINITE, PREEMPTED, USER_MISTAKE
from launch.worker import NOTES, signal_after_parent

LOCAL_SHUTDOWN_SECONDS = 8  # torchx kills a local job 10 seconds after Ctrl-C; workers must be gone before.
SHUTDOWN_SECONDS = 600  # on a cluster workers may write a checkpoint for as long as the scheduler lets them
# Codes with which a worker leaves after it has said why; 1 follows a traceback.
REPORTED_CODES = (1, USER_MISTAKE, CANNOT_WRITE, PREEMPTED, NON_FINITE, LOST_RANK, INTERRUPTED)
NO_RETRY_CODES = (USER_MISTAKE, NON_FINITE)  # what would fail again at every start


class Agent(LocalElasticAgent):
    """LocalElasticAgent, with restarts only where they can help.

    Each round of the rendezvous has a store of its own. torch 2.13 keeps the first round's: a host that joins later waits for
    an address that is never published again, and restarted workers read the addresses of dead ones.
    A stop with a checkpoint costs no restart; a user's mistake ends the job.
    Workers that are stopped because a host has joined have time to write a checkpoint. The operator is told why workers restart.
    """

    stop_seconds = 30

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        worker_group.spec.rdzv_handler._bootstrap_store_info = None  # pyright: ignore
        super()._rendezvous(worker_group)  # pyright: ignore[reportCallIssue]

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)  # pyright: ignore[reportCallIssue]
        pass_on()
        if not result.is_failed():
            return result
        codes = {failure.exitcode for failure in result.failures.values()}
        if codes & set(NO_RETRY_CODES):
            self._remaining_restarts = 0
        if not self._remaining_restarts:
            return result
        say(describe(*first_failure(result.failures)))
        if codes <= {PREEMPTED, -signal.SIGTERM} and PREEMPTED in codes:
            self._remaining_restarts += 1
        return result

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        if worker_group.state == WorkerState.HEALTHY:  # a host has joined: every worker writes a checkpoint
            self._shutdown(timeout=self.stop_seconds)
        else:
            super()._stop_workers(worker_group)  # pyright: ignore[reportCallIssue]

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        """Tell the workers to stop. A suspended one (SIGSTOP) is resumed first: it would not see the signal until the timeout."""
        for pid in self._pcontext.pids().values() if self._pcontext else ():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        super()._shutdown(death_sig, timeout)

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        if worker_group.group_rank == 0:
            if worker_group.state == WorkerState.HEALTHY:
                # behind a progress bar
                say("\nmbcnet: a host has joined: all workers write a checkpoint and continue from it")
            else:
                left = f"{self._remaining_restarts} of {worker_group.spec.max_restarts} restarts left"
                say(f"mbcnet: all workers restart from the last checkpoint ({left})")
        super()._restart_workers(worker_group)  # pyright: ignore[reportCallIssue]
        pass_on()


def say(line: str) -> None:
    """Write a line to the terminal, if there is something to say."""
    if line:
        print(line, file=sys.stderr, flush=True)


def pass_on() -> None:
    """Print the messages that workers without a terminal have left in files."""
    for path in sorted(Path(os.environ[NOTES]).glob("said_*")):
        say(path.read_text(encoding="utf-8").rstrip("\n"))
        path.unlink()


def first_failure(failures: dict[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """The rank that failed first: the one that claimed so, else the earliest not stopped by the launcher itself."""
    for rank, failure in failures.items():
        if failure.error_file_data.get("first"):
            return rank, failure
    own = {rank: failure for rank, failure in failures.items() if failure.exitcode != -signal.SIGTERM}
    return min((own or failures).items(), key=lambda item: item[1].timestamp)


def describe(rank: int, failure: ProcessFailure) -> str:
    """What to print about a failed rank; empty where it, or the rank to blame, has reported it already."""
    code = failure.exitcode
    if code in REPORTED_CODES:
        return ""
    if code >= 0:
        return f"rank {rank} ended with exit code {code}"
    name, hint = signal.Signals(-code).name, ""
    if name == "SIGKILL":
        hint = "; most often the machine ran out of memory: a smaller batch, smaller tables or fewer workers need less"
    return f"rank {rank} was ended by {name}{hint}"


def code_after_signal(signum: int, notes: Path) -> int:
    """Exit code after a signal: PREEMPTED where every worker of this host left with a checkpoint, else 128 + the signal."""
    preempted, codes = str(PREEMPTED), {path.read_text(encoding="utf-8") for path in notes.glob("exit_*")}
    return PREEMPTED if preempted in codes and codes <= {preempted, "0"} else 128 + signum


def run_workers(args: Namespace) -> RunResult:
    """Start this host's workers and wait, as `torchrun` would; SignalException if told to stop, with the rendezvous open for other hosts."""
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
