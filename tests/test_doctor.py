"""Proves that `mbcnet doctor` tells a whole installation from a broken one, and says how to fix each fault."""

import pytest

from mbcnet_rec import doctor
from mbcnet_rec.cli import main


@pytest.mark.parametrize(
    ("torch", "fbgemm", "torchrec", "fix"),
    [
        ("2.13.0+cpu", "1.8.0", "1.8.0", ""),
        ("2.11.0+cu130", "1.6.0", "1.6.1", ""),
        ("2.12.0", "1.8.0", "1.8.0", "fbgemm 1.8 is built for torch 2.13, not 2.12"),
        ("2.13.0", "1.8.0", "1.6.1", "torchrec 1.8 goes with this fbgemm"),
        ("2.13.0", "1.2.0", "1.2.0", "fbgemm 1.2 is not in our table"),
        ("2.13.0", "", "1.8.0", "run `make` again"),
    ],
)
def test_triples(torch, fbgemm, torchrec, fix):
    finding = doctor.check_triple(torch, fbgemm, torchrec)
    assert fix in finding.fix if fix else not finding.fix


@pytest.mark.parametrize(
    ("fbgemm", "fbgemm_cpu", "has_gpu", "fix"),
    [
        ("1.8.0+cpu", "1.8.0", False, ""),
        ("1.8.0+cpu", "1.8.0", True, "the CPU set is installed"),
        ("1.8.0+cpu", "", False, "fbgemm-gpu-cpu is missing"),
        ("1.8.0", "", True, ""),
    ],
)
def test_the_stand_in_of_the_cpu_set_never_serves_a_gpu(fbgemm, fbgemm_cpu, has_gpu, fix):
    finding = doctor.check_shadow(fbgemm, fbgemm_cpu, has_gpu)
    assert fix in finding.fix if fix else not finding.fix


@pytest.mark.parametrize(
    ("torch", "pyarrow", "fix"),
    [
        ("2.13.0", "26.0.1", ""),
        ("2.9.1", "26.0.1", "torch below 2.10"),
        ("2.13.0", "14.0.0", "pyarrow below 14.0.1"),
    ],
)
def test_versions_with_known_holes(torch, pyarrow, fix):
    finding = doctor.check_floors(torch, pyarrow)
    assert fix in finding.fix if fix else not finding.fix


def test_a_gpu_that_this_torch_cannot_use_is_a_fault(monkeypatch):
    assert doctor.check_cuda([]) == []
    if "+cpu" in doctor.installed("fbgemm-gpu"):
        (finding,) = doctor.check_cuda(["GPU 0: a card"])
        assert finding.fix


@pytest.mark.long
def test_this_installation_is_whole(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "a matching set" in out and "import torchrec" in out and "local_cwd" in out
    assert out.rstrip().endswith("nothing is wrong")


def test_a_fault_is_counted_and_shown_with_its_fix(monkeypatch, capsys):
    broken = doctor.Finding("triple", "torch 1", "remove .venv")
    monkeypatch.setattr(doctor, "examine", lambda: [doctor.Finding("python", "3.11"), broken])
    assert doctor.run_doctor() == 1
    out = capsys.readouterr().out
    assert "fault triple" in out and "remove .venv" in out and "1 to fix" in out
