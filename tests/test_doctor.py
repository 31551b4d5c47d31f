"""Proves that `mbcnet doctor` tells a whole installation from a broken one, and says how to fix each fault."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from data.errors import InputError
from mbcnet_rec import doctor
from mbcnet_rec.cli import main, plain_words
from mbcnet_rec.doctor import check_cuda, check_import, check_shadow, check_triple

ROOT = Path(__file__).parents[1]
GONE = "{}: cannot open shared object file: No such file or directory"


@pytest.mark.parametrize(
    ("check", "versions", "fix"),
    [
        (check_triple, ("2.13.0+cpu", "1.8.0", "1.8.0"), ""),
        (check_triple, ("2.11.0+cu130", "1.6.0", "1.6.1"), ""),
        (check_triple, ("2.12.0", "1.8.0", "1.8.0"), "fbgemm 1.8 is built for torch 2.13, not 2.12"),
        (check_triple, ("2.13.0", "1.8.0", "1.6.1"), "torchrec 1.8 goes with this fbgemm"),
        (check_triple, ("2.13.0", "1.2.0", "1.2.0"), "fbgemm 1.2 is not in our table"),
        (check_triple, ("2.13.0", "", "1.8.0"), "run `make` again"),
        # the CPU set's stand-in for fbgemm-gpu never serves a GPU
        (check_shadow, ("1.8.0+cpu", "1.8.0", False), ""),
        (check_shadow, ("1.8.0+cpu", "1.8.0", True), "the CPU set is installed"),
        (check_shadow, ("1.8.0+cpu", "", False), "fbgemm-gpu-cpu is missing"),
        (check_shadow, ("1.8.0", "", True), ""),
        # nor does a CPU build of torch, or of fbgemm beside it, serve CUDA's fbgemm
        (check_shadow, ("1.8.0", "", False, "2.13.0"), ""),
        (check_shadow, ("1.8.0", "", False, "2.13.0+cpu"), "torch 2.13.0+cpu is a CPU build"),
        (check_shadow, ("1.8.0", "1.8.0", True, "2.13.0"), "lies in the same folder"),
    ],
)
def test_versions(check, versions, fix):
    found = check(*versions).fix
    assert fix in found and bool(fix) == bool(found)


def test_a_gpu_that_this_torch_cannot_use_is_a_fault():
    assert check_cuda([]) == []
    if "+cpu" in doctor.installed("fbgemm-gpu"):
        (finding,) = check_cuda(["GPU 0: a card"])
        assert finding.fix


@pytest.mark.parametrize(
    ("cause", "fix"),
    [
        (GONE.format("libnvidia-ml.so.1"), "no NVIDIA driver on this machine: libnvidia-ml.so.1"),
        (GONE.format("libcuda.so.1"), "no NVIDIA driver on this machine: libcuda.so.1"),
        (GONE.format("libtorch_cuda.so"), "CUDA build on a torch without CUDA"),
        (GONE.format("libcudart.so.13"), "wrong wheels: libcudart.so.13"),
        ("fbgemm_gpu_config.so: undefined symbol: _ZN5torch8autograd13_wrap", "built for another torch"),
    ],
)
def test_a_library_that_does_not_load_is_told_by_its_cause_and_not_by_the_last_line(cause, fix, tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text(
        f"try:\n    raise OSError({cause!r})\nexcept OSError as e:\n    raise OSError('no') from e"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    finding = check_import("broken")
    assert fix in finding.fix and cause in finding.found
    with pytest.raises(InputError, match=re.escape(fix)), plain_words():  # what `mbcnet plan` says on a login node
        try:
            raise OSError(cause)
        except OSError as error:
            raise OSError("Could not load this library: fbgemm_gpu_py.so") from error


def test_the_cuda_set_takes_no_build_with_a_label():
    pins = (ROOT / "requirements/gpu.txt").read_text()
    labelled = {"torch", "fbgemm-gpu", "torchrec", "triton"}  # also built for CPUs, or other versions of CUDA
    assert set(re.findall(r"^([\w-]+)===[\d.]+$", pins, re.MULTILINE)) == labelled


PYTHON = """#!/bin/sh
echo "$(basename $0) $*" >> {log}
if [ "$2" = venv ]; then
    for folder in "$@"; do :; done
    [ "$3" != --clear ] || rm -rf $folder/* $folder/.[!.]*
    mkdir -p $folder/bin && cp $0 $folder/bin/python
fi
"""


def test_make_never_lays_one_set_over_the_other(tmp_path):
    """The recipe run with a Python that only says what it was asked."""
    (tmp_path / "requirements").mkdir()
    (tmp_path / "Makefile").write_bytes((ROOT / "Makefile").read_bytes())
    for name in ("requirements/cpu.txt", "requirements/gpu.txt", "pyproject.toml"):
        (tmp_path / name).touch()
    log, python = tmp_path / "log", tmp_path / "fake_python"
    python.write_text(PYTHON.format(log=log))
    python.chmod(0o755)

    def asked(kind: str) -> list[str]:
        log.write_text("")
        make = ["make", "test", f"PYTHON={python}", f"SET={kind}"]
        subprocess.run(make, cwd=tmp_path, env={"PATH": os.environ["PATH"]}, check=True, capture_output=True)
        return [line for line in log.read_text().splitlines() if "venv" in line or "-r " in line]

    pip = "python -m pip install -q --progress-bar off -r requirements/{}.txt"
    assert asked("cpu") == ["fake_python -m venv --clear .venv", pip.format("cpu")]
    assert asked("cpu") == [], "it is there"
    (tmp_path / ".venv/of_the_cpu_set").touch()
    assert asked("gpu") == ["fake_python -m venv --clear .venv", pip.format("gpu")]
    assert sorted(each.name for each in (tmp_path / ".venv").iterdir()) == ["bin", "ready-gpu"]
    # a touch may fall into the same tick of the file system's clock
    later = (tmp_path / ".venv/ready-gpu").stat().st_mtime + 1
    os.utime(tmp_path / "requirements/gpu.txt", (later, later))
    assert asked("gpu") == [pip.format("gpu")], "the same set is brought up to date"


@pytest.mark.long
def test_this_installation_is_whole(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "a matching set" in out and "import torchrec" in out and "local_cwd" in out
    assert out.rstrip().endswith("nothing is wrong")


def test_a_fault_is_counted_and_shown_with_its_fix(capsys):
    broken = doctor.Finding("triple", "torch 1", "remove .venv")
    assert doctor.print_report([doctor.Finding("python", "3.11"), broken]) == 1
    out = capsys.readouterr().out
    assert "fault triple" in out and "remove .venv" in out and "1 to fix" in out
