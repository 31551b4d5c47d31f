"""`mbcnet serve`: answer POST /score with an artifact's probabilities, until SIGTERM. Needs nothing of the training code.

docs/serving.md has the requests, and how models change without a restart.
"""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from data.errors import InputError
from mbcnet_rec.server.options import Options, read_token


def register(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("artifact", metavar="ARTIFACT", type=Path, help="what `mbcnet export` wrote")
    for each in fields(Options):
        if words := each.metadata.get("help"):
            name = f"--{each.name.replace('_', '-')}"
            if each.default is False:
                parser.add_argument(name, action="store_true", help=words)
            else:
                kind = Path if each.default is None else type(each.default)
                shown = words if each.default is None else f"{words} (default {each.default})"
                metavar = "PATH" if kind is Path else "VALUE"
                parser.add_argument(name, type=kind, default=each.default, metavar=metavar, help=shown)
    parser.set_defaults(run=_serve)


def _serve(args: argparse.Namespace) -> int:
    given = {each.name: getattr(args, each.name) for each in fields(Options) if hasattr(args, each.name)}
    tokens: dict[str, Any] = {
        "score_token": read_token(args.score_token_file, "MBCNET_SCORE_TOKEN"),
        "models_token": read_token(args.models_token_file, "MBCNET_MODELS_TOKEN"),
    }
    options = Options(**given, **tokens)
    options.check()
    try:
        from mbcnet_rec.server.run import run_server  # imports torch
    except ModuleNotFoundError as error:
        if error.name not in ("uvicorn", "starlette", "prometheus_client"):
            raise
        words = "run: pip install uvicorn starlette prometheus-client (requirements/serve.txt has the pins)"
        raise InputError(f"{error.name} is not installed; {words}") from None
    return run_server(options)
