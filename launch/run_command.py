"""`torchx run` for a local job: its exit code is the command's, Ctrl-C ends in one line, logs are kept.

torchx's own ends with 1 whatever the job's code was, answers Ctrl-C with a traceback, writes logs to a folder that it
removes, and refuses a second `--set`. Registered in the entry point group `torchx.cli.cmds`, in which torchx looks for its sub-commands. Jobs of other
components, and jobs of other schedulers, pass through untouched.
"""

import argparse
import logging
import os
import sys
from pathlib import Path

from torchx import specs
from torchx.cli.cmd_run import CmdRun
from torchx.runner import Runner, config
from torchx.schedulers import DEFAULT_SCHEDULER_MODULES
from torchx.schedulers.local_scheduler import LocalScheduler, SignalException

from launch.agent import LOGS

LOCAL = "local_cwd"
INTERRUPTED = 130
# The image holds this package; torchx would build another one from the working directory at each start.
FROM_IMAGES = ("kubernetes", "aws_batch", "local_docker")


class _LocalChatter(logging.Filter):
    """Drops torchx's lines about local runs: where its folder is, that it waits, and a failed run's status object.

    What the workers print passes through untouched, and so do torchx's own errors.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """False for a line that tells a user of a local run nothing."""
        return not isinstance(record.msg, specs.AppStatus) and record.levelno >= logging.WARNING


def is_ours(component_and_args: list[str]) -> bool:
    """Whether the component named on the command line is one of components.py."""
    name = next((word for word in component_and_args if not word.startswith("-")), "")
    return name.startswith("mbcnet.") or name.partition(":")[0].endswith("launch/components.py")


def join_repeated(words: list[str]) -> list[str]:
    """Write `--set KEY=VALUE` as one word after `--`: torchx refuses an option that it sees twice."""
    if "--" not in words:
        return words
    first = words.index("--") + 1
    joined, rest = words[:first], iter(words[first:])
    for word in rest:
        value = next(rest, None) if word == "--set" else None
        joined.append(word if value is None else f"{word}={value}")
    return joined


def exit_code(runner: Runner, app_handle: str) -> int:
    """The code of a local job's first host that failed, 1 where none is known."""
    scheduler = runner._scheduler(LOCAL)
    assert isinstance(scheduler, LocalScheduler)
    apps = [app for app in scheduler._apps.values() if app_handle.endswith(app.id)]
    codes = [
        replica.proc.returncode
        for app in apps
        for replicas in app.role_replicas.values()
        for replica in replicas
    ]
    # a host that stopped because of another ends by a signal, or with 1
    return max((code for code in codes if code and code > 0), default=1, key=lambda code: (code < 128, code))


class Run(CmdRun):
    """`torchx run`. Every call of torchx makes one, `torchx status` too."""

    def __init__(self) -> None:
        super().__init__()
        self.ours = False
        # torchx's own registry. An entry point would hide all its other schedulers and change its default one.
        DEFAULT_SCHEDULER_MODULES.update(slurm="launch.slurm", kubernetes="launch.volcano")  # pyright: ignore

    def run(self, args: argparse.Namespace) -> None:
        """Run a component."""
        ours = is_ours(args.component_name_and_args)
        self.ours = ours and args.scheduler == LOCAL
        if ours:
            args.component_name_and_args = join_repeated(args.component_name_and_args)
            if args.scheduler in FROM_IMAGES and args.workspace == f"file://{Path.cwd()}":
                args.workspace = ""
        if not self.ours:
            super().run(args)
            return
        if "LOGLEVEL" not in os.environ:
            for handler in logging.getLogger().handlers:
                handler.addFilter(_LocalChatter())
        settings = {}
        config.apply(LOCAL, settings)  # what a .torchxconfig says
        if not settings.get("log_dir") and "log_dir=" not in (args.scheduler_args or ""):
            args.scheduler_args = ",".join(filter(None, [args.scheduler_args, f"log_dir={LOGS}"]))
        try:
            super().run(args)
        except SignalException as error:
            print(f"\nmbcnet: stopped by {error.sigval.name}; no process is left", file=sys.stderr)
            sys.exit(128 + error.sigval)

    def _wait_and_exit(self, runner: Runner, app_handle: str, log: bool) -> None:
        try:
            super()._wait_and_exit(runner, app_handle, log)
        except SystemExit:
            if self.ours:
                sys.exit(exit_code(runner, app_handle))
            raise
