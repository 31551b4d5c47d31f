"""Proves that the product uses no private names of torch, TorchRec and FBGEMM but these, where they are allowed, and that each is still there;
and that tests patch no internals.

The one list of them. A library that drops a name fails the test of that row; a name that is not listed, or is listed and not used any more, fails the last.
"""

import ast
import inspect
import re
import sys
from pathlib import Path

import pytest
import torch
import torch._inductor
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.composable import table_batched_embedding_slice
from torchrec.distributed.embedding_lookup import GroupedPooledEmbeddingsLookup
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.mc_embedding_modules import BaseShardedManagedCollisionEmbeddingCollection
from torchrec.distributed.mc_modules import ShardedManagedCollisionCollection
from torchrec.distributed.model_parallel import DMPCollection
from torchrec.distributed.train_pipeline.train_pipelines import PrefetchTrainPipelineSparseDist, TrainPipelineSparseDist
from torchrec.modules.mc_embedding_modules import BaseManagedCollisionEmbeddingCollection
from torchrec.modules.mc_modules import ManagedCollisionCollection, ManagedCollisionModule
from torchrec.optim.keyed import KeyedOptimizerWrapper

from sharding.bridge.allocated import KERNEL_TENSORS

ROOT = Path(__file__).parents[1]
ALLOWED = ("sharding/bridge/", "mbcnet_rec/training/pipeline.py", "mbcnet_rec/cpu/", "launch/agent.py")
# a compiled graph has no public loader
EXCEPTIONS = ("mbcnet_rec/serving/loader.py", "mbcnet_rec/serving/artifact.py")
EBC, LOOKUP, AGENT = ShardedEmbeddingBagCollection, GroupedPooledEmbeddingsLookup, LocalElasticAgent
MC = BaseShardedManagedCollisionEmbeddingCollection
USED = [  # file, what owns the name, the name
    ("launch/agent.py", DynamicRendezvousHandler, "_bootstrap_store_info"),
    ("launch/agent.py", AGENT, "_pcontext"),
    ("mbcnet_rec/cpu/layers.py", torch.ops.mkldnn, "_linear_pointwise"),
    ("mbcnet_rec/cpu/layers.py", torch.ops.mkldnn, "_is_mkldnn_bf16_supported"),
    ("mbcnet_rec/cpu/layers.py", torch.cpu, "_is_amx_tile_supported"),
    *(
        ("sharding/bridge/one_process.py", EBC, name)
        for name in (
            "_lookups", "_sharding_types", "_has_uninitialized_input_dist", "_has_mean_pooling_callback", "_has_features_permute",
            "_features_order", "_features_order_tensor", "_feature_splits", "_embedding_names", "_embedding_dims",
        )
    ),
    ("sharding/bridge/one_process.py", LOOKUP, "_emb_modules"),
    ("sharding/bridge/one_process.py", DistributedModelParallel, "_dmp_wrapped_module"),
    ("mbcnet_rec/cpu/mlp.py", torch, "_add_relu"),
    ("mbcnet_rec/cpu/whole_adam.py", torch, "_fused_adam_"),
    ("mbcnet_rec/cpu/whole_adam.py", torch, "_fused_adamw_"),
    ("mbcnet_rec/serving/artifact.py", torch, "_inductor"),
    ("mbcnet_rec/serving/loader.py", torch, "_inductor"),
    ("mbcnet_rec/training/pipeline.py", TrainPipelineSparseDist, "_model_attached"),
    ("mbcnet_rec/training/pipeline.py", PrefetchTrainPipelineSparseDist, "_model"),
    ("sharding/bridge/allocated.py", EBC, "_lookups"),
    ("sharding/bridge/blocks.py", DMPCollection, "_default_ctx"),
    ("sharding/bridge/blocks.py", KeyedOptimizerWrapper, "_optimizer"),
    ("sharding/bridge/groups.py", torch.distributed.distributed_c10d, "_abort_process_group"),
    ("sharding/bridge/zch.py", MC, "_managed_collision_collection"),
    ("sharding/bridge/zch.py", MC, "_table_to_tbe_and_index"),
    ("sharding/bridge/zch.py", ShardedManagedCollisionCollection, "_table_to_offset"),
]  # fmt: skip
# overridden in a subclass, or spelled in a string: not seen by the walk below
ELSEWHERE = [
    *(
        ("launch/agent.py", AGENT, name)
        for name in ("_monitor_workers", "_shutdown", "_stop_workers", "_remaining_restarts", "_rendezvous", "_restart_workers")
    ),
    *(("sharding/bridge/allocated.py", SplitTableBatchedEmbeddingBagsCodegen, name) for name in KERNEL_TENSORS),
    ("mbcnet_rec/cpu/whole_adam.py", table_batched_embedding_slice, "_original_tensor"),
    ("sharding/bridge/zch.py", BaseManagedCollisionEmbeddingCollection, "_embedding_module"),
    ("sharding/bridge/zch.py", ManagedCollisionCollection, "_managed_collision_modules"),
    ("sharding/bridge/zch.py", ManagedCollisionModule, "_current_iter_tensor"),
    ("sharding/bridge/zch.py", MC, "_evict"),
]  # fmt: skip
PYTHONS = {"_asdict", "_fields", "_make", "_replace", "_exit"}


