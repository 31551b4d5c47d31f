"""The plan file: it round-trips, and one that is not of this run, or that the platform computes wrongly, is refused with the fix."""

from dataclasses import replace
from pathlib import Path

import pytest

from data.errors import InputError
from data.schema import parse_schema
from sharding.plan.compare import check_plan, compare_plans, diff_lines, ranks_text, schema_differences
from sharding.plan.placement import DenseCost, Plan, TablePlan, plan_text, read_plan

FIELDS = {
    "user": {"kind": "categorical", "num_embeddings": 100, "embedding_dim": 16},
    "tags": {"kind": "multi_valued", "num_embeddings": 40, "embedding_dim": 8},
}


def schema_of(fields=FIELDS, **more):
    return parse_schema({"name": "s", "label": "y", "fields": fields, **more}, "s", Path())


SCHEMA = schema_of()
TABLES = {
    "user": TablePlan("table_row_wise", "fused", (2, 3), 100, 16),
    "tags": TablePlan("table_wise", "fused", (1,), 40, 8, 1, 4.5, 33),
}
PLAN = Plan(
    4, 2, "cpu", SCHEMA.fingerprint(), TABLES, 64, cluster="2x2:cpu", format=2, dense=DenseCost(10, 2.0, 3.0, 4.0)
)  # fmt: skip


REPLICATED = {"sharding_type": "data_parallel", "compute_kernel": "dense", "ranks": ()}


def changed(**table):
    """The plan with another placement of `user`."""
    return replace(PLAN, tables=TABLES | {"user": replace(TABLES["user"], **table)})


def test_file_round_trips_and_keeps_one_line_a_table(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(plan_text(PLAN))
    assert read_plan(path) == PLAN and list(tmp_path.iterdir()) == [path]
    assert (
        '\n    "user": {"sharding_type": "table_row_wise", "compute_kernel": "fused", "ranks": [2, 3], "num'
        in path.read_text()
    )
    assert path.read_text().count('"cardinality"') == 1  # defaults are left out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read"),
        ("{", "not JSON"),
        ('{"format": 9}', "format = 9, this version reads 2; plan again"),
        ('{"world_size": 2}', "format = 1, this version reads 2; plan again"),
        ('{"format": 2, "world_size": 2}', "local_world_size is missing"),
        (plan_text(PLAN).replace('"world_size": 4', '"world_size": 0'), "wanted 1 or more of each"),
        (plan_text(replace(PLAN, local_world_size=3)), "wanted a divisor of world_size = 4"),
        (plan_text(PLAN).replace('"cpu"', '"tpu"'), "wanted one of 'cpu', 'cuda'"),
        (plan_text(changed(sharding_type="grid_shard")), "with mean pooling TorchRec computes it wrongly"),
        (plan_text(changed(sharding_type="diagonal")), "wanted one of data_parallel"),
        (plan_text(changed(compute_kernel="dense")), "table_row_wise wants 'fused'"),
        (plan_text(changed(compute_kernel="fused_uvm")), "a CPU has no device memory"),
        (plan_text(replace(PLAN, data_type="bf16")), "FBGEMM has no kernels for bf16 rows; use 'fp16' or 'fp32'"),
        (plan_text(replace(PLAN, data_type="bf16", device="cuda")), "FBGEMM has no kernels for bf16 rows"),
        (plan_text(replace(changed(**REPLICATED), data_type="fp16")), "optimizer computes in the rows' fp16"),
        (plan_text(changed(ranks=(1, 2))), "wants the ranks of one host; write [0, 1]"),
        (plan_text(changed(sharding_type="table_wise")), "table_wise wants one rank"),
        (plan_text(changed(sharding_type="table_wise", ranks=(4,))), "wanted ranks in [0, 4)"),
        (plan_text(changed(sharding_type="row_wise", ranks=(0, 1))), "row_wise uses every rank"),
        (plan_text(changed(sharding_type="column_wise", ranks=(0, 1, 2))), "do not divide into 3 shards"),
        (plan_text(changed(sharding_type="row_wise", ranks=(), num_embeddings=5)), "5 rows over 4 ranks leave"),
        (plan_text(changed(sharding_type="column_wise", ranks=(1, 1))), "each once"),
    ],
)  # fmt: skip
def test_faulty_files_are_refused_in_one_line(tmp_path, text, said):
    path = tmp_path / "plan.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_plan(path)
    assert said in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("run", "said"),
    [
        ({"world_size": 8}, "world_size = 4, but this run has 8 ranks; use -j 2x2"),
        ({"local_world_size": 4}, "local_world_size = 2, but this run has 4 ranks a host"),
        ({"device": "cuda"}, "device = 'cpu', but this run computes on 'cuda'"),
        ({"optimizer": "adagrad"}, "optimizer = 'rowwise_adagrad', but this run's tables use 'adagrad'"),
    ],
)
def test_a_plan_of_another_run_is_refused(run, said):
    same = {"world_size": 4, "device": "cpu", "local_world_size": 2, "optimizer": "rowwise_adagrad"}
    check_plan(PLAN, SCHEMA, source="p", **same)
    with pytest.raises(InputError, match=f"p: {said}.*mbcnet plan make"):
        check_plan(PLAN, SCHEMA, source="p", **(same | run))


def test_a_plan_of_another_schema_is_refused_with_the_difference():
    grown = FIELDS | {"user": FIELDS["user"] | {"num_embeddings": 1000}, "shop": FIELDS["user"]}
    with pytest.raises(InputError, match="shop is not planned; table user: num_embeddings 100 -> 1,000"):
        check_plan(PLAN, schema_of(grown), world_size=4, device="cpu", source="p")
    assert "tables are equal" in schema_differences(PLAN, schema_of(groups={"g": ["user"]}))[0]
    assert not schema_differences(PLAN, SCHEMA)


def test_differences_are_named_by_table():
    other = replace(changed(ranks=(0, 1)), data_type="fp16")
    other = replace(other, tables={name: table for name, table in other.tables.items() if name != "tags"})
    assert diff_lines(compare_plans(PLAN, other)) == [
        "data_type: fp32 -> fp16",
        "~ user: ranks 2-3 -> 0-1",
        "- tags: table_wise fused on 1",
    ]
    assert compare_plans(PLAN, PLAN) == {"head": {}, "tables": {}}
    assert ranks_text((0, 1, 2, 5, 7, 8)) == "0-2, 5, 7-8"
