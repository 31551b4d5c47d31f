"""Two ranks of one thread against one process of two threads, on the same global batch: what distribution costs on one machine.

    python benchmarks/ranks.py [--quick] [--json] [--batch 1024] [--seconds 90]

Both sides are the paper's model on the same rows; each rank trains half of them, and tables are sharded over both ranks. The sides take
turns; the one that waits does not compute. Needs two free cores: other work on them hits the two sides differently.

ranks_efficiency          step of 1 process x 2 threads / step of 2 ranks x 1 thread; 1: distribution is free
rank_step_seconds, thread_step_seconds    median step of each side
"""

import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from paper_size import MBCNET, cut_schema, read_batches, run_config, training_step, written_log
from side_by_side import Answering, answering_ranks, parser_of, print_figures, ratio, take_turns

from data.schema import load_schema
from mbcnet_rec.build import build
from mbcnet_rec.runtime.process import joined_process

STEPS = 2  # of one turn
CORES = 2


def steps_of(ranks: list[Answering]) -> None:
    """Train STEPS steps on every rank."""
    for rank in ranks:
        rank.ask("go")
    for rank in ranks:
        rank.answer()


def train_when_told(folder: Path, batch: int, threads: int) -> int:
    """One rank: a line on standard input is STEPS steps."""
    torch.set_num_threads(threads)
    schema = load_schema(folder / "schema.toml")
    with joined_process("cpu") as process:
        rows = read_batches(folder, schema, batch // process.world_size)[process.rank]
        step = training_step(build(run_config(folder, MBCNET, batch), schema, process), rows)
        for _ in sys.stdin:
            for _ in range(STEPS):
                step()
            print("done", flush=True)
    return 0


def main() -> int:
    if sys.argv[1:2] == ["--rank-of"]:
        return train_when_told(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    parser = parser_of(__doc__)
    parser.add_argument("--batch", type=int, help="global; default 1024, quick 128")
    parser.add_argument("--max-rows", type=int, default=10_000, help="of a table")
    parser.add_argument("--seconds", type=float, help="of measuring in turns; default 90, quick 4")
    args = parser.parse_args()
    args.batch = args.batch or (128 if args.quick else 1024)
    print(
        "prediction: the dense gradients are 53 MB, 30 to 50 ms over loopback, partly beside the backward pass; both ranks repeat Adam\n"
        "(6 ms); pooled rows are 11 MB; of a step of 600 ms that leaves ranks_efficiency at 0.9 to 0.95"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        written_log(folder, cut_schema(args.max_rows), 2 * args.batch)
        sides = {}
        for name, world in (("ranks", CORES), ("threads", 1)):
            words = ["--rank-of", str(folder), str(args.batch), str(CORES // world)]
            sides[name] = answering_ranks(__file__, words, world, CORES // world)
        cases = {name: partial(steps_of, ranks) for name, ranks in sides.items()}
        times = take_turns(cases, args.seconds or (4 if args.quick else 90))
        for rank in (rank for ranks in sides.values() for rank in ranks):
            rank.end()
    figures = {
        "ranks_efficiency": ratio(times["threads"], times["ranks"]),
        "rank_step_seconds": statistics.median(times["ranks"]) / STEPS,
        "thread_step_seconds": statistics.median(times["threads"]) / STEPS,
        "rounds": len(times["ranks"]),
        "batch": args.batch,
    }
    print_figures(figures, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
