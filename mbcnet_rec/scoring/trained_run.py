"""A run that is done: its config, its best checkpoint, and the model with those weights, sharded over these ranks or whole in one process."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from data.errors import InputError
from data.schema import Schema, load_schema
from mbcnet_rec.build import build
from mbcnet_rec.checkpoints.manifest import MANIFEST
from mbcnet_rec.checkpoints.run_folder import CONFIG, PLAN, storage_of
from mbcnet_rec.checkpoints.run_schema import own_schema
from mbcnet_rec.checkpoints.shards import Saved, load_shards, of_average, shards_of, whole_shard
from mbcnet_rec.checkpoints.storage import CheckpointStorage, best_step
from mbcnet_rec.checkpoints.zch_state import check_rows
from mbcnet_rec.config import RunConfig, load_config
from mbcnet_rec.runtime.process import Process, answer_of_first, joined_process, mean_over_ranks
from mbcnet_rec.scoring.scorer import Scorer, autocast_of
from mbcnet_rec.training.built import Built
from sharding.bridge.allocated import purge_caches
from sharding.plan.placement import read_plan


@dataclass(frozen=True)
class TrainedRun:
    """One checkpoint of a run. What reads it raises InputError where it is damaged, or belongs to another model."""

    config: RunConfig
    folder: Path
    step: int

    @property
    def storage(self) -> CheckpointStorage:
        """Where its checkpoints are."""
        return storage_of(self.config.train, self.folder)

    @cached_property
    def schema(self) -> Schema:
        """The schema that it was trained with: its own copy, or in runs of earlier versions, which have none, the config's."""
        return own_schema(self.folder, self.storage, self.step) or load_schema(self.config.schema)

    def build(self, process: Process) -> Built:
        """Build the model with the checkpoint's weights, its tables planned anew where the plan was for other ranks or to train on replicas."""
        path = self.folder / PLAN
        plan = str(path) if self.config.sharding.plan and _fits(path, process) else ""
        sharding = replace(self.config.sharding, replicas=1, prefetch=False, plan=plan)
        built = build(replace(self.config, sharding=sharding), self.schema, process)
        shards = [each for each in shards_of(built.model, built.optimizer) if each.name.startswith("model/")]
        with self.storage.fetched(self.step) as saved:
            checkpoint = Saved(saved)
            load_shards(checkpoint, of_average(checkpoint, shards), process.rank, process.world_size)
            purge_caches(built.model)
            check_rows(checkpoint, built.model)
        for buffer in built.model.buffers():
            if buffer.is_floating_point():
                mean_over_ranks(buffer)  # running statistics of batch norm
        return built

    def scorer(self, process: Process) -> tuple[Scorer, int]:
        """Build the model and its scorer; with the rows of one rank's batch."""
        rows = (self.config.data.eval_batch_size or self.config.data.batch_size) // process.world_size
        return Scorer(self.build(process).model, autocast_of(self.config.train.autocast, process.device)), max(1, rows)

    def read_whole(self, tensors: dict[str, Tensor]) -> None:
        """Copy the logical tensors into whole ones of one process: name in the model's state dict -> where to put it."""
        shards = [whole_shard(f"model/{name}", tensor) for name, tensor in tensors.items()]
        with torch.no_grad(), self.storage.fetched(self.step) as saved:
            checkpoint = Saved(saved)
            # no world has size 0: statistics that each rank has saved are averaged
            load_shards(checkpoint, of_average(checkpoint, shards), rank=0, world_size=0)

    def digest(self) -> str:
        """SHA-256 of the checkpoint's manifest, which holds the sums of its files."""
        with self.storage.fetched(self.step) as saved:
            return hashlib.sha256((saved / MANIFEST).read_bytes()).hexdigest()


def load_run(folder: Path) -> RunConfig:
    """Read the resolved config of a run folder; InputError if it is no run folder."""
    others = {"model.json": "an exported artifact", "_predict.json": "scores of `mbcnet predict`"}
    other = next((what for name, what in others.items() if (folder / name).is_file()), "")
    if other or not (folder / CONFIG).is_file():
        found = f"it is {other}" if other else f"it has no {CONFIG}"
        raise InputError(f"{folder}: no run folder ({found}); pass what `mbcnet train` wrote, such as runs/NAME")
    return load_config(folder / CONFIG)


def find_best(config: RunConfig, folder: Path, process: Process) -> TrainedRun:
    """A run at its best checkpoint; InputError if it has none."""
    step = answer_of_first(process, lambda: best_step(storage_of(config.train, folder)))
    if step is None:
        raise InputError(f"{folder}: no whole checkpoint; train it first")
    return TrainedRun(config, folder, step)


@contextmanager
def opened_run(folder: Path) -> Iterator[tuple[TrainedRun, Process]]:
    """A run at its best checkpoint, and this rank among those that read it; InputError if it is no run folder, or has no checkpoint."""
    config = load_run(folder)
    with joined_process(config.train.device) as process:
        yield find_best(config, folder, process), process


def _fits(path: Path, process: Process) -> bool:
    """Whether a plan file is there and made for these ranks, and for nothing that only training needs."""
    if not path.is_file():
        return False
    plan = read_plan(path)
    ranks = (plan.world_size, plan.local_world_size, plan.device)
    here = (process.world_size, process.local_world_size, process.device.type)
    return ranks == here and plan.replicas == 1 and not plan.prefetch


def known_best(schema: Schema, split: str, rows: int) -> tuple[float, float] | None:
    """The best reachable AUC and log-loss of a synthetic split, as its generator wrote them; None elsewhere."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        summary = json.loads((schema.folder / "synthetic.json").read_text(encoding="utf-8"))["splits"][split]
        if summary["rows"] == rows:
            return float(summary["best_auc"]), float(summary["best_log_loss"])  # null: rows of one class
    return None
