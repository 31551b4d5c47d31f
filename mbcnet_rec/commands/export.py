"""`mbcnet export`: write the fused path of a run's best checkpoint, and say its size and what quantisation costs.

The artifact needs torch and fbgemm only; its mbcnet_serving.py loads it.
"""

import argparse

from data.errors import InputError
from mbcnet_rec.commands.arguments import names


def register(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add = parser.add_argument
    add("run_folder", metavar="RUN", help="the run folder")
    add("--out", required=True, metavar="FOLDER")
    add(
        "--since",
        default="",
        metavar="ARTIFACT",
        help="write a delta: what has changed since this artifact, with its rows and branches",
    )
    add("--rows", choices=("int8", "int4", "fp16", "fp32"), default="", help="type of the tables' rows (default int8)")
    add("--branches", type=names, default=[], metavar="NAME,...", help="serve these branches alone")
    add("--calibrate", choices=("isotonic", "platt"), default="", help="fit probabilities to the validation rows; NE before and after is told of the test rows")  # fmt: skip
    add("--triton", action="store_true", help="--out is REPOSITORY/MODEL/VERSION of NVIDIA Triton: also config.pbtxt and model.py for its Python backend")  # fmt: skip
    compiled = parser.add_mutually_exclusive_group()
    compiled.add_argument("--aot", action="store_true", default=None, help="also compile the dense part by AOTInductor (default: where a C++ compiler is there)")  # fmt: skip
    compiled.add_argument("--no-aot", action="store_false", dest="aot", help="do not")
    add("--overwrite", action="store_true", help="replace an artifact in the folder")
    parser.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> int:
    if args.since and (args.rows or args.branches or args.aot or args.calibrate or args.triton):
        raise InputError(
            "--since: a delta has the rows, branches and calibration of its artifact, and nothing compiled; leave --rows, --branches, --calibrate, --triton, --aot out"
        )
    from mbcnet_rec.serving.export import run_delta, run_export  # imports torchrec

    if args.since:
        return run_delta(args.run_folder, args.since, args.out, overwrite=args.overwrite)
    return run_export(
        args.run_folder,
        args.out,
        rows=args.rows or "int8",
        branches=args.branches,
        aot=args.aot,
        calibrate=args.calibrate,
        triton=args.triton,
        overwrite=args.overwrite,
    )
