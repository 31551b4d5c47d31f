"""Training rates beside peers': our DNN, DCNv2 and FinalMLP beside FuxiCTR's, our DCNv2 beside torchrec_dlrm's. Whole trainers, in turns.

    python benchmarks/peers.py [--quick] [--json] [--threads N] [--sizes small criteo] [--only fuxictr dlrm] [--rounds 3]
        [--peer-python VENV/bin/python --peer-source FUXICTR] [--dlrm-source DLRM [--dlrm-python VENV/bin/python]]

A turn is one whole run of one side, in a process that lives on: ours is `mbcnet train`'s own at the defaults, FuxiCTR's its `fit` on its
Parquet loader, dlrm's its unchanged dlrm_main.py. One clock for all: the time between the ends of two optimizer steps after a warm-up,
so start-up, evaluation and checkpoints are left out on each side.

Beside FuxiCTR the same: Parquet file, batch size, fields, ids, widths, layers, dropout, dense Adam on tables and layers, lambda of the
tables' penalty, gradients clipped at 10, threads of torch. Not the same: it reads the whole file into memory before its clock starts,
ours streams it; it clips tables too, ours layers only; its loader is a process beside (--peer-workers), ours a thread.
Beside dlrm the same: fields, numbers, uniform ids, widths, cross layers, layers of the over arch, exact Adagrad on tables. Not the same:
its batches are ten that lie in memory; it has a dense arch of 13-512-256-64, ours has none and one rank x rank product more in each cross
layer: rank 480 where its is 512, so that both make 6.7 M multiply-adds a sample; its layers learn by Adagrad, ours by Adam. Neither clips.

fuxictr_speedup/SIZE/MODEL, dlrm_speedup             ours / the peer's samples a second, median over rounds; null without the peer
least_fuxictr_speedup                                the least of them
ours_per_second/..., fuxictr_per_second/..., dlrm_per_second     medians, samples a second
cpu_fast_path_speedup/SIZE/MODEL                     ours over ours with train.cpu_fast_path=false
ours_as_shipped_per_second/...                       ours with its default table optimizer, rowwise Adagrad inside backward
ours_bf16_per_second/...                             ours with dense Adam and train.autocast=bf16, a switch that FuxiCTR does not have;
                                                     left out where the processor has no bf16 products
"""

import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import quality
import tomli_w
import torch
from peer_code.timed_steps import answer_tasks
from side_by_side import Answering, environment, print_figures, ratio, timing_parser_of

from mbcnet_rec.config import config_of
from mbcnet_rec.cpu.layers import bf16_in_hardware
from mbcnet_rec.run_training import run_training

TAIL = 5  # steps after the last one that is timed: a pipeline that runs dry is no steady state
ROW_GROUP = 16_384


@dataclass(frozen=True)
class Size:
    """How large the rows and the models of a comparison are."""

    fields: int  # single-valued
    ids: int  # rows of each one's table
    width: int  # of a row
    batch: int
    hidden: tuple[int, ...]  # of DNN and streams
    gate: tuple[int, ...] = ()  # of FinalMLP
    cross_layers: int = 2  # of the full-rank cross network
    warm_up: int = 20  # steps; the default of log lines is one in 20
    steps: int = 40  # that are timed
    numbers: int = 0  # dense columns

    @property
    def layers(self) -> quality.Layers:
        """As quality.py's models take them."""
        return quality.Layers(self.hidden, self.gate, self.cross_layers)


SIZES = {
    "small": Size(14, 100, 16, 256, (128, 64), (64,), warm_up=40, steps=400),
    "criteo": Size(39, 10_000, 16, 4096, (400, 400, 400), (64,)),
    # 1,086,810 rows in all: what BARS keeps of Criteo's ids (Criteo_x4, each seen ten times or more)
    "criteo_x4": Size(39, 27_867, 16, 4096, (400, 400, 400), (64,), warm_up=10, steps=20),
}
QUICK = Size(6, 50, 8, 64, (32, 16), (8,), steps=20)
# dlrm_main.py's defaults: 26 fields of 64, 13 numbers, over arch 512-512-256-1, 3 cross layers of rank 512
DLRM = Size(26, 100_000, 64, 1024, (512, 512, 256), cross_layers=3, warm_up=10, steps=20, numbers=13)
QUICK_DLRM = Size(26, 200, 64, 64, (512, 512, 256), cross_layers=3, steps=20, numbers=13)
DLRM_RANK, OUR_RANK = 512, 480  # as many multiply-adds


