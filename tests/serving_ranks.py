"""Trains, evaluates and predicts the runs of serving_data.py on 1, 2 and 4 ranks, and kills one of them. Writes what they said to ranks.json.

With `long` behind the folder 4 ranks evaluate a run that is there already, and what they said goes to long.json.
"""

import json
import os
import signal
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from forked_ranks import report, run_ranks, training
from serving_data import KINDS

from data.schema import load_schema
from mbcnet_rec.config import load_config
from mbcnet_rec.run_training import open_splits
from mbcnet_rec.runtime.process import joined_process
from mbcnet_rec.scoring.evaluate import Question, run_evaluation
from mbcnet_rec.scoring.predict import put_in_place, run_prediction
from mbcnet_rec.scoring.tally import EXACT_ROWS
from mbcnet_rec.scoring.trained_run import find_best
from mbcnet_rec.training.evaluation import evaluate_stream
from mbcnet_rec.training.hooks import Hooks

FOLDER, LONG = Path(sys.argv[1]), sys.argv[2:] == ["long"]
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
    return lambda: run(f"{kind}_train", training(FOLDER / f"run_{kind}.toml", [], lambda rank: Hooks(), resume=False))


def evaluate(kind, world, **more):
    question = Question(by=("hour",), max_slices=FEW_SLICES, **more)
    action = partial(run_evaluation, str(FOLDER / kind), question, as_json=True)
    return lambda: run(f"{kind}_evaluate", lambda rank: action(), world=world)


def prediction(kind, world, name, put=lambda rank: put_in_place):
    def action(rank):
        data, out = [str(FOLDER / "test.parquet")], str(FOLDER / f"{kind}_{name}")
        return run_prediction(str(FOLDER / kind), data, out, chunk_rows=CHUNK_ROWS, put=put(rank))

    return lambda: run(f"{kind}_{name}", action, world=world)


def evaluated_in_training(rank):
    """The test rows as training evaluates them: all gathered, and streamed."""
    config = load_config(FOLDER / "run_row_wise.toml")
    schema = load_schema(config.schema)
    with joined_process("cpu") as process:
        built = find_best(config, FOLDER / "row_wise", process).build(process)
        found = []
        for exact_rows in (EXACT_ROWS, 500):
            stream = open_splits(config.data, 0, schema, process)["test"]
            found.append(evaluate_stream(built, stream, process, nullcontext, exact_rows=exact_rows, ranking_k=(2, 5)))
        print(json.dumps(found))
    return 0


def killed():
    """Killed on 2 ranks, looked at, and resumed by the same command on 1."""
    found = prediction("row_wise", 2, "killed", killed_at_its_second_chunk)()
    out = FOLDER / "row_wise_killed"
    found["left"] = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    return found


scenarios = {f"{kind}_train": train(kind) for kind in KINDS}
for kind in KINDS:
    for world in (1, 2):
        scenarios[f"{kind}_evaluate_{world}"] = evaluate(kind, world)
    scenarios[f"{kind}_predict_1"] = prediction(kind, 1, "predicted_1")
scenarios["row_wise_stream_2"] = evaluate("row_wise", 2, exact_rows=500)
scenarios["row_wise_predict_2"] = prediction("row_wise", 2, "predicted_2")
scenarios["in_training"] = lambda: run("in_training", evaluated_in_training)
scenarios["killed"] = killed
scenarios["resumed"] = prediction("row_wise", 1, "killed")
if LONG:
    scenarios = {"row_wise_evaluate_4": evaluate("row_wise", 4)}
report(scenarios, FOLDER / ("long.json" if LONG else "ranks.json"))
