"""`mbcnet train` and `mbcnet evaluate`."""

import argparse
from typing import Any


def register(subparsers: Any) -> None:
    """Add the commands."""
    train = subparsers.add_parser("train", help="train a model from a config", description=_train.__doc__)
    train.add_argument("--config", required=True, metavar="FILE", help="the run's TOML file")
    train.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help="override one key"
    )
    train.add_argument("--resume", action="store_true", help="go on from the run folder's latest checkpoint")
    train.add_argument("--overwrite", action="store_true", help="replace an earlier run of the same folder")
    train.set_defaults(run=_train)
    evaluate = subparsers.add_parser(
        "evaluate", help="score a run's checkpoint on its test rows", description=_evaluate.__doc__
    )
    evaluate.add_argument("run_folder", metavar="RUN", help="the run folder")
    evaluate.add_argument("--split", choices=("train", "valid", "test"), default="test")
    evaluate.set_defaults(run=_evaluate)


def _train(args: argparse.Namespace) -> int:
    """Train in this process, or as one rank where torchrun started it."""
    from mbcnet_rec.config import load_config

    config = load_config(args.config, args.overrides)
    from mbcnet_rec.train import run_training

    return run_training(config, resume=args.resume, overwrite=args.overwrite)


def _evaluate(args: argparse.Namespace) -> int:
    """Score a run's best checkpoint on its test rows; in any number of processes."""
    from mbcnet_rec.evaluate import run_evaluation

    return run_evaluation(args.run_folder, args.split)