@pytest.mark.parametrize(("file", "owner", "name"), USED + ELSEWHERE)
def test_the_name_is_still_there(file, owner, name):
    parts = owner.__mro__[:-1] if inspect.isclass(owner) else [owner]
    assert hasattr(owner, name) or any(name in inspect.getsource(part) for part in parts), f"{file} uses {owner}.{name}"
    assert not name.startswith("_") or name in (ROOT / file).read_text(), "no longer used"


def private_names(path: Path) -> set[str]:
    """Attributes and modules `_x` of others: an attribute is the file's own if it defines or assigns it."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    attributes = [each for each in nodes if isinstance(each, ast.Attribute)]
    own = {each.name for each in nodes if isinstance(each, ast.FunctionDef | ast.ClassDef)}
    own |= {each.attr for each in attributes if isinstance(each.ctx, ast.Store) and ast.unparse(each.value) == "self"}
    imported = [each.module or "" for each in nodes if isinstance(each, ast.ImportFrom)]
    imported += [alias.name for each in nodes if isinstance(each, ast.ImportFrom | ast.Import) for alias in each.names]
    names = {each.attr for each in attributes} | {part for name in imported for part in name.split(".")}
    return {name for name in names - own - PYTHONS if name.startswith("_") and not name.startswith("__")}


def test_no_other_private_name_is_used():
    files = [
        path for package in ("data", "sharding", "mbcnet_rec", "launch") for path in (ROOT / package).rglob("*.py")
    ]
    found = {(str(path.relative_to(ROOT)), name) for path in files for name in private_names(path)}
    assert found == {(file, name) for file, _, name in USED}
    assert all(file.startswith(ALLOWED) or file in EXCEPTIONS for file, _ in found)


# What tests replace although it is no constant: of torch and TorchRec what needs CUDA, by the same on a CPU.
REPLACED = {
    ("planned_ranks.py", "_allreduce_tensors"), ("planned_ranks.py", "_remap_sharding_plan"), ("planned_ranks.py", "_prefetch"),
    ("planned_ranks.py", "device_problem"), ("test_model_layers.py", "get_cpu_capability"),
    ("fake_gpu.py", "_initialized"),
    ("fake_gpu.py", "current_device"),
    ("fake_gpu.py", "is_bf16_supported"),
    ("fake_gpu.py", "is_available"),
    ("fake_gpu.py", "get_device_properties"),
    ("fake_gpu.py", "_cuda_memoryStats"),
    ("fake_gpu.py", "Stream"),
    ("fake_gpu.py", "stream"),
    ("fake_gpu.py", "current_stream"),
    ("fake_gpu.py", "default_stream"),
    ("fake_gpu.py", "CUDAGraph"),
    ("fake_gpu.py", "graph_pool_handle"),
    ("fake_gpu.py", "synchronize"),
    ("fake_gpu.py", "empty_cache"),
    ("fake_gpu.py", "is_current_stream_capturing"),
    ("fake_gpu.py", "get_rng_state"),
    ("fake_gpu.py", "set_rng_state"),
    ("fake_gpu_cases.py", "_verify_param_shape_across_processes"),
}  # fmt: skip


def replaced_names(path: Path) -> set[str]:
    """Attributes that a test sets by setattr on what it has imported, but for constants and the standard library."""
    text, found = path.read_text(), set()
    imported = {
        alias.asname or alias.name.partition(".")[0]: (getattr(node, "module", None) or alias.name).partition(".")[0]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom | ast.Import)
        for alias in node.names
    }
    for owner, name in re.findall(r"setattr\(\s*([\w.\"]+),\s*\"(\w+)\"", text) + re.findall(
        r"^\s*([\w.]+)\.(\w+) = ", text, re.M
    ):
        module = imported.get(owner.partition(".")[0], "")
        if module and module not in sys.stdlib_module_names and not name.isupper():
            found.add(name)
    return found


def test_tests_patch_no_internals():
    """Faults go in through arguments, training/hooks.py and public constants."""
    found = {(path.name, name) for path in ROOT.glob("tests/*.py") for name in replaced_names(path)}
    assert found == REPLACED
