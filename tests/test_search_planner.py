"""The planner: constraints are kept to, what does not fit is said in bytes, and large searches end near the bound."""

import itertools
import random
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torchrec.distributed.planner.types import ParameterConstraints, Topology

from data.errors import InputError
from data.schema import load_schema, parse_schema
from sharding.bridge.collections import meta_collections
from sharding.bridge.sharder import AnyTypeSharder
from sharding.cost.assess import assess
from sharding.cost.estimate import DoesNotFit
from sharding.plan.cluster import read_cluster
from sharding.plan.constraints import ShardingConfig, TableConstraint
from sharding.plan.placement import DenseCost, check_shape
from sharding.search.candidates import Task, cluster_of
from sharding.search.planner import Ordered, make_plan, smallest_cluster, solve

CLUSTER = read_cluster("2x4:h100-80g")
PAPER = Path(__file__).parents[1] / "data/schemas/pailitao.toml"


def schema_of(tables, lists=()):
    """One field a table: name -> (rows, dim)."""
    fields = {
        name: {"kind": "multi_valued" if name in lists else "categorical", "num_embeddings": rows, "embedding_dim": dim}
        for name, (rows, dim) in tables.items()
    }  # fmt: skip
    return parse_schema({"name": "s", "label": "y", "fields": fields}, "s", Path())


def random_schema(count, seed):
    """Tables of ten to 200 million rows, a third of them lists."""
    rng = random.Random(seed)
    sizes = [(int(10 ** rng.uniform(1, 8.3)), rng.choice([8, 16, 32, 64, 128])) for _ in range(count)]
    tables = {f"t{i}": size for i, size in enumerate(sizes)}
    return schema_of(tables, {name for name in tables if rng.random() < 0.33})


SMALL = schema_of({"user": (50_000_000, 32), "item": (10_000_000, 64), "city": (400, 8), "tags": (5000, 16)}, {"tags"})
TINY = schema_of({"weekday": (9, 8)})


def planned(config, schema=SMALL, **more):
    """The plan of a small schema on eight ranks, checked."""
    plan = make_plan(Task(schema, config, CLUSTER, 64, **more))
    check_shape(plan, "plan")
    return plan


def test_the_paper_schema_is_planned_without_gpu_or_process_group():
    start = time.monotonic()
    schema, cluster = load_schema(PAPER), read_cluster("16x8:h100-80g")
    plan = make_plan(Task(schema, ShardingConfig(), cluster, 8192))
    assert time.monotonic() - start < 60
    check_shape(plan, "plan")
    assert list(plan.tables) == [table.name for table in schema.tables]
    assert plan.tables["item"].bags == 3 and plan.tables["item"].num_embeddings == 974_333_635
    assert plan.tables["item"].sharding_type != "table_wise"
    result = assess(plan, cluster)
    assert all(rank.bytes.hbm < 0.9 * cluster.hbm_bytes for rank in result.ranks)
    assert result.over_bound < 0.15  # 144 tables on 128 ranks are few to share out


def test_options_come_in_the_order_of_the_constraints_in_every_process():
    """TorchRec takes them from a set of strings, whose order each process draws anew: ranks would make different plans."""
    topology = Topology(8, "cuda", local_world_size=4)
    tables = torch.nn.ModuleDict({"ebc": next(iter(meta_collections(TINY).values()))})
    for order in itertools.permutations(["table_wise", "row_wise", "table_row_wise", "column_wise"]):
        asked = ParameterConstraints(sharding_types=list(order), compute_kernels=["fused"], min_partition=8)
        options = Ordered(topology, 64, {"weekday": asked}, []).enumerate(tables, [AnyTypeSharder()])
        assert [option.sharding_type for option in options] == list(order)


@pytest.mark.parametrize("kind", ["data_parallel", "table_wise", "row_wise", "table_row_wise", "column_wise"])
def test_a_type_that_is_asked_for_is_used(kind):
    asked = TableConstraint(sharding_types=(kind,), min_partition=16 if kind == "column_wise" else 0)
    tables = planned(ShardingConfig(tables={"item": asked})).tables
    assert tables["item"].sharding_type == kind
    assert len(tables["item"].ranks) == 4 or kind != "column_wise"
    assert all(table.sharding_type != "column_wise" for name, table in tables.items() if name != "item")


