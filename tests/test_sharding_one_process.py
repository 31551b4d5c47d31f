"""A single process looks rows up as TorchRec does: the same columns, gradients and updates, for every mix of tables that lie here whole."""

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, data_parallel, table_wise
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from sharding.bridge.one_process import DirectLookup, NoCopies, shorten_lookups

ROWS, B = 11, 5
DIMS = {"user": 4, "item": 8, "tags": 4, "shops": 12}
MEAN = {"tags"}
# the tables that are replicated, the others being whole on their rank
KINDS = {"replicated": set(DIMS), "whole": set(), "mixed": {"user", "tags"}}


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(kind: str, weighted: bool, shortened: bool) -> tuple[DistributedModelParallel, Any]:
    """A collection in a DistributedModelParallel, equal for equal arguments, and its sharded self."""
    torch.manual_seed(0)
    pooling = {name: PoolingType.MEAN if name in MEAN else PoolingType.SUM for name in DIMS}
    tables = [
        EmbeddingBagConfig(name=name, num_embeddings=ROWS, embedding_dim=width, feature_names=[name], pooling=pooling[name])
        for name, width in DIMS.items()
    ]  # fmt: skip
    rows = EmbeddingBagCollection(tables, is_weighted=weighted)
    weights = copy.deepcopy(rows.state_dict())
    replicated = KINDS[kind]
    fused = [param for name, param in rows.named_parameters() if name.split(".")[1] not in replicated]
    apply_optimizer_in_backward(torch.optim.SGD, fused, {"lr": 0.1})
    places = {name: data_parallel() if name in replicated else table_wise(rank=0) for name in DIMS}
    plan = construct_module_sharding_plan(rows, places, local_size=1, world_size=1, device_type="cpu")
    model = DistributedModelParallel(
        torch.nn.Sequential(rows), device=torch.device("cpu"), plan=ShardingPlan({"0": plan}), data_parallel_wrapper=NoCopies()
    )  # fmt: skip
    if shortened:
        shorten_lookups(model)
    model.load_state_dict(OrderedDict((f"0.{name}", value) for name, value in weights.items()), strict=False)
    collection = next(each for each in model.modules() if isinstance(each, ShardedEmbeddingBagCollection))
    return model, collection


def features(seed: int, weighted: bool, order: tuple[str, ...]) -> KeyedJaggedTensor:
    """Up to three ids a field and row; fields without any occur."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 4, (len(order) * B,), generator=draw, dtype=torch.int32)
    values = torch.randint(0, ROWS, (int(lengths.sum()),), generator=draw)
    weights = torch.rand(len(values), generator=draw) if weighted else None
    return KeyedJaggedTensor(list(order), values, weights, lengths)


@pytest.mark.parametrize("order", [tuple(DIMS), ("shops", "user", "tags", "item")], ids=["in order", "mixed"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("kind", KINDS)
def test_direct_lookups_are_torchrecs(
    kind: str, weighted: bool, order: tuple[str, ...], one_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps, in each the same columns by key; then the same rows, those moved in backward and those with a gradient."""
    (plain, _), (short, collection) = (sharded(kind, weighted, shortened) for shortened in (False, True))
    assert isinstance(collection.forward, DirectLookup)
    for step in range(3):
        if step == 1:  # from now on nothing is exchanged
            monkeypatch.setattr(collection, "input_dist", None)
        outputs = [model(features(step, weighted, order)) for model in (plain, short)]
        theirs, ours = ({key: each[key] for key in DIMS} for each in outputs)
        for key in DIMS:
            assert torch.equal(theirs[key], ours[key]), (step, key)
            assert ours[key].shape == (B, DIMS[key])
        for columns in (theirs, ours):
            sum((step + 1) * value.square().sum() for value in columns.values()).backward()  # type: ignore[union-attr]
    for (name, one), (_, other) in zip(plain.named_parameters(), short.named_parameters(), strict=True):
        assert torch.equal(one.detach(), other.detach()), name
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad)
