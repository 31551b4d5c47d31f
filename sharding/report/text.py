"""What a plan looks like to a person and to a machine: tables, ranks, balance, critical path, speed."""

import json
from dataclasses import asdict
from functools import reduce
from typing import Any

from sharding.cost.assess import PARTS, Assessment
from sharding.cost.estimate import Bytes, Times
from sharding.cost.memory import gib
from sharding.plan.compare import ranks_text
from sharding.plan.plan_file import plan_text

TABLES_SHOWN = 15
RANKS_SHOWN = 6


def table_totals(assessment: Assessment) -> dict[str, tuple[Bytes, Times]]:
    """Bytes of all shards, and seconds of the largest: table -> both, most seconds first."""
    totals = {}
    for name, costs in assessment.costs.items():
        slowest = max((cost.times for cost in costs), key=lambda times: times.total)
        totals[name] = reduce(Bytes.plus, (cost.bytes for cost in costs)), slowest
    return dict(sorted(totals.items(), key=lambda pair: -(pair[1][0].rows + pair[1][0].state)))


def report_lines(
    assessment: Assessment, *, full: bool = False, bound: float = 0.0, assumed: int = 0
) -> list[str]:
    """The report for people.

    Args:
        assessment: what the plan costs.
        full: whether to list every table and rank.
        bound: least seconds of the busiest rank for any sharding types, if known.
        assumed: number of fields whose ids per row are assumed.
    """
    plan, path = assessment.plan, assessment.path
    rows = sum(table.num_embeddings for table in plan.tables.values())
    lines = [
        f"{len(plan.tables)} tables, {rows:,} rows, {plan.data_type} rows, {plan.optimizer}; {assessment.cluster}, "
        f"{plan.batch_size_per_rank:,} rows a rank, {plan.batch_size_per_rank * plan.world_size:,} a step"
        + (f"; {plan.replicas} replicas of {plan.group_size} ranks" if plan.replicas > 1 else ""),
        "",
        *_table_lines(assessment, full),
        "",
        *_rank_lines(assessment, full),
        "",
        *_balance_lines(assessment, bound),
        "",
    ]
    dense = assessment.dense
    if dense.parameters:
        memory = dense.memory_bytes(plan.batch_size_per_rank)
        lines.append(
            f"dense part: {dense.parameters:,} parameters, {dense.forward_flops / 1e6:.1f} MFLOP forward a row, {gib(memory)} a rank "
            f"({gib(dense.weight_bytes())} weights, gradients and Adam; {gib(memory - dense.weight_bytes())} activations)"
        )
    phases = ("lookup", "output_dist", "dense", "gradient_dist", "update", "all_reduce")
    lines.append(
        "critical path, ms: " + ", ".join(f"{name} {1e3 * getattr(path, name):.3f}" for name in phases)
    )
    beside = f"beside it: input_dist {1e3 * path.input_dist:.3f}, decode {1e3 * path.decode:.3f}"
    lines.append(
        f"step {1e3 * path.step:.3f} ms at least ({beside}); {assessment.samples_per_second:,.0f} samples a second at most, "
        f"bound by {path.bound_by}"
    )
    if assumed:
        lines.append(
            f"note: ids a row of {assumed} multi-valued field(s) are assumed; `mbcnet schema infer` measures them (pooling_factor)"
        )
    return lines


def _table_lines(assessment: Assessment, full: bool) -> list[str]:
    totals = table_totals(assessment)
    width = min(40, max((len(name) for name in totals), default=5))
    head = f"  {'table':<{width}} {'rows':>14} {'dim':>4} {'ids':>5}  {'type':<15}{'kernel':<18}{'shards':>6}  {'ranks':<11}{'rows':>11}{'state':>11}{'ms':>8}"
    lines = ["tables, largest first; ms: of the shard that takes longest", head]
    names = list(totals)
    shown, rest = (names, []) if full else (names[:TABLES_SHOWN], names[TABLES_SHOWN:])
    for name in shown:
        size, times = totals[name]
        table = assessment.plan.tables[name]
        label = name if len(name) <= width else name[: width - 2] + ".."
        lines.append(
            f"  {label:<{width}} {table.num_embeddings:>14,} {table.embedding_dim:>4} {table.ids:>5.4g}  {table.sharding_type:<15}"
            f"{table.compute_kernel:<18}{len(assessment.costs[name]):>6}  {ranks_text(table.ranks):<11}{gib(size.rows):>11}"
            f"{gib(size.state):>11}{1e3 * times.total:>8.3f}"
        )
    if rest:
        size = reduce(Bytes.plus, (totals[name][0] for name in rest))
        lines.append(
            f"  and {len(rest)} more tables: {gib(size.rows)} rows, {gib(size.state)} state (--all shows them)"
        )
    return lines


