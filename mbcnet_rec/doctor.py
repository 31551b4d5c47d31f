"""Checks of the installation and of what this machine offers, each with how to fix its fault."""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from typing import NamedTuple

# FBGEMM is compiled against one minor version of torch: another one fails at import with an undefined symbol.
TORCH_OF_FBGEMM = {"1.9": "2.14", "1.8": "2.13", "1.7": "2.12", "1.6": "2.11", "1.5": "2.10"}
REINSTALL = "remove .venv and run `make` again: it installs the pinned set"


class Finding(NamedTuple):
    """One line of the report. `fix` is empty where nothing is wrong."""

    topic: str
    found: str
    fix: str = ""


def installed(package: str) -> str:
    """The installed version, or an empty string."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def minor(version: str) -> str:
    """1.8.0+cpu -> 1.8."""
    return ".".join(version.split("+")[0].split(".")[:2])


def ask(code: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own, where a broken library cannot take the doctor with it."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)


def check_triple(torch: str, fbgemm: str, torchrec: str) -> Finding:
    """Compare the three versions with the table of what was built for what."""
    found = f"torch {torch or 'missing'}, fbgemm {fbgemm or 'missing'}, torchrec {torchrec or 'missing'}"
    wanted = TORCH_OF_FBGEMM.get(minor(fbgemm))
    if not (torch and fbgemm and torchrec):
        fix = REINSTALL
    elif wanted is None:
        fix = f"fbgemm {minor(fbgemm)} is not in our table; use 1.6 to 1.9; {REINSTALL}"
    elif minor(torch) != wanted:
        fix = f"fbgemm {minor(fbgemm)} is built for torch {wanted}, not {minor(torch)}; {REINSTALL}"
    elif minor(torchrec) != minor(fbgemm):
        fix = f"torchrec {minor(fbgemm)} goes with this fbgemm; {REINSTALL}"
    else:
        return Finding("triple", f"{found}: a matching set")
    return Finding("triple", found, fix)


def check_import(module: str) -> Finding:
    """Import one of the three."""
    done = ask(f"import {module}")
    if done.returncode == 0:
        return Finding(f"import {module}", "works")
    said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    causes = [line for line in said if "cannot open shared object file" in line or "undefined symbol" in line]
    return Finding(f"import {module}", (causes or said[-1:])[0], library_fault(done.stderr) or REINSTALL)


def library_fault(words: str) -> str:
    """Why a library of the set does not load and what to do, from all that Python said, causes included; "" where it is not that."""
    missing = re.search(r"(lib[\w.+-]+): cannot open shared object file", words)
    name = missing[1] if missing else ""
    if name.startswith(("libcuda.so", "libnvidia-ml.so")):
        return (
            f"no NVIDIA driver on this machine: {name} comes with it, and the CUDA set does not load without; run this where a GPU is "
            "(srun --gres=gpu:1, docker run --gpus all), or from an environment with requirements/cpu.txt, which plans for GPUs too"
        )
    if name.startswith(("libtorch_cuda", "libc10_cuda")):
        return f"fbgemm is the CUDA build on a torch without CUDA ({name} is missing); {REINSTALL}"
    if name.startswith(("libcu", "libnv", "libnccl")):
        return f"wrong wheels: {name} of CUDA is missing, or of another version than torch's; {REINSTALL}"
    return f"fbgemm is built for another torch; {REINSTALL}" if "undefined symbol" in words else ""


def check_shadow(fbgemm_gpu: str, fbgemm_gpu_cpu: str, has_gpu: bool, torch: str = "") -> Finding:
    """The CPU set stands in for fbgemm-gpu with an empty package; the CUDA build wants a GPU's torch and no CPU build beside it."""
    if fbgemm_gpu.endswith("+cpu"):
        fix = ""
        if has_gpu:
            fix = f"this machine has a GPU but the CPU set is installed; {REINSTALL}"
        elif not fbgemm_gpu_cpu:
            fix = f"fbgemm-gpu is our empty stand-in, but fbgemm-gpu-cpu is missing; {REINSTALL}"
        return Finding("fbgemm build", f"CPU (fbgemm-gpu-cpu {fbgemm_gpu_cpu or 'missing'})", fix)
    fix = ""
    if fbgemm_gpu and torch.endswith("+cpu"):
        fix = f"torch {torch} is a CPU build, and this fbgemm wants CUDA's; {REINSTALL}"
    elif fbgemm_gpu and fbgemm_gpu_cpu:
        fix = f"fbgemm-gpu-cpu {fbgemm_gpu_cpu} lies in the same folder, and their files mix; {REINSTALL}"
    return Finding("fbgemm build", f"CUDA (fbgemm-gpu {fbgemm_gpu})" if fbgemm_gpu else "missing", fix)


