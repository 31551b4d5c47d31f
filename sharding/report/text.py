"""What a plan looks like to a person and to a machine: tables, ranks, balance, critical path, speed; and why a table is where it is."""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import reduce
from typing import Any, NamedTuple

import jinja2

from data.schema.show import columns
from sharding.cost.assess import MAIN_PHASES, PARTS, Assessment, assess
from sharding.cost.estimate import Bytes, Room, Times, gib, plus
from sharding.plan.compare import placement_text, ranks_text
from sharding.plan.placement import TablePlan, plan_text, with_kernels

TABLES_SHOWN = 15
RANKS_SHOWN = 6
ROWS_SHOWN = 40  # tables with a row of their own in the heat map, by time; the rest share one


def table_totals(assessment: Assessment) -> dict[str, tuple[Bytes, Times]]:
    """Bytes of all shards, and seconds of the largest: table -> both, most seconds first."""
    totals = {}
    for name, costs in assessment.costs.items():
        slowest = max((cost.times for cost in costs), key=lambda times: times.total)
        totals[name] = reduce(plus, (cost.bytes for cost in costs)), slowest
    return dict(sorted(totals.items(), key=lambda pair: -(pair[1][0].rows + pair[1][0].state)))


def ms(seconds: float) -> str:
    """Seconds as milliseconds for people."""
    return f"{1e3 * seconds:.3f}"


def report_lines(assessment: Assessment, *, full: bool = False) -> list[str]:
    """The report for people; `full` lists every table and rank."""
    plan, path, busiest = assessment.plan, assessment.path, assessment.busiest
    rows = sum(table.num_embeddings for table in plan.tables.values())
    groups = f"; {plan.replicas} replicas of {plan.group_size} ranks" if plan.replicas > 1 else ""
    memory = [sum(assessment.memory(rank)) for rank in assessment.ranks]
    lines = [
        f"{len(plan.tables)} tables, {rows:,} rows, {plan.data_type} rows, {plan.optimizer}; {assessment.cluster}, "
        f"{plan.batch_size_per_rank:,} rows a rank, {plan.batch_size_per_rank * plan.world_size:,} a step{groups}",
        "",
        *_table_lines(assessment, full),
        "",
        *_rank_lines(assessment, full),
        "",
        f"balance: time {assessment.balance:.3f}, memory {sum(memory) / len(memory) / max(memory):.3f} (mean over largest; 1 is perfect)",
        f"busiest rank {busiest.rank}: {ms(busiest.times.total)} ms, {100 * assessment.over_bound:.1f} % above the lower bound of "
        f"{ms(assessment.bound)} ms for these sharding types",
        "",
    ]
    dense = plan.dense
    if dense.parameters:
        used, weights = dense.memory_bytes(plan.batch_size_per_rank), dense.weight_bytes()
        lines.append(
            f"dense part: {dense.parameters:,} parameters, {dense.forward_flops / 1e6:.1f} MFLOP forward a row, {gib(used)} a rank "
            f"({gib(weights)} weights, gradients and Adam; {gib(used - weights)} activations)"
        )
    lines += [
        "critical path, ms: " + ", ".join(f"{name} {ms(getattr(path, name))}" for name in MAIN_PHASES),
        f"step {ms(path.step)} ms at least (beside it: input_dist {ms(path.input_dist)}, decode {ms(path.decode)}); "
        f"{assessment.samples_per_second:,.0f} samples a second at most, bound by {path.bound_by}",
    ]
    if assessment.assumed:
        lines.append(
            f"note: ids a row of {len(assessment.assumed)} multi-valued field(s) are assumed; `mbcnet schema infer` measures them (pooling_factor)"
        )
    return lines


def _table_lines(assessment: Assessment, full: bool) -> list[str]:
    totals = table_totals(assessment)
    shown = list(totals) if full else list(totals)[:TABLES_SHOWN]
    rows = []
    for name in shown:
        table, (size, times) = assessment.plan.tables[name], totals[name]
        shards, where = len(assessment.costs[name]), ranks_text(table.ranks)
        what = (name, f"{table.num_embeddings:,}", table.embedding_dim, f"{table.ids:.4g}")
        how = (table.sharding_type, table.compute_kernel, shards, where)
        rows.append((*what, *how, gib(size.rows), gib(size.state), ms(times.total)))
    head = ("<table", "rows", "dim", "ids", "<type", "<kernel", "shards", "<ranks", "rows", "state", "ms")
    lines = ["tables, largest first; ms: of the shard that takes longest", *columns(head, rows, "  ")]
    if len(shown) < len(totals):
        rest = [size for name, (size, _) in totals.items() if name not in shown]
        weights, state = sum(size.rows for size in rest), sum(size.state for size in rest)
        lines.append(f"  and {len(rest)} more tables: {gib(weights)} rows, {gib(state)} state (--all shows them)")
    return lines


