"""Builds the stub of CUDA for an environment with the CUDA set: one library, preloaded, that answers for runtime, driver, cuBLAS, NCCL and NVML."""

import re
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = ("runtime.cpp", "nccl.cpp")
# what torch and FBGEMM ask of CUDA's libraries; cuFile is another library, which loads without a driver
ASKED = re.compile(r"^(__cuda|cuda[A-Z]|cu(?!File)[A-Z]|cublas|nccl|nvml)\w*$")
NVML_UNKNOWN = 999  # torch and FBGEMM do without NVML then
DRIVER_LIBRARIES = ("libcuda.so.1", "libnvidia-ml.so.1")  # no wheel has them


def build(python: Path, folder: Path) -> dict[str, str]:
    """Compile the stub into a folder, by the headers of the environment; return the variables under which its Python finds a GPU.

    Raises:
        RuntimeError: no compiler, no CUDA set in the environment, or the compiler's own words.
    """
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise RuntimeError("no C++ compiler: install g++")
    site = Path(said(str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip())
    libraries = [*site.glob("torch/lib/*.so"), *site.glob("fbgemm_gpu/*.so")]
    if not any(each.name == "libtorch_cuda.so" for each in libraries):
        raise RuntimeError(f"{python}: its torch is not a CUDA build; install requirements/gpu.txt there")
    # crt/ lies with triton's headers only
    headers = ("nvidia/cu13/include", "nvidia/nccl/include", "triton/backends/nvidia/include")
    flags = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", *(f"-I{site / each}" for each in headers)]
    objects = []
    for source in SOURCES:
        objects.append(folder / f"{source}.o")
        said(compiler, *flags, "-c", "-o", str(objects[-1]), str(HERE / source))
    written = symbols(objects, "--defined-only")
    rest = folder / "rest.c"
    rest.write_text(
        "".join(
            f'__attribute__((visibility("default"))) int {name}(void) {{ return {NVML_UNKNOWN if name.startswith("nvml") else 0}; }}\n'
            for name in sorted(symbols(libraries, "-D", "--undefined-only") - written)
        )
    )
    library = folder / "libstub.so"
    said(compiler, "-x", "c", *flags[2:4], "-c", "-o", str(folder / "rest.o"), str(rest))
    said(compiler, "-shared", "-o", str(library), *map(str, objects), str(folder / "rest.o"))
    for name in DRIVER_LIBRARIES:
        (folder / name).symlink_to(library.name)
    shared = folder / "shared"
    shared.mkdir()
    return {
        "LD_PRELOAD": str(library),
        "LD_LIBRARY_PATH": str(folder),
        "STUB_LIBRARY": str(library),
        "STUB_SHARED": str(shared),
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # asked otherwise, torch takes CUDA for initialised and refuses to be forked
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",  # so that new memory is the stub's, whose values show what nobody computed
    }


def symbols(libraries: list[Path], *flags: str) -> set[str]:
    """The names that libraries define, or want and do not have, of CUDA's."""
    lines = said("nm", *flags, *map(str, libraries)).splitlines()
    names = (line.split()[-1].partition("@")[0] for line in lines if line and not line.endswith(":"))
    return {name for name in names if ASKED.match(name)}


def said(*command: str) -> str:
    """What a command prints.

    Raises:
        RuntimeError: it failed.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:2])}: {done.stderr.strip()[-1500:]}")
    return done.stdout