def write_rows(size: Size, folder: Path, uniform: bool = False) -> None:
    """Write Parquet rows for a turn and for its evaluation, their schema, and FuxiCTR's map of the same columns.

    Id 0, FuxiCTR's padding, never occurs. Ids have a power law unless they are uniform.
    """
    draw = np.random.default_rng(0)
    folder.mkdir(parents=True)
    names = [f"field_{number}" for number in range(size.fields)]
    for split, batches in (("train", size.warm_up + size.steps + TAIL), ("valid", 2)):
        rows = batches * size.batch
        columns: dict[str, np.ndarray] = {}
        for name in names:
            share = draw.random(rows)
            columns[name] = (1 + (size.ids - 1) * (share if uniform else share**4)).astype(np.int64)
        for number in range(size.numbers):
            columns[f"number_{number}"] = draw.normal(size=rows).astype(np.float32)
        columns["label"] = (draw.random(rows) < 0.25).astype(np.int64)
        file = folder / f"{split}.parquet"
        pq.write_table(pa.table(columns), file, row_group_size=ROW_GROUP, write_page_checksum=True)
    field = {"kind": "categorical", "num_embeddings": size.ids, "embedding_dim": size.width}
    fields = dict.fromkeys(names, field)
    fields |= {f"number_{number}": {"kind": "numeric"} for number in range(size.numbers)}
    schema = {"name": folder.name, "label": "label", "fields": fields}
    (folder / "schema.toml").write_text(tomli_w.dumps(schema))
    features = {name: {"vocab_size": size.ids} for name in names}
    quality.write_feature_map(folder, folder.name, "label", features)


def our_dlrm() -> dict[str, Any]:
    """The [model] table that stands beside dlrm's DCN: one expert, its layers."""
    cross = {"kind": "low_rank_mixture", "num_experts": 1}
    cross |= {"num_layers": DLRM.cross_layers, "low_rank": OUR_RANK}
    return {"kind": "dcnv2", "dcnv2": {"hidden": list(DLRM.hidden), "cross": cross, "top": []}}


def our_task(
    model: Mapping[str, Any], size: Size, folder: Path, embedding: Mapping[str, Any], **train: Any
) -> dict[str, Any]:
    """One epoch of ours. embedding: the [optim.embedding] table; dense Adam wants whole tables on the rank."""
    dense_adam = embedding.get("name") == "adam"
    files = {split: [str(folder / f"{split}.parquet")] for split in ("train", "valid")}
    out = {"device": "cpu", "max_grad_norm": quality.CLIP, "out": str(folder / "run")}
    config: dict[str, Any] = {
        "name": "peers",
        "schema": str(folder / "schema.toml"),
        "data": files | {"batch_size": size.batch},
        "model": dict(model),
        "sharding": {"sharding_types": ["data_parallel"]} if dense_adam else {},
        "optim": {"dense_lr": quality.RATE, "dense_eps": 1e-8, "embedding": dict(embedding)},
        "train": out | train,
    }
    return {"config": config, "warm_up": size.warm_up, "steps": size.steps, "batch": size.batch}


def fuxictr_task(kind: str, size: Size, folder: Path, source: str, l2: float, workers: int) -> dict[str, Any]:
    """One epoch of FuxiCTR's model."""
    (folder / "checkpoints" / folder.name).mkdir(parents=True, exist_ok=True)
    params = quality.peer_model(kind, size.layers) | {"dataset_id": folder.name, "model_id": kind, "epochs": 1}
    params |= {"model_root": str(folder / "checkpoints"), "data_format": "parquet", "num_workers": workers}
    params |= {"embedding_regularizer": l2, "embedding_dim": size.width, "batch_size": size.batch}
    files = {split: str(folder / f"{split}.parquet") for split in ("train", "valid")}
    timing = {"warm_up": size.warm_up, "steps": size.steps, "batch": size.batch}
    return files | timing | {"source": source, "folder": str(folder), "model": kind, "params": params}


