"""`mbcnet compare`: two runs on the same rows: paired differences of AUC, GAUC, log-loss and calibration with 95 % intervals."""

import argparse
from pathlib import Path


def register(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add = parser.add_argument
    add("ours", metavar="RUN_A", type=Path, help="a run folder")
    add("theirs", metavar="RUN_B", type=Path, help="the run folder that it is compared with")
    add(
        "--data",
        nargs="+",
        default=[],
        metavar="PATH",
        help="files, folders or globs instead of a split of RUN_A",
    )
    add("--split", choices=("train", "valid", "test"), default="test")
    add("--by", action="append", default=[], metavar="FIELD", help="also by this column's values; repeatable")
    add("--expected-clicks", type=int, default=0, metavar="K", help="also the clicks of each group's K highest rows under either ranking")  # fmt: skip
    add("--json", action="store_true", help="print one JSON object instead of a table")
    add("-o", "--out", type=Path, metavar="PAGE.html", help="also write a page")
    parser.set_defaults(run=_compare)


def _compare(args: argparse.Namespace) -> int:
    from mbcnet_rec.scoring.compare import Comparison, run_comparison  # imports torchrec
    from mbcnet_rec.scoring.evaluate import Question

    question = Question(args.split, tuple(args.data), by=tuple(dict.fromkeys(args.by)))
    comparison = Comparison(args.ours, args.theirs, question, args.expected_clicks)
    return run_comparison(comparison, as_json=args.json, page=args.out)
