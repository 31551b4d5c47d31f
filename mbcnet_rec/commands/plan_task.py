"""What `mbcnet plan` works on: arguments -> schema, constraints, cluster and model; and how it tells of its progress."""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from data.errors import InputError

if TYPE_CHECKING:
    from mbcnet_rec.config import RunConfig
    from sharding.plan.cluster import Cluster
    from sharding.plan.constraints import ShardingConfig
    from sharding.plan.plan_file import Plan
    from sharding.search.capacity import Task

DEFAULT_BATCH = 8192
MAX_BATCH = 2**24


def cluster_for(plan: "Plan", named: str | None, source: str) -> "Cluster":
    """The cluster to assess a plan on.

    Raises:
        InputError: it is of another size or device than the plan.
    """
    from sharding.plan.cluster import default_cluster, read_cluster

    text = named or plan.cluster
    if text.endswith(":default") or not text:
        return default_cluster(plan.world_size, plan.local_world_size, plan.device)
    cluster = read_cluster(text)
    same = (cluster.world_size, cluster.devices_per_host, cluster.device) == (
        plan.world_size,
        plan.local_world_size,
        plan.device,
    )
    if not same:
        raise InputError(
            f"{source}: for {plan.hosts}x{plan.local_world_size} on {plan.device}, but --cluster {text} is {cluster.hosts}x"
            f"{cluster.devices_per_host} on {cluster.device}; name a cluster of the plan's size, or plan again with `mbcnet plan make`"
        )
    return cluster


def task_of(args: argparse.Namespace) -> "Task":
    """Gather what to plan from the arguments, cheap checks first.

    Raises:
        InputError: something is missing or absurd.
    """
    from dataclasses import replace

    from data.schema import load_schema
    from sharding.plan.cluster import read_cluster
    from sharding.plan.dense_part import DenseCost
    from sharding.search.candidates import check_constraints, empty_plan

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
    if run is None:  # a config may bring tables of the model's own; the planner checks again
        optimizer = args.optimizer or "rowwise_adagrad"
        check_constraints(config, schema, empty_plan(config, schema, cluster, batch, optimizer, DenseCost()))
    from mbcnet_rec.dense_cost import dense_cost
    from mbcnet_rec.model.input_layout import schema_with_wide
    from mbcnet_rec.model.models import ModelConfig
    from sharding.search.capacity import Task

    optimizer = args.optimizer or (run.optim.embedding.name if run else "rowwise_adagrad")
    model = run.model if run else ModelConfig()
    dense = dense_cost(model, schema, config)
    given = {
        "parameters": args.dense_parameters,
        "forward_flops": args.dense_flops,
        "activation_bytes": args.dense_activation_bytes,
    }
    dense = replace(dense, **{key: value for key, value in given.items() if value is not None})
    return Task(schema_with_wide(model, schema), config, cluster, batch, optimizer, dense)


def _check_arguments(args: argparse.Namespace) -> None:
    for key in ("batch_size", "global_batch_size"):
        value = getattr(args, key)
        if value is not None and not 1 <= value <= MAX_BATCH * (1 if key == "batch_size" else 65_536):
            raise InputError(
                f"--{key.replace('_', '-')} {value}: wanted rows in [1, {MAX_BATCH:,}] a rank; 8192 is usual"
            )
    for key in ("output", "html", "png"):
        path = getattr(args, key, None)
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
    from data.schema.parse import parse_dataclass, read_toml, to_toml_value
    from sharding.plan.constraints import ShardingConfig

    constraints = read_toml(Path(args.constraints)) if args.constraints else {}
    if constraints:
        parse_dataclass(ShardingConfig, constraints, args.constraints)
    run = None
    if args.config:
        from mbcnet_rec.config import load_config

        run = load_config(args.config)
    if args.overrides:
        from mbcnet_rec.config import apply_override

        for override in args.overrides:
            apply_override(constraints, override)
    base = to_toml_value(run.sharding) if run else {}
    return parse_dataclass(ShardingConfig, {**base, **constraints}, args.constraints or "--set"), run


def config_differences(plan: "Plan", config_file: str) -> list[str]:
    """How a plan differs from what a run's config would train: tables, a wide part's among them, optimizer, constraints."""
    from data.schema import load_schema
    from mbcnet_rec.config import load_config
    from mbcnet_rec.model.input_layout import schema_with_wide
    from sharding.plan.plan_file import constraint_differences, schema_differences

    run = load_config(config_file)
    schema = schema_with_wide(run.model, load_schema(run.schema))
    lines = schema_differences(plan, schema) + constraint_differences(plan, run.sharding)
    if plan.optimizer != run.optim.embedding.name:
        lines.append(f"optimizer: plan {plan.optimizer}, run {run.optim.embedding.name}")
    return lines


def numbers(text: str, flag: str) -> list[int]:
    """Read a list of whole numbers.

    Raises:
        InputError: it holds something else, or a number below 1.
    """
    try:
        found = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = [0]
    if any(not 1 <= number <= MAX_BATCH for number in found):
        raise InputError(f"{flag} {text!r}: wanted numbers of 1 or more with commas; write e.g. 2,4,8")
    return found


def say(line: str) -> None:
    """Progress and hints go beside the output."""
    print(line, file=sys.stderr, flush=True)


class Ticker:
    """One line on a terminal that grows while the search runs; where output is no terminal, a line every ten seconds."""

    def __init__(self, title: str) -> None:
        self.title, self.shown, self.drawn = title, time.monotonic(), False
        self.terminal = sys.stderr.isatty()
        say(f"{title} ...")

    def tick(self, proposals: int, best_ms: float, seconds: float) -> None:
        """Called after every proposal."""
        if time.monotonic() - self.shown < (0.2 if self.terminal else 10.0):
            return
        self.shown, self.drawn = time.monotonic(), True
        line = (
            f"{self.title}: {proposals} proposals, best {best_ms:.3f} ms on the busiest rank, {seconds:.0f} s"
        )
        print(
            f"\r{line}" if self.terminal else line,
            file=sys.stderr,
            end="" if self.terminal else "\n",
            flush=True,
        )

    def close(self) -> None:
        """End the line."""
        if self.drawn and self.terminal:
            print(file=sys.stderr)
