"""Training rates beside peers': our DNN, DCNv2 and FinalMLP beside FuxiCTR's, our DCNv2 beside torchrec_dlrm's. Whole trainers, in turns.

    python benchmarks/peers.py [--quick] [--json] [--threads N] [--sizes small criteo] [--only fuxictr dlrm] [--rounds 3]
        [--peer-python VENV/bin/python --peer-source FUXICTR] [--dlrm-source DLRM [--dlrm-python VENV/bin/python]]

A turn is one whole run of one side, in a process that lives on: ours is `mbcnet train`'s own (Parquet stream, step, checks, metrics, log
lines, at the defaults), FuxiCTR's its `fit` on its Parquet loader, dlrm's its unchanged dlrm_main.py. One clock for all: the time between
the ends of two optimizer steps after a warm-up, so start-up, evaluation and checkpoints, which all sides have, are left out on each.

Beside FuxiCTR the same: Parquet file, batch size, fields, ids, widths, layers, dropout, dense Adam on tables and layers, lambda of the
tables' penalty, gradients clipped at 10, threads of torch. Not the same: it reads the whole file into memory before its clock starts,
ours streams it; it clips tables too, ours layers only; its loader is a process beside (--peer-workers), ours a thread.
Beside dlrm the same: fields, numbers, uniform ids, widths, cross layers and rank, layers of the over arch, exact Adagrad on tables. Not
the same: its batches are ten that lie in memory, ours are read from Parquet; it has a dense arch of 13-512-256-64 before and its MLP after
its cross layers, ours, the parallel DCNv2, has none and one beside, with a rank x rank product in each cross layer: ours has rank 480
where its has 512, so that both make 6.7 M multiply-adds a sample; its layers learn by Adagrad, ours by Adam.

fuxictr_speedup/SIZE/MODEL, dlrm_speedup             ours / the peer's samples a second, median over rounds; null without the peer
least_fuxictr_speedup                                the least of them
ours_per_second/..., fuxictr_per_second/..., dlrm_per_second     medians, samples a second
ours_as_shipped_per_second/...                       ours with its default table optimizer, rowwise Adagrad inside backward
ours_bf16_per_second/...                             ours with dense Adam and train.autocast=bf16, a switch that FuxiCTR does not have;
                                                     left out where the processor has no bf16 products
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tomli_w
from peer_code.timed_steps import answer_tasks
from quality import CLIP, DROPOUT, PEER_TRAINING, RATE
from side_by_side import parser_of, print_figures

from mbcnet_rec.cpu.linear import bf16_in_hardware

HERE = Path(__file__).parent
MODELS = ("dnn", "dcnv2", "finalmlp")
TAIL = 5  # steps after the last one that is timed: a pipeline that runs dry is no steady state
ROW_GROUP = 16_384


@dataclass(frozen=True)
class Size:
    """How large the rows and the models of a comparison are.

    Attributes:
        fields, ids, width: single-valued fields, rows of each one's table, its width.
        batch: rows a step.
        hidden, gate, cross_layers: of DNN and streams, of FinalMLP's gates, of the full-rank cross network.
        warm_up, steps: of a turn; the default of log lines is one in 20 steps.
        numbers: dense columns.
    """

    fields: int
    ids: int
    width: int
    batch: int
    hidden: tuple[int, ...]
    gate: tuple[int, ...] = ()
    cross_layers: int = 2
    warm_up: int = 20
    steps: int = 40
    numbers: int = 0


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
        pq.write_table(
            pa.table(columns), folder / f"{split}.parquet", row_group_size=ROW_GROUP, write_page_checksum=True
        )
    fields: dict[str, Any] = {
        name: {"kind": "categorical", "num_embeddings": size.ids, "embedding_dim": size.width}
        for name in names
    }
    fields |= {f"number_{number}": {"kind": "numeric"} for number in range(size.numbers)}
    schema = {"name": folder.name, "label": "label", "fields": fields}
    (folder / "schema.toml").write_text(tomli_w.dumps(schema))
    column = {"source": "", "type": "categorical", "padding_idx": 0, "vocab_size": size.ids}
    described = {
        "dataset_id": folder.name,
        "labels": ["label"],
        "features": [{name: column} for name in names],
        "num_fields": len(names),
    }
    (folder / "feature_map.json").write_text(json.dumps(described))


def our_model(kind: str, size: Size) -> dict[str, Any]:
    """The [model] table of our config."""
    deep = {"hidden": list(size.hidden), "dropout": DROPOUT}
    match kind:
        case "dnn":
            own: dict[str, Any] = deep
        case "dcnv2":
            own = deep | {"cross": {"kind": "full_rank", "num_layers": size.cross_layers}}
        case _:
            stream = deep | {"gate": list(size.gate)}
            own = {"first": stream, "second": stream}
    return {"kind": kind, kind: own}


def our_dlrm() -> dict[str, Any]:
    """The [model] table that stands beside dlrm's DCN: one expert, its layers."""
    cross = {
        "kind": "low_rank_mixture",
        "num_layers": DLRM.cross_layers,
        "num_experts": 1,
        "low_rank": OUR_RANK,
    }
    return {"kind": "dcnv2", "dcnv2": {"hidden": list(DLRM.hidden), "cross": cross}}