def _rank_lines(assessment: Assessment, full: bool) -> list[str]:
    ranked = sorted(assessment.ranks, key=lambda rank: (-rank.times.total, rank.rank))
    shown = ranked if full else ranked[:RANKS_SHOWN]
    rows = [
        (rank.rank, len(rank.tables), *map(gib, assessment.memory(rank)), *map(ms, rank.times), ms(rank.times.total))
        for rank in shown
    ]  # fmt: skip
    head = ("rank", "tables", "HBM", "DDR", *PARTS, "total")
    title = "ranks, busiest first; HBM and DDR with activations and the dense part; ms by part (total: no input_dist)"
    lines = [title, *columns(head, rows, "  ")]
    if len(shown) < len(ranked):
        memory = [sum(assessment.memory(rank)) for rank in ranked]
        lines.append(
            f"  and {len(ranked) - len(shown)} more (--all); least busy {ms(ranked[-1].times.total)} ms; memory "
            f"{gib(min(memory))} to {gib(max(memory))}"
        )
    return lines


def report_dict(assessment: Assessment) -> dict[str, Any]:
    """The same for machines: bytes and seconds."""
    path = assessment.path
    ranks = [
        {
            "rank": rank.rank,
            "hbm_bytes": assessment.memory(rank).hbm,
            "ddr_bytes": assessment.memory(rank).ddr,
            "table_bytes": {part: getattr(rank.bytes, part) for part in ("rows", "state", "cache", "activations")},
            "seconds": rank.times._asdict() | {"total": rank.times.total},
            "tables": rank.tables,
        }
        for rank in assessment.ranks
    ]
    tables = {
        name: {"bytes": size._asdict(), "seconds": times._asdict() | {"total": times.total}, "shards": len(assessment.costs[name])}
        for name, (size, times) in table_totals(assessment).items()
    }  # fmt: skip
    dense = assessment.plan.dense
    dense_bytes = dense.memory_bytes(assessment.plan.batch_size_per_rank)
    return {
        "plan": json.loads(plan_text(assessment.plan)),
        "cluster": str(assessment.cluster),
        "tables": tables,
        "ranks": ranks,
        "balance": assessment.balance,
        "busiest_rank": assessment.busiest.rank,
        "lower_bound_seconds": assessment.bound,
        "over_lower_bound": assessment.over_bound,
        "dense": {"parameters": dense.parameters, "forward_flops": dense.forward_flops, "bytes": dense_bytes},
        "critical_path_seconds": asdict(path),
        "step_seconds": path.step,
        "samples_per_second": assessment.samples_per_second,
        "bound_by": path.bound_by,
        "assumed_pooling_factors": list(assessment.assumed),
    }


def heat(assessment: Assessment) -> dict[str, list[float]]:
    """Milliseconds of each rank by table: those with most time first, all others summed in the last row."""
    grid = {}
    for name, costs in assessment.costs.items():
        grid[name] = [0.0] * len(assessment.ranks)
        for cost in costs:
            grid[name][cost.rank] += 1e3 * cost.times.total
    names = sorted(grid, key=lambda name: -sum(grid[name]))
    shown, rest = names[:ROWS_SHOWN], names[ROWS_SHOWN:]
    rows = {name: grid[name] for name in shown}
    if rest:
        rows[f"{len(rest)} other tables"] = [sum(column) for column in zip(*map(grid.get, rest), strict=True)]  # type: ignore[arg-type]
    return rows


def html_page(assessment: Assessment) -> str:
    """The report with a heat map whose cells say what they are when pointed at. One file, no network."""
    plan, grid = assessment.plan, heat(assessment)
    ranks = {"all tables": [1e3 * rank.times.total for rank in assessment.ranks]}
    templates = jinja2.Environment(loader=jinja2.PackageLoader("sharding.report"), autoescape=True)
    return templates.get_template("plan.html").render(
        assessment=assessment,
        heat=[(rows, max((max(row) for row in rows.values()), default=1.0)) for rows in (grid, ranks)],
        placements={name: placement_text(table) for name, table in plan.tables.items()},
        memory=[sum(assessment.memory(rank)) for rank in assessment.ranks],
        gib=gib,
        report="\n".join(report_lines(assessment, full=True)),
    )  # fmt: skip


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
