"""The cases of tests/test_gpu_fake_device.py, in a process of their own: what the models, tables and plans do on a fake GPU, as JSON.

python tests/fake_gpu_cases.py FOLDER CASE,... ...

Each list of cases has a process, forked when all is imported.
"""

import contextlib
import gc
import json
import multiprocessing
import sys
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fake_gpu_guard import COMPILER, load_guard

FOLDER = Path(sys.argv[1])
gc.disable()  # it would go through all that is imported again and again
if COMPILER:
    load_guard(FOLDER)  # before torch

# ruff: noqa: E402
import torch
import torch.distributed as dist
import torch.nn.parallel.distributed as data_parallel
from fake_gpu import CUDA, FakeGPU, FakeGraph, install, values_of
from small_data import write_small
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_map

from data.reading.files import resolve_files
from data.schema import load_schema
from data.stream import Batch, ParquetStream
from mbcnet_rec.build import build
from mbcnet_rec.checkpoints.compatibility import load_checked
from mbcnet_rec.checkpoints.run_folder import storage_of
from mbcnet_rec.checkpoints.shards import Saved
from mbcnet_rec.checkpoints.shards import shards_of as held
from mbcnet_rec.config import load_config
from mbcnet_rec.model.models import build_model, build_objective, model_layout
from mbcnet_rec.plugins import model_class
from mbcnet_rec.runtime.exits import StopRequest
from mbcnet_rec.runtime.process import Process
from mbcnet_rec.scoring.scorer import Scorer
from mbcnet_rec.teachers import TaughtStream
from mbcnet_rec.training.cuda_graph import replay_dense_arch
from mbcnet_rec.training.pipeline import CheckedStep
from mbcnet_rec.training.state import RunContext
from mbcnet_rec.training.trainer import Trainer
from sharding.bridge.allocated import with_lookups
from sharding.plan.placement import shards_of

ROWS = 8
CONFIG = write_small(FOLDER / "rows", 400, 100)
# what a config may say of each kind of model that changes what is computed
VARIANTS = {
    # esmm takes two labels, which no case here has; its layers are shared_bottom's
    **{kind: [f"model.kind={kind}"] for kind in model_class().kinds if kind != "esmm"},
    "mbcnet, five branches": [
        'model.mbcnet.branches=["efgc","cross","deep","fm","wide"]', "model.mbcnet.fusion=gated", "model.mbcnet.batch_norm=true",
        "model.mbcnet.dropout=0.1", "model.mbcnet.coteaching.warmup_steps=3",
    ],
    "mbcnet, a slice for each branch": ["model.mbcnet.embeddings=per_branch", "model.mbcnet.cross.kind=full_rank"],
    "mbcnet, orthogonal by construction": [
        "model.mbcnet.differentiation.parametrization=orthogonal", "model.mbcnet.coteaching.threshold=base_rate",
        "model.mbcnet.differentiation.norm=squared",
    ],
    "mbcnet, max difference": ["model.mbcnet.differentiation.kind=max_difference", "model.mbcnet.coteaching.scheme=no_discrimination"],
}  # fmt: skip


def loaded(*settings: str) -> Any:
    config = load_config(CONFIG, settings)
    return config, load_schema(Path(config.schema))


class Columns(nn.Module):
    """Stands in for the tables: one parameter for each tensor that a model reads."""

    def __init__(self, widths: dict[str, int]) -> None:
        super().__init__()
        self.columns = nn.ParameterDict(
            {name: nn.Parameter(torch.randn(ROWS, width)) for name, width in widths.items()}
        )

    def forward(self, dense_features: object, sparse_features: object, weighted_features: object) -> dict[str, Any]:
        return dict(self.columns.items())


def model_step(settings: list[str], device: torch.device, autocast: bool) -> dict[str, Any]:
    """Forward, loss and backward of a model on stand-in columns."""
    config, schema = loaded(*settings)
    layout = model_layout(config.model, schema)
    torch.manual_seed(0)
    with device:
        model = build_model(config.model, Columns(layout.tensor_widths()), layout)  # type: ignore[arg-type]
        objective = build_objective(config.model, model)
        width = sum(feature.dense_width for feature in schema.dense)
        teachers = len(config.model.enkd.teachers) if config.model.kind == "enkd" else 0
        rows = SimpleNamespace(
            dense_features=torch.randn(ROWS, width + teachers), sparse_features=None, weighted_features=None,
            labels=(torch.rand(ROWS) < 0.5).float(), weights=torch.ones(ROWS),
        )  # fmt: skip
        with torch.autocast(device.type, torch.bfloat16) if autocast else contextlib.nullcontext():
            loss, outputs = objective(rows)
        loss.backward()
    grads = {name: each.grad for name, each in objective.named_parameters()}
    tensors = [loss, *outputs.terms.values(), outputs.logits, outputs.latent_norms, outputs.transform_distance]
    tensors += [each for each in grads.values() if each is not None]
    return {
        "devices": sorted({str(each.device) for each in tensors}),
        "without gradient": sorted(name for name, each in grads.items() if each is None),
        "dtypes": sorted({str(each.dtype) for each in tensors}),
        "loss": float("nan") if device.type == "meta" else loss.item(),
    }


