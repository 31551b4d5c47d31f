"""`mbcnet`: parses arguments, runs one command and turns a user's mistakes into one line."""

import argparse
import errno
import importlib
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from data.errors import InputError
from mbcnet_rec.runtime.exits import RunStoppedError

PATH_FAULTS = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ELOOP, errno.EROFS)
SILENT_RANK_SECONDS = 3.0
OURS = ("data", "sharding", "mbcnet_rec")
# Each is a module of mbcnet_rec/commands, imported when it is chosen.
COMMANDS = {
    "doctor": "check the installation",
    "data": "write, prepare and check data",
    "schema": "infer, fit or show a schema",
    "plan": "place a schema's tables on a cluster, and review the plan",
    "launch": "start a training job on this machine or a cluster",
    "train": "train a model from a config",
    "evaluate": "score a run's best checkpoint on its test rows or any others",
    "predict": "score Parquet files",
    "export": "write a run as an artifact to serve",
    "bench": "measure an artifact's latency",
    "study": "train a table or figure of the paper on your data",
    "report": "write a run's report.html again",
    "tune": "search ranges of a config by Optuna",
}


class _Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message: str) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Say what is wrong and where help is."""
        raise InputError(f"{message}; see `{self.prog} --help`")


class _Command(_Parser):
    """The parser of one command, whose module adds its arguments when the command is chosen."""

    module = ""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Import the module first."""
        if self.module:
            command, self.module = importlib.import_module(f"mbcnet_rec.commands.{self.module}"), ""
            self.description = command.__doc__
            command.register(self)
        return super().parse_known_args(args, namespace)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of every command."""
    parser = _Parser(prog="mbcnet", description="Train, plan and serve MBCnet, a click-through-rate model.")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Command)
    for name, help_text in COMMANDS.items():
        subparsers.add_parser(name, help=help_text).module = name
    return parser


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a warning of ours as one line, on rank 0 alone; anyone else's as Python does."""
    if category.__module__.partition(".")[0] not in OURS:
        _PYTHONS_SHOW_WARNING(message, category, filename, lineno, file, line)
    elif os.environ.get("RANK", "0") == "0":
        _tell(f"warning: {message}")


_PYTHONS_SHOW_WARNING = warnings.showwarning


def _tell(line: str) -> None:
    """Print a line on stderr, if it is open."""
    with suppress(OSError):
        print(f"mbcnet: {line}", file=sys.stderr, flush=True)


def _close_output() -> None:
    """Flush stdout. What a full disk or a closed pipe does not take is dropped: Python would end with a code of its own."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(argv: Sequence[str] | None = None) -> int:
    """Run one command and leave its errors to the caller: main, or launch/worker.py, which prints them once for a whole job.

    Raises:
        InputError: the user can fix it.
        RunStoppedError: a run ends before its last step.
    """
    # torch itself would print pages of C++ frames for a lost rank
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    args = build_parser().parse_args(argv)
    with plain_words():
        return int(args.run(args) or 0)


@contextmanager
def plain_words() -> Iterator[None]:
    """Print our own warnings as one line each, and report a path that cannot be used as the user's mistake, while a command runs."""
    with warnings.catch_warnings():  # restores the hook
        warnings.showwarning = show_warning
        try:
            yield
        except OSError as error:
            if error.errno not in PATH_FAULTS or not isinstance(error.filename, str | Path):
                raise
            shown = str(error.filename)[:200]
            raise InputError(f"{shown}: {error.strerror}; fix it, or give another path") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; see `exit_code`."""
    return exit_code(lambda: run(argv))


def exit_code(command: Callable[[], int]) -> int:
    """Run a command and print what ends it early as one line.

    Returns:
        The exit code: 0, or 2 for a user's mistake, 130 after Ctrl-C; see runtime/exits.py for the others.
    """
    try:
        return command()
    except InputError as error:
        # Every rank meets a mistake in config or schema; one of them says it. A note names the rank whose rows are faulty.
        notes = getattr(error, "__notes__", [])
        if os.environ.get("RANK", "0") == "0" or notes:
            whose = f"{notes[0]}: " if notes and os.environ.get("WORLD_SIZE", "1") != "1" else ""
            _tell(f"{whose}{error}")
        else:
            # A launcher ends all ranks with the first: let that be the one that tells.
            time.sleep(SILENT_RANK_SECONDS)
        return 2
    except RunStoppedError as error:
        if error.reported:
            _tell(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        _tell("stopped")
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has read enough
        return 0
    finally:
        _close_output()


if __name__ == "__main__":
    sys.exit(main())
