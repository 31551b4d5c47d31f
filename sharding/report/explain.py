"""Why a table is where it is: every other placement it could have, and what that would cost."""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from data.schema.show import columns
from sharding.cost.assess import Assessment, assess
from sharding.cost.estimate import Bytes, Room, Times, gib
from sharding.plan.compare import placement_text
from sharding.plan.placement import TablePlan, with_kernels
from sharding.report.text import ms, table_totals


class Alternative(NamedTuple):
    """One placement of a table, all else as planned."""

    table: TablePlan
    bytes: Bytes  # of all its shards
    times: Times  # of its largest shard
    step_seconds: float  # of the whole step with it
    fits: bool  # whether every rank has room


def alternatives(assessment: Assessment, name: str, room: Room) -> list[Alternative]:
    """The planned placement first, then every other that the platform runs, the one with the shortest step first."""
    plan, found = assessment.plan, []
    chosen, others = plan.tables[name], {other: each for other, each in plan.tables.items() if other != name}
    for table in (chosen, *_placements(chosen, assess(replace(plan, tables=others), assessment.cluster))):
        result = assess(replace(plan, tables=others | {name: table}), assessment.cluster)
        memory = [result.memory(rank) for rank in result.ranks]
        fits = all(rank.hbm <= room.hbm and rank.ddr <= room.ddr for rank in memory)
        found.append(Alternative(table, *table_totals(result)[name], result.path.step, fits))
    return [found[0], *sorted(found[1:], key=lambda each: (not each.fits, each.step_seconds))]


def _placements(chosen: TablePlan, without: Assessment) -> Iterator[TablePlan]:
    """Every other type and kernel of a table, on the ranks that are least busy without it; of a table of encoding zch, none."""
    plan, busy = without.plan, [rank.times.total for rank in without.ranks]
    order, local = sorted(range(plan.group_size), key=busy.__getitem__), plan.local_group_size
    hosts = [tuple(range(first, first + local)) for first in range(0, plan.group_size, local)]
    ranks = {"table_wise": (order[0],), "row_wise": (), "data_parallel": ()}
    if plan.hosts > 1:
        ranks["table_row_wise"] = min(hosts, key=lambda host: max(busy[rank] for rank in host))
    if parts := next((n for n in (4, 2) if n <= plan.group_size and not chosen.embedding_dim % (4 * n)), 0):
        ranks["column_wise"] = tuple(sorted(order[:parts]))
    kernels = ["fused"] if plan.device == "cpu" else ["fused", "fused_uvm_caching"]
    for kind, where in ranks.items() if not chosen.zch_buckets else ():
        for each in with_kernels(chosen, kind, kernels, chosen.cache_ratio or 0.2):
            if (kind, each.compute_kernel) != (chosen.sharding_type, chosen.compute_kernel):
                yield replace(each, ranks=where)


def explain_lines(assessment: Assessment, name: str, room: Room) -> list[str]:
    """Why this placement, what the next best would cost, and every other."""
    chosen, *others = alternatives(assessment, name, room)
    table, size = chosen.table, gib(chosen.bytes.rows + chosen.bytes.state)
    lines = [
        f"{name}: {table.num_embeddings:,} x {table.embedding_dim}, {table.ids:g} ids a row over {table.bags} field(s), "
        f"{size} with optimizer state",
        f"planned: {placement_text(table)}, {ms(chosen.times.total)} ms on its busiest rank; step {ms(chosen.step_seconds)} ms",
    ]
    if next_best := next((each for each in others if each.fits), None):
        step = next_best.step_seconds - chosen.step_seconds
        held = next_best.bytes.hbm + next_best.bytes.ddr - chosen.bytes.hbm - chosen.bytes.ddr
        lines.append(
            f"next best: {placement_text(next_best.table)}: step {1e3 * step:+.3f} ms ({100 * step / chosen.step_seconds:+.1f} %), "
            f"memory over all ranks {'+' if held >= 0 else '-'}{gib(abs(held))}"
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
    note = "; encoding zch: row_wise is the only placement" if table.zch_buckets else ""
    return [*lines, *columns(head, rows, "  "), f"  times in ms{note}"]
