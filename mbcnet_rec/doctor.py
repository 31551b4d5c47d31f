"""`mbcnet doctor`: is this installation whole, and what does this machine offer? Imports torch and friends only to ask them."""

import ctypes.util
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from typing import NamedTuple

# FBGEMM is compiled against one minor version of torch: another one fails at import with an undefined symbol.
TORCH_OF_FBGEMM = {"1.9": "2.14", "1.8": "2.13", "1.7": "2.12", "1.6": "2.11", "1.5": "2.10"}
TORCH_FLOOR = (2, 10)  # below it torch.load(weights_only=True) is known to be unsafe
PYARROW_FLOOR = (14, 0, 1)  # below it reading a file can run code
REINSTALL = "remove .venv and run `make` again: it installs the pinned set"


class Finding(NamedTuple):
    """One line of the report. `mend` is empty where nothing is wrong."""

    topic: str
    found: str
    mend: str = ""


def installed(package: str) -> str:
    """The installed version, or an empty string."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def minor(version: str) -> str:
    """1.8.0+cpu -> 1.8."""
    return ".".join(version.split("+")[0].split(".")[:2])


def numbers(version: str) -> tuple[int, ...]:
    """14.0.1 -> (14, 0, 1)."""
    return tuple(int(part) for part in version.split("+")[0].split(".") if part.isdigit())


def check_triple(torch: str, fbgemm: str, torchrec: str) -> Finding:
    """Compare the three versions with the table of what was built for what."""
    found = f"torch {torch or 'missing'}, fbgemm {fbgemm or 'missing'}, torchrec {torchrec or 'missing'}"
    if not (torch and fbgemm and torchrec):
        return Finding("triple", found, REINSTALL)
    wanted = TORCH_OF_FBGEMM.get(minor(fbgemm))
    if wanted is None:
        return Finding(
            "triple", found, f"fbgemm {minor(fbgemm)} is not in our table; use 1.6 to 1.9; {REINSTALL}"
        )
    if minor(torch) != wanted:
        mend = f"fbgemm {minor(fbgemm)} is built for torch {wanted}, not {minor(torch)}; {REINSTALL}"
        return Finding("triple", found, mend)
    if minor(torchrec) != minor(fbgemm):
        return Finding("triple", found, f"torchrec {minor(fbgemm)} goes with this fbgemm; {REINSTALL}")
    return Finding("triple", found + ": a matching set")


def check_floors(torch: str, pyarrow: str) -> Finding:
    """Refuse versions with known holes."""
    found = f"torch {torch or 'missing'}, pyarrow {pyarrow or 'missing'}"
    if torch and numbers(torch) < TORCH_FLOOR:
        return Finding(
            "safe floors", found, "torch below 2.10 loads some weights-only files unsafely; upgrade it"
        )
    if pyarrow and numbers(pyarrow) < PYARROW_FLOOR:
        return Finding("safe floors", found, "pyarrow below 14.0.1 can run code from a file; upgrade it")
    return Finding("safe floors", found)


def check_imports() -> list[Finding]:
    """Import the three in a fresh process each, where a broken library cannot take the doctor with it."""
    findings = []
    for module in ("torch", "fbgemm_gpu", "torchrec"):
        done = subprocess.run(
            [sys.executable, "-c", f"import {module}"],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        if done.returncode == 0:
            findings.append(Finding(f"import {module}", "works"))
        elif "libtorch_cuda" in last or "libcudart" in last:
            findings.append(
                Finding(
                    f"import {module}", last, f"this is the CUDA build on a torch without CUDA; {REINSTALL}"
                )
            )
        else:
            findings.append(Finding(f"import {module}", last, REINSTALL))
    return findings


def check_shadow(fbgemm_gpu: str, fbgemm_gpu_cpu: str, has_gpu: bool) -> Finding:
    """The CPU set stands in for fbgemm-gpu with an empty package; that must not happen on a GPU machine."""
    if fbgemm_gpu.endswith("+cpu"):
        mend = ""
        if has_gpu:
            mend = f"this machine has a GPU but the CPU set is installed; {REINSTALL}"
        elif not fbgemm_gpu_cpu:
            mend = f"fbgemm-gpu is our empty stand-in, but fbgemm-gpu-cpu is missing; {REINSTALL}"
        return Finding("fbgemm build", f"CPU (fbgemm-gpu-cpu {fbgemm_gpu_cpu or 'missing'})", mend)
    return Finding("fbgemm build", f"CUDA (fbgemm-gpu {fbgemm_gpu})" if fbgemm_gpu else "missing")


def gpu_names() -> list[str]:
    """What nvidia-smi lists; empty without a driver."""
    if not shutil.which("nvidia-smi"):
        return []
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return done.stdout.strip().splitlines() if done.returncode == 0 else []


def check_devices(gpus: list[str]) -> Finding:
    """Name the devices."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cpu = f"{cores} CPU cores ({platform.machine()})"
    return Finding("devices", f"{cpu}, {len(gpus)} NVIDIA GPUs" + "".join(f"; {name}" for name in gpus))


