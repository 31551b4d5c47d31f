"""Proves that mbcnet_rec uses no other private names of torch, TorchRec and FBGEMM than these, each in its file, and that each is still there.

sharding has its own list in test_bridge_private_names.py. A row: file, what owns the name, the name.
"""

import ast
import inspect
from pathlib import Path

import pytest
import torch
import torch._inductor
import torch._ops
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embedding_lookup import GroupedPooledEmbeddingsLookup
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.model_parallel import DMPCollection
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.train_pipeline.train_pipelines import PrefetchTrainPipelineSparseDist
from torchrec.optim.keyed import KeyedOptimizerWrapper

ROOT = Path(__file__).parents[1] / "mbcnet_rec"
EBC, LOOKUP = ShardedEmbeddingBagCollection, GroupedPooledEmbeddingsLookup
IN_TORCH = [  # found by its name in a module, not in the text of a class
    ("cpu/linear.py", torch.ops.mkldnn, "_linear_pointwise"),
    ("cpu/linear.py", torch.ops.mkldnn, "_is_mkldnn_bf16_supported"),
    ("cpu/whole_adam.py", torch, "_fused_adam_"),
    ("cpu/whole_adam.py", torch, "_fused_adamw_"),
    # a compiled artifact has no public loader in this torch
    ("serving/loader.py", torch, "_inductor"),
    ("serving/artifact.py", torch, "_inductor"),
    ("serving/loader.py", torch, "_ops"),
    ("serving/graph.py", torch, "_ops"),
]
IN_CLASSES = [
    ("training/pipeline.py", TrainPipelineSparseDist, "_model_attached"),
    ("training/pipeline.py", PrefetchTrainPipelineSparseDist, "_model"),
    ("checkpoints/shards.py", KeyedOptimizerWrapper, "_optimizer"),
    ("checkpoints/shards.py", DMPCollection, "_default_ctx"),
    ("cpu/one_process.py", DistributedModelParallel, "_dmp_wrapped_module"),
    *(
        ("cpu/one_process.py", EBC, name)
        for name in (
            "_lookups", "_sharding_types", "_has_uninitialized_input_dist", "_has_mean_pooling_callback", "_has_features_permute",
            "_features_order", "_features_order_tensor", "_feature_splits", "_embedding_names", "_embedding_dims",
        )
    ),
    ("cpu/one_process.py", LOOKUP, "_emb_modules"),
    ("cpu/one_process.py", LOOKUP, "_feature_splits"),
]  # fmt: skip
PYTHONS = {"_asdict", "_fields", "_replace", "_exit"}


@pytest.mark.parametrize(("file", "owner", "name"), IN_TORCH)
def test_the_name_of_torch_is_still_there(file, owner, name):
    assert hasattr(owner, name), f"{file} uses {owner}.{name}"


@pytest.mark.parametrize(("file", "owner", "name"), IN_CLASSES)
def test_the_name_of_torchrec_is_still_there(file, owner, name):
    assert name in inspect.getsource(owner), f"{file} uses {owner.__name__}.{name}"


def test_no_other_private_name_is_used():
    """An attribute `_x` of anything but self, unless the same file defines it."""
    found = set()
    for path in ROOT.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        attributes = [each for each in nodes if isinstance(each, ast.Attribute) and each.attr.startswith("_")]
        attributes = [each for each in attributes if not each.attr.startswith("__")]
        on_self = {each.attr for each in attributes if ast.unparse(each.value) in ("self", "cls")}
        ours = {each.name for each in nodes if isinstance(each, ast.FunctionDef | ast.ClassDef)} | on_self
        names = {each.attr for each in attributes if ast.unparse(each.value) not in ("self", "cls")}
        found |= {(str(path.relative_to(ROOT)), name) for name in names - ours - PYTHONS}
    listed = {(file, name) for file, _, name in (*IN_TORCH, *IN_CLASSES)}
    assert found <= listed, found - listed
