"""`mbcnet plan`: from a schema to a reviewed sharding plan, without a GPU.

`mbcnet plan --schema S --cluster 16x8:h100-80g -o plan.json` is short for `mbcnet plan make`. `show`, `explain`, `diff` and `check` read a
plan file and import no torch.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.errors import InputError
from mbcnet_rec.commands.plan_task import (
    DEFAULT_BATCH,
    Ticker,
    cluster_for,
    config_differences,
    numbers,
    say,
    task_of,
)

if TYPE_CHECKING:
    from sharding.cost.assess import Assessment
    from sharding.search.capacity import Task


def register(subparsers: Any) -> None:
    """Add the commands."""
    parser = subparsers.add_parser(
        "plan", help="place a schema's tables on a cluster, and review the plan", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    _add_task(parser)
    _add_output(parser)
    parser.set_defaults(run=_make)
    actions = parser.add_subparsers(metavar="ACTION", parser_class=type(parser))
    make = actions.add_parser("make", help="plan (the default)", description=_make.__doc__)
    _add_task(make)
    _add_output(make)
    make.set_defaults(run=_make)
    show = actions.add_parser("show", help="what a plan file costs", description=_show.__doc__)
    _add_plan(show)
    _add_views(show)
    show.set_defaults(run=_show)
    explain = actions.add_parser("explain", help="why a table is where it is", description=_explain.__doc__)
    explain.add_argument("table", metavar="TABLE")
    explain.add_argument("plan", metavar="PLAN", help="the plan file")
    _add_machine(explain)
    explain.set_defaults(run=_explain)
    diff = actions.add_parser("diff", help="how two plans differ", description=_diff.__doc__)
    diff.add_argument("old", metavar="OLD")
    diff.add_argument("new", metavar="NEW")
    diff.add_argument(
        "--cluster", metavar="HxD:KIND", help="also compare costs there (default: each plan's own cluster)"
    )
    diff.add_argument("--json", action="store_true", help="print one JSON object")
    diff.set_defaults(run=_diff)
    smallest = actions.add_parser(
        "min-gpus", help="the smallest cluster that fits", description=_min_gpus.__doc__
    )
    _add_task(smallest)
    _add_output(smallest)
    smallest.add_argument(
        "--headroom",
        type=float,
        default=0.2,
        metavar="SHARE",
        help="of each device's memory to leave free (default 0.2)",
    )
    smallest.set_defaults(run=_min_gpus)
    swept = actions.add_parser(
        "sweep", help="batch sizes against numbers of hosts", description=_sweep.__doc__
    )
    _add_task(swept)
    swept.add_argument(
        "--batch-sizes", default="2048,4096,8192,16384", metavar="LIST", help="rows a rank, with commas"
    )
    swept.add_argument(
        "--hosts",
        default="",
        metavar="LIST",
        help="with commas (default: half, once and twice the cluster's)",
    )
    swept.add_argument("--json", action="store_true", help="print one JSON object")
    swept.set_defaults(run=_sweep)
    check = actions.add_parser(
        "check", help="does a plan fit a schema and a cluster?", description=_check.__doc__
    )
    _add_plan(check)
    check.add_argument("--schema", metavar="FILE", help="refuse a plan of another schema")
    check.add_argument(
        "--config", metavar="FILE", help="the same for a run's schema, model, optimizer and [sharding]"
    )
    check.add_argument("--json", action="store_true", help="print one JSON object")
    check.set_defaults(run=_check)


def _add_task(parser: argparse.ArgumentParser) -> None:
    """What to plan."""
    parser.add_argument("--schema", metavar="FILE", help="the schema (default: the config's)")
    parser.add_argument("--cluster", metavar="HxD:KIND", help="such as 16x8:h100-80g; KIND is a preset (a100-40g, a100-80g, h100-80g, h200, b200, cpu) or a TOML file")  # fmt: skip
    parser.add_argument(
        "--config", metavar="FILE", help="a run's TOML file: its schema, model, optimizer and [sharding]"
    )
    parser.add_argument("--constraints", metavar="FILE", help="a TOML file with the keys of [sharding]")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help="override one key of [sharding], e.g. data_type=fp16")  # fmt: skip
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--batch-size", type=int, metavar="N", help=f"rows of ONE rank's batch (default {DEFAULT_BATCH}, or the config's share)")  # fmt: skip
    size.add_argument("--global-batch-size", type=int, metavar="N", help="rows of a step over all ranks")
    parser.add_argument("--optimizer", choices=("rowwise_adagrad", "adagrad", "sgd"), help="of the tables (default: the config's, else rowwise_adagrad)")  # fmt: skip
    parser.add_argument(
        "--dense-parameters", type=int, metavar="N", help="of the dense part, instead of counting the model's"
    )
    parser.add_argument("--dense-flops", type=float, metavar="N", help="forward, of one row")
    parser.add_argument(
        "--dense-activation-bytes", type=float, metavar="N", help="kept for backward, of one row"
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", metavar="PLAN", help="write the plan file")
    _add_views(parser)


def _add_views(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--all", action="store_true", help="list every table and rank")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the report")
    parser.add_argument("--html", metavar="FILE", help="write the report with a heat map")
    parser.add_argument("--png", metavar="FILE", help="draw the heat map")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", metavar="PLAN", help="the plan file")
    _add_machine(parser)


def _add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cluster", metavar="HxD:KIND", help="(default: the plan's own)")
    parser.add_argument(
        "--reserve", type=float, default=0.1, metavar="SHARE", help="of memory to keep free (default 0.1)"
    )


def _make(args: argparse.Namespace) -> int:
    """Choose a place for every table, show what it costs, and write the plan file."""
    task = task_of(args)
    from sharding.cost.memory import DoesNotFit

    progress = Ticker(f"planning {len(task.schema.tables):,} tables on {task.cluster.world_size:,} ranks")
    try:
        assessment = task.solve(progress.tick)
    except DoesNotFit as error:
        progress.close()
        return _no_fit(task, error)
    progress.close()
    _publish(args, task, assessment)
    return 0


def _publish(args: argparse.Namespace, task: "Task", assessment: "Assessment") -> None:
    """Write and print what was asked for."""
    from sharding.cost.assess import search_bound
    from sharding.cost.memory import room_for_tables
    from sharding.plan.plan_file import write_plan
    from sharding.report.text import report_dict, report_lines
    from sharding.search.candidates import all_options, assumed_fields

    cluster = assessment.cluster
    room = room_for_tables(task.config, cluster, task.dense, task.batch_size_per_rank)
    options = all_options(
        task.schema, task.config, assessment.plan, room[0] if cluster.device == "cuda" else room[1]
    )
    bound, assumed = search_bound(options, assessment.plan, cluster), assumed_fields(task.schema, task.config)
    if args.output:
        write_plan(assessment.plan, Path(args.output))
    if args.json:
        print(json.dumps(report_dict(assessment, bound=bound, assumed=tuple(assumed))))
    else:
        print("\n".join(report_lines(assessment, full=args.all, bound=bound, assumed=len(assumed))))
    _draw(args, assessment)
    if args.output:
        say(
            f"wrote {args.output}; next: mbcnet plan show {args.output}, or mbcnet train --config RUN.toml --plan {args.output}"
        )


def _draw(args: argparse.Namespace, assessment: "Assessment") -> None:
    if not args.html and not args.png:
        return
    from sharding.report.heatmap import write_html, write_png

    for path, write in ((args.html, write_html), (args.png, write_png)):
        if path:
            write(assessment, Path(path))
            say(f"wrote {path}")


def _no_fit(task: "Task", error: Any) -> int:
    """Say what is missing and which changes were seen to help."""
    from sharding.search.capacity import find_cures

    print(f"mbcnet: {task.cluster}: {error}", file=sys.stderr)
    cures = find_cures(task, error.shortage, say)
    for number, cure in enumerate(cures, 1):
        step, rate = cure.assessment.path.step, cure.assessment.samples_per_second
        note = "; another model: measure its quality" if cure.changes_model else ""
        print(
            f"cure {number}: {cure.change} (planned again: fits; {1e3 * step:.2f} ms a step at least, {rate:,.0f} samples a second at most, "
            f"{cure.cost:.2f} device-seconds a million samples{note})",
            file=sys.stderr,
        )
    if not cures:
        print(
            "no single change that was tried lets it fit; combine fewer columns, fp16 rows and more hosts",
            file=sys.stderr,
        )
    return 2


def _show(args: argparse.Namespace) -> int:
    """Show what a plan file costs on its cluster, or on another."""
    from sharding.report.text import report_dict, report_lines

    assessment = _assessed(args)
    if args.json:
        print(json.dumps(report_dict(assessment)))
    else:
        print("\n".join(report_lines(assessment, full=args.all)))
    _draw(args, assessment)
    return 0


def _explain(args: argparse.Namespace) -> int:
    """Say why a table is where it is, and what every other place would cost."""
    from data.schema.parse import unknown_key
    from sharding.cost.memory import room_of
    from sharding.report.explain import explain_lines

    assessment = _assessed(args)
    if args.table not in assessment.plan.tables:
        raise InputError(unknown_key(f"{args.plan}: tables.{args.table}", args.table, assessment.plan.tables))
    print("\n".join(explain_lines(assessment, args.table, room_of(assessment.cluster, args.reserve))))
    return 0


def _diff(args: argparse.Namespace) -> int:
    """Show how two plans differ. Exits with 1 where they do, as diff does."""
    from sharding.cost.assess import assess
    from sharding.plan.compare import compare_plans, diff_lines
    from sharding.plan.plan_file import read_plan

    old, new = read_plan(Path(args.old)), read_plan(Path(args.new))
    found = compare_plans(old, new)
    if args.json:
        print(json.dumps(found))
    else:
        print("\n".join(diff_lines(old, new)) or "no difference")
    if (
        not args.json
        and (found["head"] or found["tables"])
        and (args.cluster or (old.cluster and new.cluster))
    ):
        for label, plan in (("old", old), ("new", new)):
            result = assess(plan, cluster_for(plan, args.cluster, args.old if label == "old" else args.new))
            print(
                f"{label}: {1e3 * result.path.step:.3f} ms a step, {result.samples_per_second:,.0f} samples a second; busiest "
                f"rank {1e3 * result.busiest.times.total:.3f} ms, most memory {max(sum(result.memory(rank)) for rank in result.ranks):,} bytes"
            )
    return 1 if found["head"] or found["tables"] else 0


def _min_gpus(args: argparse.Namespace) -> int:
    """Find the smallest cluster of a kind that fits, with head-room; --cluster names the kind."""
    task = task_of(args)
    from sharding.search.capacity import smallest_cluster

    assessment = smallest_cluster(task, args.headroom, say)
    cluster = assessment.cluster
    if not args.json:
        print(
            f"smallest: {cluster}, {cluster.world_size} devices, {args.headroom:.0%} of each free at least; "
            f"{assessment.samples_per_second:,.0f} samples a second at most"
        )
    _publish(args, task, assessment)
    return 0


def _sweep(args: argparse.Namespace) -> int:
    """Plan several batch sizes on several numbers of hosts, and show samples a second, step and memory of each."""
    task = task_of(args)
    from sharding.cost.memory import gib
    from sharding.search.capacity import sweep

    hosts = numbers(args.hosts, "--hosts") or sorted(
        {max(1, task.cluster.hosts // 2), task.cluster.hosts, 2 * task.cluster.hosts}
    )
    sizes = numbers(args.batch_sizes, "--batch-sizes")
    table = sweep(task, sizes, hosts, say)
    if args.json:
        cells = [
            {"batch_size_per_rank": rows, "hosts": count, "fits": not isinstance(cell, str)}
            | (
                {"problem": cell}
                if isinstance(cell, str)
                else {
                    "samples_per_second": cell.samples_per_second,
                    "step_seconds": cell.path.step,
                    "bound_by": cell.path.bound_by,
                    "largest_rank_bytes": max(sum(cell.memory(rank)) for rank in cell.ranks),
                }
            )
            for (rows, count), cell in table.items()
        ]
        print(
            json.dumps(
                {"kind": task.cluster.name, "devices_per_host": task.cluster.devices_per_host, "cells": cells}
            )
        )
        return 0
    print("M samples a second at most (step ms, largest rank, bound by)")
    print(
        f"  {'rows a rank':>12}"
        + "".join(f"{f'{count}x{task.cluster.devices_per_host}':>42}" for count in hosts)
    )
    for rows in sizes:
        cells = []
        for count in hosts:
            cell = table[rows, count]
            if isinstance(cell, str):
                cells.append(f"{'does not fit':>42}")
                continue
            most = gib(max(sum(cell.memory(rank)) for rank in cell.ranks))
            text = f"{cell.samples_per_second / 1e6:.2f} ({1e3 * cell.path.step:.2f} ms, {most}, {cell.path.bound_by})"
            cells.append(f"{text:>42}")
        print(f"  {rows:>12,}" + "".join(cells))
    return 0


def _check(args: argparse.Namespace) -> int:
    """Check a plan against a schema and a cluster: every difference, and whether it fits."""
    from sharding.cost.assess import shortage
    from sharding.cost.memory import gib, room_of
    from sharding.plan.plan_file import schema_differences

    assessment = _assessed(args)
    plan, problems = assessment.plan, []
    if args.schema:
        from data.schema import load_schema

        problems += schema_differences(plan, load_schema(args.schema))
    if args.config:
        problems += config_differences(plan, args.config)
    room = room_of(assessment.cluster, args.reserve)
    for name, over in zip(("HBM", "DDR"), shortage(assessment, room), strict=True):
        if over:
            problems.append(
                f"{name}: a rank needs {over:,} bytes more than {gib(room[['HBM', 'DDR'].index(name)])}"
            )
    if (
        plan.cluster_fingerprint
        and not args.cluster
        and plan.cluster_fingerprint != assessment.cluster.fingerprint()
    ):
        problems.append(
            f"cluster {plan.cluster}: its figures have changed since ({plan.cluster_fingerprint} -> {assessment.cluster.fingerprint()})"
        )
    if args.json:
        print(json.dumps({"plan": args.plan, "fits": not problems, "problems": problems}))
    else:
        for problem in problems:
            print(f"{args.plan}: {problem}")
        if not problems:
            most = max(sum(assessment.memory(rank)) for rank in assessment.ranks)
            against = [str(assessment.cluster), *(name for name in (args.schema, args.config) if name)]
            print(f"{args.plan}: fits {' and '.join(against)}; the fullest rank holds {gib(most)}")
    if problems and not args.json:
        print("plan again with `mbcnet plan make`", file=sys.stderr)
    return 2 if problems else 0


def _assessed(args: argparse.Namespace) -> "Assessment":
    from sharding.cost.assess import assess
    from sharding.plan.plan_file import read_plan

    plan = read_plan(Path(args.plan))
    unsized = [name for name, table in plan.tables.items() if not table.num_embeddings]
    if unsized:
        raise InputError(
            f"{args.plan}: tables.{unsized[0]} has no sizes (a file of the first format); write a new one with `mbcnet plan make`"
        )
    return assess(plan, cluster_for(plan, args.cluster, args.plan))
