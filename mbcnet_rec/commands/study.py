"""`mbcnet study` and `tune`: the paper's tables and figures on one's own data, and a search for each model's best config."""

import argparse
from pathlib import Path

from data.errors import InputError
from mbcnet_rec.commands.arguments import engine_of
from mbcnet_rec.study.studies import STUDIES


def study(args: argparse.Namespace) -> int:
    """Train the variants of a table or figure of the paper with several seeds, and write a report."""
    if args.name == "list":
        width = max(map(len, STUDIES))
        for study in STUDIES.values():
            reference = f"{study.reference}:"
            rows = len(study.variants + study.rivals)
            print(f"{study.name:<{width}}  {reference:<24} {study.question} ({rows} rows)")
        return 0
    if args.name not in STUDIES:
        raise InputError(f"study {args.name!r}: wanted one of {', '.join(STUDIES)}; see `mbcnet study list`")
    if not args.config:
        raise InputError(f"study {args.name}: --config is missing; name a run's TOML file")
    engine = engine_of(args)._replace(workers=args.workers)
    from mbcnet_rec.config import load_config  # imports torch

    load_config(args.config, args.overrides)  # its mistakes show before torchrec is imported
    from mbcnet_rec.study.runner import StudyRequest, conduct

    request = StudyRequest(
        STUDIES[args.name], Path(args.config), tuple(args.overrides), args.seeds, tuple(args.models),
        args.tuned, args.category, args.out, engine, args.command_line,
    )  # fmt: skip
    return conduct(request)


def tune(args: argparse.Namespace) -> int:
    """Search each model's ranges with the same number of trials, and write the winner as a config.

    Started again, it continues.
    """
    engine = engine_of(args)._replace(workers=args.workers or 1)
    from mbcnet_rec.config import load_config  # imports torch

    config = load_config(args.config, args.overrides)  # its mistakes show before torchrec is imported
    from mbcnet_rec.study.tuning import load_search, tune_models

    return tune_models(config, load_search(args.space, args.trials), args.models, args.out, engine=engine)
