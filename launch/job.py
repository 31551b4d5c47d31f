"""What a job is, whichever scheduler runs it: a command of `mbcnet`, hosts x processes, resources.

components.py makes torchx's description of it, scripts.py a torchrun line, an sbatch script or a Kubernetes Job.
"""

import os
import re
import shlex
import sys
from dataclasses import dataclass, field

WORKER = "launch.worker"  # where the workers begin; torchrun starts it once for each process
AGENT = "launch.agent"
LOGS = "logs"  # where a local job keeps the output of its ranks
GRACE_SECONDS = 300  # between a stop request and the end: time for a checkpoint of the largest model
USER_ID = 10001  # as the Dockerfile's user
# Kubernetes' securityContext of a pod: the image's user, to whom the volumes belong too
POD_SECURITY = {"runAsNonRoot": True, "runAsUser": USER_ID, "runAsGroup": USER_ID, "fsGroup": USER_ID}
# Of this environment's programs. On a cluster with a shared file system it is right on every host.
PROGRAMS = os.path.dirname(sys.executable)
EXIT_CODES = "LAUNCH_EXIT_CODES"  # a folder in which the launchers of a local job leave their exit codes
OURS = "mbcnet"  # key in the metadata of a torchx role: what we add to a scheduler's request is for our own jobs only
# Exit codes of a worker, as in mbcnet_rec/runtime/exits.py
USER_MISTAKE, CANNOT_WRITE, PREEMPTED, NON_FINITE, LOST_RANK, INTERRUPTED = 2, 74, 75, 76, 77, 130
# How often torchelastic restarts the workers of a job of several hosts: when one is lost, the others continue from the checkpoint
RESTARTS = 3


class JobError(ValueError):
    """A job that cannot run as described; one line that says how to fix it."""


@dataclass(frozen=True)
class Shape:
    """Hosts x processes, the `-j` of torchx."""

    min_hosts: int  # with which an elastic job starts; equal to hosts otherwise
    hosts: int  # at most
    processes: int  # on each host, one a device

    @property
    def elastic(self) -> bool:
        """Whether hosts may come and go."""
        return self.min_hosts < self.hosts

    @property
    def nodes(self) -> str:
        """Hosts, as --nnodes of torchrun takes them."""
        return f"{self.min_hosts}:{self.hosts}" if self.elastic else str(self.hosts)

    @property
    def world_sizes(self) -> tuple[int, ...]:
        """How many ranks the job may have."""
        return tuple(hosts * self.processes for hosts in range(self.min_hosts, self.hosts + 1))

    def __str__(self) -> str:
        """As -j takes it."""
        return f"{self.nodes}x{self.processes}"


def parse_shape(text: str) -> Shape:
    """Read `[MIN:]HOSTSxPROCESSES` or `PROCESSES`; a JobError where it is not of that form."""
    match = re.fullmatch(r"(?:(?:(\d+):)?(\d+)x)?(\d+)", text.strip())
    if match:
        hosts = int(match[2] or 1)
        shape = Shape(int(match[1] or hosts), hosts, int(match[3]))
        if 1 <= shape.min_hosts <= shape.hosts and shape.processes >= 1:
            return shape
    raise JobError(
        f"-j {text}: wanted HOSTSxPROCESSES, or MIN:MAXxPROCESSES where hosts may come and go, MIN no more than MAX and none of them 0; "
        "write 1x2, 16x8 or 2:4x8"
    )


@dataclass(frozen=True)
class Job:
    """A command of `mbcnet`, its arguments, and what it runs on."""

    command: str
    args: tuple[str, ...] = ()
    shape: Shape = Shape(1, 1, 2)
    name: str = ""
    image: str = "mbcnet-rec"  # of the container, for schedulers that use one
    cpu: int = 2  # this and the next two: of each host
    gpu: int = 0
    memory_mb: int = 8192
    env: dict[str, str] = field(default_factory=dict)  # further variables of every worker
    retries: int = 0  # how often the scheduler starts the job again
    port: int = 29500  # of the rendezvous, on the first host

    def __post_init__(self) -> None:
        """Refuse a job that would remove its own checkpoints as it starts again, contradicts itself, or has fewer GPUs than processes."""
        if {"--resume", "--overwrite"} <= set(self.args):
            raise JobError("--resume with --overwrite: the one continues the run, the other replaces it; leave one out")
        if (self.retries or self.shape.elastic) and "--overwrite" in self.args:
            why = f"-j {self.shape}" if self.shape.elastic else f"max_retries = {self.retries}"
            raise JobError(
                f"--overwrite with {why}: each new start would remove what the last one has trained; leave it out and choose a new folder"
            )
        if 0 < self.gpu < self.shape.processes:
            raise JobError(
                f"gpu = {self.gpu}: -j {self.shape} starts {self.shape.processes} processes on each host, one a GPU; ask for {self.shape.processes} GPUs"
            )

    @property
    def worker_args(self) -> tuple[str, ...]:
        """Arguments of the worker: the command and its own, and --resume where a second start is to be expected."""
        starts_again = self.retries or self.restarts
        resume = self.command == "train" and starts_again and "--resume" not in self.args
        return (self.command, *self.args, *(("--resume",) if resume else ()))

    @property
    def restarts(self) -> int:
        """Restarts by torchelastic: none on one host, whose fault comes again, nor with --overwrite, which would remove what the others trained."""
        return RESTARTS if self.shape.hosts > 1 and "--overwrite" not in self.args else 0


def environment(job: Job) -> dict[str, str]:
    """Variables of every worker; what the user gives wins."""
    return {
        # The working directory stays off sys.path: a user's own data/ or launch/ there must not shadow ours.
        "PYTHONSAFEPATH": "1",
        # Of the launcher's log lines only the worker's own message matters on a terminal; these two set to INFO show them all.
        "LOGLEVEL": os.environ.get("LOGLEVEL", "CRITICAL"),
        # Pinned memory of a checkpoint's copy is rounded up to a power of two only below this size: else it could take twice the bytes.
        "PYTORCH_ALLOC_CONF": os.environ.get("PYTORCH_ALLOC_CONF")
        or os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "pinned_max_round_threshold_mb:128"),
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
        **job.env,
    }


def rendezvous(job: Job, run_id: str, endpoint: str) -> list[str]:
    """Arguments with which torchrun, or our agent, finds the other hosts."""
    return [
        "--nnodes", job.shape.nodes,
        "--nproc-per-node", str(job.shape.processes),
        "--max-restarts", str(job.restarts),
        "--rdzv-backend", "c10d",
        "--rdzv-endpoint", endpoint,
        "--rdzv-id", run_id,
    ]  # fmt: skip


def shell_words(job: Job, run_id: str, endpoint: str) -> str:
    """The same and the worker's own, for a shell, to which run_id and endpoint are given as they are."""
    return " ".join([*rendezvous(job, run_id, endpoint), "-m", WORKER, *map(shlex.quote, job.worker_args)])


def shared_memory_mb(memory_mb: int) -> int:
    """Bound of /dev/shm, where NCCL and gloo keep buffers: a container's own 64 MiB are too few. It counts as memory of the pod."""
    return max(64, memory_mb // 4)
