"""What the per-branch diagnostics cost: their share of the time of training, inside the real trainer.

    python benchmarks/diagnostics.py [--quick] [--json] [--config mbcnet_rec/configs/adult.toml]

Every function that exists only for the log is timed where training calls it: in a step that ends with a
line of the log norms of latents and ||W - I||; at the line disagreement rates, AUC, log-loss, normalised entropy and calibration of every output, averages, shares of the gradient.
The time of all of them, over the time from the first to the last line of the log. CPU only: on a GPU a call returns before its work is done.

diagnostics_share          of a run with the log's default of a line each 20 steps; the bound is 0.02
share/FUNCTION             the parts
milliseconds_a_step        a step with its share of the log, diagnostics included
"""

import io
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from paper_size import MBCNET, cut_schema, run_config, written_log
from side_by_side import print_figures, timing_parser_of

from mbcnet_rec.config import RunConfig, load_config
from mbcnet_rec.model import objective
from mbcnet_rec.train import run_training
from mbcnet_rec.training import trainer as loop

WATCHED: tuple[tuple[Any, str], ...] = (
    (objective, "latent_norms"),
    (objective, "distance_from_identity"),
    (loop, "gradient_shares"),
    (loop, "average_terms"),
    (loop, "real_rows"),
    (loop, "evaluate_predictions"),
    (loop, "diagnostics"),
)


class Clock:
    """Seconds of each watched function, between the first and the last line of the log."""

    def __init__(self) -> None:
        self.lines: list[float] = []  # when each was written
        self.seconds: dict[str, float] = {}

    def timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The function, its time added to the clock."""

        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

        return wraps(function)(call)

    def note_line(self, line: Any) -> Any:
        """A line was written: the first opens the measurement."""
        if not self.lines:
            self.seconds.clear()
        self.lines.append(time.perf_counter())
        return line


def measure(config: RunConfig) -> dict[str, Any]:
    """Train, and tell the shares."""
    clock = Clock()
    with ExitStack() as stack:
        for module, name in WATCHED:
            stack.enter_context(patch.object(module, name, clock.timed(getattr(module, name), name)))
        log = loop.Trainer._log
        noted: Any = lambda *args: clock.note_line(log(*args))  # noqa: E731
        stack.enter_context(patch.object(loop.Trainer, "_log", noted))
        stack.enter_context(redirect_stdout(io.StringIO()))
        run_training(config)
    whole = clock.lines[-1] - clock.lines[0]
    steps = (len(clock.lines) - 1) * config.train.log_every
    shares = {f"share/{name}": seconds / whole for name, seconds in clock.seconds.items()}
    figures = {"diagnostics_share": sum(shares.values())} | shares
    return figures | {"milliseconds_a_step": 1e3 * whole / steps, "steps": steps}


def main() -> int:
    parser = timing_parser_of(__doc__)
    parser.add_argument("--config", help="of an MBCnet run instead of the paper's model on a synthetic log")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--steps", type=int, help="default 160, quick 40")
    parser.add_argument("--scale", choices=["paper", "demo"], default="paper", help="demo: 684 dims")
    args = parser.parse_args()
    steps = args.steps or (40 if args.quick else 160)
    batch = min(args.batch, 256) if args.quick else args.batch
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.config:
            config = load_config(args.config)
            batch = config.data.batch_size
        else:
            written_log(folder / "log", cut_schema(10_000, args.scale), 16 * batch)
            config = run_config(folder / "log", MBCNET, batch)
        train = replace(
            config.train, out=str(folder / "run"), epochs=10_000, max_steps=steps + config.train.log_every,
            eval_every=10**6, patience=0, schedule="constant", device="cpu",
        )  # fmt: skip
        figures = measure(replace(config, train=train, data=replace(config.data, valid=(), test=())))
    figures |= {"batch": batch, "threads": args.threads, "log_every": config.train.log_every}
    print_figures(figures, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