def gpu_names() -> list[str]:
    """What nvidia-smi lists; empty without a driver."""
    if not shutil.which("nvidia-smi"):
        return []
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return done.stdout.strip().splitlines() if done.returncode == 0 else []


def check_cuda(gpus: list[str]) -> list[Finding]:
    """Where the driver lists GPUs: whether torch can compute on them and NCCL can connect them."""
    if not gpus:
        return []
    question = "import torch as t; print(t.cuda.is_available(), t.version.cuda, t.distributed.is_nccl_available())"
    usable, cuda, nccl = (ask(question).stdout.split() or ["False", "None", "False"])[-3:]
    found = f"torch built for CUDA {cuda}, usable: {usable}, NCCL: {nccl}"
    fix = "" if nccl == "True" else REINSTALL
    if cuda == "None":
        fix = f"this torch is a CPU build; {REINSTALL}"
    elif usable != "True":
        hidden = "or the GPUs are hidden: update the driver, or unset CUDA_VISIBLE_DEVICES"
        fix = f"the driver is too old for CUDA {cuda}, {hidden}"
    return [Finding("CUDA", found, fix)]


def examine() -> list[Finding]:
    """Make every check."""
    torch, gpus, torchx = installed("torch"), gpu_names(), installed("torchx")
    fbgemm, fbgemm_cpu = installed("fbgemm-gpu"), installed("fbgemm-gpu-cpu")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    devices = f"{cores} CPU cores ({platform.machine()}), {len(gpus)} NVIDIA GPUs"
    schedulers = [name for name, tool in (("slurm", "sbatch"), ("local_docker", "docker")) if shutil.which(tool)]
    schedulers += ["kubernetes"] if installed("kubernetes") else []
    return [
        Finding("python", platform.python_version()),  # pip refuses one below 3.11
        check_triple(torch, fbgemm_cpu or fbgemm, installed("torchrec")),
        check_shadow(fbgemm, fbgemm_cpu, bool(gpus), torch),
        *map(check_import, ("torch", "fbgemm_gpu", "torchrec")),
        Finding("devices", "; ".join([devices, *gpus])),
        *check_cuda(gpus),
        Finding("schedulers", ", ".join(["local_cwd", *schedulers])),
        Finding("torchx", torchx or "missing", "" if torchx else REINSTALL),
    ]


def doctor(_: object) -> int:
    """Tell whether torch, fbgemm and torchrec match, which devices and schedulers are there, and how to fix each fault."""
    return print_report(examine())


def print_report(findings: list[Finding]) -> int:
    """Print findings; 0 if nothing is wrong, else 1."""
    for finding in findings:
        print(f"{'fault' if finding.fix else 'ok':<6}{finding.topic:<20}{finding.found}")
        if finding.fix:
            print(f"{'':<6}{'fix':<20}{finding.fix}")
    faults = sum(bool(finding.fix) for finding in findings)
    print("nothing is wrong" if not faults else f"{faults} to fix")
    return 1 if faults else 0
