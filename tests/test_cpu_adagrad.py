"""Proves that tables with an update of our own look up the same rows and learn the same numbers, but for rounding, as with FBGEMM's generated code."""

import threading
from collections.abc import Iterator

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen

from mbcnet_rec.cpu import adagrad
from mbcnet_rec.cpu.adagrad import OwnUpdate
from mbcnet_rec.cpu.team import run_together

ROWS, BATCH = 50, 32
WIDTHS = (4, 12, 8)
READS = [0, 1, 1, 2]  # the second table has two features already


def tables(
    pooling: PoolingMode, optimizer: EmbOptimType = EmbOptimType.EXACT_ROWWISE_ADAGRAD
) -> SplitTableBatchedEmbeddingBagsCodegen:
    specs = [(ROWS, width, EmbeddingLocation.HOST, ComputeDevice.CPU) for width in WIDTHS]
    kernel = SplitTableBatchedEmbeddingBagsCodegen(
        specs, READS, optimizer=optimizer, learning_rate=0.1, eps=1e-8, pooling_mode=pooling
    )
    draw = torch.Generator().manual_seed(0)
    for table in kernel.split_embedding_weights():
        table.copy_(torch.randn(table.shape, generator=draw))
    return kernel


@pytest.mark.parametrize("pooling", [PoolingMode.SUM, PoolingMode.MEAN])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("optimizer", [EmbOptimType.EXACT_ROWWISE_ADAGRAD, EmbOptimType.EXACT_ADAGRAD])
def test_own_update_changes_rounding_alone(pooling: PoolingMode, weighted: bool, optimizer: EmbOptimType) -> None:
    """Outputs of the first step are equal bit by bit; those after it, rows and Adagrad's state to float32's rounding."""
    if weighted and pooling == PoolingMode.MEAN:
        pytest.skip("FBGEMM has no mean of weighted rows")
    plain, own = tables(pooling, optimizer), tables(pooling, optimizer)
    own.forward = OwnUpdate(own)
    draw = torch.Generator().manual_seed(1)
    for step in range(4):
        lengths = torch.randint(0, 4, (len(READS) * BATCH,), generator=draw)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        ids = torch.randint(0, ROWS, (int(offsets[-1]),), generator=draw)
        weights = torch.rand(len(ids), generator=draw) if weighted else None
        outputs = [each(indices=ids, offsets=offsets, per_sample_weights=weights) for each in (plain, own)]
        if step == 0:
            assert torch.equal(*outputs)
        torch.testing.assert_close(*outputs)
        # columns of a wider one
        gradient = torch.randn(BATCH, outputs[0].shape[1] + 5, generator=draw)[:, 3:-2]
        for output in outputs:
            output.backward(gradient)
    for first, second in zip(plain.split_embedding_weights(), own.split_embedding_weights(), strict=True):
        torch.testing.assert_close(first, second)
    for first, second in zip(plain.split_optimizer_states(), own.split_optimizer_states(), strict=True):
        torch.testing.assert_close(first[0], second[0])
        assert first[0].any()


@pytest.mark.parametrize("wrong", [-1, ROWS])
def test_an_id_without_a_row_is_refused(wrong: int) -> None:
    """And neither read nor written elsewhere: FBGEMM's own check would say so and take row 0."""
    kernel = tables(PoolingMode.SUM)
    ids = torch.zeros(len(READS) * BATCH, dtype=torch.int64)
    ids[40] = wrong
    with pytest.raises(RuntimeError, match=f"out of bounds: {wrong}"):
        OwnUpdate(kernel)(ids, torch.arange(len(ids) + 1))


@pytest.mark.parametrize("optimizer", [EmbOptimType.EXACT_ROWWISE_ADAGRAD, EmbOptimType.EXACT_ADAGRAD])
def test_a_row_without_gradient_stays(optimizer: EmbOptimType) -> None:
    """Also where no eps keeps its rate from being 0 / 0."""
    kernel = tables(PoolingMode.SUM, optimizer)
    kernel.optimizer_args = kernel.optimizer_args._replace(eps=0.0)
    before = kernel.weights_host.detach().clone()
    ids = torch.zeros(len(READS) * BATCH, dtype=torch.int64)
    output = OwnUpdate(kernel)(ids, torch.arange(len(ids) + 1))
    output.backward(torch.zeros_like(output))
    assert torch.equal(kernel.weights_host, before)


def test_a_table_may_be_alone() -> None:
    """Its one share has every number of the batch."""
    specs = [(ROWS, 4, EmbeddingLocation.HOST, ComputeDevice.CPU)]
    optimizer = EmbOptimType.EXACT_ADAGRAD
    plain, own = (
        SplitTableBatchedEmbeddingBagsCodegen(specs, optimizer=optimizer, learning_rate=0.1) for _ in range(2)
    )
    own.weights_host.detach().copy_(plain.weights_host.detach())
    own.forward = OwnUpdate(own)
    ids = torch.randint(0, ROWS, (BATCH,), generator=torch.Generator().manual_seed(1))
    for kernel in (plain, own):
        kernel(indices=ids, offsets=torch.arange(BATCH + 1)).sum().backward()
    torch.testing.assert_close(own.weights_host, plain.weights_host)
    assert own.forward.shares(torch.arange(BATCH + 1).numpy()) == [(0, 1)]


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("optimizer", [EmbOptimType.EXACT_ROWWISE_ADAGRAD, EmbOptimType.EXACT_ADAGRAD])
@pytest.mark.parametrize("batch", [0, BATCH])
def test_threads_share_tables_and_change_nothing(
    optimizer: EmbOptimType, batch: int, three_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows and state are equal bit by bit to those of one thread; no table is split."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(0, ROWS, (len(READS) * batch,), generator=draw)
    offsets = torch.arange(len(ids) + 1)
    gradient = torch.randn(batch, sum(WIDTHS[table] for table in READS), generator=draw)
    found, shares = [], []
    for many in (2**17, 1):
        monkeypatch.setattr(adagrad, "MANY", many)
        kernel = tables(PoolingMode.SUM, optimizer)
        own = OwnUpdate(kernel)
        shares.append(own.shares(offsets.numpy()))
        own(ids, offsets).backward(gradient)
        found.append([kernel.weights_host.detach(), kernel.momentum1_host])
    assert shares == [[(0, 4)], [(0, 3), (3, 4)] if batch else [(0, 4)]]
    assert all(torch.equal(*each) for each in zip(*found, strict=True))


def test_parts_run_at_the_same_time_and_tell_what_they_raise(three_threads: None) -> None:
    """Each waits for the other; the error of one is raised when both have ended."""
    both, ended = threading.Barrier(2, timeout=60), list[int]()

    def part(number: int) -> None:
        both.wait()
        ended.append(number)
        if number:
            raise ValueError("the second")

    with pytest.raises(ValueError, match="the second"):
        run_together([lambda: part(0), lambda: part(1)])
    assert sorted(ended) == [0, 1]
