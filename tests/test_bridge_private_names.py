"""Proves that `sharding` uses no other private names of TorchRec and FBGEMM than these, and that each is still there."""

import ast
import inspect
from pathlib import Path

import pytest
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.mc_embedding_modules import BaseShardedManagedCollisionEmbeddingCollection
from torchrec.distributed.mc_modules import ShardedManagedCollisionCollection
from torchrec.distributed.model_parallel import DMPCollection
from torchrec.modules.mc_embedding_modules import BaseManagedCollisionEmbeddingCollection
from torchrec.modules.mc_modules import ManagedCollisionCollection, ManagedCollisionModule
from torchrec.optim.keyed import KeyedOptimizerWrapper

from sharding.bridge.allocated import KERNEL_TENSORS

ROOT = Path(__file__).parents[1] / "sharding"
KERNEL = SplitTableBatchedEmbeddingBagsCodegen
NAMES = [
    ("bridge/allocated.py", ShardedEmbeddingBagCollection, "_lookups"),
    *(("bridge/allocated.py", KERNEL, name) for name in KERNEL_TENSORS),
    ("bridge/blocks.py", DMPCollection, "_default_ctx"),
    ("bridge/blocks.py", KeyedOptimizerWrapper, "_optimizer"),
    ("bridge/zch.py", BaseManagedCollisionEmbeddingCollection, "_embedding_module"),
    ("bridge/zch.py", BaseManagedCollisionEmbeddingCollection, "_managed_collision_collection"),
    ("bridge/zch.py", ManagedCollisionCollection, "_managed_collision_modules"),
    ("bridge/zch.py", ManagedCollisionModule, "_current_iter_tensor"),
    ("bridge/zch.py", BaseShardedManagedCollisionEmbeddingCollection, "_evict"),
    ("bridge/zch.py", BaseShardedManagedCollisionEmbeddingCollection, "_managed_collision_collection"),
    ("bridge/zch.py", BaseShardedManagedCollisionEmbeddingCollection, "_table_to_tbe_and_index"),
    ("bridge/zch.py", ShardedManagedCollisionCollection, "_table_to_offset"),
]
NAMED_TUPLE = {"_asdict", "_fields", "_replace"}


@pytest.mark.parametrize(("file", "owner", "name"), NAMES)
def test_the_name_is_still_there(file, owner, name):
    assert name in inspect.getsource(owner), f"{file} uses {owner.__module__}.{owner.__name__}.{name}"


def test_no_other_private_name_is_used():
    found = set()
    for path in ROOT.rglob("*.py"):
        tree = list(ast.walk(ast.parse(path.read_text())))
        ours = {node.name for node in tree if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        used = {node.attr for node in tree if isinstance(node, ast.Attribute) and node.attr.startswith("_")}
        used |= {
            node.value for node in tree if isinstance(node, ast.Constant) and str(node.value).startswith("_")
        }
        used = {
            part for name in used for part in name.split(".") if part.startswith("_") and part[:2] != "__"
        }
        found |= {
            (str(path.relative_to(ROOT)), name) for name in used - ours - NAMED_TUPLE if name.strip("_")
        }
    assert found <= {(file, name) for file, _, name in NAMES}
