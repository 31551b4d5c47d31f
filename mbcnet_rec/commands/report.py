"""`mbcnet report`: write report.html of a training run from what it logged."""

import argparse
from pathlib import Path


def register(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="the run folder")
    parser.set_defaults(run=_report)


def _report(args: argparse.Namespace) -> int:
    from mbcnet_rec.report.run_report import write_run_report  # imports matplotlib

    print(f"wrote {write_run_report(args.run_folder)}")
    return 0
