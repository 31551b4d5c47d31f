"""`mbcnet importance`: what AUC and log-loss lose where a field's or a group's values are those of other rows; in the report, too."""

import argparse
from pathlib import Path

from data.errors import InputError


def register(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add = parser.add_argument
    add("run_folder", metavar="RUN", type=Path, help="the run folder")
    add("--data", nargs="+", default=[], metavar="PATH", help="files, folders or globs instead of a split")
    add("--split", choices=("valid", "test"), default="test")
    add("--rows", type=int, default=10_000, metavar="N", help="the first ones (default 10,000)")
    add("--repeats", type=int, default=5, metavar="N", help="(default 5)")
    add("--json", action="store_true", help="print one JSON object instead of tables")
    parser.set_defaults(run=_importance)


def _importance(args: argparse.Namespace) -> int:
    from mbcnet_rec.scoring.evaluate import Question  # imports torchrec
    from mbcnet_rec.scoring.importance import run_importance
    from mbcnet_rec.scoring.trained_run import opened_run

    if args.rows < 2 or args.repeats < 2:
        raise InputError(f"--rows {args.rows} --repeats {args.repeats}: wanted 2 or more; change it")
    with opened_run(args.run_folder) as (run, process):
        question = Question(args.split, tuple(args.data))
        return run_importance(run, process, question, args.rows, args.repeats, as_json=args.json)
