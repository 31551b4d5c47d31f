"""What a run finds out of each day, before it is trained and after it.

Before: how the model of the days before scores it, what its rows are like, and what has left the range of those days. After: how much of its
tables the run has used, and what a growth has changed of them.

Of a hash table the rows that were trained are those whose values are not initial ones any more: no counter beside the checkpoint can differ.
"""

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch

from data.profile.grow import Changes, growth_lines
from data.reading.conditions import partition_of, select_files
from data.reading.files import read_contents, resolve_files
from data.reading.selection import Selection
from data.schema import OUT_OF_VOCABULARY_ROW, Schema, load_schema
from data.stream import Batch, ParquetStream
from mbcnet_rec.checkpoints.compatibility import table_of
from mbcnet_rec.config import RunConfig
from mbcnet_rec.lineage import Day, days_done
from mbcnet_rec.logs.progress import tell
from mbcnet_rec.runtime.process import Process, max_over_ranks, sum_over_ranks
from mbcnet_rec.training.built import Built
from mbcnet_rec.training.trainer import Trainer
from sharding.bridge.blocks import initial_rows

WORDS = {
    "label_rate": "label rate",
    "null": "null share of",
    "new": "new-id share of",
    "unseen": "new-id share of",
    "score": "score distribution,",
}
ERRORS = 4.0  # standard errors of a share of so many rows that a day may stand outside of the range
SLACK = 0.1  # and this share of the range's far end
HASHED_ROWS = 1 << 20  # of a hash table, which tell of all: hashes fall evenly
WORST = 5  # tables that the console names


