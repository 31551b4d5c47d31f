"""A real Slurm (munge, controller, two nodes; no accounting) runs our jobs: submit, status, log, cancel, requeue.

Skips where slurm-wlm is not installed or the tests do not run as root.
"""

import contextlib
import importlib.util
import os
import shlex
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_run import environment, free_ports, learned, make_run, program, wait_for

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "sinfo")
MISSING = [name for name in NEEDED if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")]
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(bool(MISSING), reason=f"needs Debian's slurm-wlm; missing: {', '.join(MISSING)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="slurmd starts jobs as root only"),
]


class Cluster:
    """One controller, two nodes with a name each, all on this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, folder / "run"
        self.control, first, second = free_ports(3)
        self.nodes = f"[{first}-{second}]"
        self.pids: list[Path] = []
        self.env = environment(SLURM_CONF=str(folder / "slurm.conf"))
        self.env["PATH"] += ":/usr/sbin"

    def call(self, *words: str) -> subprocess.CompletedProcess[str]:
        given = {"cwd": self.run, "env": self.env, "timeout": 20}
        return subprocess.run(words, capture_output=True, text=True, **given)

    def start(self) -> None:
        for name in ("state", "spool", "log", "munge", "run"):
            (self.folder / name).mkdir()
        self.munge()
        self.configure()
        self.daemon("slurmctld", "slurmctld.pid")
        for node in self.names:
            self.daemon("slurmd", f"slurmd-{node}.pid", "-N", node)
        idle = ("sinfo", "--noheader", "--states=idle", "--Node")
        wait_for(lambda: len(self.call(*idle).stdout.splitlines()) == 2, "no two idle nodes")

    def daemon(self, name: str, pid: str, *words: str) -> None:
        self.pids.append(self.folder / pid)
        done = self.call(name, *words)
        assert done.returncode == 0, done.stderr

    def munge(self) -> None:
        key, folder = self.folder / "munge.key", self.folder
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        folder.chmod(0o755)
        files = [f"--{name}-file={folder}/munged.{name}" for name in ("pid", "seed", "log")]
        self.daemon("munged", "munged.pid", "--force", f"--key-file={key}", f"--socket={folder}/munge/socket", *files)

    @property
    def names(self) -> tuple[str, str]:
        """Names of the nodes; each must lead here, since the rendezvous looks the first one up."""
        return socket.gethostname().partition(".")[0], "localhost"

    def configure(self) -> None:
        here, folder = self.names[0], self.folder
        (folder / "slurm.conf").write_text(f"""
ClusterName=test
SlurmctldHost={here}(127.0.0.1)
SlurmctldPort={self.control}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
KillWait=30
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
JobAcctGatherType=jobacct_gather/none
NodeName={",".join(self.names)} NodeHostname={here} NodeAddr=127.0.0.1 Port={self.nodes} CPUs={os.cpu_count()} RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
""")

    def stop(self) -> None:
        """End the daemons and, where a test failed half-way, the jobs that they have started: those are no children of ours."""
        self.call("scancel", "--user=root")
        for path in reversed(self.pids):
            with contextlib.suppress(OSError, ValueError):
                os.kill(int(path.read_text()), signal.SIGKILL)
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (process / "environ").read_bytes() + (process / "cmdline").read_bytes()
                if str(self.folder).encode() in words and int(process.name) != os.getpid():
                    os.kill(int(process.name), signal.SIGKILL)

    # What a user does

    def submit(self, *args: str, shape: str = "1x2") -> str:
        """Submit a training job through torchx; return torchx's handle."""
        words = shlex.split("run -s slurm -cfg partition=main mbcnet.train --config tiny.toml")
        words += ["--cpu", "1", "--memMB", "1000"]
        said = self.torchx(*words, "-j", shape, "--", *args)
        return next(line for line in said.splitlines() if line.startswith("slurm://"))

    def torchx(self, *args: str) -> str:
        done = program("torchx", *args, cwd=self.run, SLURM_CONF=self.env["SLURM_CONF"])
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    def state(self, handle: str) -> str:
        said = self.call("scontrol", "show", "job", "--oneliner", job_id(handle)).stdout
        return said.partition("JobState=")[2].partition(" ")[0]

    def finish(self, handle: str, state: str) -> None:
        wait_for(
            lambda: self.state(handle).startswith(state),
            lambda: f"{handle}: {self.state(handle)}, wanted {state}: {self.said(handle)}",
        )

    def started_again(self, handle: str) -> bool:
        """Whether a requeued job runs or has run; Slurm would let it wait for two minutes."""
        if self.state(handle) in ("RUNNING", "COMPLETED"):
            return True
        self.call("scontrol", "update", f"JobId={job_id(handle)}", "StartTime=now")
        time.sleep(1)
        return False

    def said(self, handle: str) -> str:
        return "".join(path.read_text() for path in self.run.glob(f"slurm-{job_id(handle)}-*"))

    def steps(self, run: str) -> list[int]:
        """Steps of a run's whole checkpoints."""
        found = [path.parent for path in (self.run / run / "checkpoints").glob("step_*/manifest.json")]
        return sorted(int(path.name[5:]) for path in found)


def job_id(handle: str) -> str:
    return handle.rpartition("/")[2]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        made.start()
        make_run(made.run)
        yield made
    finally:
        made.stop()


RUN = ("--set", "train.epochs=99", "--set", "train.checkpoint_every=5", "--set", "train.max_steps=150")


@pytest.fixture(scope="module")
def whole(cluster: Cluster) -> Path:
    """A run that nobody disturbed, by the printed script and sbatch alone."""
    words = shlex.split("launch --config tiny.toml -j 1x2 --cpu 1 --memory-mb 1000 --print slurm")
    script = program("mbcnet", *words, "--set", "train.out=runs/whole", *RUN, cwd=cluster.run)
    assert script.returncode == 0, script.stderr
    (cluster.run / "job.sh").write_text(script.stdout)
    sent = cluster.call("sbatch", "--parsable", "--partition=main", "job.sh")
    assert sent.returncode == 0, sent.stderr
    job = sent.stdout.strip()
    cluster.finish(job, "COMPLETED")
    said = (cluster.run / f"tiny-{job}.out").read_text()
    assert "2 processes on cpu" in said and "run folder: runs/whole" in said, said
    return cluster.run / "runs/whole"


def test_a_requeued_job_ends_as_if_never_stopped(cluster: Cluster, whole: Path):
    handle = cluster.submit("--set", "train.out=runs/requeued", *RUN)
    wait_for(lambda: cluster.steps("runs/requeued"), lambda: f"no checkpoint: {cluster.said(handle)}")
    assert "RUNNING" in cluster.torchx("status", handle)
    assert cluster.call("scontrol", "requeue", job_id(handle)).returncode == 0
    show = ("scontrol", "show", "job", job_id(handle))
    wait_for(lambda: "Restarts=1" in cluster.call(*show).stdout, "not requeued")
    wait_for(lambda: cluster.started_again(handle), "not started again")
    cluster.finish(handle, "COMPLETED")
    said = cluster.said(handle)
    assert ", from the start" in said and ", from step " in said, f"both starts are in one log: {said}"
    again, calm = learned(cluster.run / "runs/requeued"), learned(whole)
    assert [line[:2] for line in again] == [line[:2] for line in calm]
    different = [line[1] for line, other in zip(again, calm, strict=True) if line != other]
    # the first train line after the restart covers the steps since
    assert different in ([], ["train"])
    status = cluster.torchx("status", handle)
    assert "SUCCEEDED" in status and "train[0]" in status
    assert "100%" in cluster.torchx("log", f"{handle}/train")


def test_a_cancelled_job_of_two_nodes_leaves_its_last_step(cluster: Cluster):
    endless = ("--set", "train.epochs=99999", "--set", "train.checkpoint_every=5")
    handle = cluster.submit("--set", "train.out=runs/stopped", *endless, shape="2x1")
    wait_for(lambda: cluster.steps("runs/stopped"), lambda: f"no checkpoint: {cluster.said(handle)}")
    cluster.call("scancel", job_id(handle))
    cluster.finish(handle, "CANCELLED")
    wait_for(lambda: "checkpoint is written" in cluster.said(handle), lambda: cluster.said(handle))
    step = int(cluster.said(handle).partition("after step ")[2].partition(";")[0])
    assert cluster.steps("runs/stopped")[-1] == step
    status = cluster.torchx("status", handle)
    assert "CANCELLED" in status and "train[1]" in status


def test_a_printed_job_over_ray_counts_on_two_nodes(cluster: Cluster):
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    paths = ["rows/schema.toml", "rows/train.parquet"]
    words = ["launch", "ray-up", "--print", "slurm", "--cpu", "1", "--memory-mb", "2000", "--"]
    script = program("mbcnet", *words, "schema", "fit", *paths, "-o", "fitted", cwd=cluster.run)
    assert script.returncode == 0, script.stderr
    (cluster.run / "ray.sh").write_text(script.stdout)
    sent = cluster.call("sbatch", "--parsable", "--partition=main", "ray.sh")
    assert sent.returncode == 0, sent.stderr
    job = sent.stdout.strip()
    said = cluster.run / f"mbcnet-schema-{job}.out"
    try:
        wait_for(lambda: cluster.state(job) == "COMPLETED", lambda: said.read_text(), seconds=240)
    finally:
        cluster.call("scancel", job)
    here = program("mbcnet", "schema", "fit", *paths, "-o", "here", cwd=cluster.run)
    assert here.returncode == 0, here.stderr
    found, wanted = (
        {path.name: path.read_bytes() for path in (cluster.run / name).iterdir()} for name in ("fitted", "here")
    )
    assert found == wanted, said.read_text()
