"""Arguments that several commands share, and how their values are read."""

import argparse
import os
from collections.abc import Sequence
from typing import Any

from data.engine import ENGINES, Engine
from data.errors import InputError


def add_config(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add --config and --set."""
    parser.add_argument("--config", required=required, metavar="FILE", help="the run's TOML file")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help="set one key")
    parser.add_argument("--plugin", action=_Plugin, dest="overrides", metavar="FILE", help="a Python file with a model, branch or loss of your own (short for --set plugins+=FILE)")  # fmt: skip


class _Plugin(argparse.Action):
    """Adds a file to the config's `plugins`."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        namespace.overrides = [*namespace.overrides, f"plugins+={values}"]


def refuse_repeats(overrides: Sequence[str]) -> None:
    """Raise InputError where a --set of the command line would undo another one."""
    given: dict[str, str] = {}
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key.endswith("+"):
            continue
        again = next((each for each in given if f"{each}.".startswith(f"{key}.")), None)
        if again is not None:
            raise InputError(f"--set {override}: --set {given[again]} comes before it and would be lost; leave one out")
        given[key] = override


def add_start(parser: argparse.ArgumentParser) -> None:
    """Add --resume, --overwrite and --continue, of which a run takes one at most, and what goes with --continue."""
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--resume", action="store_true", help="continue from the run folder's latest checkpoint")
    either.add_argument(
        "--overwrite", action="store_true", help="replace an earlier run of the same folder, once all is checked"
    )
    either.add_argument("--continue", dest="continues", default="", metavar="RUN", help="go on from a finished run with the files of --data")  # fmt: skip
    add = parser.add_argument
    add("--data", nargs="+", default=[], metavar="FILES", help="with --continue: files, folders, globs, URIs, or a partition such as ds=2024-06-02")  # fmt: skip
    add(
        "--progressive",
        action="store_true",
        help="score each day (a partition of data.train, or --data) before it is trained",
    )
    add("--again", action="store_true", help="with --continue: files that this run has trained, once more")


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Add --engine and what goes with it."""
    add = parser.add_argument
    add(
        "--engine",
        choices=ENGINES,
        default="local",
        help="processes of this machine, a Ray cluster, or torchrun's ranks",
    )
    add("--workers", type=int, default=0, help="processes of the local engine; default: one for each core")
    add("--address", default="auto", help="of the Ray cluster")


def engine_of(args: argparse.Namespace) -> Engine:
    """The engine that --engine, --workers and --address name."""
    if args.workers < 0:
        raise InputError(f"--workers {args.workers}: wanted 1 or more; change it")
    return Engine(args.engine, args.workers or len(os.sched_getaffinity(0)), args.address)


def names(text: str) -> list[str]:
    """Read "a, b" as ["a", "b"]."""
    return [name.strip() for name in text.split(",") if name.strip()]
