"""`mbcnet train`."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.errors import InputError

if TYPE_CHECKING:
    from mbcnet_rec.config import RunConfig


def register(subparsers: Any) -> None:
    """Add the command."""
    train = subparsers.add_parser("train", help="train a model from a config", description=_train.__doc__)
    train.add_argument("--config", required=True, metavar="FILE", help="the run's TOML file")
    train.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help="override one key"
    )
    train.add_argument(
        "--plan",
        metavar="PLAN",
        help="run this plan file to the letter, or refuse with the difference (short for --set sharding.plan=PLAN)",
    )
    train.add_argument("--resume", action="store_true", help="go on from the run folder's latest checkpoint")
    train.add_argument("--overwrite", action="store_true", help="replace an earlier run of the same folder")
    train.add_argument(
        "--allow-partial",
        action="store_true",
        help="with --resume: load what fits of a checkpoint of another model, and say what starts fresh",
    )
    train.set_defaults(run=_train)


def _train(args: argparse.Namespace) -> int:
    """Train in this process, or as one rank where torchrun started it."""
    from mbcnet_rec.config import load_config

    config = load_config(args.config, args.overrides)
    if args.plan:
        config = _with_plan(config, args.plan)
    from mbcnet_rec.teachers import train_model

    return train_model(
        config,
        resume=args.resume,
        overwrite=args.overwrite,
        allow_partial=args.allow_partial,
        report=_draw_report,
    )


def _draw_report(folder: Path) -> None:
    """Write report.html. The library that draws it is loaded now, not before the first step, and by rank 0 alone."""
    from mbcnet_rec.report.run_report import write_run_report

    write_run_report(folder)


def _with_plan(config: "RunConfig", plan: str) -> "RunConfig":
    named = config.sharding.plan
    if named and named != plan:
        raise InputError(f"--plan {plan}: the config's sharding.plan is {named!r}; remove one of the two")
    return replace(config, sharding=replace(config.sharding, plan=plan))
