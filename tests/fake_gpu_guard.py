"""Compiles and loads tests/gpu/guard.cpp. It must be there before torch first asks for a device, so this file imports no torch."""

import ctypes
import importlib.util
import shutil
import subprocess
from pathlib import Path

COMPILER = shutil.which("g++") or shutil.which("c++")


def load_guard(folder: Path) -> None:
    """Let tensors of this process say that they are on "cuda". Compiles for some seconds."""
    spec = importlib.util.find_spec("torch")
    assert COMPILER and spec and spec.origin
    torch, library = Path(spec.origin).parent, folder / "guard.so"
    source = Path(__file__).parent / "gpu" / "guard.cpp"
    flags = ["-O0", "-std=c++20", "-shared", "-fPIC", f"-I{torch}/include"]
    links = [f"-L{torch}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch}/lib"]
    subprocess.run([COMPILER, *flags, "-o", str(library), str(source), *links], check=True)
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
