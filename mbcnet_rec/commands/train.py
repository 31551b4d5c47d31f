"""`mbcnet train`: train in this process, or as one rank where torchrun started it."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.errors import InputError

if TYPE_CHECKING:
    from mbcnet_rec.config import RunConfig


def train(args: argparse.Namespace) -> int:
    """Train in this process, or as one rank where torchrun started it."""
    from mbcnet_rec.config import load_config  # imports torch

    args.only_progress = True
    if not args.continues and not args.config:
        raise InputError("wanted --config FILE, or --continue RUN --data FILES; see `mbcnet train --help`")
    config = load_config(args.config or Path(args.continues) / "config.toml", args.overrides)
    if args.continues:
        config = _continued(config, args)
    elif args.data or args.again:
        raise InputError(
            "--data and --again go with --continue RUN; name a new run's files in its config, or by --set data.train=[...]"
        )
    else:
        _refuse_moved(Path(args.config), config, args.overrides)
    if args.plan:
        if (named := config.sharding.plan) and named != args.plan:
            raise InputError(f"--plan {args.plan}: the config's sharding.plan is {named!r}; remove one of the two")
        config = replace(config, sharding=replace(config.sharding, plan=args.plan))
    from mbcnet_rec.teachers import train_model  # imports torchrec: after every mistake that is seen without it

    how: dict[str, Any] = {name: getattr(args, name) for name in ("allow_partial", "again", "progressive")}
    how["report"] = _draw_report
    start = {"resume": args.resume, "overwrite": args.overwrite}
    if args.progressive and not args.continues:
        from mbcnet_rec.daily import train_days

        return train_days(config, partial(train_model, **how), **start)
    return train_model(config, continues=bool(args.continues), **start, **how)


def report(args: argparse.Namespace) -> int:
    """Write report.html of a training run from what it logged."""
    print(f"wrote {_draw_report(args.run_folder)}")
    return 0


def _draw_report(folder: Path) -> Path:
    """Write report.html. matplotlib is loaded now, not before the first step, and by rank 0 alone."""
    from mbcnet_rec.report.run_report import write_run_report

    return write_run_report(folder)


def _continued(config: "RunConfig", args: argparse.Namespace) -> "RunConfig":
    """The config of a run's next day, in the folder that was named."""
    from mbcnet_rec.config import next_data  # imports torch

    if not args.data:
        raise InputError(f"--continue {args.continues}: wanted its new rows; add --data FILES, or --data ds=2024-06-02")
    data = next_data(config.data, args.data)
    own = {override.partition("=")[0].strip() for override in args.overrides}
    if "data.train_where" in own:
        data = replace(data, train_where=config.data.train_where)
    return replace(config, data=data, train=replace(config.train, out=args.continues))


def _refuse_moved(path: Path, config: "RunConfig", overrides: Sequence[str]) -> None:
    """Refuse the config of a run folder that was moved or copied, by which the run would go on, or begin, in another folder unasked."""
    from mbcnet_rec.checkpoints.run_folder import CONFIG  # imports torch
    from mbcnet_rec.logs.metrics_log import METRICS

    own, out = path.resolve().parent, config.run_folder.resolve()
    named = {override.partition("=")[0].strip() for override in overrides} & {"train.out", "train", "name"}
    if path.name == CONFIG and (own / METRICS).is_file() and not named and out != own:
        raise InputError(
            f"{path}: is the config of the run in {own}, but by its train.out that run is in {out}; say which: add "
            f"--set train.out={own}, or another folder"
        )