def our_task(
    model: Mapping[str, Any],
    size: Size,
    folder: Path,
    embedding: Mapping[str, Any],
    autocast: str = "none",
) -> dict[str, Any]:
    """One epoch of ours. embedding: the [optim.embedding] table; dense Adam wants whole tables on the rank."""
    dense_adam = embedding.get("name") == "adam"
    config: dict[str, Any] = {
        "name": "peers",
        "schema": str(folder / "schema.toml"),
        "data": {split: [str(folder / f"{split}.parquet")] for split in ("train", "valid")}
        | {"batch_size": size.batch},
        "model": dict(model),
        "sharding": {"sharding_types": ["data_parallel"]} if dense_adam else {},
        "optim": {"dense_lr": RATE, "dense_eps": 1e-8, "embedding": dict(embedding)},
        "train": {
            "device": "cpu",
            "autocast": autocast,
            "max_grad_norm": CLIP,
            "out": str(folder / "run"),
        },
    }
    return {"config": config, "warm_up": size.warm_up, "steps": size.steps, "batch": size.batch}


def fuxictr_task(kind: str, size: Size, folder: Path, source: str, l2: float, workers: int) -> dict[str, Any]:
    """One epoch of FuxiCTR's model."""
    hidden = list(size.hidden)
    own: dict[str, Any] = {
        "dnn": {"hidden_units": hidden, "net_dropout": DROPOUT},
        "dcnv2": {
            "parallel_dnn_hidden_units": hidden,
            "net_dropout": DROPOUT,
            "model_structure": "parallel",
            "num_cross_layers": size.cross_layers,
        },
        "finalmlp": {f"mlp{stream}_hidden_units": hidden for stream in (1, 2)}
        | {f"mlp{stream}_dropout": DROPOUT for stream in (1, 2)}
        | {"use_fs": True, "fs_hidden_units": list(size.gate)},
    }[kind]
    params = (
        PEER_TRAINING
        | own
        | {
            "dataset_id": folder.name,
            "model_id": kind,
            "model_root": str(folder / "checkpoints"),
            "embedding_regularizer": l2,
            "embedding_dim": size.width,
            "batch_size": size.batch,
            "epochs": 1,
            "data_format": "parquet",
            "num_workers": workers,
            "verbose": 0,
        }
    )
    (folder / "checkpoints" / folder.name).mkdir(parents=True, exist_ok=True)
    return {
        "source": source,
        "folder": str(folder),
        "train": str(folder / "train.parquet"),
        "valid": str(folder / "valid.parquet"),
        "model": kind,
        "params": params,
        "warm_up": size.warm_up,
        "steps": size.steps,
        "batch": size.batch,
    }


def dlrm_task(size: Size) -> dict[str, Any]:
    """One run of dlrm_main.py with its DCN; its learning rate does not change what a step costs."""
    steps = size.warm_up + size.steps + TAIL
    flags = {
        "interaction_type": "dcn",
        "batch_size": size.batch,
        "num_embeddings": size.ids,
        "embedding_dim": size.width,
        "dcn_num_layers": size.cross_layers,
        "dcn_low_rank_dim": DLRM_RANK,
        "over_arch_layer_sizes": ",".join(map(str, (*size.hidden, 1))),
        "learning_rate": 0.01,
        "limit_train_batches": steps,
        "limit_val_batches": 1,
        "limit_test_batches": 1,
        "seed": 0,
    }
    arguments = ["--adagrad", *(text for key, value in flags.items() for text in (f"--{key}", str(value)))]
    return {"arguments": arguments, "warm_up": size.warm_up, "steps": size.steps, "batch": size.batch}


