"""How much of its tables a run has used, and what a growth has changed of them, for the log.

Of a hash table the rows that were trained are those whose values are not initial ones any more: no counter beside the checkpoint can differ.
"""

import math
from collections.abc import Mapping

import torch

from data.profile.grow import Changes, growth_lines
from data.schema import Schema
from mbcnet_rec.checkpoints.compatibility import table_of
from mbcnet_rec.logs.progress import tell
from mbcnet_rec.runtime.process import max_over_ranks
from mbcnet_rec.training.built import Built
from mbcnet_rec.training.trainer import Trainer
from sharding.bridge.blocks import initial_rows

HASHED_ROWS = 1 << 20  # of a hash table, which tell of all: hashes fall evenly
WORST = 5  # tables that the console names


def trained_rows(built: Built, schema: Schema) -> dict[str, torch.Tensor]:
    """Hash table -> (rows,) uint8, 1 where the values of one of its first `HASHED_ROWS` rows are not initial ones. Every rank calls it.

    Empty with Adam's `l2`, which moves every row.
    """
    names = {each.table_name for each in schema.features if each.is_hashed}
    state = built.model.state_dict() if names and not built.optim.embedding.l2 else {}
    tables = {name: table_of(name) for name in state if table_of(name) in names}
    found = {
        table: torch.zeros(min(state[name].size(0), HASHED_ROWS), dtype=torch.uint8) for name, table in tables.items()
    }
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
    records = trainer.context.open_records(trainer.state)
    records.add(trainer.state.step, "growth", values)
    records.close()
    for line in growth_lines(changes):
        tell(line)


def tell_collisions(trainer: Trainer, shares: Mapping[str, float]) -> None:
    """Log which share of the ids of each hash table collides after the day; the worst in words. On rank 0."""
    if not shares:
        return
    records = trainer.context.open_records(trainer.state)
    records.add(trainer.state.step, "ids", dict(shares))
    records.close()
    by_table = {key.partition("/")[2]: value for key, value in shares.items() if key.startswith("collision/")}
    worst = sorted(by_table, key=lambda name: -by_table[name])[:WORST]
    told = ", ".join(
        f"{name} {by_table[name]:.1%} ({shares[f'hash_used/{name}']:.1%} of its rows used)" for name in worst
    )
    tell(
        f"ids that share a row of a hash table with others{f', the worst of {len(by_table)}' * (len(by_table) > WORST)}: {told}"
    )
