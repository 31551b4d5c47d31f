"""`mbcnet predict`: write each row's probability, fused and by branch, in the order of the input files.

Started again, it continues where it stopped. Labels are not needed.
"""

import argparse

from mbcnet_rec.commands.arguments import names


def register(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add = parser.add_argument
    add("run_folder", metavar="RUN", help="the run folder")
    add("--data", nargs="+", required=True, metavar="PATH", help="Parquet files, folders or globs")
    add("--out", required=True, metavar="FOLDER")
    add("--keep", type=names, default=[], metavar="COLUMN,...", help="columns to pass through; default: the schema's group and time columns")  # fmt: skip
    add("--overwrite", action="store_true", help="replace an earlier prediction in the folder")
    parser.set_defaults(run=_predict)


def _predict(args: argparse.Namespace) -> int:
    from mbcnet_rec.scoring.predict import run_prediction  # imports torchrec

    return run_prediction(args.run_folder, args.data, args.out, keep=args.keep, overwrite=args.overwrite)
