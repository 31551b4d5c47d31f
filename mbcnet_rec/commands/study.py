"""`mbcnet study`: train the variants of a table or figure of the paper with several seeds, and write a report."""

import argparse
from pathlib import Path

from data.errors import InputError
from mbcnet_rec.commands.arguments import add_config
from mbcnet_rec.study.studies import STUDIES


def register(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add = parser.add_argument
    add("name", metavar="NAME", help="which; `list` lists them")
    add_config(parser, required=False)
    add("--seeds", type=int, default=3, metavar="N", help="runs of each variant (default: 3)")
    add("--models", nargs="+", default=[], metavar="KIND", help="only these models")
    add("--tuned", type=Path, metavar="FOLDER", help="take KIND.toml of `mbcnet tune` for each model")
    add("--category", default="", metavar="FIELD", help="the categories of fig7")
    add("--out", type=Path, default=Path("studies"), metavar="FOLDER", help="default: studies")
    add("--workers", type=int, default=0, metavar="N", help="processes (default: one for each core)")
    parser.set_defaults(run=_study)


def _study(args: argparse.Namespace) -> int:
    if args.name == "list":
        width = max(map(len, STUDIES))
        for study in STUDIES.values():
            reference = f"{study.reference}:"
            print(
                f"{study.name:<{width}}  {reference:<24} {study.question} ({len(study.variants + study.rivals)} rows)"
            )
        return 0
    if args.name not in STUDIES:
        raise InputError(f"study {args.name!r}: wanted one of {', '.join(STUDIES)}; see `mbcnet study list`")
    if not args.config:
        raise InputError(f"study {args.name}: --config is missing; name a run's TOML file")
    if args.seeds < 1 or args.workers < 0:
        raise InputError(f"--seeds {args.seeds}, --workers {args.workers}: wanted 1 or more, and 0 or more")
    from mbcnet_rec.config import load_config  # imports torch

    load_config(args.config, args.overrides)  # its mistakes show before torchrec is imported
    from mbcnet_rec.study.runner import StudyRequest, conduct

    request = StudyRequest(
        STUDIES[args.name], Path(args.config), tuple(args.overrides), args.seeds, tuple(args.models),
        args.tuned, args.category, args.out, args.workers, args.command_line,
    )  # fmt: skip
    return conduct(request)
