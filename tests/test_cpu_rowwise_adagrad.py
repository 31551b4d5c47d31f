"""Proves that tables with second features look up the same rows and learn the same numbers, but for rounding, as FBGEMM's generated code."""

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen

from mbcnet_rec.cpu.rowwise_adagrad import SecondFeatures

ROWS, BATCH = 50, 32
WIDTHS = (4, 12, 8)
READS = [0, 1, 1, 2]  # the second table has two features already


def tables(pooling: PoolingMode) -> SplitTableBatchedEmbeddingBagsCodegen:
    specs = [(ROWS, width, EmbeddingLocation.HOST, ComputeDevice.CPU) for width in WIDTHS]
    kernel = SplitTableBatchedEmbeddingBagsCodegen(
        specs, READS, optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD, learning_rate=0.1, eps=1e-8, pooling_mode=pooling
    )
    draw = torch.Generator().manual_seed(0)
    for table in kernel.split_embedding_weights():
        table.copy_(torch.randn(table.shape, generator=draw))
    return kernel


@pytest.mark.parametrize("pooling", [PoolingMode.SUM, PoolingMode.MEAN])
@pytest.mark.parametrize("weighted", [False, True])
def test_second_features_change_rounding_alone(pooling: PoolingMode, weighted: bool) -> None:
    """Outputs of the first step are equal bit by bit; those after it, rows and Adagrad's state to float32's rounding."""
    if weighted and pooling == PoolingMode.MEAN:
        pytest.skip("FBGEMM has no mean of weighted rows")
    plain, doubled = tables(pooling), tables(pooling)
    doubled.register_forward_pre_hook(SecondFeatures(doubled), with_kwargs=True)
    draw = torch.Generator().manual_seed(1)
    for step in range(4):
        lengths = torch.randint(0, 4, (len(READS) * BATCH,), generator=draw)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        ids = torch.randint(0, ROWS, (int(offsets[-1]),), generator=draw)
        weights = torch.rand(len(ids), generator=draw) if weighted else None
        outputs = [each(indices=ids, offsets=offsets, per_sample_weights=weights) for each in (plain, doubled)]
        if step == 0:
            assert torch.equal(*outputs)
        torch.testing.assert_close(*outputs)
        gradient = torch.randn(outputs[0].shape, generator=draw)
        for output in outputs:
            output.backward(gradient)
    for first, second in zip(plain.split_embedding_weights(), doubled.split_embedding_weights(), strict=True):
        torch.testing.assert_close(first, second)
    for first, second in zip(plain.split_optimizer_states(), doubled.split_optimizer_states(), strict=True):
        torch.testing.assert_close(first[0], second[0])
        assert first[0].any()
