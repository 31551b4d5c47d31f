"""`mbcnet plan`: from a schema to a reviewed sharding plan, without a GPU.

`mbcnet plan --schema S --cluster 16x8:h100-80g -o plan.json` is short for `mbcnet plan make`. `show`, `explain`, `diff` and `check` read a
plan file and answer at once.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from data.errors import InputError
from data.schema import load_schema
from data.schema.parse import parse_dataclass, read_toml, to_toml_value, unknown_key
from data.whole_folder import write_whole
from sharding.cost.assess import Assessment, assess
from sharding.cost.estimate import Room, gib
from sharding.plan.cluster import Cluster, default_cluster, read_cluster
from sharding.plan.compare import compare_plans, constraint_differences, diff_lines, schema_differences
from sharding.plan.constraints import ShardingConfig
from sharding.plan.placement import Plan, plan_text, read_plan
from sharding.report.text import explain_lines, html_page, report_dict, report_lines
from sharding.search.candidates import Progress, Task, check_constraints

if TYPE_CHECKING:
    from mbcnet_rec.config import RunConfig

DEFAULT_BATCH = 8192


def make(args: argparse.Namespace) -> int:
    """Choose a placement for every table, show what it costs, and write the plan file."""
    task = task_of(args)
    from sharding.search.planner import solve  # torchrec: after every mistake that is seen without it

    title = f"planning {len(task.schema.tables):,} tables on {task.cluster.world_size:,} ranks"
    with shown_progress(title) as tick:
        assessment = solve(task, tick)
    return _publish(args, assessment)


def min_gpus(args: argparse.Namespace) -> int:
    """Find the smallest cluster of a kind that fits, with headroom; --cluster names the kind."""
    headroom, task = args.headroom, task_of(args)
    from sharding.search.planner import smallest_cluster  # torchrec, as in _make

    assessment = smallest_cluster(task, headroom, say)
    if not args.json:
        print(
            f"smallest: {assessment.cluster}, {assessment.cluster.world_size} devices, {headroom:.0%} of each free at least; "
            f"{assessment.samples_per_second:,.0f} samples a second at most"
        )
    return _publish(args, assessment)


def show(args: argparse.Namespace) -> int:
    """Show what a plan file costs on its cluster, or on another."""
    return _publish(args, _assessed(args))


def _publish(args: argparse.Namespace, assessment: Assessment) -> int:
    if args.output:
        write_whole(args.output, plan_text(assessment.plan))
    if args.json:
        print(json.dumps(report_dict(assessment)))
    else:
        print("\n".join(report_lines(assessment, full=args.all)))
    if args.html:
        write_whole(args.html, html_page(assessment))
        say(f"wrote {args.html}")
    if args.output:
        then = f"mbcnet plan show {args.output}, or mbcnet train --config RUN.toml --plan {args.output}"
        say(f"wrote {args.output}; next: {then}")
    return 0


def explain(args: argparse.Namespace) -> int:
    """Say why a table is where it is, and what every other placement would cost."""
    assessment = _assessed(args)
    if args.table not in assessment.plan.tables:
        raise InputError(unknown_key(f"{args.plan}: tables.{args.table}", args.table, assessment.plan.tables))
    print("\n".join(explain_lines(assessment, args.table, _room(args, assessment.cluster))))
    return 0


def diff(args: argparse.Namespace) -> int:
    """Show how two plans differ. Exits with 1 where they do, as diff does."""
    found = compare_plans(read_plan(Path(args.old)), read_plan(Path(args.new)))
    print(json.dumps(found) if args.json else "\n".join(diff_lines(found)) or "no difference")
    return int(bool(found["head"] or found["tables"]))


def check(args: argparse.Namespace) -> int:
    """Check a plan against a schema and a cluster: every difference, and whether it fits."""
    assessment = _assessed(args)
    plan, cluster = assessment.plan, assessment.cluster
    problems = schema_differences(plan, load_schema(args.schema)) if args.schema else []
    if args.config:
        problems += config_differences(plan, args.config)
    for memory, room in _room(args, cluster)._asdict().items():
        over = max(getattr(assessment.memory(rank), memory) for rank in assessment.ranks) - room
        if over > 0:
            problems.append(f"{memory.upper()}: a rank needs {over:,} bytes more than {gib(room)}")
    if plan.cluster_fingerprint not in ("", cluster.fingerprint()) and not args.cluster:
        problems.append(
            f"cluster {plan.cluster}: its figures have changed since ({plan.cluster_fingerprint} -> {cluster.fingerprint()})"
        )
    if args.json:
        print(json.dumps({"plan": args.plan, "fits": not problems, "problems": problems}))
    elif problems:
        print("\n".join(f"{args.plan}: {problem}" for problem in problems))
        print("plan again with `mbcnet plan make`", file=sys.stderr)
    else:
        against = " and ".join([str(cluster), *filter(None, (args.schema, args.config))])
        fullest = max(sum(assessment.memory(rank)) for rank in assessment.ranks)
        print(f"{args.plan}: fits {against}; the fullest rank holds {gib(fullest)}")
    return 2 if problems else 0


def _assessed(args: argparse.Namespace) -> Assessment:
    """What a plan costs on the named cluster, which must be of the plan's size and device, else on the plan's own."""
    plan = read_plan(Path(args.plan))
    text = args.cluster or plan.cluster
    if text.endswith(":default") or not text:
        return assess(plan, default_cluster(plan.world_size, plan.local_world_size, plan.device))
    cluster = read_cluster(text)
    wanted = (plan.world_size, plan.local_world_size, plan.device)
    if (cluster.world_size, cluster.devices_per_host, cluster.device) != wanted:
        raise InputError(
            f"{args.plan}: for {plan.hosts}x{plan.local_world_size} on {plan.device}, but --cluster {text} is {cluster.hosts}x"
            f"{cluster.devices_per_host} on {cluster.device}; name a cluster of the plan's size, or plan again with `mbcnet plan make`"
        )
    return assess(plan, cluster)


def _room(args: argparse.Namespace, cluster: Cluster) -> Room:
    """Bytes of a rank without the share that is kept free."""
    used = 1 - args.reserve
    return Room(int(cluster.hbm_bytes * used), int(cluster.ddr_bytes * used))


def task_of(args: argparse.Namespace) -> Task:
    """Gather what to plan from the arguments, cheap checks first."""
    if not args.schema and not args.config:
        raise InputError("mbcnet plan: no schema; add --schema FILE, or --config RUN.toml, which names one")
    if not args.cluster:
        raise InputError(
            "mbcnet plan: no cluster; add --cluster HOSTSxDEVICES:KIND, for example 16x8:h100-80g or 1x2:cpu"
        )
    cluster = read_cluster(args.cluster)
    schema = load_schema(args.schema) if args.schema else None
    config, run = _configs(args)
    schema = schema or load_schema(run.schema)  # type: ignore[union-attr]  # without --schema there is a config
    schema.require_fitted()
    batch = args.batch_size
    if batch is None:
        whole = args.global_batch_size or (run.data.batch_size if run else 0)
        batch = -(-whole // cluster.world_size) if whole else DEFAULT_BATCH
    optimizer = args.optimizer or (run.optim.embedding.name if run else "rowwise_adagrad")
    task = Task(schema, config, cluster, batch, optimizer)
    if run is None:  # a config may bring tables of the model's own; the planner checks again
        check_constraints(task)
    from mbcnet_rec.dense_cost import dense_cost  # torch: after every mistake that is seen without it
    from mbcnet_rec.model.models import schema_with_wide
    from mbcnet_rec.plugins import model_config

    model = run.model if run else model_config()
    return replace(task, schema=schema_with_wide(model, schema), dense=dense_cost(model, schema, config))


def _configs(args: argparse.Namespace) -> "tuple[ShardingConfig, RunConfig | None]":
    """What the planner may do, from the run's config, the constraints file and --set, later ones winning; and the run."""
    constraints = read_toml(Path(args.constraints)) if args.constraints else {}
    if constraints:
        parse_dataclass(ShardingConfig, constraints, args.constraints)
    run = None
    if args.config or args.overrides:
        from mbcnet_rec.config import apply_override, load_config  # torch

        run = load_config(args.config) if args.config else None
        for override in args.overrides:
            apply_override(constraints, override)
    base = to_toml_value(run.sharding) if run else {}
    return parse_dataclass(ShardingConfig, {**base, **constraints}, args.constraints or "--set"), run


def config_differences(plan: Plan, config_file: str) -> list[str]:
    """How a plan differs from what a run's config would train: tables, a wide part's among them, optimizer, constraints."""
    from mbcnet_rec.config import load_config  # torch
    from mbcnet_rec.model.models import schema_with_wide

    run = load_config(config_file)
    schema = schema_with_wide(run.model, load_schema(run.schema))
    lines = schema_differences(plan, schema) + constraint_differences(plan, run.sharding)
    if plan.optimizer != run.optim.embedding.name:
        lines.append(f"optimizer: plan {plan.optimizer}, run {run.optim.embedding.name}")
    return lines


def say(line: str) -> None:
    """Progress and hints go to stderr, beside the output."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def shown_progress(title: str) -> Iterator[Progress]:
    """Show on stderr how far the search is; where that is no terminal, every ten seconds."""
    interval = 0.2 if sys.stderr.isatty() else 10.0
    with tqdm(desc=title, unit=" proposals", file=sys.stderr, mininterval=interval) as bar:

        def tick(proposals: int, best_ms: float) -> None:
            bar.set_postfix_str(f"best {best_ms:.3f} ms on the busiest rank", refresh=False)
            bar.update(proposals - bar.n)

        yield tick
