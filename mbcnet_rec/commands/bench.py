"""`mbcnet bench`: measure what this machine does with a model."""

import argparse
from typing import Any

RIVALS = ("dcnv2", "dnn")  # of the paper's online experiment, and the plain one


def register(subparsers: Any) -> None:
    """Add the commands."""
    bench = subparsers.add_parser("bench", help="measure an artifact's latency", description=__doc__)
    actions = bench.add_subparsers(metavar="ACTION", required=True, parser_class=type(bench))
    latency = actions.add_parser(
        "latency", help="milliseconds of a request, by rows and threads", description=_latency.__doc__
    )
    latency.add_argument("folders", metavar="DIR", nargs="+", help="what `mbcnet export` wrote")
    latency.add_argument(
        "--beside", metavar="KIND,...",
        help="time these models on the same tables too (default: dcnv2,dnn beside one artifact, none beside several)",
    )  # fmt: skip
    latency.add_argument(
        "--rows",
        type=_counts,
        default=(1, 8, 64, 512),
        metavar="N,...",
        help="of a request (default 1,8,64,512)",
    )
    latency.add_argument("--threads", type=_counts, default=(1, 2, 4), metavar="N,...", help="default 1,2,4")
    latency.add_argument(
        "--seconds", type=float, default=5.0, help="for each pair of rows and threads (default 5)"
    )
    latency.add_argument(
        "--calls",
        type=int,
        default=100,
        help="of each model at least; below 100 there is no p99 (default 100)",
    )
    latency.add_argument(
        "--data", default="", metavar="FILE", help="Parquet rows as requests; default: drawn"
    )
    latency.add_argument("--compiled", action="store_true", help="also time the compiled dense part")
    latency.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
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
    """Print p50, p95 and p99 of one request to an artifact, beside DCNv2 and DNN on the same tables, and Table 8 by part."""
    from mbcnet_rec.serving.latency import Contest, run_latency

    beside = tuple(name.strip() for name in (args.beside or "").split(",") if name.strip())
    if args.beside is None and len(args.folders) == 1:
        beside = RIVALS
    contest = Contest(args.rows, args.threads, args.seconds, max(1, args.calls))
    return run_latency(
        args.folders, contest, beside=beside, data=args.data, compiled=args.compiled, as_json=args.json
    )
