"""`mbcnet compare`: two runs on the same rows: paired differences of AUC, GAUC, log-loss and calibration with 95 % intervals.

RUN_A less RUN_B. With --expected-clicks also the clicks that either ranking would get: an offline stand-in for an A/B test. With --log and no runs
the click rates of the arms of `mbcnet serve --split`, arm b less arm a.
"""

import argparse
from pathlib import Path

from data.errors import InputError


def register(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add = parser.add_argument
    add("ours", metavar="RUN_A", type=Path, nargs="?", help="a run folder")
    add("theirs", metavar="RUN_B", type=Path, nargs="?", help="the run folder that it is compared with")
    add(
        "--log",
        nargs="+",
        default=[],
        metavar="PATH",
        help="Parquet with the columns arm and click of rows that were served",
    )
    add(
        "--key",
        default="",
        metavar="COLUMN",
        help="of the log: what `mbcnet serve --split` split by; its rows depend on each other",
    )
    add("--label", default="", metavar="COLUMN", help="of the log: 1 where a row was clicked (default click)")
    add("--data", nargs="+", default=[], metavar="PATH", help="files, folders or globs instead of a split of RUN_A")
    add("--split", choices=("train", "valid", "test"), default="test", help="of RUN_A's config (default test)")
    add("--by", action="append", default=[], metavar="FIELD", help="also by this column's values; repeatable")
    add("--expected-clicks", type=int, metavar="K", help="also the expected clicks on the K highest rows of each group (a query's or user's)")  # fmt: skip
    add("--json", action="store_true", help="print one JSON object instead of tables")
    add("--exact-rows", type=int, default=0, metavar="N", help="refuse more rows than this, all of which are held (default 10,000,000)")  # fmt: skip
    add("-o", "--out", type=Path, metavar="PAGE.html", help="also write a page")
    parser.set_defaults(run=_compare)


def _compare(args: argparse.Namespace) -> int:
    if bool(args.log) == bool(args.theirs) or (args.log and (args.ours or args.data or args.expected_clicks)):
        raise InputError("compare: wanted RUN_A and RUN_B, or --log PATH without --data and --expected-clicks")
    if (args.key or args.label) and not args.log:
        raise InputError("--key and --label name columns of --log; leave them out")
    from mbcnet_rec.scoring.arms import run_arms
    from mbcnet_rec.scoring.compare import Comparison, run_comparison  # imports torchrec
    from mbcnet_rec.scoring.evaluate import EXACT_ROWS, Question

    if args.expected_clicks is not None and args.expected_clicks < 1:
        raise InputError(f"--expected-clicks {args.expected_clicks}: wanted a number of rows, 1 or more; change it")
    by = tuple(dict.fromkeys(args.by))
    question = Question(args.split, tuple(args.log or args.data), by=by, exact_rows=args.exact_rows or EXACT_ROWS)
    if args.log:
        return run_arms(question, args.label or "click", args.key, args.command_line, as_json=args.json, page=args.out)
    comparison = Comparison(args.ours, args.theirs, question, args.expected_clicks or 0, args.command_line)
    return run_comparison(comparison, as_json=args.json, page=args.out)