def _rank_lines(assessment: Assessment, full: bool) -> list[str]:
    head = (
        f"  {'rank':>5} {'tables':>6} {'HBM':>11} {'DDR':>11}"
        + "".join(f"{part:>15}" for part in PARTS)
        + f"{'total':>10}"
    )
    lines = [
        "ranks, busiest first; HBM and DDR with activations and the dense part; ms by part (total without input_dist)",
        head,
    ]
    ranked = sorted(assessment.ranks, key=lambda rank: (-rank.times.total, rank.rank))
    shown = ranked if full else ranked[:RANKS_SHOWN]
    for rank in shown:
        hbm, ddr = assessment.memory(rank)
        times = "".join(f"{1e3 * value:>15.3f}" for value in rank.times) + f"{1e3 * rank.times.total:>10.3f}"
        lines.append(f"  {rank.rank:>5} {len(rank.tables):>6} {gib(hbm):>11} {gib(ddr):>11}{times}")
    if len(shown) < len(ranked):
        memory = [sum(assessment.memory(rank)) for rank in ranked]
        lines.append(
            f"  and {len(ranked) - len(shown)} more (--all); least busy {1e3 * ranked[-1].times.total:.3f} ms; memory "
            f"{gib(min(memory))} to {gib(max(memory))}"
        )
    return lines


def _balance_lines(assessment: Assessment, bound: float) -> list[str]:
    busiest = assessment.busiest
    memory = [sum(assessment.memory(rank)) for rank in assessment.ranks]
    lines = [
        f"balance: time {assessment.balance:.3f}, memory {sum(memory) / len(memory) / max(memory):.3f} (mean over largest; 1 is perfect)",
        f"busiest rank {busiest.rank}: {1e3 * busiest.times.total:.3f} ms, {100 * assessment.over_bound:.1f} % above the lower bound of "
        f"{1e3 * assessment.bound:.3f} ms for these sharding types",
    ]
    if bound:
        lines.append(f"lower bound for any types that were allowed: {1e3 * bound:.3f} ms")
    return lines


def report_dict(
    assessment: Assessment, *, bound: float = 0.0, assumed: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The same for machines: bytes and seconds."""
    path = assessment.path
    ranks = [
        {
            "rank": rank.rank,
            "hbm_bytes": assessment.memory(rank).hbm,
            "ddr_bytes": assessment.memory(rank).ddr,
            "table_bytes": {
                part: getattr(rank.bytes, part) for part in ("rows", "state", "cache", "activations")
            },
            "seconds": rank.times._asdict() | {"total": rank.times.total},
            "tables": rank.tables,
        }
        for rank in assessment.ranks
    ]
    tables = {
        name: {
            "bytes": size._asdict(),
            "seconds": times._asdict() | {"total": times.total},
            "shards": len(assessment.costs[name]),
        }
        for name, (size, times) in table_totals(assessment).items()
    }
    dense = assessment.dense
    return {
        "plan": json.loads(plan_text(assessment.plan)),
        "cluster": str(assessment.cluster),
        "tables": tables,
        "ranks": ranks,
        "balance": assessment.balance,
        "busiest_rank": assessment.busiest.rank,
        "lower_bound_seconds": assessment.bound,
        "over_lower_bound": assessment.over_bound,
        "lower_bound_any_types_seconds": bound,
        "dense": {
            "parameters": dense.parameters,
            "forward_flops": dense.forward_flops,
            "bytes": dense.memory_bytes(assessment.plan.batch_size_per_rank),
        },
        "critical_path_seconds": asdict(path),
        "step_seconds": path.step,
        "samples_per_second": assessment.samples_per_second,
        "bound_by": path.bound_by,
        "assumed_pooling_factors": list(assumed),
    }
