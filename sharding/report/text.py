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
    """Bytes of all shards, and seconds of the largest: table -> both, most bytes first."""
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
    totals, tables = table_totals(assessment), assessment.plan.tables
    listed = list(totals) if full else list(totals)[:TABLES_SHOWN]
    ranks = sorted(assessment.ranks, key=lambda rank: (-rank.times.total, rank.rank))
    busy = ranks if full else ranks[:RANKS_SHOWN]
    cells = []
    for name in listed:
        table, (size, times) = tables[name], totals[name]
        shards, where = len(assessment.costs[name]), ranks_text(table.ranks)
        what = (name, f"{table.num_embeddings:,}", table.embedding_dim, f"{table.ids:.4g}")
        how = (table.sharding_type, table.compute_kernel, shards, where)
        cells.append((*what, *how, gib(size.rows), gib(size.state), ms(times.total)))
    loads = [
        (rank.rank, len(rank.tables), *map(gib, assessment.memory(rank)), *map(ms, rank.times), ms(rank.times.total))
        for rank in busy
    ]  # fmt: skip
    head = ("<table", "rows", "dim", "ids", "<type", "<kernel", "shards", "<ranks", "rows", "state", "ms")
    return _rendered(
        "plan.txt",
        assessment=assessment,
        rows=sum(table.num_embeddings for table in tables.values()),
        tables="\n".join(columns(head, cells, "  ")),
        unlisted=[size for name, (size, _) in totals.items() if name not in listed],
        ranks="\n".join(columns(("rank", "tables", "HBM", "DDR", *PARTS, "total"), loads, "  ")),
        unlisted_ranks=ranks[len(busy) :],
        memory=[sum(assessment.memory(rank)) for rank in ranks],
        phases=MAIN_PHASES,
    ).splitlines()


def _rendered(file: str, **values: Any) -> str:
    """A template filled in, with numbers in the units of reports."""
    loader = jinja2.PackageLoader("sharding.report")
    is_page = file.endswith(".html")
    templates = jinja2.Environment(loader=loader, autoescape=is_page, trim_blocks=not is_page)
    templates.filters |= {"ms": ms, "gib": gib, "whole": "{:,.0f}".format}
    return templates.get_template(file).render(values)


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
    return _rendered(
        "plan.html",
        assessment=assessment,
        heat=[(rows, max((max(row) for row in rows.values()), default=1.0)) for rows in (grid, ranks)],
        placements={name: placement_text(table) for name, table in plan.tables.items()},
        memory=[sum(assessment.memory(rank)) for rank in assessment.ranks],
        report="\n".join(report_lines(assessment, full=True)),
    )


class Alternative(NamedTuple):
    """One placement of a table, all else as planned."""

    table: TablePlan
    bytes: Bytes  # of all its shards
    times: Times  # of its largest shard
    step_seconds: float  # of the whole step with it
    fits: bool  # whether every rank has room

    @property
    def all_bytes(self) -> int:
        """HBM and DDR of all shards."""
        return self.bytes.hbm + self.bytes.ddr


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
    found = alternatives(assessment, name, room)
    rows = [
        (
            f"{each.table.sharding_type} {each.table.compute_kernel}",
            *map(ms, each.times[1:]),
            gib(each.all_bytes),
            f"{ms(each.step_seconds)} ms" if each.fits else "no room",
        )
        for each in found
    ]
    head = ("<placement", "largest shard: lookup", "output", "gradient", "update", "all bytes", "step")
    return _rendered(
        "explain.txt",
        name=name,
        chosen=found[0],
        next_best=next((each for each in found[1:] if each.fits), None),
        placement=placement_text,
        others="\n".join(columns(head, rows, "  ")),
    ).splitlines()
