"""`mbcnet doctor`: whether torch, fbgemm and torchrec match, which devices and schedulers are there, and how to fix each fault."""

import argparse

from mbcnet_rec.doctor import examine, print_report


def register(parser: argparse.ArgumentParser) -> None:
    """Doctor takes no arguments."""
    parser.set_defaults(run=lambda _: print_report(examine()))
