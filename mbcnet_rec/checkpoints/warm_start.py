"""Copies another run's tables into this run before its first step."""

from pathlib import Path
from typing import Any

from data.errors import InputError
from data.schema.parse import parse_dataclass, read_toml
from mbcnet_rec.checkpoints.compatibility import all_shapes, column_shards, init_states, saved_run, table_of
from mbcnet_rec.checkpoints.run_folder import best_step, storage_of
from mbcnet_rec.checkpoints.shards import Saved, TensorShard, shards_of
from mbcnet_rec.checkpoints.zch_state import check_rows, zch_table_of
from mbcnet_rec.runtime.process import Process
from mbcnet_rec.training.built import Built
from mbcnet_rec.training.config import TrainConfig


def warm_start(train: TrainConfig, built: Built, process: Process) -> str:
    """Copy tables and their optimizer state from the best checkpoint of `train.warm_start`; every rank calls it.

    A table may have more rows here: the first ones are copied, so its ids must mean the same there (hashes of another size and
    vocabularies in another order do not). Without `train.warm_start_tables` every table that both runs have is taken.

    Returns:
        One line on what was taken.

    Raises:
        InputError: no such run or table, or a table is wider or longer there.
    """
    other = Path(train.warm_start)
    if not (other / "config.toml").is_file():
        raise InputError(
            f"train.warm_start = {str(other)!r}: no run folder (it has no config.toml); name what `mbcnet train` wrote"
        )
    path = other / "config.toml"
    storage = storage_of(
        parse_dataclass(TrainConfig, read_toml(path).get("train", {}), str(path), "train"), other
    )
    step = best_step(storage)
    if step is None:
        raise InputError(f"train.warm_start = {str(other)!r}: holds no whole checkpoint; train it first")
    init_states(built)
    with storage.fetched(step) as folder:
        saved = Saved(folder)
        shards = shards_of(built.model, built.optimizer)
        tables = _chosen(train, saved, {table_of(name) for name in all_shapes(shards, process)} - {""})
        same_state = _same_state(saved, built)
        _refuse_other_ids(saved, built, tables, train)
        for shard in shards:
            table = table_of(shard.name) or zch_table_of(shard.name)
            if table in tables and (shard.name.startswith("model/") or same_state):
                _copy(saved, shard, table)
        check_rows(saved, built.model)
    note = "with" if same_state else "without"
    return f"warm start from step {step} of {other}: {note} optimizer state: {', '.join(sorted(tables))}"


def _refuse_other_ids(saved: Saved, built: Built, tables: set[str], train: TrainConfig) -> None:
    """Rows are of the same ids on both sides only where both or neither are of encoding zch, in equal buckets of equal size."""
    theirs: Any = saved_run(saved).get("zch_buckets", {})
    for table in sorted(tables):
        own = built.plan.tables[table]
        names = [name for name in saved.shapes if zch_table_of(name) == table and name.endswith(".raw_ids")]
        rows = [saved.shapes[name][0] for name in names]
        same = rows == [own.num_embeddings] and theirs.get(table) == own.zch_buckets
        if (own.zch_buckets or names) and not same:
            raise InputError(
                f"train.warm_start = {train.warm_start!r}: table {table}: encoding zch, num_embeddings or zch_buckets differ, so "
                "its rows are of other ids; make them equal in the schema, or leave the table out of train.warm_start_tables"
            )


def _chosen(train: TrainConfig, saved: Saved, own: set[str]) -> set[str]:
    theirs = {table_of(name) for name in saved.shapes} - {""}
    for name in train.warm_start_tables:
        for where, known in (("this run", own), (train.warm_start, theirs)):
            if name not in known:
                raise InputError(
                    f"train.warm_start_tables: {name!r} is not a table of {where}; wanted some of: {', '.join(sorted(own & theirs))}"
                )
    return set(train.warm_start_tables) or own & theirs


def _same_state(saved: Saved, built: Built) -> bool:
    run = saved_run(saved)
    return run.get("optimizer") == built.optim.embedding.name and (
        built.optim.embedding.name != "rowwise_adagrad"
        or run.get("column_shards", {}) == column_shards(built.plan)
    )


def _copy(saved: Saved, shard: TensorShard, table: str) -> None:
    theirs = saved.shapes.get(shard.name)
    if theirs is None or theirs[1:] != shard.global_shape[1:] or theirs[0] > shard.global_shape[0]:
        raise InputError(
            f"train.warm_start: table {table} has shape {theirs} there and {shard.global_shape} here; wanted equal columns and at "
            "least as many rows here: change the schema, or leave the table out of train.warm_start_tables"
        )
    saved.fill_rows(shard)
