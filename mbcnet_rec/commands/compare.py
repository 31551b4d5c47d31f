"""`mbcnet compare`: two runs on the same rows: paired differences of AUC, GAUC, log-loss and calibration with 95 % intervals.

RUN_A less RUN_B. With --expected-clicks also the clicks that either ranking would get: an offline stand-in for an A/B test.
"""

import argparse
from pathlib import Path

from data.errors import InputError


def register(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add = parser.add_argument
    add("ours", metavar="RUN_A", type=Path, help="a run folder")
    add("theirs", metavar="RUN_B", type=Path, help="the run folder that it is compared with")
    add("--data", nargs="+", default=[], metavar="PATH", help="files, folders or globs instead of a split of RUN_A")
    add("--split", choices=("train", "valid", "test"), default="test", help="of RUN_A's config (default test)")
    add("--by", action="append", default=[], metavar="FIELD", help="also by this column's values; repeatable")
    add("--expected-clicks", type=int, metavar="K", help="also the expected clicks on the K highest rows of each group (a query's or user's)")  # fmt: skip
    add("--json", action="store_true", help="print one JSON object instead of tables")
    add("--exact-rows", type=int, default=0, metavar="N", help="refuse more rows than this, all of which are held (default 10,000,000)")  # fmt: skip
    add("-o", "--out", type=Path, metavar="PAGE.html", help="also write a page")
    parser.set_defaults(run=_compare)


def _compare(args: argparse.Namespace) -> int:
    from mbcnet_rec.scoring.compare import Comparison, run_comparison  # imports torchrec
    from mbcnet_rec.scoring.evaluate import EXACT_ROWS, Question

    if args.expected_clicks is not None and args.expected_clicks < 1:
        raise InputError(f"--expected-clicks {args.expected_clicks}: wanted a number of rows, 1 or more; change it")
    by = tuple(dict.fromkeys(args.by))
    question = Question(args.split, tuple(args.data), by=by, exact_rows=args.exact_rows or EXACT_ROWS)
    comparison = Comparison(args.ours, args.theirs, question, args.expected_clicks or 0, args.command_line)
    return run_comparison(comparison, as_json=args.json, page=args.out)
