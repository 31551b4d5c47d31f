"""`mbcnet data`: write synthetic logs, prepare public data sets, check files against a schema."""

import argparse
import math
import os
from itertools import groupby
from pathlib import Path

from data.profile.check import WHOLE_FILE, check_files
from data.public.prepare import prepare
from data.reading.files import files_in_words, resolve_files
from data.schema import load_schema
from data.synthetic.planted import pailitao_schema
from data.synthetic.write import write_synthetic
from mbcnet_rec.commands.arguments import add_engine, engine_of
from mbcnet_rec.logs.progress import RowBar


def register(parser: argparse.ArgumentParser) -> None:
    """Add the commands."""
    actions = parser.add_subparsers(metavar="ACTION", required=True, parser_class=type(parser))
    synth = actions.add_parser("synth", help="write a synthetic log", description=_synth.__doc__)
    add = synth.add_argument
    add("--out", required=True, metavar="FOLDER")
    add("--rows", type=int, default=100_000)
    add("--days", type=int, default=14)
    add("--seed", type=int, default=0)
    add("--schema", metavar="FILE", help="a Pailitao-like schema; default: the demo's")
    add("--threads", type=int, default=0, help="default: one for each core")
    add("--force", action="store_true", help="replace another synthetic log")
    synth.set_defaults(run=_synth)
    public = actions.add_parser("prepare", help="prepare a public data set", description=_prepare.__doc__)
    add = public.add_argument
    add(
        "name", metavar="NAME",
        help="criteo_kaggle, criteo_1tb, avazu, movielens_latest or taobao_ad_raw, from their own downloads; "
        "or a sample: adult, criteo, movielens, taobao_ad, ali_ccp, aliexpress, slots",
    )  # fmt: skip
    add("--src", required=True, metavar="FOLDER", help="folder with the data set's own files")
    add("--out", required=True, metavar="FOLDER")
    public.set_defaults(run=_prepare)
    check = actions.add_parser("check", help="check files against a schema", description=_check.__doc__)
    add = check.add_argument
    add("paths", nargs="+", metavar="PATH", help="Parquet files, folders, globs or URIs")
    add("--schema", required=True, metavar="FILE")
    add("--full", action="store_true", help="every value; default: footers only")
    add("--max-faults", type=int, default=100, help="how many to list; all are counted")
    add_engine(check)
    check.set_defaults(run=_check)


def _synth(args: argparse.Namespace) -> int:
    """Write a Pailitao-like log of 192 fields as day-partitioned Parquet, with a known best AUC and log-loss."""
    schema = load_schema(args.schema) if args.schema else pailitao_schema("demo")
    threads = args.threads or len(os.sched_getaffinity(0))
    with RowBar("synth", args.rows) as bar:
        summary = write_synthetic(
            schema, args.out, rows=args.rows, days=args.days, seed=args.seed, threads=threads,
            force=args.force, progress=bar.reach,
        )  # fmt: skip
    test = summary["splits"]["test"]
    verb = "already there" if summary.get("already_there") else "written"
    print(f"{args.out}: {args.rows:,} rows {verb}, {args.days} days; the last day is the test split")
    if test["best_auc"] is None:
        print("its rows are all of one class, so it has no AUC: write more --rows")
    else:
        print(f"best reachable on it: AUC {test['best_auc']:.4f}, log-loss {test['best_log_loss']:.4f}")
    return 0


def _prepare(args: argparse.Namespace) -> int:
    """Turn a public data set's own files into Parquet splits and a fitted schema."""
    with RowBar("prepare") as bar:
        out = prepare(args.name, args.src, args.out, progress=bar.reach)
    print(f"{out}: train, valid, test and schema.toml")
    config = f"mbcnet_rec/configs/{args.name}.toml"
    is_shipped = (Path(__file__).parents[2] / config).is_file()
    others = f"train on {out}/train with schema {out}/schema.toml; start from mbcnet_rec/configs/demo.toml"
    print(f"next: {f'mbcnet train --config {config}' if is_shipped else others}")
    return 0


def _check(args: argparse.Namespace) -> int:
    """Check Parquet files against a schema and list faults by file, row group and column; exit code 1 if there are any."""
    schema = load_schema(args.schema)
    files = resolve_files(args.paths)
    engine = engine_of(args)
    with RowBar("check", shown=args.full and engine.is_first) as bar:
        report = check_files(
            files, schema, full=args.full, max_faults=args.max_faults, progress=bar.reach, engine=engine
        )
    if not engine.is_first:
        return 0
    for file, faults in groupby(report.faults, lambda fault: fault.file):
        print(file)
        for fault in faults:
            row_group = "" if fault.row_group == WHOLE_FILE else f"row group {fault.row_group}, "
            print(f"  {row_group}{f'column {fault.column}' if fault.column else 'file'}: {fault.message}")
    if report.num_faults > len(report.faults):
        print(f"... and {report.num_faults - len(report.faults)} more (--max-faults)")
    empty = f", {report.empty_files} empty file(s)" if report.empty_files else ""
    what = "every value" if args.full else "footers only; --full checks every value"
    verdict = f"{report.num_faults} fault(s)" if report.num_faults else "no fault"
    size = f"{files_in_words(files)}, {report.num_row_groups} row groups, {report.num_rows:,} rows"
    if not report.num_faults and len(report.labels) == 1 and not math.isnan(value := min(report.labels)):
        print(
            f"label {schema.label!r} is {value:g} in every row: nothing can be learned from these rows, and their AUC is not defined"
        )
    print(f"{verdict} in {size}{empty} ({what})")
    return 1 if report.num_faults else 0
