"""`mbcnet`: parses arguments, runs one command and turns a user's mistakes into one line."""

import argparse
import errno
import importlib
import io
import logging
import math
import os
import shlex
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from data.errors import InputError
from data.whole_folder import home_path
from launch.interrupt import end_with, heed_interrupts, heed_termination
from mbcnet_rec.commands.arguments import DECLARED, add_command, refuse_repeats
from mbcnet_rec.doctor import library_fault
from mbcnet_rec.runtime.exits import CannotWriteError, RunStoppedError, no_room
from mbcnet_rec.runtime.ranks import is_first_rank

PATH_FAULTS = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EROFS)
SILENT_RANK_SECONDS = 3.0
OURS = ("data", "sharding", "mbcnet_rec")


class _Given(argparse.Action):
    """Stores a value in [at_least, below); lists add up where they are given again, anything else given twice or empty is refused."""

    def __init__(self, *, at_least: float = -math.inf, below: float = math.inf, **words: Any) -> None:
        super().__init__(**words)
        self.at_least, self.below = at_least, below

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        several = isinstance(values, list | tuple)
        shown = option_string or str(self.metavar or self.dest)
        if values == "" or (several and "" in values):
            parser.error(f"{shown} is empty: give it a value, or leave it out")
        if self._is_outside(values):
            end = f", and less than {self.below:,}" if self.below < math.inf else ""
            parser.error(f"{shown} {values}: wanted {self.at_least} or more{end}")
        if option_string and self.dest in parser.given:
            if not several:
                parser.error(f"{shown} is given twice ({getattr(namespace, self.dest)} and {values}): leave one out")
            values = [*getattr(namespace, self.dest), *values]
        parser.given.add(self.dest)
        values = [at_home(each, shown) for each in values] if several else at_home(values, shown)
        setattr(namespace, self.dest, values)

    def _is_outside(self, value: object) -> bool:
        return isinstance(value, int | float) and not self.at_least <= value < self.below


def at_home(value: Any, shown: str) -> Any:
    """A value as it is, or where it begins with `~` a path from the home folder, of the same type: no name of ours begins so."""
    return type(value)(home_path(str(value), shown)) if str(value).startswith("~") else value


class _Parser(argparse.ArgumentParser):
    """argparse with errors of one line, options in full, and none that is dropped because it is given again."""

    def __init__(self, **words: Any) -> None:
        super().__init__(**words, allow_abbrev=False)
        self.given: set[str] = set()
        for name in (None, "store"):
            self.register("action", name, _Given)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as if nothing had been given before."""
        self.given.clear()
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Say what is wrong and where help is."""
        raise InputError(f"{message}; see `{self.prog} --help`")


class _Command(_Parser):
    """The parser of one command, which gets its arguments when the command is chosen."""

    name = ""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Import the module of the command's function first."""
        if self.name:
            command = DECLARED["commands"][self.name]
            module = importlib.import_module(f"mbcnet_rec.{command.get('module', f'commands.{self.name}')}")
            add_command(self, command, module, self.name)
            self.name = ""
        return super().parse_known_args(args, namespace)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of every command."""
    parser = _Parser(prog="mbcnet", description="Train, plan and serve MBCnet, a click-through-rate model.")
    parser.set_defaults(only_progress=False)
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Command)
    for name, command in DECLARED["commands"].items():
        subparsers.add_parser(name, help=command["help"]).name = name
    return parser


def show_warning(message: Warning | str, category: type[Warning], *where: Any) -> None:
    """Print a warning of ours as one line, on rank 0 alone; anyone else's as Python does."""
    if category.__module__.partition(".")[0] not in OURS:
        _PYTHONS_SHOW_WARNING(message, category, *where)
    elif is_first_rank():
        _tell(f"warning: {message}")


_PYTHONS_SHOW_WARNING = warnings.showwarning


def _tell(line: str) -> None:
    """Print a line on stderr, if it is open."""
    with suppress(OSError):
        print(f"mbcnet: {line}", file=sys.stderr, flush=True)


def run(argv: Sequence[str] | None = None) -> int:
    """Run one command and leave its errors to the caller: main, or launch/worker.py, which prints them once for a whole job.

    Raises:
        InputError: the user can fix it.
        RunStoppedError: a run ends before its last step.
    """
    # torch itself would print pages of C++ frames for a lost rank
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    args = build_parser().parse_args(argv)
    args.command_line = shlex.join(["mbcnet", *(sys.argv[1:] if argv is None else argv)])  # to do it again
    with plain_words():
        refuse_repeats(getattr(args, "overrides", ()))
        code = int(args.run(args) or 0)
        if not args.only_progress and sys.stdout is not None:  # what was printed is the result
            sys.stdout.flush()
        return code


@contextmanager
def plain_words() -> Iterator[None]:
    """Print our own warnings as one line each, and report a path that cannot be used as the user's mistake, while a command runs."""
    root = logging.getLogger()
    with warnings.catch_warnings():  # restores the hook
        warnings.showwarning = show_warning
        root.addFilter(_is_no_echo)
        try:
            yield
        except Exception as error:
            known = isinstance(error, InputError | RunStoppedError)
            if not known and (line := no_room(error)):
                raise CannotWriteError(line) from None
            if isinstance(error, OSError | ImportError):
                chain = "".join(traceback.format_exception(error))
                if line := library_fault(chain):
                    raise InputError(line) from None
            is_path_fault = isinstance(error, OSError) and error.errno in PATH_FAULTS
            if not is_path_fault or not isinstance(error.filename, str | Path):
                raise
            shown = str(error.filename)[:200]
            raise InputError(f"{shown}: {error.strerror}; fix it, or give another path") from None
        finally:
            root.removeFilter(_is_no_echo)


def _is_no_echo(record: logging.LogRecord) -> bool:
    # FBGEMM logs, by the root logger, what it raises
    return not str(record.msg).startswith("Could not load the library")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; see `exit_code`. Without `argv` it is this process's own command line."""
    if argv is not None:
        return exit_code(lambda: run(argv))
    heed_interrupts()
    heed_termination()
    open_output()
    code = exit_code(lambda: run([readable(word) for word in sys.argv[1:]]))
    end_with(code)
    return code


def open_output() -> None:
    """Let stdout and stderr take any name, whatever the locale's encoding, and be there where they are closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed: the next file that is opened would take its number
            with suppress(OSError):
                os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (until the end)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def readable(word: str) -> str:
    """A word of the command line, which an ASCII locale leaves as bytes, as the UTF-8 that it is."""
    try:
        return os.fsencode(word).decode()
    except UnicodeError:
        return word


def exit_code(command: Callable[[], int]) -> int:
    """Run a command and print what ends it early as one line; 0, 2 for a user's mistake, 130 after Ctrl-C, or one of runtime/exits.py."""
    try:
        return command()
    except InputError as error:
        # Every rank meets a mistake in config or schema; one of them says it. A note names the rank whose rows are faulty.
        notes = getattr(error, "__notes__", [])
        if is_first_rank() or notes:
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
        try:
            sys.stdout.flush()
        except OSError:  # a full disk or a closed pipe: Python would end with a code of its own
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
