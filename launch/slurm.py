"""torchx's Slurm scheduler, mended in two places.

Its status crashes on a job that a user cancelled ("CANCELLED by 0"), and on a cluster without accounting, where `sacct` has
nothing to say; there `scontrol` knows the jobs of the last minutes.
"""

import subprocess
from typing import Any

from torchx.schedulers.api import DescribeAppResponse
from torchx.schedulers.slurm_scheduler import SLURM_STATES, SlurmScheduler
from torchx.specs import AppState, ReplicaStatus, Role, RoleStatus

# JobID, JobName and State of one replica
Row = tuple[str, str, str]


def accounted(app_id: str) -> list[Row] | None:
    """Replicas as sacct lists them; None where the cluster keeps no accounts."""
    words = ["sacct", "--parsable2", "--noheader", "--format=JobID,JobName,State", "-j", app_id]
    result = subprocess.run(words, capture_output=True, text=True)
    if result.returncode:
        return None
    rows = [line.split("|") for line in result.stdout.splitlines()]
    # JOB.batch and JOB.0 are steps of a replica
    return [(row[0], row[1], row[2]) for row in rows if len(row) == 3 and "." not in row[0]]


def controlled(app_id: str) -> list[Row]:
    """Replicas as the controller knows them, until some minutes after their end."""
    result = subprocess.run(["scontrol", "show", "job", "-o", app_id], capture_output=True, text=True)
    rows = []
    for line in result.stdout.splitlines():
        pairs: dict[str, str] = dict(word.split("=", 1) for word in line.split() if "=" in word)  # pyright: ignore[reportArgumentType]
        if "JobId" in pairs:
            rows.append((pairs["JobId"], pairs.get("JobName", ""), pairs.get("JobState", "")))
    return rows


def app_state(slurm_state: str) -> AppState:
    """State in torchx's words; "CANCELLED by UID" is CANCELLED."""
    word = slurm_state.split()[0] if slurm_state.strip() else ""
    return {**SLURM_STATES, "COMPLETING": AppState.RUNNING, "CONFIGURING": AppState.PENDING}.get(
        word, AppState.UNKNOWN
    )


def describe_rows(app_id: str, rows: list[Row]) -> DescribeAppResponse | None:
    """The status of a job from its replicas, each named ROLE-INDEX; None if there are none."""
    if not rows:
        return None
    replicas: dict[str, list[ReplicaStatus]] = {}
    for _, name, state in rows:
        role, _, index = name.rpartition("-")
        if role and index.isdigit():
            status = ReplicaStatus(id=int(index), role=role, state=app_state(state), hostname="")
            replicas.setdefault(role, []).append(status)
    first = rows[0][2]  # the replica whose script speaks for the job
    return DescribeAppResponse(
        app_id=app_id,
        roles=[Role(name=name, num_replicas=len(each), image="") for name, each in replicas.items()],
        roles_statuses=[RoleStatus(name, each) for name, each in replicas.items()],
        state=app_state(first),
        msg=first,
    )


class Scheduler(SlurmScheduler):
    """Slurm, with a status that always answers."""

    def describe(self, app_id: str) -> DescribeAppResponse | None:
        """Status of a job; None if nobody knows it."""
        rows = accounted(app_id)
        return describe_rows(app_id, controlled(app_id) if rows is None else rows)


def create_scheduler(session_name: str, **_: Any) -> Scheduler:
    """What torchx calls."""
    return Scheduler(session_name=session_name)
