"""Adam on whole tensors moves every number as torch's does; clipping and profilers' marks do what torch's do, with less around them."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torchrec.distributed.composable.table_batched_embedding_slice import TableBatchedEmbeddingSlice
from torchrec.optim.keyed import KeyedOptimizerWrapper

from mbcnet_rec.cpu.whole_adam import WholeAdam, wholes_of

RATES = {"lr": 1e-2, "eps": 1e-8}
TABLES = ((3, 4), (5, 2))


def tables_of_one_tensor() -> tuple[nn.Parameter, list[TableBatchedEmbeddingSlice]]:
    """Two tables as TorchRec keeps them: in one tensor, whose gradient they look up."""
    sizes = [rows * width for rows, width in TABLES]
    whole = nn.Parameter(torch.randn(sum(sizes), generator=torch.Generator().manual_seed(0)))
    cuts = [(0, sizes[0]), (sizes[0], sum(sizes))]
    return whole, [
        TableBatchedEmbeddingSlice(whole, first, last, -1, width)
        for (first, last), (_, width) in zip(cuts, TABLES, strict=True)
    ]


def gradients(steps: int, size: int) -> Tensor:
    return torch.randn(steps, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "options",
    [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled_weight_decay": True}],
    ids=["plain", "penalty", "decoupled decay"],
)
def test_tables_move_as_torch_moves_them_one_by_one(options: dict[str, float]) -> None:
    """Ten steps, the rate changed between them: equal to torch's own fused Adam on separate parameters, but for the last bit:
    whether a number is in the vector part of the loop depends on where its tensor begins."""
    whole, tables = tables_of_one_tensor()
    apart = [nn.Parameter(table.detach().clone()) for table in tables]
    ours, theirs = (WholeAdam(tables, **RATES, **options), torch.optim.Adam(apart, fused=True, **RATES, **options))
    for step, gradient in enumerate(gradients(10, whole.numel())):
        for optimizer in (ours, theirs):
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] = RATES["lr"] / (1 + step // 5)
        assert all(table.grad is None for table in tables)
        whole.grad = gradient.clone()
        for one, table in zip(apart, tables, strict=True):
            assert table.grad is not None
            one.grad = table.grad.clone()
        ours.step()
        theirs.step()
    for one, table in zip(apart, tables, strict=True):
        torch.testing.assert_close(table.detach(), one.detach(), rtol=1e-6, atol=1e-7)
        for key, value in theirs.state[one].items():
            torch.testing.assert_close(ours.state[table][key], value, rtol=1e-6, atol=1e-9)


def test_state_that_is_loaded_is_the_state_that_moves() -> None:
    """Checkpoints write into the state of each table; the next step must start from there."""
    runs = []
    for _ in range(2):
        whole, tables = tables_of_one_tensor()
        named = {f"table_{number}": table for number, table in enumerate(tables)}
        runs.append((whole, KeyedOptimizerWrapper(named, lambda params: WholeAdam(params, **RATES))))
    (first, kept), (second, resumed) = runs
    steps = gradients(6, first.numel())
    for gradient in steps[:3]:
        first.grad = gradient.clone()
        kept.step()
    saved, weights = copy.deepcopy(kept.state_dict()), first.detach().clone()
    for gradient in steps[3:]:
        first.grad = gradient.clone()
        kept.step()
    resumed.init_state()  # as a resumed run makes what it loads into: gradients that are given to the tables, not to the tensor
    resumed.zero_grad()
    resumed.load_state_dict(saved)
    with torch.no_grad():
        second.copy_(weights)
    for gradient in steps[3:]:
        second.grad = gradient.clone()
        resumed.step()
    assert torch.equal(first, second)


def test_only_what_has_a_gradient_moves_and_each_gradient_moves_it_once() -> None:
    """None at all: nothing happens. Some: the others neither move nor count. Given to the parts: not used again in the next step."""
    ones = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = WholeAdam(ones, **RATES)
    optimizer.step()
    assert all(torch.equal(one.detach(), torch.ones(3)) for one in ones)
    ones[0].grad = torch.ones(3)
    optimizer.step()
    assert (ones[0] < 1).all() and torch.equal(ones[1].detach(), torch.ones(3))
    assert [float(optimizer.state[one]["step"]) for one in ones] == [1.0, 0.0]
    whole, tables = tables_of_one_tensor()
    optimizer = WholeAdam(tables, **RATES)
    for table in tables:
        table.grad = torch.ones_like(table)
    optimizer.step()
    moved = whole.detach().clone()
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(whole, moved)


def test_tables_without_their_neighbours_stand_for_themselves() -> None:
    """A tensor some of whose tables another optimizer has is not moved as a whole."""
    whole, tables = tables_of_one_tensor()
    other = nn.Parameter(torch.ones(3))
    assert [(id(each), len(parts)) for each, parts in wholes_of([*tables, other])] == [(id(whole), 2), (id(other), 1)]
    assert [id(each) for each, _ in wholes_of([tables[1], other])] == [id(tables[1]), id(other)]
    before = whole.detach().clone()
    optimizer = WholeAdam([tables[1]], **RATES)
    whole.grad = torch.ones_like(whole)
    optimizer.step()
    moved = whole.detach() != before
    assert not moved[: tables[0].numel()].any() and moved[tables[0].numel() :].all()
