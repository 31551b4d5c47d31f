"""torchx components: `torchx run -s SCHEDULER launch/components.py:train --config CONFIG -j 1x2 -- --set key=value`.

torchx executes this file's text inside one of its own modules, so nothing here may rely on `__file__` or on the names that
module has, and annotations must be real types (no `from __future__ import annotations`).
"""

import logging
import os
import shlex
import shutil
import sys
from typing import Dict, List, Optional

import torchx.specs as specs
from torchx.components import dist


class _LocalChatter(logging.Filter):
    """Drops torchx's lines about local runs: where its temporary folder is, that it waits, and a failed run's status object.

    What the workers print passes through untouched, and so do torchx's own errors and everything about remote jobs.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """False for a line that tells a user of a local run nothing."""
        if isinstance(record.msg, specs.AppStatus):
            return not (record.msg.ui_url or "").startswith("file:")
        local = record.name.endswith("local_scheduler") or str(record.msg).startswith(
            (
                "Waiting for the app to finish",
                "Tracker configurations",
                "Job finished: SUCCEEDED",
                "Job finished: FAILED",
            )
        )
        return record.levelno >= logging.WARNING or not local


def _quieten_torchx() -> None:
    """Attach the filter once, unless the user asked for a log level."""
    if "LOGLEVEL" in os.environ:
        return
    for handler in logging.getLogger().handlers:
        if not any(type(known).__name__ == "_LocalChatter" for known in handler.filters):
            handler.addFilter(_LocalChatter())


def _environment(role_name: str, extra: Optional[Dict[str, str]]) -> Dict[str, str]:
    """Variables of every worker; what the user gives wins."""
    env = {
        # The working directory stays off sys.path: a user's own data/ or launch/ there must not shadow ours.
        "PYTHONSAFEPATH": "1",
        # Of the launcher's log lines only the worker's own message matters on a terminal; LOGLEVEL=INFO shows them all.
        "LOGLEVEL": os.environ.get("LOGLEVEL", "CRITICAL"),
    }
    if sys.stderr.isatty():
        # Workers write to a pipe and cannot ask the terminal how wide it is. torchx puts "train/0 " before each line.
        size = shutil.get_terminal_size()
        env["COLUMNS"] = str(max(20, size.columns - len(role_name) - len("/0 ")))
        env["LINES"] = str(size.lines)
    return {**env, **(extra or {})}


def _job(command: str, args: List[str], env: Optional[Dict[str, str]], **options: object) -> specs.AppDef:
    """The `dist.ddp` job of torchx for one command of `mbcnet`.

    Three things differ from plain ddp: workers write straight to the terminal (ddp's tee=3 turns each carriage return of a
    progress bar into a line), our agent stands in for torchrun (same arguments, see agent.py), and this environment's
    programs come first on PATH.
    """
    _quieten_torchx()
    app = dist.ddp(command, *args, m="mbcnet_rec.cli", tee=0, env=_environment("cli", env), **options)  # pyright: ignore[reportArgumentType]
    role = app.roles[0]
    # Schedulers look programs up on PATH, which holds .venv/bin only in an activated shell. On a cluster with a shared
    # file system the folder is right too; inside a container it does not exist and does no harm. $$ is torchx's spelling of $.
    bin_folder = shlex.quote(os.path.dirname(sys.executable))
    role.args[1] = role.args[1].replace(
        "torchrun ", f"export PATH={bin_folder}:$$PATH; exec python -m launch.agent ", 1
    )
    return app


def train(
    *args: str,
    config: str,
    j: str = "1x2",
    name: str = "/",
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    h: Optional[str] = None,
    image: str = "mbcnet-rec",
    env: Optional[Dict[str, str]] = None,
    max_retries: int = 0,
) -> specs.AppDef:
    """Train a model: one process for each device, tables sharded over all of them.

    Args:
        args: further arguments of the trainer, after `--`; for example `-- --set train.max_steps=10`
        config: the run's TOML file
        j: hosts x processes on each host, for example 1x2 on a laptop, 16x8 on a cluster
        name: job name, `{experiment}/{run}`
        cpu: CPU cores for each host (ignored by local_cwd)
        gpu: GPUs for each host (ignored by local_cwd)
        memMB: memory for each host in MB (ignored by local_cwd)
        h: a named resource of torchx in place of cpu, gpu and memMB
        image: container image, for schedulers that use one
        env: further environment variables, K1=V1,K2=V2
        max_retries: how often the scheduler starts a failed job again
    """
    return _job(
        "train", ["--config", config, *args], env,
        j=j, name=name, cpu=cpu, gpu=gpu, memMB=memMB, h=h, image=image, max_retries=max_retries,
    )  # fmt: skip


def evaluate(
    *args: str,
    run: str,
    j: str = "1x2",
    name: str = "/",
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    h: Optional[str] = None,
    image: str = "mbcnet-rec",
    env: Optional[Dict[str, str]] = None,
) -> specs.AppDef:
    """Evaluate a run's checkpoint on its test split.

    Args:
        args: further arguments of the evaluation, after `--`
        run: the run folder
        j: hosts x processes on each host; it need not be what the run was trained with
        name: job name, `{experiment}/{run}`
        cpu: CPU cores for each host (ignored by local_cwd)
        gpu: GPUs for each host (ignored by local_cwd)
        memMB: memory for each host in MB (ignored by local_cwd)
        h: a named resource of torchx in place of cpu, gpu and memMB
        image: container image, for schedulers that use one
        env: further environment variables, K1=V1,K2=V2
    """
    return _job(
        "evaluate", [run, *args], env,
        j=j, name=name, cpu=cpu, gpu=gpu, memMB=memMB, h=h, image=image,
    )  # fmt: skip
