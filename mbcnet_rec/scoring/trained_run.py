"""A run that is done: its config, its best checkpoint, and the model with those weights, sharded over these ranks or whole in one process."""

import dataclasses
import hashlib
import json
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from data.errors import InputError
from data.schema import Schema, load_schema
from mbcnet_rec.build import build
from mbcnet_rec.checkpoints.compatibility import saved_run
from mbcnet_rec.checkpoints.manifest import MANIFEST
from mbcnet_rec.checkpoints.run_folder import CONFIG, PLAN, storage_of
from mbcnet_rec.checkpoints.run_schema import own_schema
from mbcnet_rec.checkpoints.shards import Saved, load_shards, shards_of, whole_shard
from mbcnet_rec.checkpoints.storage import best_step
from mbcnet_rec.checkpoints.zch_state import check_rows
from mbcnet_rec.config import RunConfig, load_config
from mbcnet_rec.model.models import ModelConfig
from mbcnet_rec.runtime.process import Process, answer_of_first, mean_over_ranks
from mbcnet_rec.scoring.scorer import Scorer, autocast_of
from mbcnet_rec.training.built import Built
from sharding.bridge.caches import purge_caches
from sharding.plan.plan_file import read_plan


def load_run(folder: Path) -> RunConfig:
    """Read the resolved config of a run folder.

    Raises:
        InputError: it is no run folder.
    """
    others = {"model.json": "an exported artifact", "_predict.json": "scores of `mbcnet predict`"}
    other = next((what for name, what in others.items() if (folder / name).is_file()), "")
    if other or not (folder / CONFIG).is_file():
        found = f"it is {other}" if other else f"it has no {CONFIG}"
        raise InputError(f"{folder}: no run folder ({found}); pass what `mbcnet train` wrote, such as runs/NAME")
    return load_config(folder / CONFIG)


def find_step(config: RunConfig, folder: Path, process: Process) -> int:
    """The step of a run's best checkpoint.

    Raises:
        InputError: it has none.
    """

    def find() -> int:
        step = best_step(storage_of(config.train, folder))
        if step is None:
            raise InputError(f"{folder}: no whole checkpoint; train it first")
        return step

    return answer_of_first(process, find)


def run_schema(config: RunConfig, folder: Path, step: int) -> Schema:
    """The schema that a run was trained with: its own copy, or in runs of earlier versions, which have none, the config's.

    Raises:
        InputError: it cannot be read, or was changed since.
    """
    manifest = storage_of(config.train, folder).manifest(step)
    return own_schema(folder, saved_run(manifest, folder)) or load_schema(config.schema)


def load_built(config: RunConfig, schema: Schema, folder: Path, step: int, process: Process) -> Built:
    """Build a run's model on this world size and load a checkpoint.

    The run's plan is left aside where it was made for other ranks or to train on replicas: the tables are planned anew.

    Raises:
        InputError: the checkpoint is damaged, or the plan is for another schema.
    """
    plan = str(folder / PLAN) if config.sharding.plan and _fits(folder / PLAN, process) else ""
    sharding = dataclasses.replace(config.sharding, replicas=1, prefetch=False, plan=plan)
    built = build(dataclasses.replace(config, sharding=sharding), schema, process)
    shards = [each for each in shards_of(built.model, built.optimizer) if each.name.startswith("model/")]
    with storage_of(config.train, folder).fetched(step) as saved:
        checkpoint = Saved(saved)
        load_shards(checkpoint, shards, process.rank, process.world_size)
        purge_caches(built.model)
        check_rows(checkpoint, built.model)
    for buffer in built.model.buffers():
        if buffer.is_floating_point():
            mean_over_ranks(buffer)  # running statistics of batch norm
    return built


def _fits(path: Path, process: Process) -> bool:
    """Whether a plan file is there and made for these ranks, and for nothing that only training needs."""
    if not path.is_file():
        return False
    plan = read_plan(path)
    ranks = (plan.world_size, plan.local_world_size, plan.device)
    here = (process.world_size, process.local_world_size, process.device.type)
    return ranks == here and plan.replicas == 1 and not plan.prefetch


def read_whole(config: RunConfig, folder: Path, step: int, tensors: dict[str, Tensor]) -> None:
    """Copy a checkpoint's logical tensors into whole ones of one process: name in the model's state dict -> where to put it.

    Raises:
        InputError: the checkpoint is damaged, or holds other tensors.
    """
    shards = [whole_shard(f"model/{name}", tensor) for name, tensor in tensors.items()]
    with torch.no_grad(), storage_of(config.train, folder).fetched(step) as saved:
        # no world has size 0: statistics that each rank has saved are averaged
        load_shards(Saved(saved), shards, rank=0, world_size=0)


def branch_names(config: ModelConfig) -> tuple[str, ...]:
    """Branches of a model, in the order of its outputs."""
    return config.mbcnet.branches if config.kind == "mbcnet" else ()


def scorer_of(config: RunConfig, built: Built, process: Process) -> tuple[Scorer, int]:
    """The scorer of a run's model, and the rows of one rank's batch."""
    rows = (config.data.eval_batch_size or config.data.batch_size) // process.world_size
    return Scorer(built.model, autocast_of(config.train.autocast, process.device)), max(1, rows)


def weights_digest(config: RunConfig, folder: Path, step: int) -> str:
    """SHA-256 of a checkpoint's manifest, which holds the sums of its files."""
    with storage_of(config.train, folder).fetched(step) as saved:
        return hashlib.sha256((saved / MANIFEST).read_bytes()).hexdigest()


def known_best(schema: Schema, split: str, rows: int) -> tuple[float, float] | None:
    """The best reachable AUC and log-loss of a synthetic split, as its generator wrote them; None elsewhere."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        summary = json.loads((schema.folder / "synthetic.json").read_text(encoding="utf-8"))["splits"][split]
        if summary["rows"] == rows:
            return float(summary["best_auc"]), float(summary["best_log_loss"])  # null: rows of one class
    return None
