"""torchx's Slurm scheduler, with a status that always answers and jobs that stop with a checkpoint.

torchx's own status crashes on a job that a user cancelled ("CANCELLED by 0"), and on a cluster without accounting, where `sacct` has
nothing to say; there `scontrol` knows the jobs of the last minutes. Our own jobs get all their cores, keep their log when they
are queued again, and are warned of the time limit while there is time for a checkpoint.
"""

import re
import subprocess
from typing import Any

from torchx.schedulers.api import AppDryRunInfo, DescribeAppResponse
from torchx.schedulers.slurm_scheduler import SLURM_STATES, SlurmBatchRequest, SlurmOpts, SlurmScheduler
from torchx.specs import AppDef, AppState, ReplicaStatus, Role, RoleStatus

from launch.job import GRACE_SECONDS, OURS

SHORTEST_WARNED = 6  # a job shorter than so many times the warning would be warned as it starts
Row = tuple[str, str]  # JobName, which is ROLE-INDEX, and State of one replica


def replicas_of(app_id: str) -> list[Row]:
    """Replicas as sacct lists them or, where the cluster keeps no accounts, as the controller knows them until some minutes after their end."""
    words = ["sacct", "--parsable2", "--noheader", "--format=JobID,JobName,State", "-j", app_id]
    result = subprocess.run(words, capture_output=True, text=True)
    if not result.returncode:
        # JOB.batch and JOB.0 are steps of a replica
        return re.findall(r"^[^.|]*\|([^|]*)\|([^|]*)$", result.stdout, re.MULTILINE)
    result = subprocess.run(["scontrol", "show", "job", "-o", app_id], capture_output=True, text=True)
    return re.findall(r"\bJobName=(\S*).*?\bJobState=(\S*)", result.stdout)


def app_state(slurm_state: str) -> AppState:
    """State in torchx's words; "CANCELLED by UID" is CANCELLED."""
    more = {"COMPLETING": AppState.RUNNING, "CONFIGURING": AppState.PENDING}
    return {**SLURM_STATES, **more}.get(slurm_state.partition(" ")[0], AppState.UNKNOWN)


def time_limit_minutes(text: str) -> int:
    """Minutes of `--time`: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S."""
    days, dash, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    hours = parts.pop(0) if dash or len(parts) == 3 else 0
    return int(days or 0) * 1440 + hours * 60 + (parts[0] if parts else 0)


class Scheduler(SlurmScheduler):
    """Slurm. Jobs of other components pass through untouched."""

    def submit_dryrun(self, app: AppDef, cfg: SlurmOpts) -> AppDryRunInfo[SlurmBatchRequest]:
        """Describe the job; ours are completed."""
        info = super().submit_dryrun(app, cfg)
        if all(OURS in role.metadata for role in app.roles):
            time_limit = cfg.get("time")
            warned = time_limit and 60 * time_limit_minutes(time_limit) >= SHORTEST_WARNED * GRACE_SECONDS
            for replica in info.request.replicas.values():
                # srun does not take the job's --cpus-per-task since Slurm 22.05: all workers would share one core.
                if cores := replica.sbatch_opts.get("cpus-per-task"):
                    replica.srun_opts["cpus-per-task"] = cores
                replica.srun_opts["open-mode"] = "append"
                if warned:
                    replica.sbatch_opts["signal"] = f"TERM@{GRACE_SECONDS}"
        return info

    def describe(self, app_id: str) -> DescribeAppResponse | None:
        """Status of a job from its replicas; None if nobody knows it."""
        rows = replicas_of(app_id)
        if not rows:
            return None
        replicas: dict[str, list[ReplicaStatus]] = {}
        for name, state in rows:
            role, _, index = name.rpartition("-")
            if role and index.isdigit():
                status = ReplicaStatus(id=int(index), role=role, state=app_state(state), hostname="")
                replicas.setdefault(role, []).append(status)
        first = rows[0][1]  # the replica whose state is the job's state
        return DescribeAppResponse(
            app_id=app_id,
            roles=[Role(name=name, num_replicas=len(each), image="") for name, each in replicas.items()],
            roles_statuses=[RoleStatus(name, each) for name, each in replicas.items()],
            state=app_state(first),
            msg=first,
        )


def create_scheduler(session_name: str, **_: Any) -> Scheduler:
    """Make the scheduler that the entry point `torchx.schedulers` names."""
    return Scheduler(session_name=session_name)
