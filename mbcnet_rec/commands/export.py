"""`mbcnet export`."""

import argparse
from typing import Any


def register(subparsers: Any) -> None:
    """Add the command."""
    export = subparsers.add_parser(
        "export", help="write a run as an artifact to serve", description=_export.__doc__
    )
    export.add_argument("run_folder", metavar="RUN", help="the run folder")
    export.add_argument("--out", required=True, metavar="FOLDER")
    export.add_argument(
        "--rows", choices=("int8", "int4", "fp16", "fp32"), default="int8", help="type of the tables' rows"
    )
    export.add_argument(
        "--branches", default="", metavar="NAME,...", help="serve these branches of an MBCnet only"
    )
    export.add_argument(
        "--aot", action=argparse.BooleanOptionalAction, default=None,
        help="also compile the dense part by AOTInductor (default: where a C++ compiler is there)",
    )  # fmt: skip
    export.add_argument("--overwrite", action="store_true", help="replace an artifact in the folder")
    export.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> int:
    """Write the fused path of a run's best checkpoint, and say what it weighs and what quantisation costs.

    The artifact needs torch and fbgemm only; its mbcnet_serving.py loads it.
    """
    from mbcnet_rec.serving.export import run_export

    branches = [name.strip() for name in args.branches.split(",") if name.strip()]
    return run_export(
        args.run_folder, args.out, rows=args.rows, branches=branches, aot=args.aot, overwrite=args.overwrite
    )
