"""A job for those without torchx: a torchrun line, an sbatch script, a Kubernetes Job. Pure text.

All three run the same command with the same arguments; the container and the cluster need nothing but this package.
"""

import json
import re
import shlex
from string import Template

import yaml

from launch.job import (
    AGENT,
    GRACE_SECONDS,
    NON_FINITE,
    POD_SECURITY,
    PREEMPTED,
    PROGRAMS,
    USER_MISTAKE,
    WORKER,
    Job,
    JobError,
    environment,
    rendezvous,
    shared_memory_mb,
    shell_words,
)

# A headless Service, by which pods find the first one, and an Indexed Job of one pod a host. Values are JSON, which YAML can read.
KUBERNETES = """
apiVersion: v1
kind: Service
metadata: {name: $name, labels: {app: $name}}
spec:
  clusterIP: "None"
  selector: {job-name: $name}
  # The first pod must be found before it is ready: the others' start is what makes it so
  publishNotReadyAddresses: true
  ports: [{name: c10d, port: $port}]
---
apiVersion: batch/v1
kind: Job
metadata: {name: $name, labels: {app: $name}}
spec:
  completionMode: Indexed
  completions: $hosts
  parallelism: $hosts
  backoffLimit: $restarts
  podFailurePolicy:
    rules:
    # would fail again
    - {action: FailJob, onExitCodes: {containerName: $name, operator: In, values: $final}}
    # a drained node or a stop with a checkpoint is no failure
    - {action: Ignore, onPodConditions: [{type: DisruptionTarget, status: "True"}]}
    - {action: Ignore, onExitCodes: {containerName: $name, operator: In, values: [$preempted]}}
  template:
    metadata: {labels: {app: $name}}
    spec:
      restartPolicy: Never
      subdomain: $name
      terminationGracePeriodSeconds: $grace
      securityContext: $security
      containers:
      - name: $name
        image: $image
        command: [python, -m, $agent]
        args: $args
        env: $env
        ports: [{name: c10d, containerPort: $port}]
        resources: {limits: $resources, requests: $resources}
        securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
        volumeMounts:
        - {name: shared-memory, mountPath: /dev/shm}
        - {name: storage, mountPath: /storage}
        workingDir: /storage
      volumes:
      - {name: shared-memory, emptyDir: {medium: Memory, sizeLimit: $shared_memory}}
      # Data, config and run folder, the same on every host: a ReadWriteMany claim
      - {name: storage, persistentVolumeClaim: {claimName: storage}}
"""


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
    gpus = f"#SBATCH --gpus-per-node={job.gpu}\n" if job.gpu else ""
    found = " ".join(rendezvous(job, '"$SLURM_JOB_ID"', f'"$HEAD:{job.port}"'))
    exports = "\n".join(f"export {name}={shlex.quote(value)}" for name, value in environment(job).items())
    return f"""#!/bin/bash
#SBATCH --job-name={job_name(job)}
#SBATCH --nodes={job.shape.nodes.replace(":", "-")}
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task={job.cpu}
#SBATCH --mem={job.memory_mb}M
{gpus}#SBATCH --signal=TERM@{GRACE_SECONDS}
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
#SBATCH --requeue
# Add what your cluster wants: --partition, --account, --time (well above the {GRACE_SECONDS} s of --signal)
set -u
export PATH={shlex.quote(PROGRAMS)}:$PATH
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


def kubernetes_yaml(job: Job) -> str:
    """For `kubectl apply -f -`.

    Raises:
        JobError: a pod that starts again would remove what it has trained.
    """
    if "--overwrite" in job.args:
        raise JobError(
            "--overwrite: a pod that starts again would remove what it has trained; leave it out and choose a new folder with --set train.out=FOLDER"
        )
    name, args = job_name(job), job.worker_args
    if job.command == "train" and "--resume" not in args:
        args = (*args, "--resume")  # a pod cannot tell that it is not the first
    endpoint = f"{name}-0.{name}:{job.port}" if job.shape.hosts > 1 else "localhost:0"
    resources = {"cpu": str(job.cpu), "memory": f"{job.memory_mb}Mi"}
    if job.gpu:
        resources["nvidia.com/gpu"] = str(job.gpu)
    values = {
        "name": name,
        "port": job.port,
        "hosts": job.shape.hosts,
        "restarts": max(1, job.retries) * job.shape.hosts,
        "final": [USER_MISTAKE, NON_FINITE],
        "preempted": PREEMPTED,
        "grace": GRACE_SECONDS,
        "security": POD_SECURITY,
        "image": job.image,
        "agent": AGENT,
        "args": [*rendezvous(job, name, endpoint), "-m", WORKER, *args],
        "env": [{"name": key, "value": value} for key, value in environment(job).items()],
        "resources": resources,
        "shared_memory": f"{shared_memory_mb(job.memory_mb)}Mi",
    }
    written = {key: json.dumps(value, ensure_ascii=False) for key, value in values.items()}
    # read and written again: plain YAML, and only what YAML can hold
    objects = yaml.safe_load_all(Template(KUBERNETES).substitute(written))
    return yaml.safe_dump_all(objects, sort_keys=False)


def job_name(job: Job) -> str:
    """The job's name, or its command's, in letters that every scheduler takes."""
    name = re.sub(r"[\W_]", "-", (job.name or f"mbcnet-{job.command}").lower())
    return name.strip("-")[:50] or "mbcnet"
