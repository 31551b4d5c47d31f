"""`mbcnet evaluate`."""

import argparse
from typing import Any


def register(subparsers: Any) -> None:
    """Add the command."""
    evaluate = subparsers.add_parser(
        "evaluate",
        help="score a run's best checkpoint on its test rows or any others",
        description=_evaluate.__doc__,
    )
    evaluate.add_argument("run_folder", metavar="RUN", help="the run folder")
    evaluate.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="PATH",
        help="Parquet files, folders or globs instead of a split",
    )
    evaluate.add_argument("--split", choices=("train", "valid", "test"), default="test")
    evaluate.add_argument(
        "--by",
        action="append",
        default=[],
        metavar="FIELD",
        help="also by the values of this column; repeatable",
    )
    evaluate.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    evaluate.add_argument(
        "--exact-rows", type=int, default=0, metavar="N",
        help="rows up to which AUC is exact (default 10,000,000); beyond, it is binned, with a bound",
    )  # fmt: skip
    evaluate.set_defaults(run=_evaluate)


def _evaluate(args: argparse.Namespace) -> int:
    """Print AUC, GAUC, log-loss, normalised entropy and calibration with 95 % intervals; in any number of processes."""
    from mbcnet_rec.scoring.evaluate import EXACT_ROWS, Question, run_evaluation

    by = tuple(dict.fromkeys(args.by))
    question = Question(args.split, tuple(args.data), by, args.exact_rows or EXACT_ROWS)
    return run_evaluation(args.run_folder, question, as_json=args.json)
