"""The cost model: shards are TorchRec's, bytes and seconds follow the formulas, and paths and bounds add up."""

from dataclasses import replace

import pytest
import torch
from torchrec.distributed.sharding_plan import calculate_shard_sizes_and_offsets

from sharding.cost.assess import MAIN_PHASES, assess
from sharding.cost.estimate import Room, shard_bytes, shard_times
from sharding.plan.cluster import read_cluster
from sharding.plan.placement import SHARDING_TYPES, DenseCost, Plan, TablePlan, shards_of
from sharding.report.text import alternatives, explain_lines, heat, html_page, report_dict, report_lines

CLUSTER = read_cluster("2x4:h100-80g")
TABLE = TablePlan("table_wise", "fused", (3,), 1_000_000, 32, 1, 5.0)
PLAN = Plan(8, 4, "cuda", "s", {}, 1024, cluster="2x4:h100-80g", format=2)


def placed(kind, ranks=()):
    return replace(
        TABLE, sharding_type=kind, ranks=ranks, compute_kernel="dense" if kind == "data_parallel" else "fused"
    )


@pytest.mark.parametrize("rows", [8, 9, 1001, 1_000_000])
@pytest.mark.parametrize("kind", ["table_wise", "row_wise", "table_row_wise", "column_wise"])
def test_shards_are_those_of_torchrec(kind, rows):
    ranks = {"table_wise": (3,), "row_wise": (), "table_row_wise": (4, 5, 6, 7), "column_wise": (1, 5)}[kind]
    ours = shards_of(replace(placed(kind, ranks), num_embeddings=rows), PLAN)
    parameter = torch.empty(rows, 32, device="meta")
    sizes, _ = calculate_shard_sizes_and_offsets(parameter, 8, 4, kind, 16)
    assert [[shard.rows, shard.columns] for shard in ours] == sizes


def test_bytes_follow_optimizer_dtype_and_kernel():
    rows = 1_000_000

    def size(table=TABLE, **change):
        return shard_bytes(table, replace(PLAN, **change), rows, 32)

    assert (size().rows, size().state, size().ddr) == (128 * rows, 4 * rows, 0)
    assert size().hbm == size().rows + size().state + size().activations
    assert size(optimizer="adagrad").state == 128 * rows and size(optimizer="sgd").state == 0
    assert size(data_type="bf16").rows == 64 * rows
    assert (size(device="cpu").hbm, size(device="cpu").ddr) == (0, size().hbm)
    paged = size(replace(TABLE, compute_kernel="fused_uvm_caching", cache_ratio=0.25))
    assert paged.cache == 250_000 * (128 + 16) + 4 * rows and paged.ddr == 128 * rows
    assert paged.hbm == paged.cache + paged.state + paged.activations  # rowwise state stays on the device


def test_seconds_follow_the_traffic():
    def seconds(table=TABLE, rows=1_000_000, **change):
        return shard_times(table, replace(PLAN, **change), CLUSTER, rows, 32)

    whole, pooled = seconds(), 8 * 1024 * 32 * 4  # bytes that leave the rank of a table_wise table
    # half of the ranks are on the other host
    assert whole.output_dist == pytest.approx(pooled * 4 / 8 / (0.8 * 50e9))
    halved = seconds(forward_precision="fp16")
    assert halved.output_dist == pytest.approx(whole.output_dist / 2)
    assert halved.gradient_dist == whole.gradient_dist
    # NVLink carries the reduce-scatter, a quarter crosses hosts
    by_host = seconds(placed("table_row_wise", (0, 1, 2, 3)), 250_000)
    assert by_host.output_dist < whole.output_dist
    paged = replace(TABLE, compute_kernel="fused_uvm_caching", cache_ratio=0.1)
    assert seconds(paged).lookup > 3 * max(whole.lookup, seconds(paged, prefetch=True).lookup)
    # ten rows are read once and then come from the cache
    assert seconds(replace(TABLE, cardinality=10)).lookup < whole.lookup


def assessment():
    tables = {
        "a": placed("table_wise", (3,)),
        "b": placed("row_wise"),
        "c": placed("table_row_wise", (4, 5, 6, 7)),
        "d": placed("data_parallel"),
    }
    return assess(replace(PLAN, tables=tables, dense=DenseCost(1_000_000, 2e6, 1e3, 100)), CLUSTER)


def test_ranks_add_up_and_phases_last_as_long_as_their_slowest_rank():
    result = assessment()
    assert sum(rank.bytes.rows for rank in result.ranks) == 128_000_000 * (3 + 8)
    assert [rank.tables for rank in result.ranks][3] == ["a", "b", "d"]
    path = result.path
    assert path.lookup == max(rank.times.lookup for rank in result.ranks)
    assert path.step == pytest.approx(sum(getattr(path, phase) for phase in MAIN_PHASES))
    assert result.samples_per_second == pytest.approx(8 * 1024 / path.step)
    slow_input = assess(result.plan, replace(CLUSTER, cores=1, decode_values_per_second=1e5))
    assert slow_input.path.bound_by == "input" and slow_input.path.step == pytest.approx(1024 * 100 / 1e5)


def test_explain_names_the_next_best_and_every_place():
    result = assessment()
    found = alternatives(result, "a", Room(CLUSTER.hbm_bytes, CLUSTER.ddr_bytes))
    assert {each.table.sharding_type for each in found} == set(SHARDING_TYPES)
    assert found[0].table == result.plan.tables["a"]
    steps = [each.step_seconds for each in found[1:] if each.fits]
    assert steps == sorted(steps)
    text = "\n".join(explain_lines(result, "a", Room(CLUSTER.hbm_bytes, CLUSTER.ddr_bytes)))
    assert "planned: table_wise fused on 3" in text and "next best: " in text
    assert not any(each.fits for each in alternatives(result, "a", Room(10, 10)))


def test_reports_say_the_same_to_people_and_machines():
    result = assessment()
    values, lines = report_dict(result), report_lines(result, full=True)
    assert values["step_seconds"] == result.path.step and len(values["ranks"]) == 8
    assert sum(rank["table_bytes"]["rows"] for rank in values["ranks"]) == 128_000_000 * 11
    assert any(f"bound by {values['bound_by']}" in line for line in lines)
    grid = heat(result)
    assert set(grid) == set("abcd") and all(len(row) == 8 for row in grid.values())
    assert sum(map(sum, grid.values())) == pytest.approx(1e3 * sum(rank.times.total for rank in result.ranks))
    page = html_page(result)
    assert page.count("<tr>") == 6 and page.count("b, rank 3: ") == 1 and "http" not in page
