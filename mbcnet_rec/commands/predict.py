"""`mbcnet predict`."""

import argparse
from typing import Any


def register(subparsers: Any) -> None:
    """Add the command."""
    predict = subparsers.add_parser("predict", help="score Parquet files", description=_predict.__doc__)
    predict.add_argument("run_folder", metavar="RUN", help="the run folder")
    predict.add_argument(
        "--data", nargs="+", required=True, metavar="PATH", help="Parquet files, folders or globs"
    )
    predict.add_argument("--out", required=True, metavar="FOLDER")
    predict.add_argument(
        "--keep", default="", metavar="COLUMN,...",
        help="columns to pass through; default: the schema's group and time columns",
    )  # fmt: skip
    predict.add_argument(
        "--overwrite", action="store_true", help="replace an earlier prediction in the folder"
    )
    predict.set_defaults(run=_predict)


def _predict(args: argparse.Namespace) -> int:
    """Write each row's probability, fused and by branch, in the order of the input files.

    Started again, it goes on where it stopped. Labels are not needed.
    """
    from mbcnet_rec.scoring.predict import run_prediction

    keep = [name.strip() for name in args.keep.split(",") if name.strip()]
    return run_prediction(args.run_folder, args.data, args.out, keep=keep, overwrite=args.overwrite)
