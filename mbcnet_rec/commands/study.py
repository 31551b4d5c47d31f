"""`mbcnet study`, and `mbcnet report` for a single run."""

import argparse
from pathlib import Path
from typing import Any


def register(subparsers: Any) -> None:
    """Add the commands."""
    study = subparsers.add_parser(
        "study", help="a table or figure of the paper on your data", description=_study.__doc__
    )
    study.add_argument("name", metavar="NAME", help="which; `list` lists them")
    study.add_argument("--config", metavar="FILE", help="the run's TOML file that the variants start from")
    study.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help="override one key"
    )
    study.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each variant (default: 3)")
    study.add_argument("--models", nargs="+", default=[], metavar="KIND", help="only these models")
    study.add_argument(
        "--tuned", type=Path, metavar="FOLDER", help="take KIND.toml of `mbcnet tune` for each model"
    )
    study.add_argument("--category", default="", metavar="FIELD", help="the categories of fig7")
    study.add_argument("--out", type=Path, default=Path("studies"), metavar="FOLDER", help="default: studies")
    study.add_argument(
        "--workers", type=int, default=0, metavar="N", help="processes (default: one for each core)"
    )
    study.set_defaults(run=_study)
    report = subparsers.add_parser("report", help="a run's report.html, anew", description=_report.__doc__)
    report.add_argument("run_folder", metavar="RUN", type=Path, help="the run folder")
    report.set_defaults(run=_report)


def _study(args: argparse.Namespace) -> int:
    """Train the variants of a table or figure of the paper with several seeds, and write a report of them."""
    from mbcnet_rec.study.studies import STUDIES

    if args.name == "list":
        width = max(map(len, STUDIES))
        for study in STUDIES.values():
            print(
                f"{study.name:<{width}}  {study.reference + ':':<24} {study.question} ({len(study.variants)} rows)"
            )
        return 0
    from data.errors import InputError

    if args.name not in STUDIES:
        raise InputError(f"study {args.name!r}: wanted one of {', '.join(STUDIES)}; see `mbcnet study list`")
    if not args.config:
        raise InputError(f"study {args.name}: --config is missing; name a run's TOML file")
    if args.seeds < 1 or args.workers < 0:
        raise InputError(f"--seeds {args.seeds}, --workers {args.workers}: wanted 1 or more, and 0 or more")
    from mbcnet_rec.config import load_config

    load_config(args.config, args.overrides)  # its mistakes show before torchrec is imported
    from mbcnet_rec.study.runner import StudyRequest, conduct

    request = StudyRequest(
        STUDIES[args.name],
        Path(args.config),
        tuple(args.overrides),
        args.seeds,
        tuple(args.models),
        args.tuned,
        args.category,
        args.out,
        args.workers,
    )
    return conduct(request)


def _report(args: argparse.Namespace) -> int:
    """Write report.html of a training run from what it logged."""
    from mbcnet_rec.report.run_report import write_run_report

    print(f"wrote {write_run_report(args.run_folder)}")
    return 0
