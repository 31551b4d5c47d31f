"""Are our models FuxiCTR's models? Both start from the same weights and train on the same batches; predictions are compared.

    python benchmarks/same_start.py --data prepared/adult prepared/criteo --peer-python VENV/bin/python --peer-source FUXICTR

Over seeds, test AUCs of two equal models scatter as widely as the test part is small (quality.py). Here nothing is drawn by the peer: our
initial weights, our batches, in our order, and the masks of our dropout go to it. What is left is rounding, which training makes larger with
every step. Models and protocol are those of quality.py: Adam, full-table L2, gradient clip, an evaluation each epoch, rates x 0.1 at each
that does not improve, stop after two in a row; what counts is each side's best epoch by its own predictions of the validation rows.
FuxiCTR's FinalMLP adds two biases to one sum; its second stays 0. Without a peer only our side is trained, and what compares is null.

largest_difference/DATA/MODEL/first       of the probability of any test row with any seed, after the first epoch
auc_ours/..., auc_peer/...                of the test rows then, mean over seeds
auc_apart/...                             the largest difference of the two with any seed
auc_difference/...                        mean over seeds of ours less the peer's
.../DATA/MODEL/best                       the same of each side's best epoch
other_epoch/DATA/MODEL                    seeds with which the two sides chose another epoch
"""

import contextlib
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import quality
import torch
from paper_size import objective_of
from peer_code.given_masks import give_masks
from side_by_side import print_figures, timing_parser_of

from data.reading.config import StreamOptions
from data.reading.files import resolve_files
from data.schema import Schema, load_schema
from data.stream import Batch, ParquetStream
from mbcnet_rec.build import build
from mbcnet_rec.config import RunConfig
from mbcnet_rec.runtime.process import joined_process
from mbcnet_rec.scoring.metrics import auc
from mbcnet_rec.training.built import Built
from mbcnet_rec.training.dense_part import Rates
from mbcnet_rec.training.pipeline import CheckedStep
from mbcnet_rec.training.state import TrainState

PREDICTION = "equal to 1e-6 after the first pass; rounding grows to 1e-2 of single rows over a thousand steps, AUCs stay within 1e-3"
SPARE_EPOCHS = 4
Predictions = list[dict[str, np.ndarray]]  # of an epoch: split -> probabilities


def initial_weights(built: Built, schema: Schema) -> dict[str, np.ndarray]:
    """Copies of our parameters: table/FIELD, and the dense ones as dense/000 and so on in the order of the model."""
    weights, dense = {}, 0
    for name, parameter in objective_of(built).named_parameters():
        value = parameter.detach().numpy().copy()
        _, is_table, rest = name.partition(".embedding_bags.")
        if is_table:
            table = rest.removesuffix(".weight")
            named = (feature.name for feature in schema.sparse if schema.table_of[feature.name].name == table)
            weights |= {f"table/{field}": value for field in named}
        else:
            weights[f"dense/{dense:03d}"], dense = value, dense + 1
    return weights


def train_ours(config: RunConfig, schema: Schema, data: Path, folder: Path, labels: np.ndarray) -> Predictions:
    """Train by the schedule of the protocol, given the labels of the validation rows; what the peer starts from is left in the folder."""
    scored = {split: list(quality.batches_of(data, split, schema)) for split in ("valid", "test")}
    for split, batches in scored.items():
        rows = quality.joined([quality.rows_of(batch, schema) for batch in batches])
        np.savez(folder / f"{split}_rows.npz", **rows)  # type: ignore[arg-type]
    found: Predictions = []
    with joined_process("cpu") as process:
        built = build(config, schema, process)
        give_masks(built.model, config.train.seed)
        np.savez(folder / "weights.npz", **initial_weights(built, schema))  # type: ignore[arg-type]

        def clip() -> None:
            torch.nn.utils.clip_grad_norm_(built.dense, config.train.max_grad_norm)

        step = CheckedStep(built.model, built.optimizer, contextlib.nullcontext, after_backward=clip)
        pipeline = built.pipeline(step)
        state, rates = TrainState(), Rates(built)
        for epoch in range(config.train.epochs):
            built.model.train()
            for batch in batches_of(config, schema, data, epoch):
                pipeline.progress(iter([batch]))
            found.append({split: probabilities(built, batches) for split, batches in scored.items()})
            state.note_evaluation(auc(found[-1]["valid"], labels), config.train)
            rates.set(0, state.lr_scale)
            if state.stopped:
                break
    # the peer may want more of them than we did
    epochs = range(min(config.train.epochs, len(found) + SPARE_EPOCHS))
    passes = (batches_of(config, schema, data, epoch) for epoch in epochs)
    seen = [quality.rows_of(batch, schema) for batches in passes for batch in batches]
    sizes = [len(rows[schema.label]) for rows in seen]
    np.savez(folder / "train_rows.npz", **quality.joined(seen), **{"": np.asarray(sizes)})  # type: ignore[arg-type]
    return found


def batches_of(config: RunConfig, schema: Schema, data: Path, epoch: int) -> ParquetStream:
    """The training rows of an epoch."""
    options = StreamOptions(config.data.batch_size, 1, "shuffled", seed=1000 * config.train.seed + epoch)
    return ParquetStream(resolve_files([str(data / "train")]), schema, options)


