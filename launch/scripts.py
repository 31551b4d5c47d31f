"""A job for those without torchx: a torchrun line, an sbatch script, a Kubernetes Job; and one over a Ray cluster of its own. Pure text, of templates/.

All run the same command with the same arguments; the container and the cluster need nothing but this package, and Ray where it is asked for.
"""

import json
import re
import shlex
from functools import partial

import jinja2
import yaml

import launch.job
from launch.job import Job, JobError, environment, rendezvous, shell_words


def torchrun_line(job: Job) -> str:
    """One line, the same on every host. `$HEAD` is the first host's name, where there are several."""
    several = job.shape.hosts > 1
    endpoint = f'"$HEAD:{job.port}"' if several else "localhost:0"
    variables = [f"{name}={shlex.quote(value)}" for name, value in environment(job).items()]
    if several:
        # else a host that joins late waits forever: see launch/agent.py
        variables.insert(0, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1")
    return " ".join([*variables, "torchrun", shell_words(job, shlex.quote(job_name(job)), endpoint)])


def sbatch_script(job: Job) -> str:
    """An sbatch script: one task a host, which starts its processes.

    srun hands a signal to the job's processes, which write a checkpoint and exit with 75; then the job is requeued and
    continues. Slurm sends that signal before the time limit, at preemption and at `scontrol requeue`.
    """
    return _rendered("slurm.sh", job, words=shell_words(job, '"$SLURM_JOB_ID"', f'"$HEAD:{job.port}"'))


def kubernetes_yaml(job: Job) -> str:
    """For `kubectl apply -f -`; JobError if a pod that starts again would remove what it has trained."""
    if "--overwrite" in job.args:
        raise JobError(
            "--overwrite: a pod that starts again would remove what it has trained; leave it out and choose a new folder with --set train.out=FOLDER"
        )
    name, args = job_name(job), job.worker_args
    if job.command == "train" and "--resume" not in args:
        args = (*args, "--resume")  # a pod cannot tell that it is not the first
    endpoint = f"{name}-0.{name}:{job.port}" if job.shape.hosts > 1 else "localhost:0"
    return _manifest("kubernetes.yaml", job, words=[*rendezvous(job, name, endpoint), "-m", launch.job.WORKER, *args])


def ray_script(job: Job) -> str:
    """An sbatch script that starts Ray on its hosts, runs the command on the first, and ends Ray."""
    return _rendered("ray.sh", job, words=shlex.join(["mbcnet", *job.worker_args]))


def ray_job(job: Job) -> str:
    """A RayJob of the KubeRay operator, for `kubectl apply -f -`."""
    # KubeRay puts it into a shell line of its own
    words = shlex.join(["sh", "-c", f"cd /storage && exec {shlex.join(['mbcnet', *job.worker_args])}"])
    return _manifest("rayjob.yaml", job, words=words)


def _manifest(file: str, job: Job, **values: object) -> str:
    resources = {"cpu": str(job.cpu), "memory": f"{job.memory_mb}Mi"}
    if job.gpu:
        resources["nvidia.com/gpu"] = str(job.gpu)
    env = [{"name": key, "value": value} for key, value in environment(job).items()]
    text = _rendered(file, job, env=env, resources=resources, **values)
    # read and written again: plain YAML, and only what YAML can hold
    return yaml.safe_dump_all(yaml.safe_load_all(text), sort_keys=False)


def dry_run(job: Job, **values: object) -> str:
    """What would run, one fact a line; the values are those of the command."""
    return _rendered("dry_run.txt", job, **values)


def _rendered(file: str, job: Job, **values: object) -> str:
    """A template filled in; it may name all that launch/job.py has."""
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("launch"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    # JSON is what YAML can read
    templates.filters |= {"json": partial(json.dumps, ensure_ascii=False), "quoted": shlex.quote}
    return templates.get_template(file).render(vars(launch.job), job=job, name=job_name(job), **values)


def job_name(job: Job) -> str:
    """The job's name, or its command's, in letters that every scheduler takes."""
    name = re.sub(r"[\W_]", "-", (job.name or f"mbcnet-{job.command}").lower())
    return name.strip("-")[:50] or "mbcnet"
