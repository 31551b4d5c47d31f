"""What the per-branch diagnostics cost: their share of the time of training, inside the real trainer.

    python benchmarks/diagnostics.py [--quick] [--json] [--config mbcnet_rec/configs/adult.toml]

Every function that exists only for the log is seen by Python's profiler where training calls it: in a step that ends with a
line of the log norms of latents and ||W - I||; at the line disagreement rates, AUC, log-loss, normalised entropy and calibration of every output, averages, shares of the gradient.
The time of all of them, over that of whole lines of the log, the first of which warms up. CPU only: on a GPU a call returns before its work is done.

diagnostics_share          of a run with the log's default of a line each 20 steps; the bound is 0.02
share/FUNCTION             the parts
milliseconds_a_step        a step with its share of the log, diagnostics included, under the profiler
"""

import cProfile
import io
import pstats
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from paper_size import MBCNET, cut_schema, run_config, written_log
from side_by_side import print_figures, timing_parser_of
from small_log import at_each_step

from mbcnet_rec.config import RunConfig, load_config
from mbcnet_rec.model import objective
from mbcnet_rec.run_training import run_training
from mbcnet_rec.training import trainer

WATCHED: tuple[Any, ...] = (
    objective.latent_norms, objective.distance_from_identity, trainer.gradient_shares, trainer.average_terms, trainer.real_rows,
    trainer.evaluate_predictions, trainer.disagreements, trainer.latent_measures,
)  # fmt: skip


def measure(config: RunConfig) -> dict[str, Any]:
    """Train, and tell the shares of the steps after the first line of the log."""
    profiler, times = cProfile.Profile(), []
    first, last = config.train.log_every + 1, config.train.max_steps

    def note(step: int) -> None:
        if step in (first, last):  # both begin behind a line of the log
            times.append(time.perf_counter())
            profiler.enable() if step == first else profiler.disable()

    with redirect_stdout(io.StringIO()):
        run_training(config, hooks=at_each_step(note))
    whole = times[1] - times[0]
    spent = pstats.Stats(profiler).stats
    shares = {f"share/{each.__name__}": seconds_in(each, spent) / whole for each in WATCHED}
    figures = {"diagnostics_share": sum(shares.values())} | shares
    return figures | {"milliseconds_a_step": 1e3 * whole / (last - first), "steps": last - first}


def seconds_in(function: Any, spent: dict[tuple[str, int, str], tuple]) -> float:
    """Seconds from call to return, summed over its calls; the code object is what a profiler knows a function by."""
    code = function.__code__
    return spent.get((code.co_filename, code.co_firstlineno, code.co_name), (0, 0, 0.0, 0.0))[3]


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
            config.train, out=str(folder / "run"), epochs=10_000, max_steps=steps + config.train.log_every + 1,
            eval_every=10**6, patience=0, schedule="constant", device="cpu",
        )  # fmt: skip
        figures = measure(replace(config, train=train, data=replace(config.data, valid=(), test=())))
    figures |= {"batch": batch, "threads": args.threads, "log_every": config.train.log_every}
    print_figures(figures, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
