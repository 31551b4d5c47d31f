"""Test AUC of our models beside FuxiCTR's own, on the same rows, split and ids, with equal hyper-parameters.

    python benchmarks/quality.py --data prepared/adult prepared/movielens --peer-python VENV/bin/python --peer-source FUXICTR

Both sides follow the BARS protocol: dense Adam on all parameters, lambda / 2 ||E||^2 over whole tables, an evaluation each epoch, rates
x 0.1 at every evaluation that does not improve, stop after two in a row, best weights restored. Linear layers start as FuxiCTR's
do (model.init = "xavier_normal"). Rows are encoded once, by our encoder; numbers are cut at quantiles of the training rows and all fields are equally wide, since FinalMLP of FuxiCTR wants that. FUXICTR is a
checkout of its repository (the wheel carries no models); its Python needs torch, "pandas<3", "polars<2", h5py and keras_preprocessing.
Without a peer only our side is trained, and the peer's figures are null. Without --data a small synthetic log is written.

auc_ours/DATA/MODEL, auc_peer/...          mean test AUC over seeds; with sd_... their standard deviations
auc_difference/DATA/MODEL                  ours minus FuxiCTR's; above -0.001 is "comparable"
log_loss_ours/..., log_loss_peer/...       likewise
least_difference                           the least auc_difference; null without a peer
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tomli_w
from side_by_side import parser_of, print_figures

from data.reading.config import StreamOptions
from data.reading.files import resolve_files
from data.schema import load_schema, schema_to_toml
from data.schema.parse import parse_dataclass
from data.stream import ParquetStream
from mbcnet_rec.config import RunConfig
from mbcnet_rec.study.runs import Run, place_run, scores, train_all
from mbcnet_rec.study.tuning import with_overrides

HERE = Path(__file__).parent
SPLITS = ("train", "valid", "test")
WIDTH = 16  # of every field
QUANTILES = 20  # of a number
BATCH, RATE, CLIP = 256, 1e-3, 10.0
PEER_TRAINING = {  # FuxiCTR's own names
    "task": "binary_classification",
    "loss": "binary_crossentropy",
    "metrics": ["logloss", "AUC"],
    "monitor": "AUC",
    "monitor_mode": "max",
    "optimizer": "adam",
    "learning_rate": RATE,
    "max_gradient_norm": CLIP,
    "net_regularizer": 0,
    "early_stop_patience": 2,
    "shuffle": True,
}
HIDDEN, DROPOUT, GATE, CROSS_LAYERS = [128, 64], 0.2, [64], 2
OURS = {
    "dnn": {"dnn.hidden": HIDDEN, "dnn.dropout": DROPOUT},
    "dcnv2": {
        "dcnv2.hidden": HIDDEN,
        "dcnv2.dropout": DROPOUT,
        "dcnv2.cross.kind": "full_rank",
        "dcnv2.cross.num_layers": CROSS_LAYERS,
    },
    "finalmlp": {
        f"finalmlp.{stream}.{key}": value
        for stream in ("first", "second")
        for key, value in (("hidden", HIDDEN), ("dropout", DROPOUT), ("gate", GATE))
    },
}
PEERS: dict[str, dict[str, Any]] = {
    "dnn": {"hidden_units": HIDDEN, "net_dropout": DROPOUT},
    "dcnv2": {
        "parallel_dnn_hidden_units": HIDDEN,
        "net_dropout": DROPOUT,
        "model_structure": "parallel",
        "num_cross_layers": CROSS_LAYERS,
    },
    "finalmlp": {
        "mlp1_hidden_units": HIDDEN,
        "mlp2_hidden_units": HIDDEN,
        "mlp1_dropout": DROPOUT,
        "mlp2_dropout": DROPOUT,
        "use_fs": True,
        "fs_hidden_units": GATE,
    },
}
Scores = dict[str, list[dict[str, float]]]  # model -> a seed's AUC and log-loss


def write_even_schema(data: Path, folder: Path) -> Path:
    """Write a schema of the same columns in which every field is ids of equal width: numbers are cut, vectors left out."""
    schema = load_schema(data / "schema.toml")
    table = schema_to_toml(schema)
    table["groups"] = {}
    for feature in schema.features:
        entry = table["fields"][feature.name]
        if feature.kind == "vector":
            del table["fields"][feature.name]
        elif feature.kind == "numeric" and not feature.is_bucketised:
            bounds = quantiles([data / "train"], feature.source_column)
            kept = {key: entry[key] for key in ("column",) if key in entry}
            table["fields"][feature.name] = kept | {
                "kind": "numeric",
                "transform": "bucketise",
                "boundaries": bounds,
                "num_embeddings": len(bounds) + 2,
                "embedding_dim": WIDTH,
            }
        elif not feature.table:
            entry["embedding_dim"] = WIDTH
    for shared in table.get("tables", {}).values():
        shared["embedding_dim"] = WIDTH
    if (data / "vocabulary").is_dir():
        shutil.copytree(data / "vocabulary", folder / "vocabulary", dirs_exist_ok=True)
    path = folder / "schema.toml"
    path.write_text(tomli_w.dumps(table))
    return path


def quantiles(folders: Sequence[Path], column: str) -> list[float]:
    """Distinct inner quantiles of a column of the training rows."""
    values = np.concatenate(
        [
            pq.read_table(file, columns=[column]).column(0).drop_null().to_numpy().astype(np.float64)
            for folder in folders
            for file in sorted(folder.glob("**/*.parquet"))
        ]
    )
    bounds = np.unique(np.quantile(values, np.arange(1, QUANTILES) / QUANTILES, method="nearest"))
    return [float(each) for each in bounds]


def write_rows(schema_file: Path, data: Path, folder: Path) -> None:
    """Write what our encoder makes of each split as FuxiCTR reads it: NPZ files and feature_map.json. Id 0 pads; ours are 1 and up."""
    schema = load_schema(schema_file)
    columns: dict[str, dict[str, list[np.ndarray]]] = {}
    for split in SPLITS:
        stream = ParquetStream(
            resolve_files([str(data / split)]), schema, StreamOptions(4096, 1, "partitioned")
        )
        found = columns.setdefault(split, {})
        for batch in stream:
            real = batch.weights.numpy() > 0
            for feature in schema.sparse:
                bags = batch.sparse_features[feature.name]
                found.setdefault(feature.name, []).append(
                    padded(bags.values().numpy(), bags.lengths().numpy())[real]
                )
            found.setdefault(schema.label, []).append(batch.labels.numpy()[real, None])
    longest = {
        feature.name: max(part.shape[1] for split in SPLITS for part in columns[split][feature.name])
        for feature in schema.sparse
    }
    for split in SPLITS:
        joined = {
            name: np.concatenate([widened(part, longest.get(name, 1)) for part in parts])
            for name, parts in columns[split].items()
        }
        arrays: dict[str, Any] = {
            name: part[:, 0] if part.shape[1] == 1 else part for name, part in joined.items()
        }
        np.savez(folder / f"{split}.npz", **arrays)
    features = []
    for feature in schema.sparse:
        entry = {
            "source": "",
            "padding_idx": 0,
            "vocab_size": schema.table_of[feature.name].num_embeddings + 1,
        }
        if longest[feature.name] == 1:
            entry |= {"type": "categorical"}
        else:
            pooling = "Average" if schema.table_of[feature.name].pooling == "mean" else "Sum"
            entry |= {
                "type": "sequence",
                "max_len": longest[feature.name],
                "feature_encoder": f"layers.Masked{pooling}Pooling()",
            }
        features.append({feature.name: entry})
    described = {
        "dataset_id": data.name,
        "labels": [schema.label],
        "features": features,
        "num_fields": len(features),
    }
    (folder / "feature_map.json").write_text(json.dumps(described))


def padded(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Bags of ids as (rows, longest) with ids from 1 up and 0 behind them."""
    width = max(1, int(lengths.max(initial=0)))
    place = np.arange(width)[None, :] < lengths[:, None]
    rows = np.zeros((len(lengths), width), np.int64)
    rows[place] = values + 1
    return rows


