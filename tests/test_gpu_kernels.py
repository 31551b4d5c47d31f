"""Every kernel, type of rows and optimizer that a plan for GPUs may ask of a table is one that FBGEMM builds for CUDA; what it has not is refused."""

import itertools
from typing import get_args

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, compute_kernel_to_embedding_location

from data.errors import InputError
from sharding.plan.constraints import DtypeName, KernelName
from sharding.plan.placement import Plan, TablePlan, check_shape

ROWS, DIM = 1_000, 16
OPTIMIZERS = {
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "sgd": EmbOptimType.EXACT_SGD,
}


def plan_of(kernel: str, rows: str, optimizer: str) -> Plan:
    kind, ranks = ("data_parallel", ()) if kernel == "dense" else ("table_wise", (0,))
    cached = 0.2 if kernel == "fused_uvm_caching" else 0.0
    table = TablePlan(kind, kernel, ranks, ROWS, DIM, cache_ratio=cached)
    return Plan(1, 1, "cuda", "a schema", {"user": table}, optimizer=optimizer, data_type=rows)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kernel", "rows", "optimizer"), list(itertools.product(get_args(KernelName), get_args(DtypeName), OPTIMIZERS))
)
def test_fbgemm_has_what_a_plan_may_ask(kernel, rows, optimizer):
    asked = plan_of(kernel, rows, optimizer)
    precision = SparseType.from_dtype({"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[rows])
    if rows == "bf16" or (kernel == "dense" and rows == "fp16" and optimizer != "sgd"):
        with pytest.raises(InputError, match="bf16 rows" if rows == "bf16" else "fp16"):
            check_shape(asked, "plan.json")
        return
    check_shape(asked, "plan.json")
    if kernel == "dense":  # a replicated table's rows are a plain parameter
        return
    place = compute_kernel_to_embedding_location(EmbeddingComputeKernel(kernel))
    table = SplitTableBatchedEmbeddingBagsCodegen(
        [(ROWS, DIM, place, ComputeDevice.CUDA)],
        device=torch.device("meta"),
        weights_precision=precision,
        cache_precision=precision,
        optimizer=OPTIMIZERS[optimizer],
        cache_sets=10,
    )
    held = "weights_dev" if place == EmbeddingLocation.DEVICE else "weights_uvm"
    assert getattr(table, held).numel() == ROWS * DIM and getattr(table, held).dtype == precision.as_dtype()
