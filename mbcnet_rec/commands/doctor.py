"""`mbcnet doctor`."""

import argparse
from typing import Any


def register(subparsers: Any) -> None:
    """Add the command."""
    doctor = subparsers.add_parser("doctor", help="check the installation", description=_doctor.__doc__)
    doctor.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    """Say whether torch, fbgemm and torchrec match, which devices and schedulers are there, and the mend of each fault."""
    from mbcnet_rec.doctor import run_doctor

    return run_doctor()
