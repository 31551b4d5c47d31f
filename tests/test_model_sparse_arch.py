"""Groups are cut by key whatever the plan's order, by either op; wide weights arrive; TorchRec's pipeline drives the whole objective."""

from dataclasses import replace

import pytest
import torch
from torchrec.distributed import DistributedModelParallel, TrainPipelineSparseDist
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from data.schema import Table
from data.stream import Batch
from mbcnet_rec.model.branches import DeepConfig, EFGCConfig
from mbcnet_rec.model.input_layout import ALL, WIDE, InputLayout, wide_tables
from mbcnet_rec.model.layers import CrossConfig
from mbcnet_rec.model.mbcnet import MBCNetConfig
from mbcnet_rec.model.models import build_model, needs_wide
from mbcnet_rec.model.objective import Objective
from mbcnet_rec.model.sparse_arch import FeatureRegroup, Lookup, SparseArch, field_of, join_slices, regroup_op, wide_key
from mbcnet_rec.model.zoo.deepfm import DeepFMConfig
from mbcnet_rec.model.zoo.dnn import DNNConfig
from mbcnet_rec.plugins import model_config
from mbcnet_rec.runtime.process import joined_process

DIMS = {"user": 4, "item": 8, "tags": 4, "shops": 12}
GROUPS = {"match": ("item", "user"), "looks": ("image", "item", "price"), "cost": ("price", "age")}
DENSE = {"price": (0, 1), "image": (2, 3), "age": (1, 1)}
B = 5


def layout(wide=False):
    return InputLayout(DIMS, DENSE, GROUPS, wide=wide)


def keyed_tensors(order, columns, split_at=3):
    """Two KeyedTensors that hold `columns` (key -> (B, width)) in the given order of keys."""
    return [
        KeyedTensor(keys, [columns[key].shape[1] for key in keys], torch.cat([columns[key] for key in keys], 1))
        for keys in (order[:split_at], order[split_at:])
    ]


@pytest.mark.parametrize("op", ["split", "permute"])
def test_regroup_finds_columns_by_key(op):
    columns, dense = {key: torch.randn(B, width) for key, width in DIMS.items()}, torch.randn(B, 5)
    price, age, image = dense[:, :1], dense[:, 1:2], dense[:, 2:]
    expected = {
        ALL: torch.cat([*columns.values(), price, image, age], 1),
        "match": torch.cat([columns["item"], columns["user"]], 1),
        "looks": torch.cat([columns["item"], image, price], 1),
        "cost": torch.cat([price, age], 1),
    }
    regroup = FeatureRegroup(layout(), op)
    # one module through several plans: nothing of the first order may stick
    for order in (
        ["user", "item", "tags", "shops"],
        ["shops", "tags", "item", "user"],
        ["item", "shops", "user", "tags"],
    ):
        groups = regroup(keyed_tensors(order, columns), dense)
        assert list(groups) == list(expected)
        for name, tensor in expected.items():
            assert torch.equal(groups[name], tensor), (order, name)


@pytest.mark.parametrize("op", ["split", "permute"])
def test_regroup_sends_gradients_to_every_use(op):
    columns = {key: torch.randn(B, width, requires_grad=True) for key, width in DIMS.items()}
    groups = FeatureRegroup(layout(), op)(keyed_tensors(list(DIMS), columns), torch.randn(B, 5))
    sum(tensor.sum() for tensor in groups.values()).backward()
    uses = {"user": 2, "item": 3, "tags": 1, "shops": 1}  # once in "all", and once in each group
    assert all((columns[key].grad == number).all() for key, number in uses.items())


@pytest.mark.parametrize("op", ["split", "permute"])
def test_regroup_with_wide_weights(op):
    columns = {f"{key}@table_{key}": torch.randn(B, width) for key, width in DIMS.items()}
    columns |= {wide_key(key): torch.randn(B, 4) for key in DIMS}
    dense = torch.randn(B, 5)
    tensors = keyed_tensors(sorted(columns, reverse=True), columns)
    groups = FeatureRegroup(layout(wide=True), op)(tensors, dense)
    weights = [columns[wide_key(key)].mean(1, keepdim=True) for key in DIMS]
    numbers = [dense[:, :1], dense[:, 2:], dense[:, 1:2]]
    torch.testing.assert_close(groups[WIDE], torch.cat([*weights, *numbers], 1))
    match = [columns["item@table_item"], columns["user@table_user"]]
    assert torch.equal(groups["match"], torch.cat(match, 1))
    assert groups[WIDE].shape[1] == layout(wide=True).width(WIDE)


def test_keys_of_wide_weights():
    fields = {"user", "a", "a@b", "user.id"}
    assert field_of("user@table", fields) == "user" and field_of("user", fields) == "user"
    assert field_of("a@b@table", fields) == "a@b" and field_of("a@table", fields) == "a"
    assert all(field_of(wide_key(field), fields) == wide_key(field) for field in fields)
    assert wide_key("user.id") == "user.id@wide_user%2Eid"  # a table's name is that of a module
    assert regroup_op(torch.device("cpu")) == "split" and regroup_op(torch.device("cuda")) == "permute"
    assert join_slices([(0, 1), (1, 3), (6, 2), (8, 1)]) == [(0, 4), (6, 3)]


