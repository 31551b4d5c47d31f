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

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tomli_w
from side_by_side import print_figures, timing_parser_of

from data.engine import Engine
from data.reading.config import StreamOptions
from data.reading.files import resolve_files
from data.schema import Schema, load_schema, schema_to_toml
from data.stream import Batch, ParquetStream
from mbcnet_rec.config import RunConfig, config_of
from mbcnet_rec.study.runs import Run, place_run, scores, train_all

PEER_CODE = Path(__file__).parent / "peer_code"
MODELS = ("dnn", "dcnv2", "finalmlp")
SPLITS = ("train", "valid", "test")
WIDTH = 16  # of every field
QUANTILES = 20  # of a number
BATCH, RATE, CLIP = 256, 1e-3, 10.0
ADAM = {"name": "adam", "lr": RATE, "eps": 1e-8, "init_std": 1e-4}
Scores = dict[str, list[dict[str, float]]]  # model -> a seed's AUC and log-loss


class Layers(NamedTuple):
    """Sizes that the models of both sides have."""

    hidden: Sequence[int] = (128, 64)
    gate: Sequence[int] = (64,)  # of FinalMLP
    cross_layers: int = 2
    dropout: float = 0.2


def our_model(kind: str, layers: Layers) -> dict[str, Any]:
    """The [model] table of our config."""
    deep = {"hidden": list(layers.hidden), "dropout": layers.dropout}
    stream = deep | {"gate": list(layers.gate)}
    own = {
        "dnn": deep,
        "dcnv2": deep | {"cross": {"kind": "full_rank", "num_layers": layers.cross_layers}, "top": []},
        "finalmlp": {"first": stream, "second": stream},
    }
    return {"kind": kind, kind: own[kind]}


def peer_model(kind: str, layers: Layers) -> dict[str, Any]:
    """The same model and its training in FuxiCTR's own names."""
    deep, net = list(layers.hidden), {"net_dropout": layers.dropout}
    cross = {"model_structure": "parallel", "num_cross_layers": layers.cross_layers}
    streams = {f"mlp{n}_hidden_units": deep for n in (1, 2)}
    streams |= {f"mlp{n}_dropout": layers.dropout for n in (1, 2)}
    own: dict[str, dict[str, Any]] = {
        "dnn": {"hidden_units": deep} | net,
        "dcnv2": {"parallel_dnn_hidden_units": deep} | cross | net,
        "finalmlp": {"use_fs": True, "fs_hidden_units": list(layers.gate)} | streams,
    }
    watched = {"metrics": ["logloss", "AUC"], "monitor": "AUC", "monitor_mode": "max"}
    training = {"task": "binary_classification", "loss": "binary_crossentropy", "optimizer": "adam"}
    training |= {"early_stop_patience": 2, "learning_rate": RATE, "max_gradient_norm": CLIP, "net_regularizer": 0}
    return own[kind] | watched | training | {"shuffle": True, "verbose": 0}


def add_peer_options(parser: argparse.ArgumentParser, l2: float) -> None:
    """Models, penalty and where FuxiCTR lies."""
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    words = "lambda of both sides' tables (default: %(default)s)"
    parser.add_argument("--l2", type=float, default=l2, help=words)
    parser.add_argument("--peer-python", metavar="FILE", help="Python that can import FuxiCTR")
    parser.add_argument("--peer-source", metavar="FOLDER", help="checkout of FuxiCTR's repository")


def parsed(parser: argparse.ArgumentParser) -> Any:
    """The options; --quick means the first model only."""
    args = parser.parse_args()
    if bool(args.peer_python) != bool(args.peer_source):
        parser.error("--peer-python and --peer-source: name both or neither")
    args.models = args.models[:1] if args.quick else args.models
    return args


def run_peer(command: str, task: dict[str, Any], asked: Path, args: Any) -> str:
    """Run fuxictr_side.py by the peer's Python on a task, which is written to the file `asked`; return what it printed."""
    source = str(Path(args.peer_source).resolve())
    common = {"source": source, "folder": str(asked.parent.resolve()), "threads": args.threads}
    asked.write_text(json.dumps(common | task))
    env = os.environ | {"PYTHONPATH": source, "OMP_NUM_THREADS": str(args.threads)}
    words = [args.peer_python, str(PEER_CODE / "fuxictr_side.py"), command, str(asked)]
    done = subprocess.run(words, env=env, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"FuxiCTR ended with {done.returncode}; its words are above")
    return done.stdout


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
            bounds = quantiles(data / "train", feature.source_column)
            kept = {key: entry[key] for key in ("column",) if key in entry}
            cut = {"kind": "numeric", "transform": "bucketise", "boundaries": bounds}
            cut |= {"num_embeddings": len(bounds) + 2, "embedding_dim": WIDTH}
            table["fields"][feature.name] = kept | cut
        elif not feature.table:
            entry["embedding_dim"] = WIDTH
    for shared in table.get("tables", {}).values():
        shared["embedding_dim"] = WIDTH
    if (data / "vocabulary").is_dir():
        shutil.copytree(data / "vocabulary", folder / "vocabulary", dirs_exist_ok=True)
    path = folder / "schema.toml"
    path.write_text(tomli_w.dumps(table))
    return path


