"""What `mbcnet plan` works on: arguments -> schema, constraints, cluster and model; and how it shows progress."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from data.errors import InputError
from data.schema import load_schema
from data.schema.parse import parse_dataclass, read_toml, to_toml_value
from sharding.plan.cluster import MAX_RANKS, read_cluster
from sharding.plan.compare import constraint_differences, schema_differences
from sharding.plan.constraints import ShardingConfig
from sharding.plan.placement import Plan
from sharding.search.candidates import check_constraints
from sharding.search.task import Progress, Task

if TYPE_CHECKING:
    from mbcnet_rec.config import RunConfig

DEFAULT_BATCH = 8192
MAX_BATCH = 2**24


def task_of(args: argparse.Namespace) -> Task:
    """Gather what to plan from the arguments, cheap checks first."""
    _check_arguments(args)
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
    # torch: after every mistake that is seen without it
    from mbcnet_rec.dense_cost import dense_cost
    from mbcnet_rec.model.models import ModelConfig, schema_with_wide

    model = run.model if run else ModelConfig()
    given = {
        "parameters": args.dense_parameters,
        "forward_flops": args.dense_flops,
        "activation_bytes": args.dense_activation_bytes,
    }
    known = {key: value for key, value in given.items() if value is not None}
    dense = replace(dense_cost(model, schema, config), **known)
    return replace(task, schema=schema_with_wide(model, schema), dense=dense)


def _check_arguments(args: argparse.Namespace) -> None:
    most = {"batch_size": MAX_BATCH, "global_batch_size": MAX_BATCH * MAX_RANKS}
    for key in (*most, "dense_parameters", "dense_flops", "dense_activation_bytes"):
        value, option = getattr(args, key), f"--{key.replace('_', '-')}"
        if key in most and value is not None and not 1 <= value <= most[key]:
            raise InputError(f"{option} {value}: wanted rows in [1, {MAX_BATCH:,}] a rank; 8192 is usual")
        if value is not None and value < 0:
            raise InputError(f"{option} {value}: wanted 0 or more; raise it")
    for key in ("output", "html"):
        path = getattr(args, key)
        if path and not Path(path).absolute().parent.is_dir():
            raise InputError(f"--{key} {path}: no such folder; make it first, or choose another path")
    if not args.schema and not args.config:
        raise InputError("mbcnet plan: no schema; add --schema FILE, or --config RUN.toml, which names one")
    if not args.cluster:
        raise InputError(
            "mbcnet plan: no cluster; add --cluster HOSTSxDEVICES:KIND, for example 16x8:h100-80g or 1x2:cpu"
        )


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
