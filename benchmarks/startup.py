"""From the command to the first step: how long a user waits, and for what.

    python benchmarks/startup.py [--quick] [--json] [--ranks 2] [--repeats 5]

help_seconds             `mbcnet --help`, median; likewise plan_help_seconds, data_help_seconds, schema_show_seconds
first_step_seconds       torchrun --nproc-per-node RANKS until every rank has made its first training step, median of repeats; the first
                         rank's stamps cut it into phases:
  agent                  torchrun itself: python, torch, the ranks' processes
  import                 everything that training imports
  join                   the ranks find each other
  build                  files, plan, tables, model
  step                   first batch, forward, backward, optimizers
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from side_by_side import environment, mbcnet, parser_of, print_figures

PHASES = ("agent", "import", "join", "build", "step")
STAMPS = "BENCHMARK_STAMPS"
WRITE_LOG = """
import sys
from pathlib import Path
from paper_size import cut_schema, written_log, run_config, MBCNET
from mbcnet_rec.config import config_text
folder = Path(sys.argv[1])
written_log(folder / 'log', cut_schema(1_000, 'demo'), 512)
config = run_config(folder / 'log', MBCNET, 128, out=str(folder / 'run'), max_steps=1, checkpoint_every=0)
(folder / 'run.toml').write_text(config_text(config))
"""
COMMANDS = {
    "help_seconds": ["--help"],
    "plan_help_seconds": ["plan", "--help"],
    "data_help_seconds": ["data", "--help"],
    "schema_show_seconds": ["schema", "show", "data/schemas/pailitao.toml"],
}


def main() -> int:
    if STAMPS in os.environ:
        return train_with_stamps()
    parser = parser_of(__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, help="default 5, quick 1")
    args = parser.parse_args()
    repeats = args.repeats or (1 if args.quick else 5)
    print(
        "prediction: --help 0.1 s, since it imports no library; a first step of two ranks on two cores 8 to 10 s: torchrun imports torch\n"
        "(1.7 s), both ranks import torchrec (4 s, at once), the rest is tables and one small step"
    )
    figures: dict[str, Any] = {
        key: statistics.median(seconds_of(command) for _ in range(2 * repeats + 1)) for key, command in COMMANDS.items()
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([sys.executable, "-c", WRITE_LOG, str(folder)], env=environment(), check=True)
        runs = [first_step(folder, args.ranks) for _ in range(repeats)]
    figures["first_step_seconds"] = statistics.median(sum(run.values()) for run in runs)
    for phase in PHASES:
        figures[f"first_step_{phase}_seconds"] = statistics.median(run[phase] for run in runs)
    print_figures(figures | {"ranks": args.ranks, "repeats": repeats}, args.json)
    return 0


def seconds_of(command: list[str]) -> float:
    """Wall seconds of one `mbcnet` command."""
    start = time.perf_counter()
    mbcnet(*command)
    return time.perf_counter() - start


def first_step(folder: Path, ranks: int) -> dict[str, float]:
    """Start so many ranks and return the phases of the slowest one, in seconds."""
    stamps = folder / "stamps"
    stamps.mkdir(exist_ok=True)
    for old in stamps.iterdir():
        old.unlink()
    agent = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"]
    own, start = environment() | {STAMPS: str(stamps)}, time.time()
    command = [*agent, __file__, str(folder / "run.toml")]
    done = subprocess.run(command, env=own, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the ranks ended with {done.returncode}:\n{done.stderr[-2000:]}")
    found = [json.loads(path.read_text()) for path in stamps.iterdir()]
    slowest = max(found, key=lambda times: times[-1])
    phases = zip(PHASES, [start, *slowest], slowest, strict=False)
    return {phase: after - before for phase, before, after in phases}


def train_with_stamps() -> int:
    """One rank: the real trainer, whose milestones are stamped: began, imported, joined, built, stepped."""
    stamps = [time.time()]
    from torch.optim.optimizer import register_optimizer_step_post_hook

    import mbcnet_rec.run_training
    from mbcnet_rec.config import load_config

    stamps.append(time.time())
    join, build = mbcnet_rec.run_training.joined_process, mbcnet_rec.run_training.build

    @contextmanager
    def joined(*args: Any) -> Iterator[Any]:
        with join(*args) as process:
            stamps.append(time.time())
            yield process

    def built(*args: Any) -> Any:
        result = build(*args)
        stamps.append(time.time())
        return result

    def stepped(*_: Any) -> None:
        if len(stamps) < len(PHASES):
            stamps.append(time.time())
            Path(os.environ[STAMPS], os.environ["RANK"]).write_text(json.dumps(stamps))

    mbcnet_rec.run_training.joined_process, mbcnet_rec.run_training.build = joined, built  # type: ignore[assignment]
    register_optimizer_step_post_hook(stepped)
    return mbcnet_rec.run_training.run_training(load_config(sys.argv[1], []), overwrite=True)


if __name__ == "__main__":
    sys.exit(main())
