"""`mbcnet tune`."""

import argparse
from pathlib import Path
from typing import Any


def register(subparsers: Any) -> None:
    """Add the command."""
    tune = subparsers.add_parser(
        "tune", help="search ranges of a config by Optuna", description=_tune.__doc__
    )
    tune.add_argument("--config", required=True, metavar="FILE", help="the run's TOML file")
    tune.add_argument("--space", required=True, type=Path, metavar="FILE", help="ranges: see docs/studies.md")
    tune.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help="override one key"
    )
    tune.add_argument("--models", nargs="+", default=[], metavar="KIND", help="default: the config's")
    tune.add_argument(
        "--trials", type=int, default=0, metavar="N", help="of each model (default: the space's)"
    )
    tune.add_argument("--out", type=Path, default=Path("tuned"), metavar="FOLDER", help="default: tuned")
    tune.set_defaults(run=_tune)


def _tune(args: argparse.Namespace) -> int:
    """Search each model's ranges with the same number of trials; a later start goes on. The winner is written as a config."""
    from mbcnet_rec.config import load_config

    config = load_config(args.config, args.overrides)
    from mbcnet_rec.study.tuning import load_space, tune_models

    return tune_models(config, load_space(args.space, args.trials), args.models, args.out)
