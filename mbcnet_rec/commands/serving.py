"""`mbcnet export`, `serve` and `bench`: a run's artifact, the scorer that answers with it, and what this machine does with it."""

import argparse

from data.errors import InputError
from mbcnet_rec.server.options import Options, read_token

RIVALS = ["dcnv2", "dnn"]  # of the paper's online experiment, and the plain one


def export(args: argparse.Namespace) -> int:
    """Write the fused path of a run's best checkpoint, and say its size and what quantisation costs.

    The artifact needs torch and fbgemm only; its mbcnet_serving.py loads it.
    """
    if args.since and (args.rows or args.branches or args.aot or args.calibrate or args.triton):
        raise InputError(
            "--since: a delta has the rows, branches and calibration of its artifact, and nothing compiled; leave --rows, --branches, "
            "--calibrate, --triton, --aot out"
        )
    from mbcnet_rec.serving.export import run_delta, run_export  # imports torchrec

    if args.since:
        return run_delta(args.run_folder, args.since, args.out, overwrite=args.overwrite)
    names = ("branches", "aot", "calibrate", "triton", "overwrite")
    given = {name: getattr(args, name) for name in names}
    return run_export(args.run_folder, args.out, rows=args.rows or "int8", **given)


def serve(args: argparse.Namespace) -> int:
    """Answer POST /score with an artifact's probabilities, until SIGTERM. Needs nothing of the training code.

    docs/serving.md has the requests, and how models change without a restart.
    """
    known = Options.__dataclass_fields__
    given = {name: value for name, value in vars(args).items() if name in known and value is not None}
    given["score_token"] = read_token(args.score_token_file, "MBCNET_SCORE_TOKEN")
    given["models_token"] = read_token(args.models_token_file, "MBCNET_MODELS_TOKEN")
    options = Options(**given)
    options.check()
    try:
        from mbcnet_rec.server.run import run_server  # imports torch
    except ModuleNotFoundError as error:
        if error.name not in ("uvicorn", "starlette", "prometheus_client"):
            raise
        words = "run: pip install uvicorn starlette prometheus-client (requirements/serve.txt has the pins)"
        raise InputError(f"{error.name} is not installed; {words}") from None
    return run_server(options)


def latency(args: argparse.Namespace) -> int:
    """Print p50, p95 and p99 of one request to an artifact, beside DCNv2 and DNN on the same tables."""
    from mbcnet_rec.serving.latency import Contest, run_latency  # imports torchrec

    beside = args.beside
    if beside is None:
        beside = RIVALS if len(args.folders) == 1 else []
    contest = Contest(tuple(args.rows), tuple(args.threads), args.seconds, max(1, args.calls))
    return run_latency(args.folders, contest, beside=tuple(beside), compiled=args.compiled, as_json=args.json)