def widened(part: np.ndarray, width: int) -> np.ndarray:
    """More columns of padding."""
    return np.pad(part, ((0, 0), (0, width - part.shape[1])))


def our_config(data: Path, schema: Path, kind: str, l2: float, epochs: int) -> RunConfig:
    """The protocol of BARS as our config says it."""
    table: dict[str, Any] = {
        "name": f"quality_{kind}",
        "schema": str(schema),
        "data": {split: [str(data / split)] for split in SPLITS} | {"batch_size": BATCH, "lanes": 1},
        "sharding": {"sharding_types": ["data_parallel"]},
        "optim": {
            "dense_lr": RATE,
            "dense_eps": 1e-8,
            "embedding": {"name": "adam", "lr": RATE, "eps": 1e-8, "init_std": 1e-4, "l2": l2},
        },
        "train": {
            "device": "cpu",
            "epochs": epochs,
            "schedule": "plateau",
            "max_grad_norm": CLIP,
            "log_every": 200,
        },
    }
    config = parse_dataclass(RunConfig, table, "the protocol")
    values = {f"model.{key}": value for key, value in OURS[kind].items()}
    values |= {"model.kind": kind, "model.init": "xavier_normal"}
    return with_overrides(config, [f"{key}={json.dumps(value)}" for key, value in values.items()], kind)