def score_day(trainer: Trainer, stream: ParquetStream, earlier: Sequence[Day]) -> Day:
    """On every rank, a day's `progressive` metrics, `profile` and `alarms`, told the lines of days before; raises as `Trainer.evaluate` does."""
    known = trained_rows(trainer.built, stream.schema)
    fields = [
        each
        for each in stream.schema.features
        if each.table_name in known or (each.is_keyed and each.encoding in ("vocabulary", "ids"))
    ]
    new, values = Counter[str](), Counter[str]()

    def count(batch: Batch) -> Batch:
        if batch.cursor.step == 1:  # again: several ranks read all rows before they score them
            new.clear()
            values.clear()
        for each in fields:
            weighted = batch.weighted_features if each.is_weighted else None
            ids = (batch.sparse_features if weighted is None else weighted)[each.name].values()
            if each.is_hashed:
                rows = known[each.table_name]
                ids = ids[(ids > 0) & (ids < len(rows))]
                new[each.name] += int((rows[ids] == 0).sum())
            elif each.encoding == "vocabulary":
                new[each.name] += int((ids == OUT_OF_VOCABULARY_ROW).sum())
            values[each.name] += len(ids)
        return batch

    stream.on_batch = count
    metrics = trainer.evaluate(stream)
    bins = metrics.pop("reliability")
    rows, process = stream.num_rows, trainer.process
    labelled = sum(size for *_, size in bins)  # that have the first label
    profile = {"label_rate": sum(rate * size for _, rate, size in bins) / labelled if bins else float("nan")}
    nulls = _summed(stream.nulls, [each.name for each in stream.schema.features], process)
    profile |= {f"null/{name}": count / rows for name, count in nulls.items()}
    unknown, whole = (_summed(each, [field.name for field in fields], process) for each in (new, values))
    for feature in fields:
        name, is_hash = feature.name, feature.is_hashed
        if feature.encoding == "ids" and not is_hash:
            unknown[name] = metrics.get(f"invalid/{name}", 0)
            whole[name] += unknown[name] if feature.on_invalid == "null" else 0  # these are in no batch
        profile[f"{'unseen' if is_hash else 'new'}/{name}"] = unknown[name] / max(1, whole[name])
    profile |= {key: value for key, value in metrics.items() if key.startswith("unseen/")}
    if earlier:
        scores = {"low": bins[0][0], "middle": bins[len(bins) // 2][0], "high": bins[-1][0]} if bins else {}
        profile |= {f"score/{name}": value for name, value in scores.items()}
    else:  # to a model that has learned nothing all rows are new, and its scores say nothing
        profile = {key: value for key, value in profile.items() if not key.startswith("unseen/")}
    metrics |= {key: value for key, value in profile.items() if key.startswith(("new/", "unseen/"))}
    return {"progressive": metrics if earlier else {}, "profile": profile, "alarms": alarms(profile, earlier, rows)}


def _summed(counts: Mapping[str, int], names: Sequence[str], process: Process) -> dict[str, int]:
    return dict(zip(names, sum_over_ranks([counts.get(name, 0) for name in names], process), strict=True))


def alarms(profile: Mapping[str, float], earlier: Sequence[Mapping[str, Any]], rows: int) -> list[str]:
    """What of a day's profile has left the range of the days before, by field, in words."""
    found = []
    for key, value in profile.items():
        seen = [each["profile"][key] for each in earlier if key in each.get("profile", {})]
        if not seen:
            continue
        low, high = min(seen), max(seen)
        slack = ERRORS * math.sqrt(max(high * (1 - high), 1 / rows) / rows) + SLACK * high
        kind, _, name = key.partition("/")
        if value > high + slack or (value < low - slack and kind != "unseen"):  # ever fewer ids are new to a model
            was = f"{low:.4g} to {high:.4g}" if high > low else f"{low:.4g}"
            found.append(f"{WORDS[kind]} {name}".rstrip() + f" is {value:.4g}, on the days before it was {was}")
    return found


def days_in(config: RunConfig) -> list[RunConfig]:
    """A config for each value of the first partition key of the training files that has rows, in their order; one config where there is no key.

    InputError if the conditions are faulty, or leave no row.
    """
    schema, where = load_schema(config.schema), config.data.train_where
    files = select_files(resolve_files(config.data.train), where, schema)
    selection = Selection(config.data.eval_options(where), schema, files)
    keys = [next(iter(partition_of(file).items()), None) for file in files]
    kept = set(keys)
    if selection.conditions:  # on time: they may leave no row of a day, and `last N` is of all days
        kept = {keys[group.file] for group in read_contents(files, schema, selection).row_groups}
    days: dict[object, list[str]] = {}
    for key, file in zip(keys, files, strict=True):
        if key in kept:
            days.setdefault(key, []).append(str(file))
    data = (replace(config.data, train=tuple(each), train_where=selection.dated()) for each in days.values())
    return [replace(config, data=each) for each in data]


def train_days(config: RunConfig, train: Callable[..., int], *, resume: bool, overwrite: bool) -> int:
    """Train a config's days one after the other, each scored before it is trained; with `resume` from where an earlier start has come to."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        resume, overwrite = True, False
    done = days_done(config.run_folder) if resume else 0
    for number, day in enumerate(days_in(config)):
        if number >= done:
            train(day, resume=resume and not number, overwrite=overwrite and not number, continues=number > 0)
    return 0


def trained_rows(built: Built, schema: Schema) -> dict[str, torch.Tensor]:
    """On every rank, hash table -> uint8, 1 where one of its first `HASHED_ROWS` rows is not initial; empty with Adam's `l2`, which moves all."""
    names = {each.table_name for each in schema.features if each.is_hashed}
    state = built.model.state_dict() if names and not built.optim.embedding.l2 else {}
    tables = {name: table_of(name) for name in state if table_of(name) in names}
    sizes = {table: min(state[name].size(0), HASHED_ROWS) for name, table in tables.items()}
    found = {table: torch.zeros(size, dtype=torch.uint8) for table, size in sizes.items()}
    std = built.optim.embedding.init_std
    for table, first, held, initial in initial_rows(state, tables, seed=built.seed, std=std, most=HASHED_ROWS):
        differs = (held.detach().cpu() != initial.to(held.dtype)).any(1)
        found[table][first : first + len(held)] |= differs
    return {table: max_over_ranks(rows) for table, rows in found.items()}


def collisions(built: Built, schema: Schema) -> dict[str, float]:
    """For each hash table the share of its rows that were trained, and the share of ids that are not the first of their row; a collective.

    R rows of which n ids, which fall evenly, use the share 1 - exp(-n/R): linear counting.
    """
    values = {}
    for name, rows in trained_rows(built, schema).items():
        used = rows[1:].float().mean().item()
        ids = -math.log(max(1 - used, 0.5 / len(rows)))  # of a full table at least so many
        values |= {f"hash_used/{name}": used, f"collision/{name}": 1 - used / ids if used else 0.0}
    return values


def tell_growth(trainer: Trainer, changes: Mapping[str, Changes]) -> None:
    """Log what the day's growth has made of each table's rows. On rank 0."""
    values = {f"{what}/{table}": count for table, counts in changes.items() for what, count in counts.items()}
    with closing(trainer.context.open_records(trainer.state)) as records:
        records.add(trainer.state.step, "growth", values)
    for line in growth_lines(changes):
        tell(line)


def tell_collisions(trainer: Trainer, shares: Mapping[str, float]) -> None:
    """Log which share of the ids of each hash table collides after the day; the worst in words. On rank 0."""
    if not shares:
        return
    with closing(trainer.context.open_records(trainer.state)) as records:
        records.add(trainer.state.step, "ids", dict(shares))
    by_table = {key.partition("/")[2]: value for key, value in shares.items() if key.startswith("collision/")}
    worst = sorted(by_table, key=lambda name: -by_table[name])[:WORST]
    used = {name: shares[f"hash_used/{name}"] for name in worst}
    told = ", ".join(f"{name} {by_table[name]:.1%} ({used[name]:.1%} of its rows used)" for name in worst)
    others = f", the worst of {len(by_table)}" if len(by_table) > WORST else ""
    tell(f"ids that share a row of a hash table with others{others}: {told}")