def on_both(names: list[str], autocast: bool) -> dict[str, Any]:
    """Variants on the fake device, and on a CPU."""
    device = CUDA if COMPILER else torch.device("meta")
    found = {}
    for name in names:
        settings = VARIANTS[name]
        with FakeGPU() if COMPILER else contextlib.nullcontext():
            on_gpu = model_step(settings, device, autocast)
        on_cpu = model_step(settings, torch.device("cpu"), autocast)
        found[f"{name}{', bf16' if autocast else ''}"] = [on_gpu, on_cpu]
    return found


def architectures() -> dict[str, Any]:
    """Each kind as it is by default, and what else a config may say of it under autocast."""
    return on_both([each for each in VARIANTS if " " not in each], False) | on_both(
        [each for each in VARIANTS if " " in each], True
    )


def in_bf16() -> dict[str, Any]:
    """Each kind under autocast."""
    return on_both([each for each in VARIANTS if " " not in each], True)


def arch_of(settings: list[str], objective: bool = False) -> tuple[Any, Any]:
    """A model, or its objective, on stand-in columns of the fake device, and the columns."""
    config, schema = loaded(*settings)
    layout = model_layout(config.model, schema)
    torch.manual_seed(0)
    columns = Columns(layout.tensor_widths())
    model = build_model(config.model, columns, layout)  # type: ignore[arg-type]
    return (build_objective(config.model, model) if objective else model), columns


def streams() -> dict[str, Any]:
    """The dense part of each kind that has parts in an evaluation, and of one that has none: in a graph on CUDA streams, and one after the other."""
    found = {}
    for name in ("mbcnet", "mbcnet, five branches", "dcnv2", "finalmlp", "deepfm", "wide_deep", "mmoe", "dnn"):
        settings = VARIANTS[name]
        with FakeGPU() as gpu, CUDA:
            model, columns = arch_of(settings)
            arch, features = model.eval().dense_arch, dict(columns.columns.items())
            gpu.streams.clear()
            plain = arch(features)  # in turn
            alone = len(gpu.streams)
            graph = FakeGraph()
            gpu.streams.clear()
            with torch.no_grad(), torch.cuda.graph(graph, capture_error_mode="thread_local"):  # type: ignore[arg-type]
                beside = arch(features)
            graph.replay()
            found[name] = {
                "equal": all(map(torch.equal, tree_map(values_of, tuple(plain)), tree_map(values_of, tuple(beside)))),
                "streams": [alone, len(gpu.streams)], "kept": gpu.kept, "races": sum(gpu.races.values()),
            }  # fmt: skip
    with FakeGPU() as gpu, CUDA:  # what is found where nobody waits
        one, stream = torch.ones(4), torch.cuda.Stream()
        with torch.cuda.stream(stream):
            one.add_(1)
        one.sum()
    return found | {"no wait": sum(gpu.races.values())}


def graph_of_branches() -> dict[str, Any]:
    """With running statistics and loss weights that grow."""
    return in_graphs("mbcnet, five branches")


def graph_of_one_network() -> dict[str, Any]:
    """Without branches, where logits are kept as they leave the model."""
    return in_graphs("dnn")


def in_graphs(*names: str) -> dict[str, Any]:
    """Four steps of some variants, of which one is of a smaller batch, and an evaluation: by CUDA graphs, and without."""
    found = {}
    for name in names:
        settings = [*VARIANTS[name], "model.mbcnet.dropout=0.0"]
        with FakeGPU() as gpu, CUDA:
            runs = [graph_steps(settings, replayed, gpu) for replayed in (True, False)]
        (ours, replays, calls, hooked), (theirs, _, all_calls, all_hooked) = runs
        found[name] = {
            "equal": [torch.equal(one, other) for one, other in zip(ours, theirs, strict=True)],
            "replays": replays,
            "calls": [calls, all_calls],
            "hooked": [hooked, all_hooked],
        }
    return found