def quantiles(folder: Path, column: str) -> list[float]:
    """Distinct inner quantiles of a column of the training rows."""
    parts = [pq.read_table(file, columns=[column]).column(0) for file in sorted(folder.glob("**/*.parquet"))]
    values = np.concatenate([part.drop_null().to_numpy().astype(np.float64) for part in parts])
    bounds = np.unique(np.quantile(values, np.arange(1, QUANTILES) / QUANTILES, method="nearest"))
    return [float(each) for each in bounds]


def batches_of(data: Path, split: str, schema: Schema) -> ParquetStream:
    """All rows of a split, in the order of the file."""
    return ParquetStream(resolve_files([str(data / split)]), schema, StreamOptions(4096, 1, "partitioned"))


def rows_of(batch: Batch, schema: Schema) -> dict[str, np.ndarray]:
    """The real rows of a batch as FuxiCTR reads them: (rows, longest) with ids from 1 up and 0 behind the end of a list."""
    real = batch.weights.numpy() > 0
    found = {schema.label: batch.labels.numpy()[real, None]}
    for feature in schema.sparse:
        bag = batch.sparse_features[feature.name]
        lengths = bag.lengths().numpy()
        place = np.arange(max(1, int(lengths.max(initial=0))))[None, :] < lengths[:, None]
        rows = np.zeros(place.shape, np.int64)
        rows[place] = bag.values().numpy() + 1
        found[feature.name] = rows[real]
    return found


