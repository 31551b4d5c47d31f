"""`mbcnet schema`: infer a schema from files, fit it on training files, show it."""

import argparse
import sys
from functools import partial
from pathlib import Path

from tqdm import tqdm

from data.errors import InputError
from data.profile.count import table_2
from data.profile.fit import write_fitted
from data.profile.grow import grow_fitted, growth_lines
from data.profile.infer import infer_schema
from data.profile.units import Work
from data.reading.files import files_in_words, resolve_files
from data.schema import load_schema
from data.schema.show import print_schema
from data.whole_folder import write_whole
from mbcnet_rec.checkpoints.run_schema import newest_schema
from mbcnet_rec.commands.arguments import engine_of
from mbcnet_rec.logs.progress import RowBar


def infer(args: argparse.Namespace) -> int:
    """Profile Parquet files in bounded memory and write a commented schema to look through."""
    out, files, engine = args.out, resolve_files(args.paths), engine_of(args)
    if out.exists() and not args.force:
        raise InputError(f"{out}: exists already; choose another file, or pass --force to replace it")
    with RowBar("infer", shown=engine.is_first) as bar:
        name, work = args.name or out.stem, Work(engine, bar.reach, out)
        text, suspicious = infer_schema(files, name=name, label=args.label, rows=args.rows, work=work)
    if not engine.is_first:
        return 0
    write_whole(out, text)
    for line in suspicious:
        print(f"left out: {line}", file=sys.stderr)
    print(
        f"{out}: written from {bar.rows:,} rows of {files_in_words(files)}; "
        f"{len(suspicious)} suspicious column(s) are left out as comments"
    )
    print(f"next: look through it, then mbcnet schema fit {out} TRAINING_FILES -o FOLDER")
    return 0


def fit(args: argparse.Namespace) -> int:
    """Replace every "fit" of a schema (vocabularies, means, boundaries) by what the training files say."""
    path, files = Path(args.schema), resolve_files(args.paths)
    if args.grow:
        schema = newest_schema(path) if path.is_dir() else load_schema(path)
        out = Path(args.out or (path if path.is_dir() else path.parent))
        with RowBar("grow") as bar:
            changes = grow_fitted(schema, files, out, bar.reach)
        if not changes:
            print(f"{out}: all of {files_in_words(files)} were counted before; nothing changes")
        for line in growth_lines(changes):
            print(line)
        print(f"next: mbcnet train --continue RUN --data FILES, of a run whose schema is {out / 'schema.toml'}")
        return 0
    schema = load_schema(path)
    if not args.out:
        raise InputError("wanted -o FOLDER, where the fitted schema goes; add it")
    engine = engine_of(args)
    with RowBar("fit", shown=engine.is_first) as bar:
        told, work = partial(tqdm.write, file=sys.stderr), Work(engine, bar.reach)
        write_fitted(schema, files, args.out, force=args.force, report=told, work=work)
    if not engine.is_first:
        return 0
    print(f"{args.out}: schema.toml and vocabularies of {bar.rows:,} rows of {files_in_words(files)}")
    print(f"next: mbcnet data check FILES --schema {Path(args.out) / 'schema.toml'}, then train with it")
    return 0


def show(args: argparse.Namespace) -> int:
    """Print tables, fields and groups with their sizes; of --data users, items, samples, clicks and density."""
    schema = load_schema(args.path)
    if (args.user or args.item) and not args.data:
        raise InputError("--user and --item say what to count in the files of --data; name these too")
    lines = []
    if args.data:
        files = resolve_files(args.data)
        with RowBar("count") as bar:
            lines = ["", f"{files_in_words(files)}:", *table_2(files, schema, args.user, args.item, bar.reach)]
    print_schema(schema)
    print("\n".join(lines), end="\n" if lines else "")
    return 0
