"""`mbcnet evaluate`, `predict`, `compare` and `importance`: what a run says of rows."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from data.errors import InputError
from mbcnet_rec.commands.arguments import engine_of

if TYPE_CHECKING:
    from mbcnet_rec.scoring.evaluate import Question


def evaluate(args: argparse.Namespace) -> int:
    """AUC, GAUC, log-loss, normalised entropy and calibration with 95 % intervals, in any number of processes."""
    from mbcnet_rec.scoring.evaluate import run_evaluation  # imports torchrec

    return run_evaluation(args.run_folder, _question(args, args.data), as_json=args.json)


def _question(args: argparse.Namespace, data: Sequence[str]) -> "Question":
    from mbcnet_rec.scoring.evaluate import EXACT_ROWS, Question  # imports torchrec

    by, ks, exact_rows = tuple(dict.fromkeys(args.by)), tuple(args.ranking_k), args.exact_rows or EXACT_ROWS
    return Question(args.split, tuple(data), by=by, exact_rows=exact_rows, ranking_k=ks)


def predict(args: argparse.Namespace) -> int:
    """Write each row's probability, fused and by branch, in the order of the input files.

    Started again, it continues where it stopped. Labels are not needed. With --engine each file is a task of its own.
    """
    engine = engine_of(args)
    if args.engine:
        from mbcnet_rec.scoring.predict_files import predict_files  # imports torchrec

        return predict_files(args.run_folder, args.data, args.out, engine, keep=args.keep, overwrite=args.overwrite)
    if args.workers:
        raise InputError(f"--workers {args.workers}: of an engine; add --engine local")
    from mbcnet_rec.scoring.predict import run_prediction  # imports torchrec

    return run_prediction(args.run_folder, args.data, args.out, keep=args.keep, overwrite=args.overwrite)


def compare(args: argparse.Namespace) -> int:
    """Compare two runs on the same rows: paired differences of AUC, GAUC, log-loss and calibration with 95 % intervals, RUN_A less RUN_B.

    With --expected-clicks also the clicks that either ranking would get. With --log and no runs the click rates of `mbcnet serve --split`'s arms, b less a.
    """
    if bool(args.log) == bool(args.theirs) or (
        args.log and (args.ours or args.data or args.expected_clicks or args.ranking_k)
    ):
        raise InputError(
            "compare: wanted RUN_A and RUN_B, or --log PATH without --data, --expected-clicks and --ranking-k"
        )
    if (args.key or args.label) and not args.log:
        raise InputError("--key and --label name columns of --log; leave them out")
    from mbcnet_rec.scoring.compare import Comparison, run_arms, run_comparison  # imports torchrec

    question = _question(args, args.log or args.data)
    if args.log:
        return run_arms(question, args.label or "click", args.key, args.command_line, as_json=args.json, page=args.out)
    comparison = Comparison(args.ours, args.theirs, question, args.expected_clicks or 0, args.command_line)
    return run_comparison(comparison, as_json=args.json, page=args.out)


def importance(args: argparse.Namespace) -> int:
    """What AUC and log-loss lose where a field's or a group's values are those of other rows; in the report, too."""
    from mbcnet_rec.scoring.evaluate import Question  # imports torchrec
    from mbcnet_rec.scoring.importance import run_importance
    from mbcnet_rec.scoring.trained_run import opened_run

    with opened_run(args.run_folder) as (run, process):
        question = Question(args.split, tuple(args.data))
        return run_importance(run, process, question, args.rows, args.repeats, as_json=args.json)
