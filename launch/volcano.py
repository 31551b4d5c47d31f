"""torchx's Kubernetes scheduler (Volcano), with what a training pod needs besides.

Time to write a checkpoint when a node is drained, a user of its own, shared memory that cannot eat the node, and no second
start after a mistake that would come again. Jobs of other components pass through untouched.
"""

from typing import Any

from torchx.schedulers.api import AppDryRunInfo
from torchx.schedulers.kubernetes_scheduler import KubernetesJob, KubernetesOpts, KubernetesScheduler
from torchx.specs import AppDef

from launch.job import GRACE_SECONDS, NON_FINITE, OURS, POD_SECURITY, USER_MISTAKE, shared_memory_mb


class Scheduler(KubernetesScheduler):
    """Kubernetes with pods that may stop and be started again."""

    def submit_dryrun(self, app: AppDef, cfg: KubernetesOpts) -> AppDryRunInfo[KubernetesJob]:
        """Describe the job; ours are completed."""
        info = super().submit_dryrun(app, cfg)
        if all(OURS in role.metadata for role in app.roles):
            shared_memory = f"{shared_memory_mb(app.roles[0].resource.memMB)}Mi"
            never_again = [{"exitCode": code, "action": "AbortJob"} for code in (USER_MISTAKE, NON_FINITE)]
            for task in info.request.resource["spec"]["tasks"]:
                pod = task["template"].spec  # a V1Pod's, of the Kubernetes client
                pod.termination_grace_period_seconds = GRACE_SECONDS
                pod.security_context = POD_SECURITY
                for volume in pod.volumes:
                    if volume.empty_dir is not None and volume.empty_dir.medium == "Memory":
                        volume.empty_dir.size_limit = shared_memory
                if task.get("policies"):
                    task["policies"] = [*never_again, *task["policies"]]
        return info


def create_scheduler(session_name: str, **_: Any) -> Scheduler:
    """Make the scheduler that the entry point `torchx.schedulers` names."""
    return Scheduler(session_name=session_name)