def test_ranks_kernels_and_measures_are_kept_to():
    tables = {
        "city": TableConstraint(ranks=(6,)),
        "item": TableConstraint(sharding_types=("table_row_wise",), ranks=(4, 5, 6, 7)),
        "user": TableConstraint(compute_kernels=("fused_uvm_caching",), cache_ratio=0.05, cardinality=1000),
        "tags": TableConstraint(pooling_factor=3.5),
    }
    plan = planned(ShardingConfig(tables=tables, data_type="fp16", prefetch=True), optimizer="adagrad")
    city, item, user, tags = (plan.tables[name] for name in ("city", "item", "user", "tags"))
    assert (city.ranks, item.ranks, tags.ids) == ((6,), (4, 5, 6, 7), 3.5)
    assert (user.compute_kernel, user.cache_ratio, user.cardinality) == ("fused_uvm_caching", 0.05, 1000)
    assert (plan.data_type, plan.optimizer, plan.prefetch) == ("fp16", "adagrad", True)


@pytest.mark.parametrize("more", [{"proposers": ("greedy_total",)}, {"partitioner": "memory_balanced"}])
def test_every_search_ends_with_a_sound_plan(more):
    assert set(planned(ShardingConfig(**more)).tables) == {"user", "item", "city", "tags"}


def test_many_tables_on_many_ranks_come_within_5_percent_of_the_bound_and_keep_to_the_budget():
    told, start, cluster = [], time.monotonic(), read_cluster("4x8:h100-80g")
    task = Task(random_schema(300, seed=1), ShardingConfig(search_seconds=30), cluster, 2048)
    plan = make_plan(task, lambda *seen: told.append(seen))
    assert time.monotonic() - start < 45
    result = assess(plan, cluster)
    assert 0 <= result.over_bound < 0.05
    assert [count for count, _ in told] == list(range(1, len(told) + 1)) and told[-1][1] <= told[0][1]


