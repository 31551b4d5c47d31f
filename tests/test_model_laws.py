"""Model files know no rank, process group, file or config reader, and no constructor takes more than 5 arguments."""

import ast
from pathlib import Path

import pytest

import mbcnet_rec.model

FILES = sorted(Path(mbcnet_rec.model.__file__).parent.rglob("*.py"))
ALLOWED = {
    "collections", "contextlib", "dataclasses", "functools", "itertools", "math", "operator", "typing",
    "torch", "torchrec.modules", "torchrec.sparse", "data.errors", "data.schema", "mbcnet_rec.model",
}  # fmt: skip
FORBIDDEN = ("torch.distributed", "data.schema.parse")
READERS = {"open", "read_text", "read_bytes", "load", "save"}


def imported(node):
    """Full names of what an import statement brings in."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [f"{node.module}.{alias.name}" for alias in node.names]


def is_in(name, packages):
    return any(name == each or name.startswith(each + ".") for each in packages)


def faults(text):
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (n for n in imported(node) if not is_in(n, ALLOWED) or is_in(n, FORBIDDEN))
        elif isinstance(node, ast.Attribute) and is_in(ast.unparse(node), FORBIDDEN):
            yield f"uses {ast.unparse(node)}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in READERS:
            yield f"line {node.lineno}: calls {ast.unparse(node.func)}"
        elif isinstance(node, ast.FunctionDef):
            count = len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs)
            if node.name == "__init__" and count > 6:
                yield f"line {node.lineno}: __init__ takes {count - 1} arguments"
            if any(isinstance(inner, ast.Import | ast.ImportFrom) for inner in ast.walk(node)):
                yield f"line {node.lineno}: import inside {node.name}"
            if node.end_lineno - node.lineno > 70:
                yield f"line {node.lineno}: {node.name} is long"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_file_keeps_the_laws(file):
    assert not list(faults(file.read_text()))


def test_the_paper_s_model_can_be_read_in_one_sitting():
    names = ("layers", "branches", "mbcnet", "losses", "objective")
    assert sum(file.read_text().count("\n") for file in FILES if file.stem in names) < 1000


@pytest.mark.parametrize(
    "code",
    [
        "import torch.distributed as dist",
        "from torch import distributed",
        "from torchrec.distributed.types import ShardingEnv",
        "import torch\ntorch.distributed.get_rank()",
        "from mbcnet_rec.config import RunConfig",
        "import json",
        "open('x')",
        "class A:\n def __init__(self, a, b, c, *, d, e, f): pass",
        "def f():\n import torch",
    ],
)
def test_the_check_sees_a_fault(code):
    assert list(faults(code))
