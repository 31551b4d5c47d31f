"""`mbcnet evaluate`: AUC, GAUC, log-loss, normalised entropy and calibration with 95 % intervals, in any number of processes."""

import argparse


def register(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add = parser.add_argument
    add("run_folder", metavar="RUN", help="the run folder")
    add("--data", nargs="+", default=[], metavar="PATH", help="files, folders or globs instead of a split")
    add("--split", choices=("train", "valid", "test"), default="test")
    add("--by", action="append", default=[], metavar="FIELD", help="also by this column's values; repeatable")
    add("--json", action="store_true", help="print one JSON object instead of tables")
    add("--exact-rows", type=int, default=0, metavar="N", help="rows up to which AUC is exact (default 10,000,000); beyond, it is binned, with a bound")  # fmt: skip
    parser.set_defaults(run=_evaluate)


def _evaluate(args: argparse.Namespace) -> int:
    from mbcnet_rec.scoring.evaluate import EXACT_ROWS, Question, run_evaluation  # imports torchrec

    by = tuple(dict.fromkeys(args.by))
    question = Question(args.split, tuple(args.data), by=by, exact_rows=args.exact_rows or EXACT_ROWS)
    return run_evaluation(args.run_folder, question, as_json=args.json)
