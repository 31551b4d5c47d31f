"""Managed collision (zch): what a checkpoint keeps besides the tables' own state, and its numbers in a log line."""

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from data.errors import InputError
from mbcnet_rec.checkpoints.shards import Saved, Shape, TensorShard, whole_shard
from mbcnet_rec.runtime.process import Process, sum_over_ranks
from sharding.bridge.zch import BucketedCollisions, collisions_of

_STATE = re.compile(r"_managed_collision_modules\.([^/]+)\.[^./]+$")


def zch_table_of(name: str) -> str:
    """The table whose id-to-row mapping a logical tensor belongs to; empty for all other tensors."""
    found = _STATE.search(name)
    return found[1] if found else ""


def tables_of_other_ids(
    saved: Mapping[str, Shape], wanted: Mapping[str, Shape], buckets: Mapping[str, int], now: Mapping[str, int]
) -> set[str]:
    """Tables whose rows belong to other ids in the checkpoint than in this run: their values must not be loaded.

    `saved` and `wanted` are shapes of logical tensors, `buckets` and `now` numbers of buckets, of the checkpoint and of this run.
    """
    names = [name for name in {**saved, **wanted} if zch_table_of(name)]
    resized = {zch_table_of(name) for name in names if saved.get(name) != wanted.get(name)}
    return resized | {table for table in map(zch_table_of, names) if buckets.get(table) != now.get(table)}


def history_shards(modules: Iterable[BucketedCollisions]) -> list[TensorShard]:
    """For each bucket of this rank, the ids since the last admission and how many ids have lost their row; often nothing."""
    shards = []
    for module in modules:
        module.deal_out()
        for bucket in module.own_buckets:
            name = f"zch/{module.table.name}/{bucket.number}"
            evictions = torch.tensor([bucket.evictions])
            shards += [
                whole_shard(f"{name}/history", bucket.history(), replicated=False),
                whole_shard(f"{name}/evictions", evictions, replicated=False),
            ]
    return shards


def restore_history(saved: Saved, modules: Iterable[BucketedCollisions]) -> None:
    """Restore what `history_shards` saved, on any number of ranks; InputError if the checkpoint does not hold it, or not in this form."""
    for module in modules:
        for bucket in module.own_buckets:
            name = f"zch/{module.table.name}/{bucket.number}"
            history, evictions = saved.whole(f"{name}/history"), saved.whole(f"{name}/evictions")
            known = history.dtype == evictions.dtype == torch.int64 and evictions.shape == (1,)
            if not known or history.dim() != 2 or history.shape[0] != 2:
                raise InputError(f"{saved.folder}: {name!r} is not a history of ids; use another checkpoint")
            bucket.load_history(history)
            bucket.evictions = int(evictions)


def check_rows(saved: Saved, model: nn.Module) -> None:
    """InputError if a loaded mapping is none that training writes: a row is out of range, or of two ids."""
    for module in collisions_of(model):
        if not module.is_sound():
            raise InputError(
                f"{saved.folder}: table {module.table.name!r}: its ids have no rows of their own; use another checkpoint"
            )


def zch_counters(modules: Sequence[BucketedCollisions], process: Process) -> dict[str, float]:
    """For each table: the share of its rows that have an id, and the ids that have got a row and lost it so far. Every rank calls it."""
    counts = [(module.used_rows(), sum(bucket.evictions for bucket in module.own_buckets)) for module in modules]
    values = {}
    for module, (used, evictions) in zip(modules, sum_over_ranks(counts, process), strict=True):
        table = module.table
        values[f"zch_used/{table.name}"] = used / (table.num_embeddings - module.zch.buckets)
        values[f"zch_admissions/{table.name}"] = used + evictions
        values[f"zch_evictions/{table.name}"] = evictions
    return values


def zch_unseen(modules: Sequence[BucketedCollisions], process: Process) -> dict[str, float]:
    """For each table, by its fields: the share without a row among the ids `looked_up` by all ranks. Every rank calls it."""
    pairs = zip(modules, sum_over_ranks([module.looked_up.tolist() for module in modules], process), strict=True)
    return {f"unseen/{'+'.join(each.table.feature_names)}": lost / max(1, ids) for each, (ids, lost) in pairs}
