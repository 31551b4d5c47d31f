"""Model files know no rank, process group, file or config reader, import no torchrec where a config is read, and no constructor takes more than 5 arguments."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mbcnet_rec.model

FOLDER = Path(mbcnet_rec.model.__file__).parent
FILES = sorted(FOLDER.glob("*.py"))
FORBIDDEN = (
    "torch.distributed",
    "torchrec.distributed",
    "sharding",
    "mbcnet_rec.training",
    "mbcnet_rec.config",
    "mbcnet_rec.train",
    "mbcnet_rec.build",
    "mbcnet_rec.study",
    "data.stream",
    "data.schema.parse",
    "data.reading.files",
    "pathlib",
    "os",
    "io",
    "tomllib",
    "json",
    "pyarrow",
)
READERS = {"open", "read_text", "read_bytes", "load", "save"}


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def faults(tree):
    for name in imported(tree):
        if any(name == each or name.startswith(each + ".") for each in FORBIDDEN):
            yield f"imports {name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith(
            ("torch.distributed", "torchrec.distributed")
        ):
            yield f"uses {ast.unparse(node)}"
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in READERS:
                yield f"line {node.lineno}: calls {called}"
        if isinstance(node, ast.FunctionDef):
            arguments = node.args
            names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
            if node.name == "__init__" and len(names) > 6:
                yield f"line {node.lineno}: __init__{tuple(names)}"
            if any(isinstance(inner, (ast.Import, ast.ImportFrom)) for inner in ast.walk(node)):
                yield f"line {node.lineno}: import inside {node.name}"
            if node.end_lineno - node.lineno > 70:
                yield f"line {node.lineno}: {node.name} has {node.end_lineno - node.lineno} lines"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_file_keeps_the_laws(file):
    text = file.read_text()
    assert not list(faults(ast.parse(text)))
    assert text.count("\n") < 420


@pytest.mark.parametrize(
    "code",
    [
        "import torch.distributed as dist",
        "from torch import distributed",
        "from torchrec.distributed.types import ShardingEnv",
        "import torch\ntorch.distributed.get_rank()",
        "from mbcnet_rec.training.trainer import train",
        "from sharding.plan.plan_file import Plan",
        "from mbcnet_rec.config import RunConfig",
        "open('x')",
        "from data.stream import ParquetStream",
        "class A:\n def __init__(self, a, b, c, d, e, f): pass",
        "class A:\n def __init__(self, a, b, c, *, d, e, f): pass",
        "def f():\n import torch",
    ],
)
def test_the_check_sees_a_fault(code):
    assert list(faults(ast.parse(code)))


def test_reading_a_config_imports_no_torchrec():
    code = (
        "import sys, mbcnet_rec.model.models, mbcnet_rec.model.objective, mbcnet_rec.model.zoo.enkd;"
        "sys.exit(any(name.split('.')[0] in ('torchrec', 'fbgemm_gpu') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
