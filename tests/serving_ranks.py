"""Trains, evaluates and predicts the runs of serving_data.py on 1, 2 and 4 ranks, and kills one of them. Writes what they said to ranks.json."""

import os
import signal
import sys
from pathlib import Path

from forked_ranks import mbcnet, report, run_ranks
from serving_data import KINDS

from mbcnet_rec.scoring import predict, slices
from mbcnet_rec.scoring import scorer as pieces

FOLDER = Path(sys.argv[1])
PIECE_ROWS, FEW_SLICES = 500, 10


def run(name, *args, hook=lambda rank: None, **options):
    return run_ranks(mbcnet([str(arg) for arg in args], hook), FOLDER / "logs" / name, **options)


def few_slices(rank):
    slices.MAX_SLICES = FEW_SLICES


def small_pieces(rank):
    pieces.PIECE_ROWS = PIECE_ROWS


def killed_at_its_second_piece(rank):
    """Rank 1 is killed with its second piece written, but not yet in its place."""
    small_pieces(rank)
    put, calls = predict.put_in_place, []

    def counted(draft, place):
        calls.extend([place] if place.suffix == ".parquet" else [])
        if rank == 1 and len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        put(draft, place)

    predict.put_in_place = counted


def train(kind):
    return lambda: run(f"{kind}_train", "train", "--config", FOLDER / f"run_{kind}.toml")


def evaluate(kind, world, *more):
    args = ("evaluate", FOLDER / kind, "--by", "hour", "--json", *more)
    return lambda: run(f"{kind}_evaluate", *args, world=world, hook=few_slices)


def prediction(kind, world, name, hook=small_pieces):
    args = ("predict", FOLDER / kind, "--data", FOLDER / "test.parquet", "--out", FOLDER / f"{kind}_{name}")
    return lambda: run(f"{kind}_{name}", *args, world=world, hook=hook)


def killed():
    """Killed on 2 ranks, looked at, and gone on with by the same command on 1."""
    found = prediction("row_wise", 2, "killed", killed_at_its_second_piece)()
    out = FOLDER / "row_wise_killed"
    found["left"] = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    return found


scenarios = {}
for kind in KINDS:
    scenarios[f"{kind}_train"] = train(kind)
    for world in (1, 2, 4):
        scenarios[f"{kind}_evaluate_{world}"] = evaluate(kind, world)
    scenarios[f"{kind}_stream_2"] = evaluate(kind, 2, "--exact-rows", 500)
    for world in (1, 2):
        scenarios[f"{kind}_predict_{world}"] = prediction(kind, world, f"predicted_{world}")
scenarios["killed"] = killed
scenarios["resumed"] = prediction("row_wise", 1, "killed")
report(scenarios, FOLDER / "ranks.json")
