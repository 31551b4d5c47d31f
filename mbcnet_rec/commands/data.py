"""`mbcnet data`: write synthetic logs, prepare public data sets."""

import argparse
import sys
from typing import Any


def register(subparsers: Any) -> None:
    """Add the commands."""
    parser = subparsers.add_parser("data", help="write, prepare and check data", description=__doc__)
    actions = parser.add_subparsers(metavar="ACTION", required=True, parser_class=type(parser))
    synth = actions.add_parser("synth", help="write a synthetic log", description=_synth.__doc__)
    synth.add_argument("--out", required=True, metavar="FOLDER")
    synth.add_argument("--rows", type=int, default=100_000)
    synth.add_argument("--days", type=int, default=14)
    synth.add_argument("--seed", type=int, default=0)
    synth.add_argument("--schema", metavar="FILE", help="a Pailitao-like schema; default: the demo's")
    synth.add_argument("--threads", type=int, default=0, help="default: one for each core")
    synth.add_argument("--force", action="store_true", help="replace another synthetic log")
    synth.set_defaults(run=_synth)
    prepare = actions.add_parser("prepare", help="prepare a public data set", description=_prepare.__doc__)
    prepare.add_argument("name", metavar="NAME")
    prepare.add_argument(
        "--src", required=True, metavar="FOLDER", help="folder with the data set's own files"
    )
    prepare.add_argument("--out", required=True, metavar="FOLDER")
    prepare.set_defaults(run=_prepare)


def _synth(args: argparse.Namespace) -> int:
    """Write a Pailitao-like log of 192 fields as day-partitioned Parquet, with a known best AUC and log-loss."""
    import os

    from tqdm import tqdm

    from data.pailitao import pailitao_schema
    from data.schema import load_schema
    from data.synthetic import write_synthetic

    schema = load_schema(args.schema) if args.schema else pailitao_schema("demo")
    threads = args.threads or len(os.sched_getaffinity(0))
    with tqdm(total=args.rows, unit="row", unit_scale=True, desc="synth", disable=None) as bar:
        summary = write_synthetic(
            schema, args.out, rows=args.rows, days=args.days, seed=args.seed, threads=threads,
            force=args.force, progress=lambda done: bar.update(done - bar.n),
        )  # fmt: skip
    test = summary["splits"]["test"]
    verb = "already there" if summary.get("already_there") else "written"
    print(f"{args.out}: {args.rows:,} rows {verb}, {args.days} days; the last day is the test split")
    print(f"best reachable on it: AUC {test['best_auc']:.4f}, log-loss {test['best_log_loss']:.4f}")
    return 0


def _prepare(args: argparse.Namespace) -> int:
    """Turn a public data set's own files into Parquet splits and a fitted schema."""
    from tqdm import tqdm

    from data.prepare import prepare

    with tqdm(unit="row", unit_scale=True, desc="prepare", disable=None) as bar:
        out = prepare(args.name, args.src, args.out, progress=lambda done: bar.update(done - bar.n))
    print(f"{out}: train, valid, test and schema.toml")
    print(f"next: mbcnet train --config mbcnet_rec/configs/{args.name}.toml", file=sys.stdout)
    return 0