def train_ours(task: dict[str, Any]) -> None:
    """One run, as `mbcnet train` makes it."""
    from data.schema.parse import parse_dataclass
    from mbcnet_rec.config import RunConfig
    from mbcnet_rec.train import run_training

    run_training(parse_dataclass(RunConfig, task["config"], "the task"), overwrite=True)


def serve_ours(threads: int) -> None:
    """Answer tasks on standard input."""
    import torch

    torch.set_num_threads(threads)
    answer_tasks(train_ours)


class Side:
    """A process that trains when it is told to.

    Args:
        command: that answers tasks; see peer_code/timed_steps.py.
        threads: of torch.
        log: what it says.
        python_path: where it finds its own modules.
    """

    def __init__(self, command: Sequence[str], threads: int, log: Path, python_path: str) -> None:
        self._log = log
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": python_path}
        with log.open("w") as words:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=words,
                text=True,
            )

    def rate(self, task: Mapping[str, Any]) -> float:
        """Samples a second of one run.

        Raises:
            SystemExit: the process has ended; its last words are told.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(task) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise SystemExit(f"a side has ended:\n{self._log.read_text()[-3000:]}")
        return json.loads(answer)["samples_per_second"]

    def end(self) -> None:
        """Let it leave; it may have ended already."""
        self._process.terminate()
        self._process.wait(60)


@contextmanager
def started_sides(args: Any, folder: Path) -> Iterator[dict[str, Side]]:
    """Start ours and the peers that are there."""
    threads = str(args.threads)
    commands = {
        "ours": ([sys.executable, str(Path(__file__).resolve()), "--serve", threads], str(HERE.parent))
    }
    if args.peer_python and "fuxictr" in args.only:
        script = [args.peer_python, str(HERE / "peer_code" / "fuxictr_speed.py"), threads]
        commands["fuxictr"] = (script, str(Path(args.peer_source).resolve()))
    if args.dlrm_source and "dlrm" in args.only:
        source = str((Path(args.dlrm_source) / "torchrec_dlrm").resolve())
        script = [args.dlrm_python, str(HERE / "peer_code" / "torchrec_dlrm_speed.py"), threads, source]
        commands["dlrm"] = (script, source)
    sides: dict[str, Side] = {}
    try:
        for name, (command, path) in commands.items():
            sides[name] = Side(command, args.threads, folder / f"{name}.log", path)
        yield sides
    finally:
        for side in sides.values():
            side.end()


def compare(cases: Mapping[str, tuple[Side, Mapping[str, Any]]], rounds: int) -> dict[str, list[float]]:
    """Rates of each case, one a round; every round begins with another case."""
    names, rates = list(cases), {name: [] for name in cases}
    for turn in range(rounds):
        first = turn % len(names)
        for name in (*names[first:], *names[:first]):
            side, task = cases[name]
            rates[name].append(side.rate(task))
    return rates


def speedup(rates: Mapping[str, Sequence[float]], peer: str) -> float | None:
    """Median over rounds of ours over the peer's; None without it."""
    if peer not in rates:
        return None
    return statistics.median(own / other for own, other in zip(rates["ours"], rates[peer], strict=True))


def told(rates: Mapping[str, Sequence[float]], peer: str, where: str) -> dict[str, float | None]:
    """Figures of one comparison; a line of it is printed."""
    figures: dict[str, float | None] = {f"{peer}_speedup{where}": speedup(rates, peer)}
    for name in ("ours", "ours_as_shipped", "ours_bf16", peer):
        suffix = "/dlrm" if peer == "dlrm" and name != peer else where
        if name in rates or name == peer:
            median = statistics.median(rates[name]) if name in rates else None
            figures[f"{name}_per_second{suffix}"] = median
    shown = ", ".join(
        f"{name} {statistics.median(found):,.0f} ({min(found):,.0f} to {max(found):,.0f})"
        for name, found in rates.items()
    )
    print(f"{peer}{where}: samples a second: {shown}", flush=True)
    return figures