def joined(batches: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Batches one below the other, lists as wide as the longest."""
    columns = {name: [each[name] for each in batches] for name in batches[0]}
    widths = {name: max(part.shape[1] for part in parts) for name, parts in columns.items()}
    return {
        name: np.concatenate([np.pad(part, ((0, 0), (0, widths[name] - part.shape[1]))) for part in parts])
        for name, parts in columns.items()
    }


def write_rows(schema: Schema, data: Path, folder: Path) -> None:
    """Write what our encoder makes of each split as FuxiCTR reads it: NPZ files and feature_map.json."""
    ends = [0]
    batches: list[dict[str, np.ndarray]] = []
    for split in SPLITS:
        batches += [rows_of(batch, schema) for batch in batches_of(data, split, schema)]
        ends.append(sum(len(batch[schema.label]) for batch in batches))
    rows = joined(batches)  # all splits at once: lists are equally wide in all
    for split, start, stop in zip(SPLITS, ends, ends[1:], strict=False):
        parts: dict[str, Any] = {name: column[start:stop] for name, column in rows.items()}
        flat = {name: part[:, 0] if part.shape[1] == 1 else part for name, part in parts.items()}
        np.savez(folder / f"{split}.npz", **flat)
    features = {}
    for feature in schema.sparse:
        table, longest = schema.table_of[feature.name], rows[feature.name].shape[1]
        pooling = "Average" if table.pooling == "mean" else "Sum"
        bag = {"max_len": longest, "feature_encoder": f"layers.Masked{pooling}Pooling()"}
        features[feature.name] = {"vocab_size": table.num_embeddings + 1} | (bag if longest > 1 else {})
    write_feature_map(folder, data.name, schema.label, features)


def write_feature_map(folder: Path, name: str, label: str, features: dict[str, dict[str, Any]]) -> None:
    """Write FuxiCTR's description of columns of ids, whose id 0 pads; a feature with max_len is lists."""
    entries = []
    for key, own in features.items():
        kind = "sequence" if "max_len" in own else "categorical"
        entries.append({key: {"source": "", "padding_idx": 0, "type": kind} | own})
    described = {"dataset_id": name, "labels": [label], "features": entries, "num_fields": len(entries)}
    (folder / "feature_map.json").write_text(json.dumps(described))


def our_config(data: Path, schema: Path, model: dict[str, Any], args: Any, seed: int = 0) -> RunConfig:
    """The protocol of BARS as our config says it."""
    table: dict[str, Any] = {
        "name": f"quality_{model['kind']}",
        "schema": str(schema),
        "data": {split: [str(data / split)] for split in SPLITS} | {"batch_size": BATCH, "lanes": 1},
        "model": model | {"init": "xavier_normal"},
        "sharding": {"sharding_types": ["data_parallel"]},
        "optim": {"dense_lr": RATE, "dense_eps": 1e-8, "embedding": ADAM | {"l2": args.l2}},
        "train": {"device": "cpu", "epochs": args.epochs, "schedule": "plateau", "seed": seed}
        | {"max_grad_norm": CLIP, "log_every": 200},
    }
    return config_of(table, "the protocol")


def train_ours(data: Path, schema: Path, args: Any) -> Scores:
    """Train our models; what is in --out already is not trained again."""
    configs = {kind: our_config(data, schema, our_model(kind, Layers()), args) for kind in args.models}
    runs = [
        Run(kind, seed, place_run(config, seed, args.out))
        for kind, config in configs.items()
        for seed in range(args.seeds)
    ]
    for run, failure in train_all(runs, Engine("local", args.workers)):
        if failure:
            raise SystemExit(f"{run.variant}, seed {run.seed}: {failure}; see {run.folder}.log")
        print(f"  ours: {run.variant}, seed {run.seed}: AUC {scores(run.folder)['auc']:.4f}", flush=True)
    return {kind: [scores(run.folder) for run in runs if run.variant == kind] for kind in args.models}


def train_peer(data: Path, folder: Path, args: Any) -> Scores:
    """Train FuxiCTR's models by its own Python."""
    common = {"dataset_id": data.name, "model_root": str(folder / "checkpoints"), "embedding_dim": WIDTH}
    common |= {"embedding_regularizer": args.l2, "batch_size": BATCH, "epochs": args.epochs}
    common |= {"data_format": "npz", "num_workers": 0}
    models = {kind: peer_model(kind, Layers()) for kind in args.models}
    (folder / "checkpoints" / data.name).mkdir(parents=True, exist_ok=True)
    task = {"common": common, "models": models, "seeds": list(range(args.seeds))}
    return json.loads(run_peer("models", task, folder / "task.json", args).splitlines()[-1])


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


def write_small_log(folder: Path) -> Path:
    """Write three splits of a log whose clicks depend on sums and products of hidden values of six columns of ids."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(6, 30))
    for split, rows in zip(SPLITS, (6_000, 1_500, 1_500), strict=True):
        ids = rng.integers(0, 30, (6, rows))
        value = np.take_along_axis(hidden, ids, axis=1)
        click = rng.random(rows) < 1 / (1 + np.exp(1.0 - value.sum(0) / 2 - value[0] * value[1]))
        columns = {f"field_{number}": each for number, each in enumerate(ids)}
        (folder / split).mkdir(parents=True)
        table = pa.table(columns | {"click": click.astype(np.int8)})
        pq.write_table(table, folder / split / "part-0.parquet", write_page_checksum=True)
    field = {"kind": "categorical", "num_embeddings": 30, "embedding_dim": WIDTH}
    schema = {"name": "small", "label": "click", "fields": {f"field_{number}": field for number in range(6)}}
    (folder / "schema.toml").write_text(tomli_w.dumps(schema))
    return folder


def main() -> int:
    parser = timing_parser_of(__doc__)
    words = "that `mbcnet data prepare` wrote"
    parser.add_argument("--data", nargs="+", type=Path, metavar="FOLDER", help=words)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=50, help="at most (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="runs of ours at a time (default: 1)")
    parser.add_argument("--out", type=Path, default=Path("results/quality"), metavar="FOLDER")
    add_peer_options(parser, l2=1e-5)
    args = parsed(parser)
    figures: dict[str, float | None] = {}
    with tempfile.TemporaryDirectory() as made:
        if args.quick:
            args.seeds, args.epochs, args.out = 1, 2, Path(made) / "out"
        if args.quick or not args.data:
            args.data = [write_small_log(Path(made) / "small")]
        for data in args.data:
            folder = args.out / data.name
            folder.mkdir(parents=True, exist_ok=True)
            schema = write_even_schema(data, folder)
            ours, peer = train_ours(data, schema, args), None
            if args.peer_python:
                write_rows(load_schema(schema), data, folder)
                peer = train_peer(data, folder, args)
            figures |= compare(data.name, ours, peer)
    known = [each for key, each in figures.items() if key.startswith("auc_difference/") and each is not None]
    figures["least_difference"] = min(known, default=None)
    print_figures(figures, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
