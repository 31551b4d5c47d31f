"""Two agents, one rendezvous, on one machine: a host joins late, is lost, comes back; from 1 to 2 hosts nothing is lost or done twice.
A worker that was stopped still ends with its job."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_run import BIN, environment, free_ports, learned, make_run, wait_for

LINE = 5  # steps between lines of metrics.jsonl
SETTINGS = {
    "train.out": "run",
    "train.epochs": 99_999,
    "train.log_every": LINE,
    "train.checkpoint_every": 20,
    "train.keep_last": 99,
}


class Host:
    """One agent and what it says."""

    def __init__(self, folder: Path, name: str, port: int, nodes: str, **settings: object) -> None:
        self.out = folder / f"{name}.out"
        given = {**SETTINGS, **{key.replace("__", "."): value for key, value in settings.items()}}
        # most waits are as on a cluster: a lost host is missed after 15 seconds
        words = shlex.split(
            f"-m launch.agent --nnodes {nodes} --nproc-per-node 1 --max-restarts 3 --rdzv-backend c10d "
            f"--rdzv-endpoint localhost:{port} --rdzv-id elastic --rdzv-conf last_call_timeout=5 "
            f"--log-dir logs/{name} -m launch.worker train --config tiny.toml --resume"
        )
        words += [f"--set={key}={value}" for key, value in given.items()]
        env = environment(PYTHONSAFEPATH="1", LOGLEVEL="CRITICAL", TORCH_CPP_LOG_LEVEL="ERROR")
        with self.out.open("ab") as file:
            command = [str(BIN / "python"), *words]
            self.process = subprocess.Popen(command, cwd=folder, env=env, stdout=file, stderr=file)

    def said(self) -> str:
        return self.out.read_text().replace("\r", "\n")


class Hosts:
    """The hosts of one job."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.all = folder, []
        (self.port,) = free_ports(1)

    def start(self, name: str, nodes: str = "1:2", **more: object) -> Host:
        self.all.append(Host(self.folder, name, self.port, nodes, **more))
        return self.all[-1]

    def said(self) -> str:
        return "\n".join(f"=== {path.name}\n{path.read_text()}" for path in self.folder.glob("*.out"))

    def begun(self, processes: int) -> list[int]:
        """Steps from which so many processes have begun."""
        steps = re.findall(rf" {processes} processes on .*, from (?:step )?(\d+|the start)", self.said())
        return [0 if step == "the start" else int(step) for step in steps]

    def last_step(self) -> int:
        lines = (self.folder / "run/metrics.jsonl").read_text().splitlines()
        return json.loads(lines[-1])["step"] if lines else 0

    def trains_on(self, processes: int, times: int) -> None:
        """Wait until so many processes have begun so many times, and train."""
        wait_for(lambda: len(self.begun(processes)) == times, self.said)
        step = self.last_step()
        wait_for(lambda: self.last_step() > step + 2 * LINE, self.said)


pytestmark = pytest.mark.long


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    made = Hosts(make_run(tmp_path))
    yield made
    for host in made.all:
        host.process.kill()


@pytest.mark.timeout(600)  # real heartbeats: a lost host is missed after 15 seconds
def test_hosts_come_and_go(hosts: Hosts):
    folder = hosts.folder
    first = hosts.start("first")
    hosts.trains_on(1, times=1)
    second = hosts.start("second")
    hosts.trains_on(2, times=1)
    joined = hosts.begun(2)[0]
    assert f"after step {joined};" in first.said(), "both continue where the first one stopped"
    wait_for((folder / f"run/checkpoints/step_{joined // 20 * 20 + 40}/manifest.json").exists, hosts.said)
    second.process.kill()
    hosts.trains_on(1, times=2)
    lost = hosts.begun(1)[1]  # until here both hosts' steps stand
    second = hosts.start("second")
    hosts.trains_on(2, times=2)
    for host in (first, second):
        host.process.send_signal(signal.SIGTERM)
    assert [host.process.wait(60) for host in (first, second)] == [75, 75], hosts.said()
    told = [first.said().count(words) for words in ("a host has joined", "restarts left")]
    assert told == [2, 1], hosts.said()
    elastic = learned(folder / "run")
    assert [step for step, *_ in elastic] == list(range(LINE, elastic[-1][0] + 1, LINE)), "each step once"

    # from 1 to 2 hosts exactly: two hosts that never knew another life continue from the same checkpoint, to the same bits
    (folder / "run").rename(folder / "elastic")
    checkpoint = f"checkpoints/step_{joined}"
    shutil.copytree(folder / "elastic" / checkpoint, folder / "run" / checkpoint)
    for name in ("config.toml", "metrics.jsonl"):
        shutil.copy(folder / "elastic" / name, folder / "run")
    (hosts.port,) = free_ports(1)
    calm = [hosts.start(name, "2", train__max_steps=lost) for name in ("calm", "calmer")]
    assert [host.process.wait(60) for host in calm] == [0, 0], hosts.said()
    again = [line for line in learned(folder / "run") if line[1] == "train"]
    assert again == elastic[: len(again)] and again[-1][0] > joined


def test_a_worker_that_somebody_stopped_does_not_hold_the_job(hosts: Hosts):
    host = hosts.start("alone", "1")
    hosts.trains_on(1, times=1)
    children = Path(f"/proc/{host.process.pid}/task/{host.process.pid}/children").read_text().split()
    (worker,) = [int(pid) for pid in children if "launch.worker" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(worker, signal.SIGSTOP)
    host.process.send_signal(signal.SIGTERM)
    assert host.process.wait(30) == 75, hosts.said()
    assert "its checkpoint is written" in host.said()
