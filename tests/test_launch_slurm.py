"""A real Slurm (munge, accounts, controller, two nodes) runs our jobs: submit, status, log, cancel, requeue.

Skips where slurm-wlm, slurmdbd and MariaDB are not installed or the tests do not run as root.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny_run import environment, make_run, program

NEEDED = ("munged", "slurmctld", "slurmd", "slurmdbd", "sbatch", "sacctmgr", "mariadbd", "mariadb-install-db")
MISSING = [name for name in NEEDED if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")]
pytestmark = [
    pytest.mark.skipif(
        bool(MISSING),
        reason=f"a real Slurm needs slurm-wlm, munge, slurmdbd and mariadb-server; missing: {', '.join(MISSING)}",
    ),
    pytest.mark.skipif(os.geteuid() != 0, reason="slurmd starts jobs as root only"),
]


def wait_for(what: Callable[[], object], message: Callable[[], str] | str, seconds: float = 90) -> None:
    """Wait, generously: other work may hold the cores."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, message if isinstance(message, str) else message()
        time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    """Consecutive ports that nobody listens on: slurm.conf wants a range for several nodes."""
    for first in range(17800, 19000, count):
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return list(range(first, first + count))
    raise AssertionError("no free ports")


class Cluster:
    """One controller, two nodes with a name each, all on this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, folder / "run"
        self.control, self.accounts, self.database, first, second = free_ports(5)
        self.nodes = f"[{first}-{second}]"
        self.pids: list[Path] = []
        self.env = environment(SLURM_CONF=str(folder / "slurm.conf"))
        self.env["PATH"] += ":/usr/sbin"

    def call(self, *words: str, timeout: float = 20) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            words, cwd=self.run, env=self.env, capture_output=True, text=True, timeout=timeout
        )

    def start(self) -> None:
        for name in ("state", "spool", "db", "log", "munge", "run"):
            (self.folder / name).mkdir()
        self.munge()
        self.configure()
        self.keep_accounts()
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
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        self.folder.chmod(0o755)
        files = {
            "key-file": key,
            "socket": self.socket,
            "pid-file": self.folder / "munged.pid",
            "seed-file": self.folder / "seed",
            "log-file": self.folder / "log/munged.log",
        }
        self.daemon("munged", "munged.pid", "--force", *(f"--{name}={path}" for name, path in files.items()))

    @property
    def socket(self) -> Path:
        return self.folder / "munge" / "socket"

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
AuthInfo=socket={self.socket},cred_expire=2
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
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={self.accounts}
AccountingStoragePass={self.socket}
NodeName={",".join(self.names)} NodeHostname={here} NodeAddr=127.0.0.1 Port={self.nodes} CPUs={os.cpu_count()} RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
""")

    def keep_accounts(self) -> None:
        """MariaDB and slurmdbd: without them sacct, and so torchx's status, has nothing to say."""
        folder, here = self.folder, self.names[0]
        data = ("--no-defaults", f"--datadir={folder}/db", "--user=root")
        assert (
            self.call(
                "mariadb-install-db", *data, "--auth-root-authentication-method=normal", "--skip-test-db"
            ).returncode
            == 0
        )
        server = subprocess.Popen(
            ["mariadbd", *data, f"--socket={folder}/db.sock", f"--port={self.database}", "--bind-address=127.0.0.1", f"--pid-file={folder}/db.pid"],
            env=self.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.server = server
        grants = "".join(
            f"create user slurm@'{host}' identified by 'slurm'; grant all on accounts.* to slurm@'{host}';"
            for host in ("127.0.0.1", "localhost")
        )
        client = (
            "mariadb",
            "--no-defaults",
            "-S",
            f"{folder}/db.sock",
            "-u",
            "root",
            "-e",
            f"create database accounts; {grants}",
        )
        wait_for(lambda: self.call(*client).returncode == 0, "MariaDB does not answer")
        conf = folder / "slurmdbd.conf"
        conf.write_text(f"""
AuthType=auth/munge
AuthInfo=socket={self.socket}
DbdHost={here}
DbdAddr=127.0.0.1
DbdPort={self.accounts}
SlurmUser=root
LogFile={folder}/log/slurmdbd.log
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={self.database}
StorageUser=slurm
StoragePass=slurm
StorageLoc=accounts
""")
        conf.chmod(0o600)
        self.daemon("slurmdbd", "slurmdbd.pid")
        add = ("sacctmgr", "--immediate", "add", "cluster", "test")
        wait_for(lambda: self.call(*add).returncode == 0, "slurmdbd does not answer")

    def stop(self) -> None:
        self.call("scancel", "--user=root")
        for path in reversed(self.pids):
            with contextlib.suppress(OSError, ValueError):
                os.kill(int(path.read_text()), signal.SIGKILL)
        if hasattr(self, "server"):
            self.server.kill()
            self.server.wait()

    # What a user does

    def submit(self, *args: str, shape: str = "1x2") -> str:
        """Submit a training job through torchx; return torchx's handle."""
        given = (
            "-s",
            "slurm",
            "-cfg",
            "partition=main",
            "mbcnet.train",
            "--config",
            "tiny.toml",
            "-j",
            shape,
        )
        done = program(
            "torchx",
            "run",
            *given,
            "--cpu",
            "1",
            "--memMB",
            "1000",
            "--",
            *args,
            cwd=self.run,
            SLURM_CONF=self.env["SLURM_CONF"],
        )
        assert done.returncode == 0, done.stderr
        return next(line for line in done.stdout.splitlines() if line.startswith("slurm://"))

    def torchx(self, *args: str) -> str:
        done = program("torchx", *args, cwd=self.run, SLURM_CONF=self.env["SLURM_CONF"])
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    def state(self, handle: str) -> str:
        words = (
            "sacct",
            "--parsable2",
            "--noheader",
            "--allocations",
            "--format=State",
            "-j",
            job_id(handle),
        )
        return (self.call(*words).stdout.splitlines() or [""])[0]

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
        found = [path for path in (self.run / run / "checkpoints").glob("step_*") if path.name[5:].isdigit()]
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


def learned(run: Path) -> list[tuple]:
    """What a run has learned, step by step: everything but times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        (line["step"], line["split"], line.get("loss"), line.get("auc"), line.get("log_loss"))
        for line in lines
    ]


def test_two_ranks_train_and_torchx_answers(cluster: Cluster):
    handle = cluster.submit("--set", "train.out=runs/whole", *RUN)
    cluster.finish(handle, "COMPLETED")
    status = cluster.torchx("status", handle)
    assert "SUCCEEDED" in status and "train[0]" in status
    assert "100%" in cluster.torchx("log", f"{handle}/train")
    assert "2 processes on cpu" in cluster.said(handle) and "run folder: runs/whole" in cluster.said(handle)


def test_a_requeued_job_ends_as_if_never_stopped(cluster: Cluster):
    handle = cluster.submit("--set", "train.out=runs/requeued", *RUN)
    wait_for(lambda: cluster.steps("runs/requeued"), lambda: f"no checkpoint: {cluster.said(handle)}")
    assert cluster.call("scontrol", "requeue", job_id(handle)).returncode == 0
    wait_for(
        lambda: "Restarts=1" in cluster.call("scontrol", "show", "job", job_id(handle)).stdout,
        "not requeued",
    )
    wait_for(lambda: cluster.started_again(handle), "not started again")
    cluster.finish(handle, "COMPLETED")
    log = cluster.said(handle)
    assert ", from step " in log, log
    assert learned(cluster.run / "runs/requeued") == learned(cluster.run / "runs/whole")


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