def collections(wide, fields=tuple(DIMS)):
    """Tables of 11 rows, those of shops weighted."""
    lookups = []
    for name, weighted in (("ebc", False), ("weighted_ebc", True)):
        tables = [
            EmbeddingBagConfig(
                name=f"table_{key}",
                num_embeddings=11,
                embedding_dim=DIMS[key],
                feature_names=[key],
                pooling=PoolingType.MEAN if key == "tags" else PoolingType.SUM,
            )
            for key in fields
            if (key == "shops") == weighted
        ]
        if tables:
            ours = [
                Table(each.name, 11, each.embedding_dim, each.pooling, tuple(each.feature_names), weighted)
                for each in tables
            ]
            both = tables + [
                EmbeddingBagConfig(
                    name=each.name, num_embeddings=11, embedding_dim=each.embedding_dim, feature_names=list(each.feature_names),
                    pooling=each.pooling,
                )
                for each in (wide_tables(ours) if wide else [])
            ]  # fmt: skip
            lookups.append(Lookup(name, EmbeddingBagCollection(both, is_weighted=weighted), weighted))
    return lookups


def batch(seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(keys, weighted):
        lengths = torch.randint(0, 4, (len(keys) * B,), generator=generator)
        values = torch.randint(0, 11, (int(lengths.sum()),), generator=generator)
        weights = torch.rand(len(values), generator=generator) if weighted else None
        return KeyedJaggedTensor(keys, values, weights, lengths)

    return Batch(
        dense_features=torch.randn(B, 5, generator=generator),
        sparse_features=draw(["user", "item", "tags"], False),
        weighted_features=draw(["shops"], True),
        labels=torch.randint(0, 2, (B,), generator=generator).float(),
        weights=torch.ones(B),
    )


SMALL = {
    "efgc": EFGCConfig((6, 4)),
    "cross": CrossConfig(low_rank=2),
    "deep": DeepConfig((10, 8)),
    "branch_dim": 8,
    "top": (7, 5),
}
MODELS = {
    "mbcnet": model_config("mbcnet", mbcnet=MBCNetConfig(**SMALL)),
    "five branches": model_config(
        "mbcnet", mbcnet=MBCNetConfig(branches=("efgc", "cross", "deep", "fm", "wide"), **SMALL)
    ),
    "deepfm": model_config("deepfm", deepfm=DeepFMConfig(hidden=(6, 5))),
    "dnn": model_config("dnn", dnn=DNNConfig(hidden=(6, 5))),
}


def objective(config):
    torch.manual_seed(0)
    wide = needs_wide(config)
    arch = SparseArch(collections(wide), layout(wide))
    return Objective(build_model(config, arch, layout(wide)))


def test_one_weight_per_id_and_field():
    """A table's wide weight follows the id and pools like its field; its four columns get one gradient."""
    arch = SparseArch(collections(wide=True), layout(wide=True))
    one = batch(0)
    rows = arch.ebc.embedding_bags["wide_user"].weight
    groups = arch(one.dense_features, one.sparse_features, one.weighted_features)
    ids = one.sparse_features["user"].to_dense()
    expected = torch.stack([rows[i.long()].mean(1).sum() for i in ids])  # sum pooling
    torch.testing.assert_close(groups[WIDE][:, 0], expected)
    shops = one.weighted_features["shops"]
    row = arch.weighted_ebc.embedding_bags["wide_shops"].weight
    pooled = [
        (row[i.long()].mean(1) * w).sum() for i, w in zip(shops.to_dense(), shops.to_dense_weights(), strict=True)
    ]
    torch.testing.assert_close(groups[WIDE][:, 3], torch.stack(pooled))
    groups[WIDE].sum().backward()
    assert rows.grad.std(1).max() == 0 and rows.grad.abs().sum() > 0  # four columns move as one


@pytest.fixture
def one_process():
    with joined_process("cpu"):
        yield


@pytest.mark.parametrize("name", MODELS)
def test_the_pipeline_drives_the_objective(name, one_process):
    """TrainPipelineSparseDist traces the objective and pipelines both collections; its losses are those of a plain loop."""
    plain, sharded = objective(MODELS[name]), objective(MODELS[name])
    sharded.load_state_dict(plain.state_dict())
    module = DistributedModelParallel(sharded, device=torch.device("cpu"))
    missing = module.load_state_dict(plain.state_dict(), strict=False)
    assert not missing.unexpected_keys
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    pipeline = TrainPipelineSparseDist(module, optimizer, torch.device("cpu"), execute_all_batches=True)
    batches = iter([batch(seed) for seed in range(3)])
    for seed in range(3):
        outputs = pipeline.progress(batches)
        with torch.no_grad():
            _, expected = plain(batch(seed))
        torch.testing.assert_close(outputs.terms["loss"], expected.terms["loss"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(outputs.logits, expected.logits, rtol=1e-4, atol=1e-5)
        assert outputs.logits.shape == (B, 1 + len(module.module.model.branch_names))
    with pytest.raises(StopIteration):
        pipeline.progress(batches)
    names = {each.forward.name for each in pipeline._pipelined_modules}
    assert names == {"model.sparse_arch.ebc", "model.sparse_arch.weighted_ebc"}


def test_without_weighted_fields():
    plain = InputLayout({"user": 4, "item": 8, "tags": 4}, DENSE, {"match": ("item", "user")})
    arch = SparseArch(collections(False, ("user", "item", "tags")), plain)
    rows = replace(batch(0), weighted_features=None)
    loss, _ = Objective(build_model(MODELS["mbcnet"], arch, plain))(rows)
    loss.backward()
    assert arch.ebc.embedding_bags["table_user"].weight.grad.abs().sum() > 0
