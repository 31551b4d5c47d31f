"""Trains, evaluates and predicts the runs of serving_data.py on 1, 2 and 4 ranks, and kills one of them. Writes what they said to ranks.json."""

import os
import signal
import sys
from functools import partial
from pathlib import Path

from forked_ranks import mbcnet, report, run_ranks
from serving_data import KINDS

from mbcnet_rec.scoring.evaluate import Question, run_evaluation
from mbcnet_rec.scoring.predict import put_in_place, run_prediction

FOLDER = Path(sys.argv[1])
CHUNK_ROWS, FEW_SLICES = 500, 10


def run(name, action, **options):
    return run_ranks(action, FOLDER / "logs" / name, **options)


def killed_at_its_second_chunk(rank):
    """Rank 1 is killed with its second chunk written, but not yet in its place."""
    calls = []

    def put(draft, place):
        calls.extend([place] if place.suffix == ".parquet" else [])
        if rank == 1 and len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        put_in_place(draft, place)

    return put


def train(kind):
    args = ["train", "--config", str(FOLDER / f"run_{kind}.toml")]
    return lambda: run(f"{kind}_train", mbcnet(args))


def evaluate(kind, world, **more):
    question = Question(by=("hour",), max_slices=FEW_SLICES, **more)
    action = partial(run_evaluation, str(FOLDER / kind), question, as_json=True)
    return lambda: run(f"{kind}_evaluate", lambda rank: action(), world=world)


def prediction(kind, world, name, put=lambda rank: None):
    def action(rank):
        data, out = [str(FOLDER / "test.parquet")], str(FOLDER / f"{kind}_{name}")
        return run_prediction(str(FOLDER / kind), data, out, chunk_rows=CHUNK_ROWS, put=put(rank))

    return lambda: run(f"{kind}_{name}", action, world=world)


def killed():
    """Killed on 2 ranks, looked at, and gone on with by the same command on 1."""
    found = prediction("row_wise", 2, "killed", killed_at_its_second_chunk)()
    out = FOLDER / "row_wise_killed"
    found["left"] = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    return found


scenarios = {}
for kind in KINDS:
    scenarios[f"{kind}_train"] = train(kind)
    for world in (1, 2, 4):
        scenarios[f"{kind}_evaluate_{world}"] = evaluate(kind, world)
    scenarios[f"{kind}_stream_2"] = evaluate(kind, 2, exact_rows=500)
    for world in (1, 2):
        scenarios[f"{kind}_predict_{world}"] = prediction(kind, world, f"predicted_{world}")
scenarios["killed"] = killed
scenarios["resumed"] = prediction("row_wise", 1, "killed")
report(scenarios, FOLDER / "ranks.json")