def graph_steps(settings: list[str], replayed: bool, gpu: FakeGPU) -> tuple[list[torch.Tensor], list[int], int, int]:
    """What each step and the evaluation gave, how often each graph ran, the operators of a step, and how often parameters' hooks were called."""
    objective, columns = arch_of(settings, objective=True)
    FakeGraph.made_so_far.clear()
    if replayed:
        replay_dense_arch(objective)
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    teachers = 3 * (objective.losses.__class__.__name__ == "DistillationArch")
    kept: list[torch.Tensor] = []
    hooked: list[torch.Tensor] = []
    for name, each in objective.named_parameters():
        if "columns" not in name:
            each.register_hook(hooked.append)
    calls = 0
    for step, rows in enumerate([ROWS, ROWS, ROWS, ROWS - 3, ROWS, ROWS]):
        objective.train(step < 4)
        columns.forward = lambda *_, rows=rows: {name: each[:rows] for name, each in columns.columns.items()}
        torch.manual_seed(step)
        batch = SimpleNamespace(
            dense_features=torch.randn(rows, 5 + teachers), sparse_features=None, weighted_features=None,
            labels=(torch.rand(rows) < 0.5).float(), weights=torch.ones(rows),
        )  # fmt: skip
        before = sum(gpu.calls.values())
        if step != 2:  # gradients of two steps add up there
            optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16), torch.set_grad_enabled(step < 4):
            loss, outputs = objective(batch)
        if step < 4:
            loss.backward()
            optimizer.step()
        calls = sum(gpu.calls.values()) - before if step == 2 else calls
        kept += [loss, outputs.logits]  # as the trainer keeps them for its log
    kept += [*objective.parameters(), *objective.buffers()]
    replays = [graph.replays for graph in FakeGraph.made_so_far]
    return [values_of(each.detach()) for each in kept], replays, calls, len(hooked)


def wrong_device() -> str:
    """What is said of a tensor that was left on the host."""
    with FakeGPU():
        try:
            torch.ones(2, device=CUDA) + torch.ones(2)
        except RuntimeError as error:
            return str(error)
    return "nothing"


@contextlib.contextmanager
def fake_ranks(world: int, device: torch.device = CUDA) -> Iterator[Process]:
    """The first of ranks that do nothing, on one host."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield Process(0, world, 0, world, device)
    finally:
        dist.destroy_process_group()


def built(process: Process, *settings: str) -> Any:
    config, schema = loaded(f"train.device={process.device.type}", *settings)
    return build(config, schema, process)


def places() -> dict[str, Any]:
    """What the first of 8 ranks builds for each type of sharding: shards, optimizer state, pipeline."""
    more = {
        "data_parallel": ['sharding.sharding_types=["data_parallel"]'],
        "table_wise": [
            'sharding.sharding_types=["table_wise"]',
            "sharding.forward_precision=bf16",
            "sharding.backward_precision=fp16",
        ],
        "row_wise": [
            'sharding.sharding_types=["row_wise","table_wise"]',
            'sharding.tables.user.sharding_types=["row_wise"]',
        ],
        "table_row_wise": ['sharding.tables.user.sharding_types=["table_row_wise"]'],
        "column_wise": [
            'sharding.tables.user.sharding_types=["column_wise"]',
            "sharding.tables.user.ranks=[0,1]",
            "optim.embedding.name=adagrad",
        ],
        "cached": ['sharding.compute_kernels=["fused_uvm_caching"]', "sharding.prefetch=true"],
        "replicas": ["sharding.replicas=2", 'sharding.sharding_types=["table_wise","row_wise"]'],
    }
    return {name: place(settings) for name, settings in more.items()}


def place(settings: list[str]) -> dict[str, Any]:
    # TorchRec makes a replicated table's parameter a subclass that no fake tensor can be: those stay on the host
    device = torch.device("cpu") if "data_parallel" in settings[0] else CUDA
    with fake_ranks(8, device) as process, FakeGPU():
        made = built(process, *settings)
        checked = CheckedStep(made.model, made.optimizer, contextlib.nullcontext)
        plan = made.plan
        # for a fake group TorchRec registers no state of tables, so the rows are asked of the kernels
        rows = [
            (table.name, block)
            for module in made.model.modules()
            for lookup in getattr(module, "_lookups", ())
            for part in getattr(lookup, "module", lookup)._emb_modules
            for table, block in zip(part.config.embedding_tables, part.split_embedding_weights(), strict=True)
        ]
        owned = [each for each in held(made.model, made.optimizer) if each.name.startswith("optim/")]
        state = [each.tensor for each in owned if "embedding_bags." in each.name]
        return {
            "types": {name: table.sharding_type for name, table in plan.tables.items()},
            "kernels": sorted({table.compute_kernel for table in plan.tables.values()}),
            "planned": sorted(
                [name, shard.rows, shard.columns]
                for name, table in plan.tables.items()
                for shard in shards_of(table, plan)
                if shard.rank == 0 and shard.rows
            ),
            "held": sorted([name, *each.shape] for name, each in rows if each.numel()),
            "devices": sorted({str(each.device) for each in [*state, *(each for _, each in rows)]}),
            "state": len([each for each in state if each.numel()]),
            "pipeline": type(made.pipeline(checked)).__name__,
        }


class Steps:
    """A watchdog and a log that keep, of each step, what the host waited for and copied from pageable memory."""

    def __init__(self, gpu: FakeGPU) -> None:
        self.gpu, self.taken, self.name = gpu, {}, "build"

    def beat(self, place: str) -> None:
        waits = sorted([*key, count] for key, count in self.gpu.waits.items())
        self.taken[self.name] = {"waits": waits, "pageable": dict(self.gpu.pageable)}
        self.gpu.waits.clear(), self.gpu.pageable.clear()
        self.name = place

    def add(self, step: int, split: str, values: dict[str, Any]) -> None:
        self.loss = values["loss"]

    def sync(self) -> None: ...

    close = sync


def waits() -> dict[str, Any]:
    """The trainer's steps on one GPU; a line of the log ends the 4th and the 8th. And the same on a CPU, for the loss."""
    return {device.type: trained(device) for device in (CUDA, torch.device("cpu"))}


