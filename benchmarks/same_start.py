"""Are our models FuxiCTR's models? Both start from the same weights and train on the same batches; predictions are compared.

    python benchmarks/same_start.py --data prepared/adult prepared/criteo --peer-python VENV/bin/python --peer-source FUXICTR

Over seeds, test AUCs of two equal models scatter as widely as the test part is small (quality.py). Here nothing is drawn by the peer: our
initial weights and our batches, in our order, go to it, and dropout is off, or, with --protocol, drops the same elements on both sides. What
is left is rounding, which training makes larger with every step. Models, Adam, full-table L2 and the gradient clip are those of quality.py.
FuxiCTR's FinalMLP adds two biases to one sum; its second stays 0. Without a peer only our side is trained, and what compares is null.

--protocol trains as quality.py does: dropout, an evaluation each epoch, rates x 0.1 at each that does not improve, stop after two in a row,
the best epoch by validation AUC is what counts. Each side decides by its own predictions.

largest_difference/DATA/MODEL/epoch_1     of the probability of any test row with any seed, after that many passes over the training rows
auc_ours/..., auc_peer/...                of the test rows then, mean over seeds
auc_apart/...                             the largest difference of the two with any seed
auc_difference/...                        mean over seeds of ours less the peer's
.../DATA/MODEL/best                       with --protocol: the same of each side's best epoch
other_epoch/DATA/MODEL                    with --protocol: seeds with which the two sides chose another epoch
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
from mbcnet_rec.training.pipeline import CheckedStep
from mbcnet_rec.training.state import TrainState, scale_rates

PREDICTION = "equal to 1e-6 after the first pass; rounding grows to 1e-2 of single rows over a thousand steps, AUCs stay within 1e-3"
SPARE_EPOCHS = 4
Predictions = list[dict[str, np.ndarray]]  # of an epoch: split -> probabilities


def layers_of(args: Any) -> quality.Layers:
    """Without --protocol nothing is dropped."""
    return quality.Layers() if args.protocol else quality.Layers(dropout=0.0)


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


def train_ours(
    config: RunConfig, schema: Schema, data: Path, folder: Path, valid_labels: np.ndarray | None
) -> Predictions:
    """Train epoch by epoch, by the schedule of the protocol where the labels of the validation rows are given; the peer's part is left in the folder.

    Returns:
        Probabilities of the validation and test rows after each epoch.
    """
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
        state, base_rates = TrainState(), [group["lr"] for group in built.optimizer.param_groups]
        for epoch in range(config.train.epochs):
            built.model.train()
            for batch in batches_of(config, schema, data, epoch):
                pipeline.progress(iter([batch]))
            found.append({split: probabilities(built, batches) for split, batches in scored.items()})
            if valid_labels is not None:
                state.note_evaluation(auc(found[-1]["valid"], valid_labels), config.train)
                scale_rates(built.optimizer, base_rates, state.lr_scale)
            if state.stopped:
                break
    spare = SPARE_EPOCHS if valid_labels is not None else 0  # the peer may want more of them than we did
    epochs = range(min(config.train.epochs, len(found) + spare))
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
    params = quality.peer_model(kind, layers_of(args)) | {"embedding_dim": quality.WIDTH}
    params |= {"dataset_id": data.name, "model_id": kind, "model_root": str(folder / "checkpoints")}
    params["embedding_regularizer"] = args.l2
    steps = batches_of(config, schema, data, 0).steps_per_epoch
    task = {"kind": kind, "steps_an_epoch": steps, "protocol": args.protocol, "mask_seed": config.train.seed}
    quality.run_peer("same_start", task | {"params": params}, folder / "same_start.json", args)
    with np.load(folder / "predictions.npz") as answer:
        epochs = len(answer.files) // 2
        return [{split: answer[f"{split}/{epoch}"] for split in ("valid", "test")} for epoch in range(epochs)]


def compare(
    place: str, labels: np.ndarray, ours: list[np.ndarray], peer: list[np.ndarray]
) -> dict[str, float | None]:
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
    name: str,
    labels: dict[str, np.ndarray],
    runs: list[tuple[Predictions, Predictions | None]],
    protocol: bool,
) -> dict[str, float | None]:
    """Figures of a model: after each epoch, or under the protocol of each side's best."""
    figures: dict[str, float | None] = {}
    if not protocol:
        for epoch in range(len(runs[0][0])):
            ours = [own[epoch]["test"] for own, _ in runs]
            peer = [theirs[epoch]["test"] for _, theirs in runs if theirs is not None]
            figures |= compare(f"{name}/epoch_{epoch + 1}", labels["test"], ours, peer)
        return figures
    chosen = [
        [int(np.argmax([auc(epoch["valid"], labels["valid"]) for epoch in side])) for side in run if side]
        for run in runs
    ]
    best = [
        [side[epoch]["test"] for side, epoch in zip(run, epochs, strict=False) if side]
        for run, epochs in zip(runs, chosen, strict=True)
    ]
    peer = [sides[1] for sides in best if len(sides) > 1]
    figures |= compare(f"{name}/best", labels["test"], [sides[0] for sides in best], peer)
    figures[f"other_epoch/{name}"] = sum(len(set(epochs)) > 1 for epochs in chosen) if peer else None
    return figures


def main() -> int:
    parser = timing_parser_of(__doc__)
    words = "that `mbcnet data prepare` wrote"
    parser.add_argument("--data", nargs="+", type=Path, metavar="FOLDER", help=words)
    parser.add_argument("--epochs", type=int, help="default 3, with --protocol at most 20")
    words = "with dropout, plateau schedule and the best epoch"
    parser.add_argument("--protocol", action="store_true", help=words)
    parser.add_argument("--seeds", type=int, default=1, help="starts, each with its own order of rows")
    quality.add_peer_options(parser, l2=1e-5)
    args = quality.parsed(parser)
    args.epochs = 1 if args.quick else args.epochs or (20 if args.protocol else 3)
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
                model = quality.our_model(kind, layers_of(args))
                runs: list[tuple[Predictions, Predictions | None]] = []
                for seed in range(args.seeds):
                    config = quality.our_config(data, schema_file, model, args, seed)
                    valid_labels = labels["valid"] if args.protocol else None
                    ours = train_ours(config, schema, data, folder, valid_labels)
                    peer = train_peer(config, schema, data, folder, args) if args.peer_python else None
                    runs.append((ours, peer))
                figures |= compare_all(f"{data.name}/{kind}", labels, runs, args.protocol)
    print_figures(figures, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
