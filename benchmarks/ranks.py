"""Two ranks of one thread against one process of two threads, on the same global batch: what distribution costs on one machine.

    python benchmarks/ranks.py [--quick] [--json] [--batch 1024] [--seconds 90]

Both sides are the paper's model on the same rows; each rank trains half of them, and tables are sharded over both ranks. The sides take
turns; the one that waits does not compute. Needs two free cores: other work on them hits the two sides differently.

ranks_efficiency          step of 1 process x 2 threads / step of 2 ranks x 1 thread; 1: distribution is free
rank_step_seconds, thread_step_seconds    median step of each side
"""

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from side_by_side import (
    free_port,
    parser_of,
    print_figures,
    rank_environment,
    ratio,
    ratio_of_least,
    take_turns,
)

STEPS = 2  # of one turn
CORES = 2


class Side:
    """Processes that train together, a few steps whenever they are told to.

    Args:
        folder: of the log.
        world: how many.
        batch: global.
    """

    def __init__(self, folder: Path, world: int, batch: int) -> None:
        port = free_port()
        here = Path(__file__).parent
        self.ranks = [
            subprocess.Popen(
                [sys.executable, __file__, "--rank-of", str(folder), str(batch)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ
                | rank_environment(rank, world, port)
                | {
                    "PYTHONPATH": os.pathsep.join([str(here.parent), os.environ.get("PYTHONPATH", "")]),
                    "OMP_NUM_THREADS": str(CORES // world),
                },
            )
            for rank in range(world)
        ]

    def steps(self) -> None:
        """Train STEPS steps on every rank.

        Raises:
            SystemExit: a rank has ended.
        """
        for rank in self.ranks:
            assert rank.stdin is not None
            rank.stdin.write("go\n")
            rank.stdin.flush()
        for rank in self.ranks:
            assert rank.stdout is not None
            if rank.stdout.readline() != "done\n":
                raise SystemExit("a rank ended before it was told to; its words are above")

    def end(self) -> None:
        """Let every rank leave."""
        for rank in self.ranks:
            assert rank.stdin is not None
            rank.stdin.close()
        for rank in self.ranks:
            rank.wait(60)


def train_when_told(folder: Path, batch: int) -> int:
    """One rank: a line on standard input is STEPS steps."""
    import torch
    from paper_size import MBCNET, read_batches, run_config, training_step

    from data.schema import load_schema
    from mbcnet_rec.build import build
    from mbcnet_rec.runtime.process import joined_process

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    schema = load_schema(folder / "schema.toml")
    with joined_process("cpu") as process:
        own = batch // process.world_size
        rows = read_batches(folder, schema, own)[process.rank]
        step = training_step(build(run_config(folder, MBCNET, batch), schema, process), rows)
        for _ in sys.stdin:
            for _ in range(STEPS):
                step()
            print("done", flush=True)
    return 0


def main() -> int:
    if sys.argv[1:2] == ["--rank-of"]:
        return train_when_told(Path(sys.argv[2]), int(sys.argv[3]))
    parser = parser_of(__doc__)
    parser.add_argument("--batch", type=int, default=1024, help="global")
    parser.add_argument("--max-rows", type=int, default=10_000, help="of a table")
    parser.add_argument("--seconds", type=float, help="of measuring in turns; default 90, quick 10")
    args = parser.parse_args()
    print(
        "prediction: the dense gradients are 53 MB, 30 to 50 ms over loopback, partly beside the backward pass; both ranks repeat Adam\n"
        "(6 ms); pooled rows are 11 MB; of a step of 600 ms that leaves ranks_efficiency at 0.9 to 0.95"
    )
    from paper_size import cut_schema, written_log  # after the ranks' own branch: they import it themselves

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        written_log(folder, cut_schema(args.max_rows), 2 * args.batch)
        sides = {"ranks": Side(folder, CORES, args.batch), "threads": Side(folder, 1, args.batch)}
        cases: dict[str, Callable[[], object]] = {key: side.steps for key, side in sides.items()}
        times = take_turns(cases, args.seconds or (10 if args.quick else 90))
        for side in sides.values():
            side.end()
    figures: dict[str, Any] = {
        "ranks_efficiency": ratio(times["threads"], times["ranks"]),
        "ranks_efficiency_of_least": ratio_of_least(times["threads"], times["ranks"]),
        "rank_step_seconds": statistics.median(times["ranks"]) / STEPS,
        "thread_step_seconds": statistics.median(times["threads"]) / STEPS,
        "rounds": len(times["ranks"]),
        "batch": args.batch,
    }
    print_figures(figures, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