@pytest.mark.parametrize(
    ("tables", "config", "said"),
    [
        ({"user": (2_000_000_000, 64), "item": (900_000_000, 64)}, {}, "142,484,669,936 bytes short; largest: user .*use more hosts"),
        ({"user": (900_000_000, 64), "b": (9, 4)}, {"sharding_types": ("table_wise",)}, "the smallest shard of table user takes"),
        ({f"t{i}": (200_000_000, 64) for i in range(9)}, {"sharding_types": ("table_wise",)}, "whole tables do not share out"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_in_bytes(tables, config, said):
    with pytest.raises(DoesNotFit, match=said):
        make_plan(Task(schema_of(tables), ShardingConfig(**config), CLUSTER, 64))


def test_the_smallest_cluster_fits_and_one_size_less_does_not():
    tables = schema_of({"user": (1_000_000_000, 32), "b": (9, 4)})
    task = Task(tables, ShardingConfig(storage_reserve=0.2), read_cluster("1x4:h100-80g"), 1024)
    found = smallest_cluster(task, 0.2)
    assert (found.cluster.hosts, found.cluster.devices_per_host) == (1, 2)
    assert max(rank.bytes.hbm for rank in found.ranks) <= 0.8 * found.cluster.hbm_bytes
    with pytest.raises(InputError):
        solve(replace(task, cluster=found.cluster.resized(1, 1)))
    hosts = smallest_cluster(replace(task, schema=schema_of({"user": (10**10, 32)})), 0.2).cluster.hosts
    assert hosts == 5  # 1.32e12 bytes of rows and state; 80 % of a host's HBM is 0.27e12


@pytest.mark.parametrize(
    ("config", "tables", "said"),
    [
        ({}, {"usr": {}}, "sharding.tables.usr is not a known key; did you mean 'user'?"),
        ({}, {"user": {"ranks": (8,)}}, "wanted ranks in [0, 8); remove [8]"),
        ({}, {"user": {"ranks": (1, 1)}}, "each rank once"),
        ({}, {"user": {"ranks": (1,), "sharding_types": ("row_wise",)}}, "row_wise use every rank"),
        ({}, {"city": {"min_partition": 12}}, "the table has 8 columns"),
        ({}, {"city": {"min_partition": 6}}, "min_partition = 6: wanted a multiple of 4"),
        ({}, {"city": {"cache_ratio": 1.5}}, "cache_ratio = 1.5"),
        ({}, {"item": {"compute_kernels": ("dense",)}}, "leave no choice for "),
        ({}, {"item": {"sharding_types": ("column_wise",), "min_partition": 4}}, "columns on 8 ranks; raise min_partition to 8"),
        ({"sharding_types": ("table_row_wise",)}, {"user": {"ranks": (0,)}}, "sharding.tables.user.ranks = [0]: no placement of it lies on these ranks"),
        ({"data_type": "bf16"}, {}, "sharding.data_type = 'bf16': FBGEMM has no kernels for bf16 rows; use 'fp16'"),
        ({"replicas": 3}, {}, "sharding.replicas = 3: wanted a divisor of local_world_size = 4"),
        ({"sharding_types": ("row_wise",)}, {}, "leave no choice for 9 rows on 8 ranks of cuda: sharding_type = 'row_wise': 9 rows over 8 ranks leave a rank without rows; use 'table_wise'"),
        ({"sharding_types": ()}, {}, "sharding_types = []"),
        ({"storage_reserve": 1.0}, {}, "wanted 0 or more and less than 1"),
        ({"estimator": "torchrec"}, {}, "estimator = 'torchrec': wanted one of 'mbcnet'"),
    ],
)  # fmt: skip
def test_constraints_that_cannot_be_kept_are_refused(config, tables, said):
    with pytest.raises(InputError) as caught:
        asked = {name: TableConstraint(**values) for name, values in tables.items()}
        planned(ShardingConfig(**config, tables=asked), TINY if "9 rows" in said else SMALL)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    if "bf16" in said:  # no larger cluster is tried
        with pytest.raises(InputError, match=f"^{re.escape(said)}"):
            smallest_cluster(Task(SMALL, ShardingConfig(**config), CLUSTER, 64), 0.1)


def test_a_run_is_planned_for_the_cluster_it_is_on():
    schema = schema_of({"user": (50_000, 32), "tags": (5000, 16)}, {"tags"})
    task = Task(schema, ShardingConfig(), cluster_of(ShardingConfig(), 2, 2, "cpu"), 64)
    plan = make_plan(task)
    assert (plan.cluster, plan.device, plan.batch_size_per_rank) == ("1x2:default", "cpu", 64)
    with pytest.raises(InputError, match="its device is 'cuda', but this run computes on 'cpu'"):
        cluster_of(ShardingConfig(cluster="h200"), 2, 2, "cpu")
    with pytest.raises(InputError, match="the dense part takes"):
        make_plan(replace(task, dense=DenseCost(10**10)))
    by_rows = replace(
        task, config=ShardingConfig(sharding_types=("table_row_wise",))
    )  # all that is allowed, on one host
    assert {each.sharding_type for each in make_plan(by_rows).tables.values()} == {"table_row_wise"}


@pytest.mark.parametrize(
    ("config", "buckets", "said"),
    [
        (ShardingConfig(tables={"id": TableConstraint(("table_wise",))}), 8, "a table of encoding 'zch' is sharded by rows.*; use 'row_wise'"),
        (ShardingConfig(compute_kernels=("fused_uvm",)), 8, ""),
        (ShardingConfig(sharding_types=("table_wise",)), 8, ""),
        (ShardingConfig(replicas=2), 8, "replicas = 2: not with fields of encoding 'zch'.*set it to 1"),
        (ShardingConfig(), 4, "zch_buckets = 4: wanted a multiple of the 8 ranks.*set zch_buckets = 8"),
    ],
)  # fmt: skip
def test_tables_of_unbounded_ids_are_sharded_by_rows_or_refused(config, buckets, said):
    field = {"kind": "categorical", "encoding": "zch", "num_embeddings": 1600, "embedding_dim": 8}
    fields = {"id": field | {"zch_buckets": buckets}}
    schema = parse_schema({"name": "s", "label": "y", "fields": fields}, "s", Path())
    if said:
        with pytest.raises(InputError, match=said):
            planned(config, schema)
        return
    plan = planned(config, schema)
    table = plan.tables["id"]
    assert (table.sharding_type, table.compute_kernel, table.zch_buckets) == ("row_wise", "fused", 8)
    assert {rank.bytes.state for rank in assess(plan, CLUSTER).ranks} == {200 * (32 + 4)}
    for change in ({"sharding_type": "table_wise", "ranks": (0,)}, {"compute_kernel": "fused_uvm"}):
        with pytest.raises(InputError, match="of encoding 'zch'"):
            check_shape(replace(plan, tables={"id": replace(table, **change)}), "plan.json")
