"""Proves that `mbcnet doctor` tells a whole installation from a broken one, and says how to fix each fault."""

import pytest

from mbcnet_rec import doctor
from mbcnet_rec.cli import main
from mbcnet_rec.doctor import check_cuda, check_floors, check_shadow, check_triple


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
        # versions with known holes
        (check_floors, ("2.13.0", "26.0.1"), ""),
        (check_floors, ("2.9.1", "26.0.1"), "torch below 2.10"),
        (check_floors, ("2.13.0", "14.0.0"), "pyarrow below 14.0.1"),
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
