"""A job as torchx describes it. torchx runs components.py's text inside a module of its own; this one is imported as usual."""

import inspect
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Dict, List, Optional

from torchx import specs
from torchx.specs import macros

from launch.job import AGENT, OURS, PROGRAMS, Job, JobError, environment, parse_shape, shell_words


def application(
    words: Sequence[str],
    *,
    j: str = "1x2",
    name: str = "",
    h: Optional[str] = None,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    image: str = "mbcnet-rec",
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    max_retries: int = 0,
) -> specs.AppDef:
    """Describe a job as one role, named like its command, of as many replicas as hosts.

    Args:
        words: a command of `mbcnet` and its arguments
        j: hosts x processes on each host, 1x2 on a laptop, 16x8 on a cluster; 2:4x8 for 2 to 4 hosts that may come and go
        name: job name
        h: a named resource of torchx, aws_p4d.24xlarge for one, in place of cpu, gpu and memMB
        cpu: CPU cores of each host (ignored by local_cwd)
        gpu: GPUs of each host (ignored by local_cwd)
        memMB: memory of each host in MB (ignored by local_cwd)
        image: container image, for schedulers that use one
        env: further environment variables, K1=V1,K2=V2
        mounts: what to mount into the container, type=volume,src=CLAIM,dst=/runs or type=bind,src=/host,dst=/job[,readonly]
        max_retries: how often the scheduler restarts a failed job, which continues from its checkpoint
    """
    try:
        resource = specs.resource(cpu=cpu, gpu=gpu, memMB=memMB, h=h)
        mounted = specs.parse_mounts(mounts or [])
        command, *own = words
        job = Job(command, tuple(own), parse_shape(j), gpu=resource.gpu, env=env or {}, retries=max_retries)
    except (JobError, KeyError, ValueError) as error:
        # torchx would print a traceback under it
        print(f"mbcnet: {error.args[0]}", file=sys.stderr)
        raise SystemExit(2) from None
    role = specs.Role(
        name=job.command,
        image=image,
        min_replicas=job.shape.min_hosts if job.shape.elastic else None,
        num_replicas=job.shape.hosts,
        entrypoint="bash",
        args=["-c", command_line(job)],
        env=terminal_size(job.command) | environment(job),
        resource=resource,
        port_map={"c10d": job.port},
        max_retries=job.retries,
        mounts=mounted,
        metadata={OURS: True},
    )
    return specs.AppDef(name=name.replace("/", "-").strip("-") or job.command, roles=[role])


def job_component(function: Callable[..., specs.AppDef]) -> Callable[..., specs.AppDef]:
    """Give a component that takes **job the keyword parameters of `application` and their help, as torchx reads them."""
    own, shared = inspect.signature(function), inspect.signature(application)
    named = [each for each in own.parameters.values() if each.kind != each.VAR_KEYWORD]
    job = [each for each in shared.parameters.values() if each.kind == each.KEYWORD_ONLY]
    function.__signature__ = own.replace(parameters=[*named, *job])
    shared_help = (inspect.getdoc(application) or "").partition("Args:\n")[2]
    function.__doc__ = f"{inspect.getdoc(function)}\n{shared_help}"
    return function


def terminal_size(role: str) -> dict[str, str]:
    """How wide and high the user's terminal is; workers write to a pipe and cannot ask. torchx puts "train/0 " before each line."""
    if not sys.stderr.isatty():
        return {}
    size = shutil.get_terminal_size()
    return {"COLUMNS": str(max(20, size.columns - len(role) - len("/0 "))), "LINES": str(size.lines)}


def command_line(job: Job) -> str:
    """What each host runs, for bash. $$ is torchx's spelling of $."""
    # Each scheduler names the first host in a variable of its own; AWS Batch leaves it empty on that host itself.
    endpoint = f"$${{{macros.rank0_env}:=localhost}}:{job.port}" if job.shape.hosts > 1 else "localhost:0"
    words = shell_words(job, shlex.quote(macros.app_id), endpoint)
    # PATH holds .venv/bin only in an activated shell. In a container the folder does not exist and does no harm.
    return f"export PATH={shlex.quote(PROGRAMS)}:$$PATH; exec python -m {AGENT} {words}"