def dlrm_task(size: Size) -> dict[str, Any]:
    """One run of dlrm_main.py with its DCN; its learning rate does not change what a step costs."""
    steps = size.warm_up + size.steps + TAIL
    flags = {
        "interaction_type": "dcn", "batch_size": size.batch, "num_embeddings": size.ids, "embedding_dim": size.width,
        "dcn_num_layers": size.cross_layers, "dcn_low_rank_dim": DLRM_RANK, "over_arch_layer_sizes": ",".join(map(str, (*size.hidden, 1))),
        "learning_rate": 0.01, "limit_train_batches": steps, "limit_val_batches": 1, "limit_test_batches": 1, "seed": 0,
    }  # fmt: skip
    arguments = ["--adagrad", *(text for key, value in flags.items() for text in (f"--{key}", str(value)))]
    return {"arguments": arguments, "warm_up": size.warm_up, "steps": size.steps, "batch": size.batch}


def train_ours(task: dict[str, Any]) -> None:
    """One run, as `mbcnet train` makes it."""
    run_training(config_of(task["config"], "the task"), overwrite=True)


def started_sides(args: Any, folder: Path, stack: ExitStack) -> dict[str, Answering]:
    """Start ours and the peers that are there; they end with the stack."""
    threads, own = str(args.threads), environment(args.threads)
    commands = {"ours": ([sys.executable, str(Path(__file__).resolve()), "--serve", threads], own)}
    if args.peer_python and "fuxictr" in args.only:
        script = [args.peer_python, str(quality.PEER_CODE / "fuxictr_side.py"), "speed", threads]
        commands["fuxictr"] = (script, own | {"PYTHONPATH": str(Path(args.peer_source).resolve())})
    if args.dlrm_source and "dlrm" in args.only:
        source = str((Path(args.dlrm_source) / "torchrec_dlrm").resolve())
        script = [args.dlrm_python, str(quality.PEER_CODE / "torchrec_dlrm_speed.py"), threads, source]
        commands["dlrm"] = (script, own | {"PYTHONPATH": source})
    sides = {}
    for name, (command, env) in commands.items():
        # a peer's script finds what lies beside it
        sides[name] = Answering(command, env | {"PYTHONSAFEPATH": ""}, folder / f"{name}.log")
        stack.callback(sides[name].end)
    return sides


Cases = Mapping[str, tuple[Answering, Mapping[str, Any]]]


def compare(cases: Cases, rounds: int) -> dict[str, list[float]]:
    """Samples a second of each case, one run a round; every round begins with another case."""
    names, rates = list(cases), {name: [] for name in cases}
    for turn in range(rounds):
        first = turn % len(names)
        for name in (*names[first:], *names[:first]):
            side, task = cases[name]
            side.ask(json.dumps(task))
            rates[name].append(json.loads(side.answer())["samples_per_second"])
    return rates


def told(rates: Mapping[str, Sequence[float]], peer: str, where: str) -> dict[str, float | None]:
    """Figures of one comparison; a line of it is printed."""
    speedup = ratio(rates["ours"], rates[peer]) if peer in rates else None
    figures: dict[str, float | None] = {f"{peer}_speedup{where}": speedup, f"{peer}_per_second{where}": None}
    for name, found in rates.items():
        suffix = "/dlrm" if peer == "dlrm" and name != peer else where
        figures[f"{name}_per_second{suffix}"] = statistics.median(found)
    if "ours_without_cpu_fast_path" in rates:
        figures[f"cpu_fast_path_speedup{where}"] = ratio(rates["ours"], rates["ours_without_cpu_fast_path"])
    shown = ", ".join(f"{name} {min(found):,.0f} to {max(found):,.0f}" for name, found in rates.items())
    print(f"{peer}{where}: samples a second: {shown}", flush=True)
    return figures