def check_cuda(gpus: list[str]) -> list[Finding]:
    """Where the driver lists GPUs: whether torch can compute on them and NCCL can connect them."""
    if not gpus:
        return []
    question = "import torch; print(torch.cuda.is_available(), torch.version.cuda, torch.distributed.is_nccl_available())"
    done = subprocess.run(
        [sys.executable, "-c", question], capture_output=True, text=True, timeout=300, check=False
    )
    usable, cuda, nccl = (done.stdout.split() or ["False", "None", "False"])[-3:]
    found = f"torch built for CUDA {cuda}, usable: {usable}, NCCL: {nccl}"
    if cuda == "None":
        return [Finding("CUDA", found, f"this torch is a CPU build; {REINSTALL}")]
    if usable != "True":
        return [
            Finding(
                "CUDA",
                found,
                f"the driver is too old for CUDA {cuda}, or the GPUs are hidden: update the driver, or unset CUDA_VISIBLE_DEVICES",
            )
        ]
    return [Finding("CUDA", found, "" if nccl == "True" else REINSTALL)]


def check_schedulers() -> Finding:
    """Name what torchx can launch on from here."""
    found = ["local_cwd"]
    found += ["slurm"] if shutil.which("sbatch") else []
    found += ["local_docker"] if shutil.which("docker") else []
    found += ["kubernetes"] if installed("kubernetes") else []
    return Finding("schedulers", ", ".join(found))


def check_openmp() -> Finding:
    """FBGEMM needs the OpenMP runtime, which slim images lack."""
    if ctypes.util.find_library("gomp"):
        return Finding("OpenMP", "libgomp found")
    return Finding("OpenMP", "libgomp not on the library path (torch brings its own; fbgemm uses that)")


def examine() -> list[Finding]:
    """Make every check."""
    fbgemm, fbgemm_cpu = installed("fbgemm-gpu"), installed("fbgemm-gpu-cpu")
    torch, gpus = installed("torch"), gpu_names()
    return [
        Finding(
            "python",
            platform.python_version(),
            "" if sys.version_info >= (3, 11) else "use Python 3.11 or newer",
        ),
        check_triple(torch, fbgemm_cpu or fbgemm, installed("torchrec")),
        check_shadow(fbgemm, fbgemm_cpu, bool(gpus)),
        *check_imports(),
        check_floors(torch, installed("pyarrow")),
        check_openmp(),
        check_devices(gpus),
        *check_cuda(gpus),
        check_schedulers(),
        Finding("torchx", installed("torchx") or "missing", "" if installed("torchx") else REINSTALL),
    ]


def run_doctor() -> int:
    """Print the report; 0 if nothing is wrong, else 1."""
    findings = examine()
    for finding in findings:
        print(f"{'fault' if finding.mend else 'ok':<6}{finding.topic:<20}{finding.found}")
        if finding.mend:
            print(f"{'':<6}{'mend':<20}{finding.mend}")
    faults = sum(bool(finding.mend) for finding in findings)
    print("nothing is wrong" if not faults else f"{faults} to mend")
    return 1 if faults else 0
