"""`mbcnet bench`: measure what this machine does with a model."""

import argparse

from mbcnet_rec.commands.arguments import names

RIVALS = ["dcnv2", "dnn"]  # of the paper's online experiment, and the plain one


def register(parser: argparse.ArgumentParser) -> None:
    """Add the commands."""
    actions = parser.add_subparsers(metavar="ACTION", required=True, parser_class=type(parser))
    latency = actions.add_parser("latency", help="milliseconds of a request, by rows and threads", description=_latency.__doc__)  # fmt: skip
    add = latency.add_argument
    add("folders", metavar="DIR", nargs="+", help="what `mbcnet export` wrote")
    add("--beside", type=names, metavar="KIND,...", help="time these models on the same tables too (default: dcnv2,dnn beside one artifact, none beside several)")  # fmt: skip
    add("--rows", type=_counts, default=(1, 8, 64, 512), metavar="N,...", help="default 1,8,64,512")
    add("--threads", type=_counts, default=(1, 2, 4), metavar="N,...", help="default 1,2,4")
    add("--seconds", type=float, default=5.0, help="for each pair of rows and threads (default 5)")
    add("--calls", type=int, default=100, help="of each model; below 100 there is no p99 (default 100)")
    add("--compiled", action="store_true", help="also time the compiled dense part")
    add("--json", action="store_true", help="print one JSON object instead of tables")
    latency.set_defaults(run=_latency)


def _counts(text: str) -> tuple[int, ...]:
    """Parse "1,8,64"."""
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: wanted whole numbers of at least 1, such as 1,8,64")
    return counts


def _latency(args: argparse.Namespace) -> int:
    """Print p50, p95 and p99 of one request to an artifact, beside DCNv2 and DNN on the same tables."""
    from mbcnet_rec.serving.latency import Contest, run_latency  # imports torchrec

    beside = args.beside
    if beside is None:
        beside = RIVALS if len(args.folders) == 1 else []
    contest = Contest(args.rows, args.threads, args.seconds, max(1, args.calls))
    return run_latency(args.folders, contest, beside=tuple(beside), compiled=args.compiled, as_json=args.json)
