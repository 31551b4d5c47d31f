"""`mbcnet tune`: search each model's ranges with the same number of trials, and write the winner as a config.

Started again, it continues.
"""

import argparse
from pathlib import Path

from mbcnet_rec.commands.arguments import add_config


def register(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_config(parser)
    add = parser.add_argument
    add("--space", required=True, type=Path, metavar="FILE", help="ranges: see docs/studies.md")
    add("--models", nargs="+", default=[], metavar="KIND", help="default: the config's")
    add("--trials", type=int, default=0, metavar="N", help="of each model (default: the space's)")
    add("--out", type=Path, default=Path("tuned"), metavar="FOLDER", help="default: tuned")
    parser.set_defaults(run=_tune)


def _tune(args: argparse.Namespace) -> int:
    from mbcnet_rec.config import load_config  # imports torch

    config = load_config(args.config, args.overrides)  # its mistakes show before torchrec is imported
    from mbcnet_rec.study.tuning import load_search, tune_models

    return tune_models(config, load_search(args.space, args.trials), args.models, args.out)