def probabilities(built: Built, batches: list[Batch]) -> np.ndarray:
    """Of the real rows."""
    built.model.eval()
    with torch.no_grad():
        logits = ((built.model(batch)[1].logits[:, 0], batch.weights > 0) for batch in batches)
        parts = [torch.sigmoid(each)[real] for each, real in logits]
    return torch.cat(parts).numpy()


def train_peer(config: RunConfig, schema: Schema, data: Path, folder: Path, args: Any) -> Predictions:
    """Have the peer do the same, by its own Python."""
    kind = config.model.kind
    params = quality.peer_model(kind, quality.Layers()) | {"embedding_dim": quality.WIDTH}
    params |= {"dataset_id": data.name, "model_id": kind, "model_root": str(folder / "checkpoints")}
    params["embedding_regularizer"] = args.l2
    steps = batches_of(config, schema, data, 0).steps_per_epoch
    task = {"kind": kind, "steps_an_epoch": steps, "mask_seed": config.train.seed}
    quality.run_peer("same_start", task | {"params": params}, folder / "same_start.json", args)
    with np.load(folder / "predictions.npz") as answer:
        epochs = len(answer.files) // 2
        return [{split: answer[f"{split}/{epoch}"] for split in ("valid", "test")} for epoch in range(epochs)]


def compare(place: str, labels: np.ndarray, ours: list[np.ndarray], peer: list[np.ndarray]) -> dict[str, float | None]:
    """Figures of probabilities of test rows, one array a seed; `peer` is empty without one."""
    own_aucs, peer_aucs = ([auc(rows, labels) for rows in side] for side in (ours, peer))
    pairs = list(zip(own_aucs, peer_aucs, strict=False))
    largest = [float(np.abs(own - other).max()) for own, other in zip(ours, peer, strict=False)]
    return {
        f"auc_ours/{place}": mean(own_aucs),
        f"auc_peer/{place}": mean(peer_aucs) if peer else None,
        f"auc_difference/{place}": mean(own - other for own, other in pairs) if peer else None,
        f"auc_apart/{place}": max((abs(own - other) for own, other in pairs), default=None),
        f"largest_difference/{place}": max(largest, default=None),
    }


def compare_all(
    name: str, labels: dict[str, np.ndarray], ours: list[Predictions], peer: list[Predictions]
) -> dict[str, float | None]:
    """Figures of a model after the first epoch and of each side's best."""
    own_best, peer_best = ([best_epoch(run, labels["valid"]) for run in side] for side in (ours, peer))
    figures: dict[str, float | None] = {}
    for place, own, other in (("first", [0] * len(ours), [0] * len(peer)), ("best", own_best, peer_best)):
        figures |= compare(f"{name}/{place}", labels["test"], tested(ours, own), tested(peer, other))
    apart = sum(own != other for own, other in zip(own_best, peer_best, strict=False))
    return figures | {f"other_epoch/{name}": apart if peer else None}


def best_epoch(predictions: Predictions, labels: np.ndarray) -> int:
    """The epoch whose predictions of the validation rows have the largest AUC."""
    return int(np.argmax([auc(epoch["valid"], labels) for epoch in predictions]))


def tested(runs: list[Predictions], epochs: list[int]) -> list[np.ndarray]:
    """Predictions of the test rows after one epoch of each run."""
    return [run[epoch]["test"] for run, epoch in zip(runs, epochs, strict=True)]


def main() -> int:
    parser = timing_parser_of(__doc__)
    words = "that `mbcnet data prepare` wrote"
    parser.add_argument("--data", nargs="+", type=Path, metavar="FOLDER", help=words)
    parser.add_argument("--epochs", type=int, default=20, help="at most; 1 with --quick")
    parser.add_argument("--seeds", type=int, default=1, help="starts, each with its own order of rows")
    quality.add_peer_options(parser, l2=1e-5)
    args = quality.parsed(parser)
    args.epochs = 1 if args.quick else args.epochs
    torch.set_num_threads(args.threads)
    print(f"prediction: {PREDICTION}")
    figures: dict[str, float | None] = {}
    with tempfile.TemporaryDirectory() as made:
        if args.quick or not args.data:
            args.data = [quality.write_small_log(Path(made) / "small")]
        for data in args.data:
            folder = Path(made) / "work" / data.name
            folder.mkdir(parents=True)
            schema_file = quality.write_even_schema(data, folder)
            schema = load_schema(schema_file)
            quality.write_rows(schema, data, folder)
            labels = {split: np.load(folder / f"{split}.npz")[schema.label] for split in ("valid", "test")}
            for kind in args.models:
                model = quality.our_model(kind, quality.Layers())
                ours, peer = [], []
                for seed in range(args.seeds):
                    config = quality.our_config(data, schema_file, model, args, seed)
                    ours.append(train_ours(config, schema, data, folder, labels["valid"]))
                    if args.peer_python:
                        peer.append(train_peer(config, schema, data, folder, args))
                figures |= compare_all(f"{data.name}/{kind}", labels, ours, peer)
    print_figures(figures, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