def beside_fuxictr(sides: Mapping[str, Side], args: Any, folder: Path) -> dict[str, float | None]:
    """Every model at every size."""
    figures: dict[str, float | None] = {}
    speedups: list[float | None] = []
    for name in args.sizes:
        size = QUICK if args.quick else SIZES[name]
        write_rows(size, folder / name)
        for kind in args.models:
            adam = {"name": "adam", "lr": RATE, "eps": 1e-8, "init_std": 1e-4, "l2": args.l2}
            model = our_model(kind, size)
            cases: dict[str, tuple[Side, Mapping[str, Any]]] = {
                "ours": (sides["ours"], our_task(model, size, folder / name, adam)),
                "ours_as_shipped": (sides["ours"], our_task(model, size, folder / name, {})),
            }
            if bf16_in_hardware():
                cases["ours_bf16"] = sides["ours"], our_task(model, size, folder / name, adam, "bf16")
            if "fuxictr" in sides:
                source = str(Path(args.peer_source).resolve())
                task = fuxictr_task(kind, size, folder / name, source, args.l2, args.peer_workers)
                cases["fuxictr"] = (sides["fuxictr"], task)
            rates = compare(cases, args.rounds)
            figures |= told(rates, "fuxictr", f"/{name}/{kind}")
            speedups.append(speedup(rates, "fuxictr"))
    known = [each for each in speedups if each is not None]
    return figures | {"least_fuxictr_speedup": min(known, default=None)}


def beside_dlrm(sides: Mapping[str, Side], args: Any, folder: Path) -> dict[str, float | None]:
    """DCNv2 on random rows."""
    size = QUICK_DLRM if args.quick else DLRM
    write_rows(size, folder / "dlrm", uniform=True)
    ours = our_task(our_dlrm(), size, folder / "dlrm", {"name": "adagrad", "lr": 0.01})
    cases: dict[str, tuple[Side, Mapping[str, Any]]] = {"ours": (sides["ours"], ours)}
    if "dlrm" in sides:
        cases["dlrm"] = (sides["dlrm"], dlrm_task(size))
    return told(compare(cases, args.rounds), "dlrm", "")


def main() -> int:
    """Compare with every peer that is there."""
    if sys.argv[1:2] == ["--serve"]:
        serve_ours(int(sys.argv[2]))
        return 0
    parser = parser_of(__doc__)
    parser.add_argument("--only", nargs="+", choices=("fuxictr", "dlrm"), default=["fuxictr", "dlrm"])
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, help="default 3, quick 1")
    parser.add_argument("--l2", type=float, default=0.0, help="lambda of the tables' penalty (default: none)")
    parser.add_argument("--peer-python", metavar="FILE", help="Python that can import FuxiCTR")
    parser.add_argument("--peer-source", metavar="FOLDER", help="checkout of FuxiCTR's repository")
    parser.add_argument(
        "--peer-workers", type=int, default=1, help="processes of its loader (default: its own)"
    )
    parser.add_argument("--dlrm-source", metavar="FOLDER", help="checkout of facebookresearch/dlrm")
    parser.add_argument(
        "--dlrm-python", metavar="FILE", default=sys.executable,
        help="with torchrec, torchmetrics and pyre_extensions (default: this one)",
    )  # fmt: skip
    args = parser.parse_args()
    if bool(args.peer_python) != bool(args.peer_source):
        parser.error("--peer-python and --peer-source: name both or neither")
    args.rounds = args.rounds or (1 if args.quick else 3)
    if args.quick:
        args.sizes, args.models = ["small"], ["dnn"]
    print(
        "prediction: small models are all overhead: FuxiCTR's table-by-table lookups and Adam cost it 14 tables' calls a step, ours one, but\n"
        "our checks and pipeline cost too: 1.5. At Criteo's size Adam over 6.2 M rows' weights is a third of its step: 2. Beside dlrm,\n"
        "products are nearly all: 1.1, from oneDNN and from gradients that are not copied"
    )
    for peer, there in (("fuxictr", args.peer_python), ("dlrm", args.dlrm_source)):
        if peer in args.only and not there:
            print(f"{peer}: not named, so its figures are null")
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as made, started_sides(args, Path(made)) as sides:
        if "fuxictr" in args.only:
            figures |= beside_fuxictr(sides, args, Path(made))
        if "dlrm" in args.only:
            figures |= beside_dlrm(sides, args, Path(made))
    print_figures(figures | {"threads": args.threads, "rounds": args.rounds}, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
