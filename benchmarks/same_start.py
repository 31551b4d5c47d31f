"""Are our models FuxiCTR's models? Both start from the same weights and train on the same batches; predictions are compared.

    python benchmarks/same_start.py --data prepared/adult prepared/criteo --peer-python VENV/bin/python --peer-source FUXICTR

Over seeds, test AUCs of two equal models scatter as widely as the test part is small (quality.py). Here nothing is drawn by the peer: our
initial weights and our batches, in our order, go to it, and dropout is off. What is left is rounding, which training makes larger with every
step. Models, Adam, full-table L2 and the gradient clip are those of quality.py. FuxiCTR's FinalMLP adds two biases to one sum; its second stays 0.
Without a peer only our side is trained, and what compares is null.

largest_difference/DATA/MODEL/epoch_1     of the probability of any test row with any seed, after that many passes over the training rows
auc_ours/..., auc_peer/...                of the test rows then, mean over seeds
auc_apart/...                             the largest difference of the two with any seed
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import quality
import torch
from paper_size import objective_of
from side_by_side import parser_of, print_figures
from torch import Tensor

from data.batch import Batch
from data.files import resolve_files
from data.order import StreamOptions
from data.schema import Schema, load_schema
from data.stream import ParquetStream
from mbcnet_rec.build import Built, build, quieten_libraries
from mbcnet_rec.config import RunConfig
from mbcnet_rec.study.tuning import with_overrides
from mbcnet_rec.training.metrics import auc
from mbcnet_rec.training.pipeline import PlainPipeline, clip_gradients
from mbcnet_rec.training.process import joined_process

PREDICTION = "equal to 1e-6 after the first pass; rounding grows to 1e-2 of single rows over a thousand steps, AUCs stay within 1e-3"
PEER_SCRIPT = Path(__file__).parent / "peer_code" / "fuxictr_same_start.py"


def without_dropout(kind: str) -> tuple[list[str], dict[str, Any]]:
    """Overrides of our config, and the peer's hyper-parameters."""
    ours = [f"model.{key}=0.0" for key in quality.OURS[kind] if key.endswith("dropout")]
    peer = {key: 0.0 if key.endswith("dropout") else value for key, value in quality.PEERS[kind].items()}
    return ours, peer


def rows_of(batch: Batch, schema: Schema) -> dict[str, np.ndarray]:
    """The real rows of a batch as FuxiCTR reads them: ids from 1 up, 0 behind the end of a list."""
    real = batch.weights.numpy() > 0
    bags = {feature.name: batch.sparse_features[feature.name] for feature in schema.sparse}
    rows = {
        name: quality.padded(bag.values().numpy(), bag.lengths().numpy())[real] for name, bag in bags.items()
    }
    return rows | {schema.label: batch.labels.numpy()[real, None]}


