"""What only a GPU takes, step by step on a CPU: one process that copies ahead trains as any other, batches are pinned where they are made and
copied in place, caches of rows are emptied after a load and unlocked after what has no backward pass."""

import threading
from dataclasses import replace
from functools import partial

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen
from small_data import write_small
from torch import nn
from torchrec.distributed.train_pipeline import TrainPipelineBase
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from data.reading.files import resolve_files
from data.schema import load_schema
from data.stream import Batch, ParquetStream
from mbcnet_rec.build import build
from mbcnet_rec.checkpoints.shards import PINNED_BYTES, shards_of, within_bound
from mbcnet_rec.config import load_config
from mbcnet_rec.cpu.fast_path import FastPath, PlainPipeline
from mbcnet_rec.runtime.process import joined_process
from mbcnet_rec.scoring.scorer import Scorer
from mbcnet_rec.training.pipeline import CheckedStep, train_pipeline
from sharding.bridge.allocated import purge_caches

CPU = torch.device("cpu")
STEPS = 5


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = write_small(tmp_path_factory.mktemp("gpu_path"), train_rows=960, other_rows=96)
    return load_config(path, ["model.kind=dnn", "model.dnn.hidden=[8]"])


def rows(config) -> ParquetStream:
    options = replace(config.data.train_options(0), prefetch=2)
    return ParquetStream(resolve_files(config.data.train), load_schema(config.schema), options)


def trained(config, process, make_pipeline, skip: int = -1) -> dict[str, torch.Tensor]:
    """All that a model is after STEPS steps, of which one may be passed over, in two parts with an evaluation between."""
    built = build(config, load_schema(config.schema), process)
    count = iter(range(STEPS))
    step = CheckedStep(built.model, built.optimizer, torch.enable_grad, lambda loss: next(count) == skip)
    pipeline, batches = make_pipeline(step), iter(rows(config))
    built.model.train()
    for part in (3, STEPS - 3):
        taken = iter([next(batches) for _ in range(part)])
        for _ in range(part):
            pipeline.progress(taken)
        with pytest.raises(StopIteration):
            pipeline.progress(taken)
        pipeline.detach()
    return {each.name: each.tensor for each in shards_of(built.model, built.optimizer)}


@pytest.mark.parametrize("skip", [-1, 2])
def test_one_gpu_trains_as_one_cpu_process_does(config, skip):
    with joined_process("cpu") as process:
        plain = trained(config, process, PlainPipeline, skip)
        ahead = trained(config, process, partial(train_pipeline, prefetch=False, alone=True), skip)
    assert plain.keys() == ahead.keys() and len(plain) > 10
    assert all(torch.equal(plain[name], ahead[name]) for name in plain)


@pytest.mark.parametrize(("device", "world", "prefetch", "alone"), [
    ("cuda", 1, False, True), ("cuda", 1, True, False), ("cuda", 2, False, False), ("cpu", 1, False, False),
])  # fmt: skip
def test_a_single_gpu_exchanges_nothing(config, device, world, prefetch, alone):
    """Only one process on a GPU that fetches no rows ahead gets the pipeline without an exchange; `cpu` is with cpu_fast_path off."""
    with joined_process("cpu") as process:
        built = build(config, load_schema(config.schema), process)
        path = FastPath(False, replace(built.plan, device=device, world_size=world, prefetch=prefetch))
        pipeline = path.pipeline(CheckedStep(built.model, built.optimizer, torch.enable_grad))
    assert isinstance(pipeline, TrainPipelineBase) == alone
    assert (path.data_parallel_wrapper is not None) == (device == "cuda" and world == 1)


def test_batches_are_finished_in_the_thread_that_makes_them(config):
    threads = []

    def finish(batch: Batch) -> Batch:
        threads.append(threading.current_thread().name)
        return batch.to(CPU)

    stream = rows(config)
    stream.on_batch = finish
    taken = list(stream)
    assert len(taken) == len(threads) == stream.steps_per_epoch and {*threads} == {"data-prefetch-0"}


def test_a_batch_is_copied_in_place_with_what_the_host_knows(config):
    batch = next(iter(rows(config)))
    batch.sparse_features.sync()
    copy = batch.to(CPU, non_blocking=True, data_copy_stream=torch.cpu.Stream())
    for name, part in vars(batch).items():
        other = getattr(copy, name)
        tensors = [(part, other)] if isinstance(part, torch.Tensor) else []
        if isinstance(part, KeyedJaggedTensor):
            tensors = [(part.values(), other.values()), (part.lengths(), other.lengths())]
            assert part.keys() == other.keys()
        for one, two in tensors:
            assert torch.equal(one, two) and one.data_ptr() != two.data_ptr(), name
    # what a GPU would be asked for, once each step
    assert copy.sparse_features._length_per_key == batch.sparse_features.length_per_key()
    assert copy.cursor == batch.cursor


def cached_rows(prefetch: bool) -> SplitTableBatchedEmbeddingBagsCodegen:
    """FBGEMM's kernel for a GPU, of which the cache's state has memory."""
    kernel = SplitTableBatchedEmbeddingBagsCodegen(
        [(1000, 16, EmbeddingLocation.MANAGED_CACHING, ComputeDevice.CUDA)], optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        device=torch.device("meta"), cache_sets=4, prefetch_pipeline=prefetch,
    )  # fmt: skip
    kernel.lxu_cache_state = torch.full(kernel.lxu_cache_state.shape, 7)
    kernel.lxu_state = torch.full(kernel.lxu_state.shape, 3)
    kernel.lxu_cache_locking_counter = torch.full(kernel.lxu_cache_locking_counter.shape, 2, dtype=torch.int32)
    kernel.timestep = 9
    return kernel


def test_a_load_empties_the_caches():
    kernel = cached_rows(prefetch=True)
    purge_caches(nn.Sequential(kernel, nn.Linear(2, 2)))
    assert kernel.lxu_cache_state.numel() and bool((kernel.lxu_cache_state == -1).all())
    assert not kernel.lxu_state.any() and not kernel.lxu_cache_locking_counter.any() and kernel.timestep == 1
    purge_caches(nn.Sequential(cached_rows(prefetch=False)))  # locks nothing


class Cached(nn.Module):
    """A model of one row, with a cache."""

    device = CPU

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.row = cached_rows(prefetch=True), nn.Parameter(torch.ones(()))

    def forward(self, batch: None) -> tuple[torch.Tensor, None]:
        return self.row * 2, None


@pytest.mark.parametrize(("skip", "locks"), [(True, 0), (False, 2)])
def test_a_skipped_step_unlocks_its_rows_and_keeps_what_the_cache_holds(skip, locks):
    model = Cached()
    loss, _ = CheckedStep(model, None, torch.enable_grad, lambda loss: skip).forward(None)
    assert loss.item() == (0 if skip else 2)
    assert bool((model.kernel.lxu_cache_locking_counter == locks).all()) and bool(
        (model.kernel.lxu_cache_state == 7).all()
    )


def test_an_evaluation_unlocks_its_rows():
    model = Cached()
    assert not list(Scorer(model).score([]))
    assert not model.kernel.lxu_cache_locking_counter.any() and bool((model.kernel.lxu_cache_state == 7).all())


def test_pinned_memory_of_a_snapshot_is_bounded():
    assert within_bound([9, 3, 4, 4, 1], bound=8) == [False, True, True, False, True]
    assert PINNED_BYTES == 8 * 2**30
