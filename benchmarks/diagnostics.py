"""What the per-branch diagnostics cost: their share of the time of training, inside the real trainer.

    python benchmarks/diagnostics.py [--quick] [--json] [--config mbcnet_rec/configs/adult.toml]

Every function that exists only for the log is timed where training calls it: in a step that ends with a
line of the log norms of latents and ||W - I||; at the line disagreement rates, AUC, log-loss, normalised entropy and calibration of every output, averages, shares of the gradient.
The time of all of them, over the time from the first to the last line of the log. CPU only: on a GPU a call returns before its work is done.

diagnostics_share          of a run with the log's default of a line each 20 steps; the bound is 0.02
share/FUNCTION             the parts
milliseconds_a_step        a step with its share of the log, diagnostics included
"""

import contextlib
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import Any

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
    (loop, "own_rows"),
    (loop, "evaluate_predictions"),
    (loop, "diagnostics"),
)


@dataclass
class Clock:
    """Seconds of each watched function, between the first and the last line of the log."""

    started: float = 0.0
    ended: float = 0.0
    lines: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def note_line(self) -> None:
        """A line has been written: the first opens the measurement."""
        now = time.perf_counter()
        if not self.lines:
            self.started, self.seconds = now, {}
        self.ended, self.lines = now, self.lines + 1


def timed(function: Callable[..., Any], name: str, clock: Clock) -> Callable[..., Any]:
    """The function, its time added to the clock."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            clock.seconds[name] = clock.seconds.get(name, 0.0) + time.perf_counter() - start

    return call


@contextmanager
def watched(clock: Clock) -> Iterator[None]:
    """Time the watched functions, and note each line of the log."""
    kept = [(module, name, getattr(module, name)) for module, name in WATCHED]
    log = loop.Trainer._log

    def noted(self: Any, *args: Any) -> Any:
        found = log(self, *args)
        clock.note_line()
        return found

    for module, name, function in kept:
        setattr(module, name, timed(function, name, clock))
    loop.Trainer._log = noted
    try:
        yield
    finally:
        for module, name, function in kept:
            setattr(module, name, function)
        loop.Trainer._log = log


def measure(config: RunConfig) -> dict[str, Any]:
    """Train, and tell the shares."""
    clock = Clock()
    with watched(clock), contextlib.redirect_stdout(io.StringIO()):
        run_training(config)
    whole = clock.ended - clock.started
    steps = (clock.lines - 1) * config.train.log_every
    shares = {f"share/{name}": seconds / whole for name, seconds in clock.seconds.items()}
    return {
        "diagnostics_share": sum(shares.values()),
        **shares,
        "milliseconds_a_step": 1e3 * whole / steps,
        "steps": steps,
    }


def main() -> int:
    parser = timing_parser_of(__doc__)
    parser.add_argument("--config", help="of an MBCnet run instead of the paper's model on a synthetic log")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--steps", type=int, help="default 160, quick 40")
    parser.add_argument("--scale", choices=["paper", "demo"], default="paper", help="demo: 684 dims")
    args = parser.parse_args()
    if args.clock != "wall":
        parser.error("--clock cpu: this script compares parts of one run; leave it out")
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
            config.train,
            out=str(folder / "run"),
            epochs=10_000,
            max_steps=steps + config.train.log_every,
            eval_every=10**6,
            patience=0,
            schedule="constant",
            device="cpu",
        )
        figures = measure(replace(config, train=train, data=replace(config.data, valid=(), test=())))
    figures |= {"batch": batch, "threads": args.threads, "log_every": config.train.log_every}
    print_figures(figures, as_json=False)
    if args.json:
        print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
