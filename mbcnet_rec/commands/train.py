"""`mbcnet train`: train in this process, or as one rank where torchrun started it."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from data.errors import InputError
from mbcnet_rec.commands.arguments import add_config, add_start

if TYPE_CHECKING:
    from mbcnet_rec.config import RunConfig


def register(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_config(parser)
    add = parser.add_argument
    add("--plan", metavar="PLAN", help="run exactly this plan file, or refuse with the difference (short for --set sharding.plan=PLAN)")  # fmt: skip
    add_start(parser)
    add("--allow-partial", action="store_true", help="with --resume: load what fits of a checkpoint of another model, and say what starts fresh")  # fmt: skip
    parser.set_defaults(run=_train, only_progress=True)


def _train(args: argparse.Namespace) -> int:
    from mbcnet_rec.config import load_config  # imports torch

    config = load_config(args.config, args.overrides)
    if args.plan:
        config = _with_plan(config, args.plan)
    # imports torchrec: after every mistake that is seen without it
    from mbcnet_rec.teachers import train_model

    return train_model(
        config,
        resume=args.resume,
        overwrite=args.overwrite,
        allow_partial=args.allow_partial,
        report=_draw_report,
    )


def _draw_report(folder: Path) -> None:
    """Write report.html. matplotlib is loaded now, not before the first step, and by rank 0 alone."""
    from mbcnet_rec.report.run_report import write_run_report

    write_run_report(folder)


def _with_plan(config: "RunConfig", plan: str) -> "RunConfig":
    named = config.sharding.plan
    if named and named != plan:
        raise InputError(f"--plan {plan}: the config's sharding.plan is {named!r}; remove one of the two")
    return replace(config, sharding=replace(config.sharding, plan=plan))