def train_ours(data: Path, schema: Path, models: Sequence[str], args: Any) -> Scores:
    """Train our models; what is in --out already is not trained again."""
    runs = [
        Run(kind, seed, place_run(our_config(data, schema, kind, args.l2, args.epochs), seed, args.out))
        for kind in models
        for seed in range(args.seeds)
    ]
    for run, failure in train_all(runs, args.workers):
        if failure:
            raise SystemExit(f"{run.variant}, seed {run.seed}: {failure}; see {run.folder}.log")
        print(f"  ours: {run.variant}, seed {run.seed}: AUC {scores(run.folder)['auc']:.4f}", flush=True)
    return {kind: [scores(run.folder) for run in runs if run.variant == kind] for kind in models}


def train_peer(data: Path, folder: Path, models: Sequence[str], args: Any) -> Scores:
    """Train FuxiCTR's models by its own Python; what is in the folder already is not trained again."""
    common = PEER_TRAINING | {
        "dataset_id": data.name,
        "model_root": str(folder / "checkpoints"),
        "embedding_regularizer": args.l2,
        "embedding_dim": WIDTH,
        "batch_size": BATCH,
        "epochs": args.epochs,
        "data_format": "npz",
        "num_workers": 0,
        "verbose": 0,
    }
    task = {
        "source": str(Path(args.peer_source).resolve()),
        "folder": str(folder.resolve()),
        "threads": args.threads,
        "common": common,
        "models": {kind: PEERS[kind] for kind in models},
        "seeds": list(range(args.seeds)),
    }
    asked, answer = folder / "task.json", folder / "answer.json"
    text = json.dumps(task)
    if not (answer.is_file() and asked.is_file() and asked.read_text() == text):
        asked.write_text(text)
        (folder / "checkpoints" / data.name).mkdir(parents=True, exist_ok=True)
        command = [args.peer_python, str(HERE / "peer_code" / "fuxictr_models.py"), str(asked)]
        env = os.environ | {"PYTHONPATH": task["source"], "OMP_NUM_THREADS": str(args.threads)}
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"FuxiCTR ended with {done.returncode}; its words are above")
        answer.write_text(done.stdout.splitlines()[-1])
    return json.loads(answer.read_text())


def compare(name: str, ours: Scores, peer: Scores | None) -> dict[str, float | None]:
    """Figures of one data set."""
    figures: dict[str, float | None] = {}
    for kind, found in ours.items():
        for metric in ("auc", "log_loss"):
            for side, values in (("ours", found), ("peer", (peer or {}).get(kind))):
                numbers = [each[metric] for each in values or ()]
                figures[f"{metric}_{side}/{name}/{kind}"] = mean(numbers) if numbers else None
                figures[f"sd_{metric}_{side}/{name}/{kind}"] = stdev(numbers) if len(numbers) > 1 else None
        theirs, own = figures[f"auc_peer/{name}/{kind}"], figures[f"auc_ours/{name}/{kind}"]
        figures[f"auc_difference/{name}/{kind}"] = None if theirs is None or own is None else own - theirs
    return figures