def taught() -> dict[str, Any]:
    """Four of the trainer's steps on one GPU of a student, whose two teachers' logits come with the rows."""
    return trained(CUDA, "train.max_steps=4", "model.kind=enkd", "model.enkd.teachers=['dnn', 'fm']")


def trained(device: torch.device, *settings: str) -> dict[str, Any]:
    config, schema = loaded(f"train.device={device.type}", "train.max_steps=8", "train.log_every=4", *settings)
    files = resolve_files([str(CONFIG.parent / "train.parquet")])
    options = replace(config.data.train_options(0), prefetch=0)  # read in this thread, whose mode sees it
    folder = FOLDER / f"run_{device.type}_{config.model.kind}"
    folder.mkdir()
    on_gpu = device.type == "cuda"
    with (
        fake_ranks(1, device) as process,
        FakeGPU() if on_gpu else contextlib.nullcontext(FakeGPU()) as gpu,
        StopRequest() as stop,
    ):
        steps: Any = Steps(gpu)
        context = RunContext(process, folder, storage_of(config.train, folder), stop, steps, lambda state: steps)
        stream = ParquetStream(files, schema, options)
        if on_gpu:
            stream.on_batch = Batch.pin_memory
        if config.model.kind == "enkd":
            kinds = [f"model.kind={kind}" for kind in config.model.enkd.teachers]
            stream = TaughtStream(stream, [Scorer(built(process, kind).model.eval()) for kind in kinds])
        trainer = Trainer(config.train, context, build(config, schema, process), stream, None)
        with contextlib.suppress(StopIteration):
            trainer.train()
    return {"steps": steps.taken, "loss": steps.loss}


def caches() -> dict[str, Any]:
    """Rows in a cache and their locks before and after a load of what `waits` has trained: which values there are."""
    cached = ('sharding.compute_kernels=["fused_uvm_caching"]', "sharding.prefetch=true")
    with fake_ranks(1) as process, FakeGPU():
        made = built(process, *cached)
        found: list[Any] = [each for each in with_lookups(made.model) if hasattr(each, "lxu_cache_locking_counter")]
        for kernel in found:
            kernel.lxu_cache_state.fill_(7)
            kernel.lxu_cache_locking_counter.fill_(1)
        before = [cache_of(kernel) for kernel in found]
        load_checked(Saved(FOLDER / "run_cuda_mbcnet" / "checkpoints" / "step_5"), made, process)
        return {"before": before, "after": [cache_of(kernel) for kernel in found]}


def cache_of(kernel: Any) -> list[list[int]]:
    return [
        sorted({*each.cpu().flatten().tolist()}) for each in (kernel.lxu_cache_state, kernel.lxu_cache_locking_counter)
    ]


def results_of(names: str) -> dict[str, Any]:
    cases: tuple[Callable[[], Any], ...] = (
        architectures, in_bf16, streams, graph_of_one_network, graph_of_branches, wrong_device, places, waits, taught, caches,
    )  # fmt: skip
    known = {each.__name__: each for each in cases}
    try:
        return {name: known[name]() for name in names.split(",")}
    except Exception:  # not every exception of torch goes between processes
        raise SystemError(traceback.format_exc()) from None


if __name__ == "__main__":
    if COMPILER:
        install()
        # it compares shapes over ranks, which a fake group cannot
        data_parallel._verify_param_shape_across_processes = lambda *args: None
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("fork")) as pool:
        found = pool.map(results_of, sys.argv[2:])
        (FOLDER / "results.json").write_text(json.dumps({name: each for some in found for name, each in some.items()}))