def beside_fuxictr(sides: Mapping[str, Answering], args: Any, folder: Path) -> dict[str, float | None]:
    """Every model at every size."""
    figures: dict[str, float | None] = {}
    adam = quality.ADAM | {"l2": args.l2}
    for name in args.sizes:
        size, place = QUICK if args.quick else SIZES[name], folder / name
        write_rows(size, place)
        for kind in args.models:
            model = quality.our_model(kind, size.layers)
            tasks = {
                "ours": our_task(model, size, place, adam),
                "ours_without_cpu_fast_path": our_task(model, size, place, adam, cpu_fast_path=False),
                "ours_as_shipped": our_task(model, size, place, {}),
            }
            if args.pairs:
                tasks = {"ours": tasks["ours"]}
            elif bf16_in_hardware():
                tasks["ours_bf16"] = our_task(model, size, place, adam, autocast="bf16")
            cases = {case: (sides["ours"], task) for case, task in tasks.items()}
            if "fuxictr" in sides:
                source = str(Path(args.peer_source).resolve())
                task = fuxictr_task(kind, size, place, source, args.l2, args.peer_workers)
                cases["fuxictr"] = (sides["fuxictr"], task)
            figures |= told(compare(cases, args.rounds), "fuxictr", f"/{name}/{kind}")
    speedups = (each for key, each in figures.items() if key.startswith("fuxictr_speedup/") and each)
    return figures | {"least_fuxictr_speedup": min(speedups, default=None)}


def beside_dlrm(sides: Mapping[str, Answering], args: Any, folder: Path) -> dict[str, float | None]:
    """DCNv2 on random rows."""
    size, place = QUICK_DLRM if args.quick else DLRM, folder / "dlrm"
    write_rows(size, place, uniform=True)
    cases = {
        "ours": (sides["ours"], our_task(our_dlrm(), size, place, {"name": "adagrad", "lr": 0.01}, max_grad_norm=0.0))
    }
    if "dlrm" in sides:
        cases["dlrm"] = (sides["dlrm"], dlrm_task(size))
    return told(compare(cases, args.rounds), "dlrm", "")


def main() -> int:
    if sys.argv[1:2] == ["--serve"]:
        torch.set_num_threads(int(sys.argv[2]))
        answer_tasks(train_ours)
        return 0
    parser = timing_parser_of(__doc__)
    parser.add_argument("--only", nargs="+", choices=("fuxictr", "dlrm"), default=["fuxictr", "dlrm"])
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--rounds", type=int, help="default 3, quick 1")
    parser.add_argument("--pairs", action="store_true", help="ours and the peer alone, without our other settings")
    words = "processes of its loader (default: its own)"
    parser.add_argument("--peer-workers", type=int, default=1, help=words)
    parser.add_argument("--dlrm-source", metavar="FOLDER", help="checkout of facebookresearch/dlrm")
    words = "with torchrec, torchmetrics and pyre_extensions (default: this one)"
    parser.add_argument("--dlrm-python", metavar="FILE", default=sys.executable, help=words)
    quality.add_peer_options(parser, l2=0.0)
    args = quality.parsed(parser)
    args.rounds = args.rounds or (1 if args.quick else 3)
    args.sizes = ["small"] if args.quick else args.sizes
    print(
        "prediction: small models are all overhead: FuxiCTR's table-by-table lookups and Adam cost it 14 tables' calls a step, ours one, but\n"
        "our checks and pipeline cost too: 1.5. At Criteo's size Adam over 6.2 M rows' weights is a third of its step: 2. Beside dlrm,\n"
        "products are nearly all: 1.1, from oneDNN and from gradients that are not copied"
    )
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        sides = started_sides(args, Path(name), stack)
        for peer, beside in (("fuxictr", beside_fuxictr), ("dlrm", beside_dlrm)):
            if peer in args.only:
                print(f"{peer}: {'started' if peer in sides else 'not named, so its figures are null'}")
                figures |= beside(sides, args, Path(name))
    print_figures(figures | {"threads": args.threads, "rounds": args.rounds}, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
