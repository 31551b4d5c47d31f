"""Proves that a sequence is pooled as its definition says (padded rows as ragged ones, by each kind of pooling), that one, two and four ranks
train the same model under each plan, that a run resumes bit for bit and on other ranks, that its artifact serves what `predict` says,
and that target attention finds a match of target and history which a mean hides.
"""

import functools
import json
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from forked_ranks import run_script
from sequence_data import schema_text, seen_table, write_seen
from tiny_run import lines_of, train
from torch.utils._python_dispatch import TorchDispatchMode
from torchrec.sparse.jagged_tensor import JaggedTensor

from data.errors import InputError
from data.reading.columns import Place
from data.reading.encode import Encoder
from data.schema import format_schema, load_schema
from mbcnet_rec.cli import main
from mbcnet_rec.dense_cost import dense_cost
from mbcnet_rec.model.input_layout import input_layout
from mbcnet_rec.model.sequences import SequencePooling
from mbcnet_rec.plugins import model_config
from mbcnet_rec.serving import loader as serving
from sharding.plan.cluster import default_cluster
from sharding.plan.constraints import ShardingConfig, TableConstraint
from sharding.search.candidates import Task
from sharding.search.planner import make_plan

POOLINGS = ("target_attention", "transformer", "mean", "sum")
B = 9


def schema_of(folder, text):
    (folder / "schema.toml").write_text(text)
    return load_schema(folder / "schema.toml")


@pytest.fixture
def schema(tmp_path):
    return schema_of(tmp_path, schema_text())


def jagged(layout, seed=0):
    """Rows of every field: no event, some, and as many as there may be."""
    torch.manual_seed(seed)
    lengths = torch.tensor([0, 8, 1, 3, 8, 0, 5, 2, 7])
    ones = torch.tensor([1, 1, 0, 1, 1, 1, 1, 1, 1])
    found = {}
    for field in sorted(layout.unpooled):
        own = ones if field in layout.singles else lengths
        found[field] = JaggedTensor(torch.randn(int(own.sum()), layout.embedding_dims[field]), lengths=own)
    return found