def joined(batches: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Batches one below the other, lists as wide as the longest."""
    columns = {name: [each[name] for each in batches] for name in batches[0]}
    widths = {name: max(part.shape[1] for part in parts) for name, parts in columns.items()}
    return {
        name: np.concatenate([quality.widened(part, widths[name]) for part in parts])
        for name, parts in columns.items()
    }


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


def train_ours(config: RunConfig, schema: Schema, data: Path, folder: Path) -> list[np.ndarray]:
    """Train epoch by epoch; what the peer needs is left in the folder.

    Returns:
        Probabilities of the test rows after each epoch.
    """
    test = list(
        ParquetStream(resolve_files([str(data / "test")]), schema, StreamOptions(4096, 1, "partitioned"))
    )
    np.savez(folder / "test_rows.npz", **joined([rows_of(batch, schema) for batch in test]))  # type: ignore[arg-type]
    seen: list[dict[str, np.ndarray]] = []
    found = []
    with joined_process("cpu") as process:
        built = build(config, schema, process)
        np.savez(folder / "weights.npz", **initial_weights(built, schema))  # type: ignore[arg-type]

        def clip() -> None:
            clip_gradients(built.dense, config.train.max_grad_norm)

        pipeline = PlainPipeline(
            built.model,
            built.optimizer,
            contextlib.nullcontext,
            lambda loss: None,
            clip,
        )
        for epoch in range(config.train.epochs):
            seed = 1000 * config.train.seed + epoch
            options = StreamOptions(config.data.batch_size, 1, "shuffled", seed=seed)
            built.model.train()
            for batch in ParquetStream(resolve_files([str(data / "train")]), schema, options):
                seen.append(rows_of(batch, schema))
                pipeline.progress(iter([batch]))
            found.append(probabilities(built, test))
    sizes = [len(rows[schema.label]) for rows in seen]
    np.savez(folder / "train_rows.npz", **joined(seen), **{"": np.asarray(sizes)})  # type: ignore[arg-type]
    return found


def probabilities(built: Built, batches: list[Batch]) -> np.ndarray:
    """Of the real rows."""
    built.model.eval()
    with torch.no_grad():
        parts: list[Tensor] = [
            torch.sigmoid(built.model(batch)[1].logits[:, 0])[batch.weights > 0] for batch in batches
        ]
    return torch.cat(parts).numpy()


def train_peer(kind: str, data: Path, folder: Path, args: Any) -> list[np.ndarray]:
    """Have the peer do the same, by its own Python."""
    task = {
        "source": str(Path(args.peer_source).resolve()),
        "folder": str(folder.resolve()),
        "threads": args.threads,
        "kind": kind,
        "epochs": args.epochs,
        "params": quality.PEER_TRAINING
        | without_dropout(kind)[1]
        | {
            "dataset_id": data.name,
            "model_id": kind,
            "model_root": str(folder / "checkpoints"),
            "embedding_regularizer": args.l2,
            "embedding_dim": quality.WIDTH,
            "verbose": 0,
        },
    }
    asked = folder / "same_start.json"
    asked.write_text(json.dumps(task))
    env = os.environ | {"PYTHONPATH": task["source"], "OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run([args.peer_python, str(PEER_SCRIPT), str(asked)], env=env)
    if done.returncode:
        raise SystemExit(f"FuxiCTR ended with {done.returncode}; its words are above")
    with np.load(folder / "predictions.npz") as answer:
        return [answer[str(epoch)] for epoch in range(args.epochs)]


def configs_of(data: Path, schema_file: Path, kind: str, args: Any) -> list[RunConfig]:
    """A run's config for each seed."""
    config = quality.our_config(data, schema_file, kind, args.l2, args.epochs)
    overrides = without_dropout(kind)[0]
    return [
        with_overrides(config, [*overrides, f"train.seed={seed}"], f"{kind}, seed {seed}")
        for seed in range(args.seeds)
    ]


def compare(
    name: str, labels: np.ndarray, runs: list[tuple[list[np.ndarray], list[np.ndarray] | None]]
) -> dict[str, float | None]:
    """Figures of a model: (ours, the peer's) probabilities after each epoch, for each seed."""
    figures: dict[str, float | None] = {}
    for epoch in range(len(runs[0][0])):
        place = f"{name}/epoch_{epoch + 1}"
        ours = [own[epoch] for own, _ in runs]
        peer = [theirs[epoch] for _, theirs in runs if theirs is not None]
        own_aucs, peer_aucs = ([auc(rows, labels) for rows in side] for side in (ours, peer))
        figures[f"auc_ours/{place}"] = mean(own_aucs)
        figures[f"auc_peer/{place}"] = mean(peer_aucs) if peer else None
        pairs = list(zip(own_aucs, peer_aucs, strict=False))
        figures[f"auc_apart/{place}"] = max((abs(own - other) for own, other in pairs), default=None)
        figures[f"largest_difference/{place}"] = max(
            (float(np.abs(own - other).max()) for own, other in zip(ours, peer, strict=False)), default=None
        )
    return figures


def main() -> int:
    """Compare on every data set."""
    parser = parser_of(__doc__)
    parser.add_argument(
        "--data", nargs="+", type=Path, metavar="FOLDER", help="that `mbcnet data prepare` wrote"
    )
    parser.add_argument("--models", nargs="+", choices=list(quality.OURS), default=list(quality.OURS))
    parser.add_argument("--l2", type=float, default=1e-5, help="lambda of the tables (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=1, help="starts, each with its own order of rows")
    parser.add_argument("--peer-python", metavar="FILE", help="Python that can import FuxiCTR")
    parser.add_argument("--peer-source", metavar="FOLDER", help="checkout of FuxiCTR's repository")
    args = parser.parse_args()
    if bool(args.peer_python) != bool(args.peer_source):
        parser.error("--peer-python and --peer-source: name both or neither")
    quieten_libraries()
    torch.set_num_threads(args.threads)
    print(f"prediction: {PREDICTION}")
    figures: dict[str, float | None] = {}
    with tempfile.TemporaryDirectory() as made:
        if args.quick:
            args.epochs, args.models = 1, args.models[:1]
        if args.quick or not args.data:
            args.data = [quality.write_small_log(Path(made) / "small")]
        for data in args.data:
            folder = Path(made) / "work" / data.name
            folder.mkdir(parents=True)
            schema_file = quality.write_even_schema(data, folder)
            schema = load_schema(schema_file)
            quality.write_rows(schema_file, data, folder)
            with np.load(folder / "test.npz") as rows:
                labels = rows[schema.label]
            for kind in args.models:
                runs = [
                    (
                        train_ours(config, schema, data, folder),
                        train_peer(kind, data, folder, args) if args.peer_python else None,
                    )
                    for config in configs_of(data, schema_file, kind, args)
                ]
                figures |= compare(f"{data.name}/{kind}", labels, runs)
    print_figures(figures, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
