"""A job as torchx describes it. torchx runs components.py's text inside a module of its own; this one is imported as usual."""

import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from torchx import specs
from torchx.specs import macros

from launch.job import (
    AGENT,
    OURS,
    WORKER,
    Job,
    JobError,
    environment,
    environment_folder,
    parse_shape,
    rendezvous,
)


def terminal_size(role: str) -> dict[str, str]:
    """How wide and high the user's terminal is; workers write to a pipe and cannot ask. torchx puts "train/0 " before each line."""
    if not sys.stderr.isatty():
        return {}
    size = shutil.get_terminal_size()
    return {"COLUMNS": str(max(20, size.columns - len(role) - len("/0 "))), "LINES": str(size.lines)}


def command_line(job: Job) -> str:
    """What each host runs, for bash. $$ is torchx's spelling of $.

    Schedulers look programs up on PATH, which holds .venv/bin only in an activated shell. Inside a container the folder does
    not exist and does no harm.
    """
    # Each scheduler names the first host in a variable of its own; AWS Batch leaves it empty on that host itself.
    endpoint = f"$${{{macros.rank0_env}:=localhost}}:{job.port}" if job.shape.hosts > 1 else "localhost:0"
    found = [
        part if part == endpoint else shlex.quote(part) for part in rendezvous(job, macros.app_id, endpoint)
    ]
    words = ["exec", "python", "-m", AGENT, *found, "-m", WORKER, *map(shlex.quote, job.worker_args)]
    return f"export PATH={shlex.quote(environment_folder())}:$$PATH; {' '.join(words)}"


def application(job: Job, resource: specs.Resource, mounts: Sequence[str] = ()) -> specs.AppDef:
    """The job as one role, its command's name, of as many replicas as hosts."""
    role = specs.Role(
        name=job.command,
        image=job.image,
        min_replicas=job.shape.min_hosts if job.shape.elastic else None,
        num_replicas=job.shape.hosts,
        entrypoint="bash",
        args=["-c", command_line(job)],
        env=terminal_size(job.command) | environment(job),
        resource=resource,
        port_map={"c10d": job.port},
        max_retries=job.retries,
        mounts=specs.parse_mounts(list(mounts)) if mounts else [],
        metadata={OURS: True},
    )
    return specs.AppDef(name=job.name or job.command, roles=[role])


@dataclass(frozen=True)
class Options:
    """What every component takes besides its command's own arguments; components.py says what each is."""

    j: str
    name: str
    h: str | None
    cpu: int
    gpu: int
    memMB: int  # torchx's own spelling
    image: str
    env: dict[str, str] | None
    mounts: list[str] | None
    max_retries: int


def describe_application(command: str, args: Sequence[str], options: Options) -> specs.AppDef:
    """The application of one component.

    Args:
        command: of `mbcnet`.
        args: its arguments.
        options: the component's other parameters.
    """
    try:
        resource = specs.resource(cpu=options.cpu, gpu=options.gpu, memMB=options.memMB, h=options.h)
        job = Job(
            command=command,
            args=tuple(args),
            shape=parse_shape(options.j),
            name=options.name.replace("/", "-").strip("-"),
            image=options.image,
            cpu=resource.cpu,
            gpu=resource.gpu,
            memory_mb=resource.memMB,
            env=dict(options.env or {}),
            retries=options.max_retries,
        )
        return application(job, resource, options.mounts or ())
    except (JobError, KeyError, ValueError) as error:
        # torchx would print a traceback under it
        print(f"mbcnet: {error.args[0]}", file=sys.stderr)
        raise SystemExit(2) from None
