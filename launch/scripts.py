"""A job for those without torchx: a torchrun line, an sbatch script, a Kubernetes Job. Pure text.

All three run the same command with the same arguments; the container and the cluster need nothing but this package.
"""

import json
import shlex
from typing import Any

import yaml

from launch.job import (
    AGENT,
    GRACE_SECONDS,
    NON_FINITE,
    PREEMPTED,
    USER_MISTAKE,
    WORKER,
    Job,
    JobError,
    environment,
    environment_folder,
    pod_security,
    rendezvous,
    shared_memory_mb,
)


def torchrun_line(job: Job) -> str:
    """One line, the same on every host. `$HEAD` is the first host's name, where there are several."""
    several = job.shape.hosts > 1
    endpoint = f'"$HEAD:{job.port}"' if several else "localhost:0"
    found = [
        part if part == endpoint else shlex.quote(part) for part in rendezvous(job, job_name(job), endpoint)
    ]
    variables = [f"{name}={shlex.quote(value)}" for name, value in environment(job).items()]
    if several:
        # else a host that joins late waits forever: see launch/elastic.py
        variables.insert(0, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1")
    words = [*variables, "torchrun", *found, "-m", WORKER, *map(shlex.quote, job.worker_args)]
    return " ".join(words)


def sbatch_script(job: Job) -> str:
    """An sbatch script: one task a host, which starts its processes.

    srun hands a signal to the job's processes, which write a checkpoint and exit with 75; then the job is requeued and
    continues. Slurm sends that signal before the time limit, at preemption and at `scontrol requeue`.
    """
    options = {
        "job-name": job_name(job),
        "nodes": f"{job.shape.min_hosts}-{job.shape.hosts}" if job.shape.elastic else str(job.shape.hosts),
        "ntasks-per-node": "1",
        "cpus-per-task": str(job.cpu),
        "mem": f"{job.memory_mb}M",
        **({"gpus-per-node": str(job.gpu)} if job.gpu else {}),
        "signal": f"TERM@{GRACE_SECONDS}",
        "open-mode": "append",
        "output": "%x-%j.out",
    }
    found = " ".join(
        part if part.startswith('"') else shlex.quote(part)
        for part in rendezvous(job, "SLURM_JOB_ID", f'"$HEAD:{job.port}"')
    ).replace("SLURM_JOB_ID", '"$SLURM_JOB_ID"')
    exports = "\n".join(f"export {name}={shlex.quote(value)}" for name, value in environment(job).items())
    head = "\n".join(f"#SBATCH --{key}={value}" for key, value in options.items())
    return f"""#!/bin/bash
{head}
#SBATCH --requeue
# Add what your cluster wants: --partition, --account, --time (well above the {GRACE_SECONDS} s of --signal)
set -u
export PATH={shlex.quote(environment_folder())}:$PATH
export HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
{exports}
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 --wait=60 \\
  python -m {AGENT} {found} \\
  -m {WORKER} {" ".join(map(shlex.quote, job.worker_args))}
code=$?
# {PREEMPTED}: stopped with a checkpoint; a second start continues from it. scancel ends the job for good.
if [ $code -eq {PREEMPTED} ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit $code
"""


def kubernetes_objects(job: Job) -> list[dict[str, Any]]:
    """A headless Service, by which pods find the first one, and an Indexed Job of one pod a host.

    Raises:
        JobError: a pod that starts again would remove what it has trained.
    """
    if "--overwrite" in job.args:
        raise JobError(
            "--overwrite: a pod that starts again would remove what it has trained; leave it out and choose a new folder with --set train.out=FOLDER"
        )
    name = job_name(job)
    labels = {"app": name}
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "labels": labels},
        # The first pod must be found before it is ready: the others' start is what makes it so
        "spec": {
            "clusterIP": "None",
            "selector": {"job-name": name},
            "publishNotReadyAddresses": True,
            "ports": [{"name": "c10d", "port": job.port}],
        },
    }
    hosts = job.shape.hosts

    def exits(*codes: int) -> dict[str, Any]:
        return {"containerName": name, "operator": "In", "values": list(codes)}

    batch_job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "completionMode": "Indexed",
            "completions": hosts,
            "parallelism": hosts,
            "backoffLimit": max(1, job.retries) * hosts,
            "podFailurePolicy": {
                "rules": [
                    {"action": "FailJob", "onExitCodes": exits(USER_MISTAKE, NON_FINITE)},  # would fail again
                    # a drained node or a stop with a checkpoint is no failure
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                    {"action": "Ignore", "onExitCodes": exits(PREEMPTED)},
                ]
            },
            "template": {"metadata": {"labels": labels}, "spec": pod(job, name)},
        },
    }
    return [service, batch_job]


def pod(job: Job, name: str) -> dict[str, Any]:
    """One host."""
    endpoint = f"{name}-0.{name}:{job.port}" if job.shape.hosts > 1 else "localhost:0"
    resources = {
        "cpu": str(job.cpu),
        "memory": f"{job.memory_mb}Mi",
        **({"nvidia.com/gpu": str(job.gpu)} if job.gpu else {}),
    }
    args = job.worker_args
    if job.command == "train" and "--resume" not in args:
        args = (*args, "--resume")  # a pod cannot tell that it is not the first
    container = {
        "name": name,
        "image": job.image,
        "command": ["python", "-m", AGENT],
        "args": [*rendezvous(job, name, endpoint), "-m", WORKER, *args],
        "env": [{"name": key, "value": value} for key, value in environment(job).items()],
        "ports": [{"name": "c10d", "containerPort": job.port}],
        "resources": {"limits": resources, "requests": resources},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [
            {"name": "shared-memory", "mountPath": "/dev/shm"},
            {"name": "storage", "mountPath": "/storage"},
        ],
        "workingDir": "/storage",
    }
    return {
        "restartPolicy": "Never",
        "subdomain": name,
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "securityContext": pod_security(),
        "containers": [container],
        "volumes": [
            {
                "name": "shared-memory",
                "emptyDir": {"medium": "Memory", "sizeLimit": f"{shared_memory_mb(job.memory_mb)}Mi"},
            },
            # Data, config and run folder, the same on every host: a ReadWriteMany claim
            {"name": "storage", "persistentVolumeClaim": {"claimName": "storage"}},
        ],
    }


def kubernetes_yaml(job: Job) -> str:
    """For `kubectl apply -f -`."""
    # through JSON: equal parts are written out, not as YAML's anchors
    return yaml.safe_dump_all(json.loads(json.dumps(kubernetes_objects(job))), sort_keys=False)


def job_name(job: Job) -> str:
    """The job's name, or its command's, in letters that every scheduler takes."""
    name = "".join(
        letter if letter.isalnum() else "-" for letter in (job.name or f"mbcnet-{job.command}").lower()
    )
    return name.strip("-")[:50] or "mbcnet"
