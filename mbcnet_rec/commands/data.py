"""`mbcnet data`: write synthetic logs, prepare public data sets, convert logs, check files against a schema."""

import argparse
import math
import os
from itertools import groupby
from pathlib import Path

from data.errors import InputError
from data.profile.check import WHOLE_FILE, check_files
from data.profile.units import Work
from data.public.convert import REJECTS, Request
from data.public.convert import convert as convert_logs
from data.public.prepare import prepare as prepare_public
from data.public.text_rows import Form
from data.reading.files import files_in_words, resolve_files
from data.schema import load_schema
from data.synthetic.planted import pailitao_schema
from data.synthetic.write import write_synthetic
from mbcnet_rec.commands.arguments import engine_of
from mbcnet_rec.logs.progress import RowBar


def synth(args: argparse.Namespace) -> int:
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


def prepare(args: argparse.Namespace) -> int:
    """Turn a public data set's own files into Parquet splits and a fitted schema."""
    with RowBar("prepare") as bar:
        out = prepare_public(args.name, args.src, args.out, progress=bar.reach)
    print(f"{out}: train, valid, test and schema.toml")
    config = f"mbcnet_rec/configs/{args.name}.toml"
    is_shipped = (Path(__file__).parents[2] / config).is_file()
    others = f"train on {out}/train with schema {out}/schema.toml; start from mbcnet_rec/configs/demo.toml"
    print(f"next: {f'mbcnet train --config {config}' if is_shipped else others}")
    return 0


def convert(args: argparse.Namespace) -> int:
    """Turn CSV, JSON lines, Parquet, Delta or Iceberg into day-partitioned Parquet with page checksums; rows that cannot be read go to rejects.jsonl."""
    given = dict(each.split("=", 1) for each in args.type if "=" in each)
    if len(given) < len(args.type):
        raise InputError(f"--type {' --type '.join(args.type)}: wanted COLUMN=TYPE, once for each column; write it so")
    form = Form(args.delimiter.encode().decode("unicode_escape"), tuple(args.names), args.list_separator)
    request = Request(args.day, load_schema(args.schema) if args.schema else None, given, form)
    engine = engine_of(args)
    with RowBar("convert", shown=engine.is_first) as bar:
        made = convert_logs(args.paths, args.out, request, Work(engine, bar.reach))
    if not engine.is_first:
        return 0
    print(f"{args.out}: {made.rows:,} rows" + (f" of {made.days} days" if args.day else ""))
    if made.rejected:
        print(f"{made.rejected:,} rows rejected, see {args.out}/{REJECTS}; the first: {made.first}")
    if made.unread:
        unread = ", ".join(made.unread)
        print(f"left out, since no file begins with them: columns {unread}; name them by --schema or --type")
    print(f"next: mbcnet schema infer {args.out} -o schema.toml")
    return 0


def check(args: argparse.Namespace) -> int:
    """Check Parquet files against a schema and list faults by file, row group and column; exit code 1 if there are any."""
    schema = load_schema(args.schema)
    files = resolve_files(args.paths)
    engine = engine_of(args)
    with RowBar("check", shown=args.full and engine.is_first) as bar:
        work = Work(engine, bar.reach)
        report = check_files(files, schema, full=args.full, max_faults=args.max_faults, work=work)
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