def print_table(name: str, models: Sequence[str], figures: dict[str, float | None]) -> None:
    """One line a model."""

    def cell(metric: str, side: str, kind: str) -> str:
        value, sd = (figures[f"{prefix}{metric}_{side}/{name}/{kind}"] for prefix in ("", "sd_"))
        return "-" if value is None else f"{value:.4f}" + (f" ± {sd:.4f}" if sd is not None else "")

    print(
        f"{name}\n  {'':10}{'AUC ours':>18}{'AUC FuxiCTR':>18}{'difference':>12}{'log-loss ours':>18}{'FuxiCTR':>18}"
    )
    for kind in models:
        difference = figures[f"auc_difference/{name}/{kind}"]
        shown = "-" if difference is None else f"{difference:+.4f}"
        print(
            f"  {kind:10}{cell('auc', 'ours', kind):>18}{cell('auc', 'peer', kind):>18}{shown:>12}"
            f"{cell('log_loss', 'ours', kind):>18}{cell('log_loss', 'peer', kind):>18}"
        )


def write_small_log(folder: Path) -> Path:
    """Write three splits of a log whose clicks depend on sums and products of hidden values of six columns of ids."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(6, 30))
    for split, rows in zip(SPLITS, (6_000, 1_500, 1_500), strict=True):
        ids = rng.integers(0, 30, (6, rows))
        value = np.take_along_axis(hidden, ids, axis=1)
        click = rng.random(rows) < 1 / (1 + np.exp(1.0 - value.sum(0) / 2 - value[0] * value[1]))
        columns = {f"field_{number}": each for number, each in enumerate(ids)} | {
            "click": click.astype(np.int8)
        }
        (folder / split).mkdir(parents=True)
        pq.write_table(pa.table(columns), folder / split / "part-0.parquet", write_page_checksum=True)
    fields = {
        f"field_{number}": {"kind": "categorical", "num_embeddings": 30, "embedding_dim": WIDTH}
        for number in range(6)
    }
    (folder / "schema.toml").write_text(tomli_w.dumps({"name": "small", "label": "click", "fields": fields}))
    return folder


def main() -> int:
    """Compare on every data set."""
    parser = parser_of(__doc__)
    parser.add_argument(
        "--data", nargs="+", type=Path, metavar="FOLDER", help="that `mbcnet data prepare` wrote"
    )
    parser.add_argument("--models", nargs="+", choices=list(OURS), default=list(OURS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--l2", type=float, default=1e-5, help="lambda of both sides' tables (default: %(default)s)"
    )
    parser.add_argument("--epochs", type=int, default=50, help="at most (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="runs of ours at a time (default: 1)")
    parser.add_argument("--peer-python", metavar="FILE", help="Python that can import FuxiCTR")
    parser.add_argument("--peer-source", metavar="FOLDER", help="checkout of FuxiCTR's repository")
    parser.add_argument("--out", type=Path, default=Path("results/quality"), metavar="FOLDER")
    args = parser.parse_args()
    if bool(args.peer_python) != bool(args.peer_source):
        parser.error("--peer-python and --peer-source: name both or neither")
    with tempfile.TemporaryDirectory() as made:
        if args.quick:
            args.seeds, args.epochs, args.models, args.out = 1, 2, args.models[:1], Path(made) / "out"
        if args.quick or not args.data:
            args.data = [write_small_log(Path(made) / "small")]
        figures: dict[str, float | None] = {}
        for data in args.data:
            folder = args.out / data.name
            folder.mkdir(parents=True, exist_ok=True)
            schema = write_even_schema(data, folder)
            ours = train_ours(data, schema, args.models, args)
            peer = None
            if args.peer_python:
                write_rows(schema, data, folder)
                peer = train_peer(data, folder, args.models, args)
            figures |= (found := compare(data.name, ours, peer))
            print_table(data.name, args.models, found)
    differences = [
        value for key, value in figures.items() if key.startswith("auc_difference/") and value is not None
    ]
    figures["least_difference"] = min(differences, default=None)
    print_figures(figures, args.json) if args.json else None
    return 0


if __name__ == "__main__":
    sys.exit(main())
