"""torchelastic's agent, with hosts that may come and go. The only file of `launch` that names private parts of a library."""

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from launch.job import CANNOT_WRITE, INTERRUPTED, LOST_RANK, NON_FINITE, PREEMPTED, USER_MISTAKE
from launch.worker import NOTES

# Codes with which a worker leaves after it has said why; 1 follows a traceback.
REPORTED_CODES = (1, USER_MISTAKE, CANNOT_WRITE, PREEMPTED, NON_FINITE, LOST_RANK, INTERRUPTED)
# What would fail again at every start
NO_RETRY_CODES = (USER_MISTAKE, NON_FINITE)


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
