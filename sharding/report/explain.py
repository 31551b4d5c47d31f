"""Why a table is where it is: every other placement it could have, and what that would cost."""

from dataclasses import replace
from typing import NamedTuple

from sharding.cost.assess import Assessment, assess
from sharding.cost.estimate import ZCH_BYTES_PER_ROW, Bytes, Room, Times, gib
from sharding.plan.compare import placement_text
from sharding.plan.placement import TablePlan, with_kernels
from sharding.report.text import columns, ms, table_totals


class Alternative(NamedTuple):
    """One placement of a table, all else as planned."""

    table: TablePlan  # on the ranks that are least busy
    bytes: Bytes  # of all its shards
    times: Times  # of its largest shard
    step_seconds: float  # of the whole step with it
    busiest_seconds: float  # table time of the busiest rank with it
    fits: bool  # whether every rank has room


def alternatives(assessment: Assessment, name: str, room: Room) -> list[Alternative]:
    """The planned placement first, then every other that the platform runs, the one with the shortest step first."""
    plan = assessment.plan
    chosen, others = plan.tables[name], {other: each for other, each in plan.tables.items() if other != name}

    def tried(table: TablePlan) -> Alternative:
        result = assess(replace(plan, tables={**plan.tables, name: table}), assessment.cluster)
        memory = [result.memory(rank) for rank in result.ranks]
        fits = all(rank.hbm <= room.hbm and rank.ddr <= room.ddr for rank in memory)
        return Alternative(table, *table_totals(result)[name], result.path.step, result.busiest.times.total, fits)

    found = [
        tried(each)
        for each in _placements(chosen, assess(replace(plan, tables=others), assessment.cluster))
        if (each.sharding_type, each.compute_kernel) != (chosen.sharding_type, chosen.compute_kernel)
    ]
    found.sort(key=lambda each: (not each.fits, each.step_seconds, each.busiest_seconds))
    return [tried(chosen), *found]


def _placements(table: TablePlan, without: Assessment) -> list[TablePlan]:
    """Every type and kernel of a table, on the ranks that are least busy without it; of a table of encoding zch, the only one."""
    if table.zch_buckets:
        return [table]
    plan = without.plan
    busy = [rank.times.total for rank in without.ranks]
    local = plan.local_group_size
    order = sorted(range(plan.group_size), key=busy.__getitem__)
    hosts = [tuple(range(first, first + local)) for first in range(0, plan.group_size, local)]
    host = min(hosts, key=lambda ranks: max(busy[rank] for rank in ranks))
    parts = next((n for n in (4, 2) if n <= plan.group_size and not table.embedding_dim % (4 * n)), 0)
    ranks = {"table_wise": (order[0],), "row_wise": (), "data_parallel": ()}
    if plan.hosts > 1:
        ranks["table_row_wise"] = host
    if parts:
        ranks["column_wise"] = tuple(sorted(order[:parts]))
    kernels = ["fused"] if plan.device == "cpu" else ["fused", "fused_uvm_caching"]
    if table.compute_kernel not in (*kernels, "dense"):
        kernels.append(table.compute_kernel)
    return [
        replace(each, ranks=where)
        for kind, where in ranks.items()
        for each in with_kernels(table, kind, kernels, table.cache_ratio or 0.2)
    ]


def explain_lines(assessment: Assessment, name: str, room: Room) -> list[str]:
    """Why this placement, what the next best would cost, and every other."""
    chosen, *others = alternatives(assessment, name, room)
    table = chosen.table
    size = gib(chosen.bytes.rows + chosen.bytes.state)
    known = f", {table.cardinality:,} distinct" if table.cardinality else ""
    lines = [
        f"{name}: {table.num_embeddings:,} x {table.embedding_dim}, {table.ids:g} ids a row over {table.bags} field(s){known}, "
        f"{size} with optimizer state{' and ids' if table.zch_buckets else ''}",
        f"planned: {placement_text(table)}, {ms(chosen.times.total)} ms on its busiest rank; step {ms(chosen.step_seconds)} ms",
    ]
    if next_best := next((each for each in others if each.fits), None):
        step = next_best.step_seconds - chosen.step_seconds
        busiest = next_best.busiest_seconds - chosen.busiest_seconds
        held = next_best.bytes.hbm + next_best.bytes.ddr - chosen.bytes.hbm - chosen.bytes.ddr
        lines.append(
            f"next best: {placement_text(next_best.table)}: step {1e3 * step:+.3f} ms ({100 * step / chosen.step_seconds:+.1f} %), "
            f"busiest rank {1e3 * busiest:+.3f} ms, memory over all ranks {'+' if held >= 0 else '-'}{gib(abs(held))}"
        )
    rows = [
        (
            f"{each.table.sharding_type} {each.table.compute_kernel}",
            *map(ms, each.times[1:]),
            gib(each.bytes.hbm + each.bytes.ddr),
            f"{ms(each.step_seconds)} ms" if each.fits else "no room",
        )
        for each in (chosen, *others)
    ]
    head = ("<placement", "largest shard: lookup", "output", "gradient", "update", "all bytes", "step")
    lines += columns(head, rows)
    notes = {
        "row_wise": "row_wise: every rank sends partial sums for all rows of the batch, so it pays where a table is large",
        "table_row_wise": "table_row_wise: partial sums are added inside one host, where links are fast; 1 / ranks-a-host leaves it",
        "table_wise": "table_wise: one rank looks up and sends everything; least traffic in all, but one rank carries it",
        "data_parallel": "data_parallel: no rows cross ranks, but the gradient of the whole table does, every step",
        "column_wise": "column_wise: each shard looks up the same ids; rowwise Adagrad keeps a state per shard",
    }
    note = notes[table.sharding_type]
    if table.zch_buckets:
        note = (
            f"encoding zch: row_wise is the only placement; each rank gives rows to the ids of its share of the {table.zch_buckets} buckets, and "
            f"keeps {ZCH_BYTES_PER_ROW} bytes a row of which id has it and how it was used"
        )
    return [*lines, f"  times in ms; {note}"]
