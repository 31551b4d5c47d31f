"""`torchx run` for a local job: its exit code is the command's, Ctrl-C ends in one line, logs are kept.

torchx's own ends with 1 whatever the job's code was, answers Ctrl-C with a traceback, writes logs to a folder that it
removes, and refuses a second `--set`. Registered in the entry point group `torchx.cli.cmds`, in which torchx looks for its sub-commands.
"""

import argparse
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path

from torchx import specs
from torchx.cli.cmd_run import CmdRun
from torchx.runner import config
from torchx.schedulers import DEFAULT_SCHEDULER_MODULES
from torchx.schedulers.local_scheduler import SignalException

from launch.job import EXIT_CODES, LOGS, USER_MISTAKE

LOCAL = "local_cwd"
# The image holds this package; torchx would build another one from the working directory at each start.
PROGRAMS_OF = {"slurm": "sbatch", "lsf": "bsub"}
PRINTED = {"slurm": "slurm", "kubernetes": "k8s"}
FROM_IMAGES = ("kubernetes", "aws_batch", "local_docker")


def is_news(record: logging.LogRecord) -> bool:
    """False for torchx's lines on a local run: its folder, that it waits, a failed run's status; workers' prints and errors pass through."""
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


def exit_code(folder: Path) -> int:
    """The code of a local job's first host that failed, 1 where none is known."""
    codes = [int(path.read_text(encoding="utf-8")) for path in folder.iterdir()]
    # a host that stopped because of another ends by a signal, or with 1
    return max((code for code in codes if code > 0), default=1, key=lambda code: (code < 128, code))


def refusal(scheduler: str, why: str) -> int:
    """Say why a job cannot be handed to a scheduler, and return the exit code of a user's mistake."""
    print(
        f"mbcnet: -s {scheduler}: the job was not handed over ({why}); start it from a machine where that scheduler is set up, run here by "
        f"-s local_cwd, or print it by `mbcnet launch --print {PRINTED.get(scheduler, 'torchrun')}` and take it there",
        file=sys.stderr,
    )
    return USER_MISTAKE


class Run(CmdRun):
    """`torchx run`. Jobs of other components, and jobs of other schedulers, pass through untouched."""

    def add_arguments(self, subparser: argparse.ArgumentParser) -> None:
        """Add torchx's own; its default scheduler stays, which would be the first of the registered names."""
        super().add_arguments(subparser)
        subparser.set_defaults(scheduler=next(iter(DEFAULT_SCHEDULER_MODULES)))

    def run(self, args: argparse.Namespace) -> None:
        """Run a component."""
        ours = is_ours(args.component_name_and_args)
        if ours:
            args.component_name_and_args = join_repeated(args.component_name_and_args)
            if args.scheduler in FROM_IMAGES and args.workspace == f"file://{Path.cwd()}":
                args.workspace = ""
        if not ours:
            super().run(args)
        elif args.scheduler == LOCAL:
            self._run_locally(args)
        else:
            self._submit(args)

    def _submit(self, args: argparse.Namespace) -> None:
        """Hand a job to a scheduler. What its client or its absence raises, of many types, is one line: no user can read its frames."""
        program = PROGRAMS_OF.get(args.scheduler, "")
        if program and not args.dryrun and shutil.which(program) is None:
            sys.exit(refusal(args.scheduler, f"{program} is not on the PATH of this machine"))
        try:
            super().run(args)
        except SystemExit as end:
            # torchx ends with 1 after it has said which option of the scheduler is wrong or missing
            sys.exit(USER_MISTAKE if end.code == 1 and not args.wait else end.code)
        except Exception as error:
            if "LOGLEVEL" in os.environ:
                raise
            sys.exit(refusal(args.scheduler, " ".join(str(error).split())[:300] or type(error).__name__))

    def _run_locally(self, args: argparse.Namespace) -> None:
        settings = {}
        config.apply(LOCAL, settings)  # what a .torchxconfig says
        if not settings.get("log_dir") and "log_dir=" not in (args.scheduler_args or ""):
            args.scheduler_args = ",".join(filter(None, [args.scheduler_args, f"log_dir={LOGS}"]))
        handlers = [] if "LOGLEVEL" in os.environ else list(logging.getLogger().handlers)
        with tempfile.TemporaryDirectory(prefix="launch_") as folder:
            os.environ[EXIT_CODES] = folder
            for handler in handlers:
                handler.addFilter(is_news)
            try:
                super().run(args)
            except SignalException as error:
                print(f"\nmbcnet: stopped by {error.sigval.name}; no process is left", file=sys.stderr)
                sys.exit(128 + error.sigval)
            except SystemExit as end:
                # torchx ends with 1 for a job that failed, and for one that never started
                sys.exit(exit_code(Path(folder)) if end.code == 1 else end.code)
            finally:
                del os.environ[EXIT_CODES]
                for handler in handlers:
                    handler.removeFilter(is_news)
