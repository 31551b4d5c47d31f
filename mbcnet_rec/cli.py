"""`mbcnet`, a thin door: it parses arguments, runs one command and turns mistakes into one line. Imports no torch."""

import argparse
import os
import sys
from collections.abc import Sequence

from data.errors import InputError
from mbcnet_rec.commands import (
    data,
    doctor,
    evaluate,
    export,
    launch,
    plan,
    predict,
    schema,
    study,
    train,
    tune,
)
from mbcnet_rec.training.exits import RunStoppedError

COMMANDS = (doctor, data, schema, plan, launch, train, evaluate, predict, export, study, tune)


class _Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message: str) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Print what is wrong and where help is, and leave with code 2."""
        print(f"{self.prog}: {message}; see `{self.prog} --help`", file=sys.stderr)
        sys.exit(2)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of every command."""
    parser = _Parser(prog="mbcnet", description="Train, plan and serve MBCnet, a click-through-rate model.")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    for command in COMMANDS:
        command.register(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0, or 2 where the user can mend something, 130 after Ctrl-C; see training/exits.py for the others.
    """
    args = build_parser().parse_args(argv)
    try:
        return int(args.run(args) or 0)
    except InputError as error:
        # Every rank meets a mistake in config or schema; one of them says it. A note marks a fault of one rank's rows.
        if os.environ.get("RANK", "0") == "0" or getattr(error, "__notes__", None):
            print(f"mbcnet: {error}", file=sys.stderr)
        return 2
    except RunStoppedError as error:
        if error.spoken:
            print(f"mbcnet: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        print("mbcnet: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