@pytest.mark.parametrize("pooling", POOLINGS)
def test_padded_rows_are_pooled_as_ragged_ones(pooling, tmp_path):
    layout = input_layout(schema_of(tmp_path, schema_text(pooling)))
    module, found = SequencePooling(layout), jagged(layout)
    pooled = module([found])
    assert pooled.keys() == ["item@", "kind@", *(f"{field}@" for field in layout.sequences[0].fields)]
    (sequence,) = layout.sequences
    (pool,) = module.pools
    rows = {field: each.to_dense() for field, each in found.items()}
    target = torch.stack(
        [
            torch.cat([(*rows[each][row], torch.zeros(width))[0] for each, width in (("item", 16), ("kind", 8))])
            for row in range(B)
        ]
    )
    for row in range(B):  # one row at a time, without padding
        events = torch.cat([rows[field][row] for field in sequence.fields], dim=1)
        if pool.encoder is not None and len(events):
            pool.encoder.places.data, whole = pool.encoder.places.data[: len(events)], pool.encoder.places.data
            events = pool.encoder(events[None], torch.ones(1, len(events)))[0]
            pool.encoder.places.data = whole
        if pool.attention is not None:
            weights = pool.attention(events[None], target[row : row + 1])[0]
        else:
            weights = torch.full((len(events),), 1.0 if pooling == "sum" else 1 / max(1, len(events)))
        wanted = (weights[:, None] * events).sum(0)
        torch.testing.assert_close(pooled.values()[row, 24:], wanted, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(pooled.values()[:, :24], target, atol=0, rtol=0)


def test_weights_are_float32_under_autocast(schema):
    layout = input_layout(schema)
    module, found = SequencePooling(layout), jagged(layout)
    with torch.autocast("cpu", torch.bfloat16):
        pooled = module([found]).values()
    assert pooled.dtype == torch.float32 and torch.equal(pooled, module([found]).values())


class Waits(TorchDispatchMode):
    """Collects what the host would wait for on a GPU."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        waits = {
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.equal.default,
        }
        assert operation not in waits, operation
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_host_waits_for_no_length(pooling, tmp_path):
    layout = input_layout(schema_of(tmp_path, schema_text(pooling)))
    module, found = SequencePooling(layout), jagged(layout)
    with Waits():
        module([found]).values().sum()


def test_the_planner_sees_what_attention_costs(schema, tmp_path):
    costs = {}
    for pooling in ("sum", "target_attention"):
        costs[pooling] = dense_cost(model_config(), schema_of(tmp_path, schema_text(pooling)), ShardingConfig())
    first, second = costs.values()
    weights = (16 + 8 + 4 + 3 * 24) * 64 + 64 * 16 + 16
    assert second.parameters - first.parameters == weights + 64 + 16 + 1
    assert second.forward_flops - first.forward_flops == 2 * 8 * weights, "of eight events"
    assert second.activation_bytes > first.activation_bytes + 4 * 8 * (16 + 8 + 4 + 3 * 24 + 64 + 16)


def encoded(schema, table):
    return Encoder(schema, has_labels=False).encode(table.to_batches()[0], Place("rows.parquet", 0))


def test_the_newest_events_stay_and_gaps_become_rows(schema):
    table = seen_table(4, 1)
    table = table.set_column(
        table.column_names.index("seen"), "seen", pa.array([[1, 2], list(range(20, 30)), [], None])
    )
    table = table.set_column(table.column_names.index("kinds"), "kinds", pa.array([[3, 4], [5] * 9 + [6], [], None]))
    ages = [[0.0, None], [1.0, 2.0, 2.9, 3.0, 6.9, 7.0, 100.0, 1e3, 1e4, 1e9], [], None]
    table = table.set_column(table.column_names.index("ages"), "ages", pa.array(ages))
    columns = encoded(schema, table)
    names = [feature.name for feature in schema.sparse if not feature.is_single]
    lists = {
        name: [columns.lists.values[i][a:b].tolist() for a, b in pairwise(o)]
        for i, (name, o) in enumerate(zip(names, columns.lists.offsets, strict=True))
    }
    assert lists["seen"] == [[1, 2], list(range(22, 30)), [], []]
    assert lists["kinds"] == [[3, 4], [5] * 7 + [6], [], []]
    assert lists["ages"] == [[1, 0], [2, 3, 3, 4, 7, 10, 11, 11], [], []]


FAULTS = {
    "lengths": ("kinds", [[3], [], []], "row 0, field 'seen': 2 values but 1 values in column 'kinds', which is beside it"),
    "no id": ("seen", [[3, None], [], []], "row 0, field 'seen' = None: wanted an id: a sequence keeps a place for each event"),
    "range": ("seen", [[3, 241], [], []], "row 0, field 'seen' = 241: wanted an id in [0, 241)"),
    "future": ("ages", [[3.0, -2.0], [], []], "row 0, field 'ages' = -2.0: wanted a time since the event, 0 or more"),
}  # fmt: skip


@pytest.mark.parametrize("case", FAULTS)
def test_a_faulty_sequence_is_named(schema, case):
    column, values, words = FAULTS[case]
    table = seen_table(3, 1)
    good = {"seen": [[1, 2], [], []], "kinds": [[1, 2], [], []], "ages": [[1.0, 2.0], [], []]} | {column: values}
    for name, own in good.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(own))
    with pytest.raises(InputError) as caught:
        encoded(schema, table)
    assert words in str(caught.value)


REFUSED = {
    "no length": ("max_length = 8, ", "", "fields.seen.max_length = 0: wanted how many values to keep, 1 to 4096"),
    "no target": (', target = "item"', "", "fields.seen.target is missing: wanted the categorical field"),
    "unknown target": ('target = "item"', 'target = "shop"', "fields.seen.target = 'shop': wanted a categorical field"),
    "another table": ('target = "item"', 'target = "kind"', "fields.seen.target = 'kind': it reads table 'kind', this field 'item'"),
    "no such sequence": ('beside = "seen", table', 'beside = "item", table', "fields.kinds.beside = 'item': wanted a field of kind 'sequence'"),
    "a bag pools so": ('kind = "multi_valued"', 'kind = "multi_valued", pooling = "transformer"', "fields.tags.pooling = 'transformer': wanted 'sum' or 'mean'"),
    "a bag has no gap": ('kind = "multi_valued"', 'kind = "multi_valued", encoding = "gap"', "fields.tags.encoding = 'gap': only sequences have gaps"),
    "a side pools": ('encoding = "gap"', 'encoding = "gap", pooling = "mean"', "fields.ages.pooling = 'mean': the sequence 'seen' pools the fields beside it"),
    "zch": ('encoding = "gap"', 'encoding = "zch"', "fields.ages.encoding = 'zch': TorchRec gives rows to unbounded ids of pooled fields only"),
    "null": ('encoding = "gap"', 'on_invalid = "null"', "fields.ages.on_invalid = 'null': a sequence keeps a place for each event"),
    "a bag in the table": ("num_embeddings = 20, embedding_dim = 8", 'table = "kind"', "fields.tags: shares table 'kind' with the sequence 'kinds'"),
    "a mean has no target": ('"target_attention"', '"mean"', "pooling = 'mean' has no target; remove it"),
    "max_length of others": ('kind = "numeric"', 'kind = "numeric", max_length = 3', "max_length = 3: only kind = \"cross\" or \"sequence\""),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_sequence_cannot_be_is_refused(case, tmp_path):
    before, after, words = REFUSED[case]
    text = schema_text().replace(before, after, 1)
    assert text != schema_text()
    with pytest.raises(InputError) as caught:
        schema_of(tmp_path, text)
    assert words in str(caught.value)


def test_a_check_finds_lists_of_other_lengths(tmp_path, capfd):
    config = write_seen(tmp_path, 200, 50)
    table = pq.read_table(tmp_path / "train.parquet")
    shorter = pa.array([each[1:] for each in table["ages"].to_pylist()])
    pq.write_table(table.set_column(table.column_names.index("ages"), "ages", shorter), tmp_path / "train.parquet")
    assert (
        main(
            ["data", "check", "--full", str(tmp_path / "train.parquet"), "--schema", str(config.parent / "schema.toml")]
        )
        != 0
    )
    words = capfd.readouterr()
    assert "in column 'ages', which is beside it" in words.out + words.err


def test_a_schema_of_sequences_is_written_as_it_was_read(schema, tmp_path):
    again = schema_of(tmp_path, format_schema(schema))
    assert (again.features, again.tables, again.fingerprint()) == (schema.features, schema.tables, schema.fingerprint())
    assert schema.table_of["seen"].positions == 9 and schema.table_of["kind"].positions == 9
    assert schema.table_of["ages"].positions == 8 and schema.table_of["tags"].positions == 0


def test_the_planner_counts_every_position_and_offers_what_runs(schema):
    def plan(**constraint):
        tables = {"item": TableConstraint(**constraint)} if constraint else {}
        return make_plan(Task(schema, ShardingConfig(tables=tables), default_cluster(2, 2, "cpu"), 64))

    assert plan().tables["item"].outputs == 9 and plan().tables["tags"].outputs == 1
    for kind in ("table_wise", "row_wise", "column_wise"):
        assert plan(sharding_types=(kind,)).tables["item"].sharding_type == kind
    with pytest.raises(
        InputError, match=r"sharding_types \['data_parallel'\] .* a sequence reads this table; use one of table_wise"
    ):
        plan(sharding_types=("data_parallel",))


# of the default lane, in which "per_branch" is MBCnet
USUAL = ("row_wise", "per_branch")


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.long)])
def ranks(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("ranks")
    run_script("sequence_ranks.py", str(folder), str(request.param), *(USUAL if request.param == 2 else ()))
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("plan", ["table_wise", "row_wise", "column_wise", "wide", "per_branch"])
def test_several_ranks_train_as_one(ranks, plan, request):
    if request.node.callspec.params["ranks"] == 2 and plan not in USUAL:
        pytest.skip("four ranks do it, in the long lane")
    one, many = ranks[plan]["losses"]
    np.testing.assert_allclose(many, one, rtol=1e-5)
    assert ranks[plan]["sequences"] >= 6, "rows and state of three tables"
    assert ranks[plan]["largest"] < 1e-5


def test_a_run_resumes_bit_for_bit_and_on_one_rank(ranks, request):
    # over four ranks gloo adds in another order in the first step of a start, in which DDP's buckets are others
    is_two = request.node.callspec.params["ranks"] == 2
    assert ranks["resumed"]["different"] == [] if is_two else ranks["resumed"]["largest"] < 1e-6
    assert ranks["resharded"]["largest"] < 1e-5


# how rows are packed does not depend on the pooling: each type once
ROWS = {"target_attention": ("fp32", "int8"), "transformer": ("int4",), "mean": ("fp16",)}
KINDS = {"target_attention": "dnn", "transformer": "wide_deep", "mean": "mbcnet"}
BOUNDS = {"fp32": 1e-5, "fp16": 1e-3, "int8": 2e-2, "int4": 2e-1}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a pooling: a run of it with its artifacts, and what `predict` says of its test rows."""

    @functools.cache
    def folder_of(pooling):
        folder = tmp_path_factory.mktemp(pooling)
        config, run = write_seen(folder, 960, 192, pooling), str(folder / "run")
        assert train(config, "train.max_steps=10", f"model.kind={KINDS[pooling]}") == 0
        assert main(["predict", run, "--data", str(folder / "test.parquet"), "--out", f"{run}_scores"]) == 0
        for rows in ROWS[pooling]:
            assert main(["export", run, "--out", str(folder / rows), "--rows", rows, "--no-aot"]) == 0
        return folder

    return folder_of


@pytest.mark.parametrize("pooling", ["target_attention", "transformer", pytest.param("mean", marks=pytest.mark.long)])
def test_an_artifact_serves_what_predict_says(trained, pooling):
    folder = trained(pooling)
    (scores,) = (folder / "run_scores").rglob("*.parquet")
    wanted = pq.read_table(scores)["probability"].to_numpy()
    table = pq.read_table(folder / "test.parquet")
    for rows in ROWS[pooling]:
        model = serving.load(folder / rows)
        np.testing.assert_allclose(model.predict(table), wanted, atol=BOUNDS[rows], rtol=0)
    plain = json.loads(json.dumps(table.slice(0, 5).to_pydict()))
    np.testing.assert_allclose(model.predict(plain), model.predict(table.slice(0, 5)), atol=1e-6)


def test_a_delta_leads_to_the_later_artifact(trained, tmp_path):
    folder = trained("target_attention")
    assert train(folder / "run.toml", "train.max_steps=20", f"train.out={tmp_path}/later") == 0
    for flags in (["--rows", "int8"], ["--since", str(folder / "int8")]):
        assert (
            main(
                [
                    "export",
                    f"{tmp_path}/later",
                    "--out",
                    f"{tmp_path}/{flags[0]}",
                    *flags,
                    *(["--no-aot"] if flags[0] == "--rows" else []),
                ]
            )
            == 0
        )
    model, table = serving.load(folder / "int8"), pq.read_table(folder / "test.parquet")
    model.apply(f"{tmp_path}/--since")
    np.testing.assert_array_equal(model.predict(table), serving.load(f"{tmp_path}/--rows").predict(table))


def test_a_request_shares_the_history_of_its_user(trained):
    model, table = (
        serving.load(trained("target_attention") / "fp32"),
        pq.read_table(trained("target_attention") / "test.parquet"),
    )
    rows = {name: table[name].to_pylist()[:3] for name in model.preprocess.columns}
    history = {name: rows.pop(name)[:1] for name in ("user", "seen", "kinds", "ages")}
    own, shared = (model.preprocess.part(frozenset(each)) for each in (rows, history))
    inputs = own(rows)._replace(shared=shared(history), owners=torch.zeros(3, dtype=torch.int64))
    whole = rows | {name: value * 3 for name, value in history.items()}
    np.testing.assert_allclose(torch.sigmoid(model.score(inputs)).numpy(), model.predict(whole), atol=1e-6)
    with pytest.raises(ValueError, match="field 'ages': must stand with 'seen'"):
        model.preprocess.part(frozenset({"seen", "kinds"}))


@pytest.mark.long
def test_target_attention_finds_what_a_mean_hides(tmp_path):
    found = {}
    for pooling in ("target_attention", "transformer", "mean"):
        config = write_seen(tmp_path / pooling, 19_200, 4_800, pooling)
        assert train(config, "train.epochs=3", "train.eval_every=200") == 0
        found[pooling] = lines_of(tmp_path / pooling / "run", "test")[-1]["auc"]
    assert min(found["target_attention"], found["transformer"]) > found["mean"] + 0.02, found


@pytest.mark.parametrize(
    ("column", "values", "words"),
    [("ages", [[float("nan")]], "or write null where it is not known"), ("seen", [[241]], "on_invalid = 'modulo' for")],
)
def test_a_faulty_event_is_not_told_to_be_read_as_missing(schema, column, values, words):
    table = seen_table(1, 0).drop_columns(["seen", "kinds", "ages"])
    lists = {"seen": [[1]], "kinds": [[1]], "ages": [[1.0]]} | {column: values}
    for name, each in lists.items():
        table = table.append_column(name, pa.array(each))
    with pytest.raises(InputError) as caught:
        encoded(schema, table)
    assert words in str(caught.value) and "'null'" not in str(caught.value)
