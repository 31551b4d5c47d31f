"""Arguments of the commands, as options.toml has them, and how their values are read."""

import argparse
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from data.engine import Engine
from data.errors import InputError

DECLARED: dict[str, Any] = tomllib.loads(Path(__file__).with_name("options.toml").read_text(encoding="utf-8"))


def names(text: str) -> list[str]:
    """Read "a, b" as ["a", "b"]."""
    return [name.strip() for name in text.split(",") if name.strip()]


def counts(text: str) -> tuple[int, ...]:
    """Read "1,8,64"."""
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: wanted whole numbers of at least 1, such as 1,8,64")
    return found


def new_file(text: str) -> Path:
    """A path that a file can be written to."""
    path = Path(text).expanduser()
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: wanted a file in a folder that is there; choose one, or make it")
    return path


TYPES = {"int": int, "float": float, "path": Path, "new_file": new_file, "names": names, "counts": counts}
TYPES |= {"plugin": "plugins+={}".format}


def add_command(parser: argparse.ArgumentParser, command: Mapping[str, Any], module: ModuleType, name: str) -> None:
    """Add the arguments of a command, or its actions with theirs; each has its function of `module`, whose docstring describes it."""
    if "actions" not in command:
        run = getattr(module, name.replace("-", "_"))
        parser.description = run.__doc__
        parser.set_defaults(run=run)
        _add_arguments(parser, command.get("arguments", {}), {})
        return
    actions, usual = command["actions"], command.get("default", "")
    if usual:
        add_command(parser, actions[usual], module, usual)
    parser.description = command.get("description", module.__doc__)
    added = parser.add_subparsers(metavar="ACTION", required=not usual, parser_class=type(parser))
    for action, own in actions.items():
        add_command(added.add_parser(action, help=own["help"]), own, module, action)


def _add_arguments(parser: Any, arguments: Mapping[str, Any], groups: dict[str, Any]) -> None:
    for name, declared in arguments.items():
        if declared == "shared":
            _add_arguments(parser, DECLARED["shared"][name], groups)
            continue
        words, owner = dict(declared), parser
        if group := words.pop("one_of", ""):
            owner = groups[group] = groups.get(group) or parser.add_mutually_exclusive_group()
        if "type" in words:
            words["type"] = TYPES[words["type"]]
        elif isinstance(words.get("default"), int | float):
            words["type"] = type(words["default"])
        owner.add_argument(*name.split(), **words)


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


def engine_of(args: argparse.Namespace) -> Engine:
    """The engine that --engine and what goes with it name."""
    cpus, gpus = (getattr(args, name, None) for name in ("cpus", "gpus"))  # of a cluster, that a run or a file takes
    if (cpus or gpus) and args.engine != "ray":
        raise InputError("--cpus and --gpus: what Ray sets aside for a task; add --engine ray, or leave them out")
    workers = args.workers or len(os.sched_getaffinity(0))
    return Engine(args.engine or "local", workers, args.address, 1 if cpus is None else cpus, gpus or 0)
