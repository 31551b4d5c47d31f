"""`mbcnet launch`: what would run is said before it runs, a plan for another job is refused, and every printed form is one job.

Also that our components stand beside torchx's own.
"""

import inspect
import shlex
import subprocess

import pytest
from tiny_run import make_run, program
from torchx.specs.file_linter import get_fn_docstring
from torchx.specs.finder import get_components

from launch import job, worker
from mbcnet_rec import cli
from mbcnet_rec.runtime import exits


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(make_run(tmp_path))
    return tmp_path


def launch(*args: str) -> int:
    return cli.main(["launch", "--config", "tiny.toml", *args])


def test_our_components_stand_beside_torchxs_own():
    names = set(get_components())
    assert {f"mbcnet.{name}" for name in ("train", "evaluate", "predict")} <= names
    assert {"dist.ddp", "utils.echo", "utils.sh"} <= names
    for name in ("train", "evaluate", "predict"):
        component = get_components()[f"mbcnet.{name}"]
        asked = inspect.signature(component.fn).parameters
        assert component.description.strip() and {"j", "gpu", "mounts", "max_retries"} < set(asked)
        assert all(get_fn_docstring(component.fn)[1][parameter].strip() for parameter in asked), "its help"


def test_a_dry_run_says_what_where_and_on_how_many_gpus(folder, capsys):
    words = "-j 16x8 --gpu 8 -s kubernetes -cfg queue=gpus --dry-run --set train.max_steps=9"
    assert launch(*words.split(), "--set", "data.lanes=128", "--set", "data.batch_size=128") == 0
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert said["ranks"].startswith("128: 16 hosts x 8 processes") and said["GPUs"] == "128 (8 a host)"
    assert said["where"] == "kubernetes (queue=gpus)" and "runs/tiny" in said["run"]
    assert said["command"].startswith("mbcnet train --config tiny.toml --set=train.max_steps=9")
    sent = "torchx run -s kubernetes -cfg queue=gpus mbcnet.train --config tiny.toml -j 16x8"
    assert said["next"].startswith(sent)
    assert not (folder / "runs").exists(), "nothing was started"


def test_a_job_that_its_plan_was_not_made_for_is_refused(folder, capsys):
    assert cli.main(["plan", "--config", "tiny.toml", "--cluster", "1x2:cpu", "-o", "plan.json"]) == 0
    capsys.readouterr()
    given = ("--set", "sharding.plan=plan.json", "--dry-run")
    assert launch("-j", "1x2", *given) == 0
    assert "plan.json" in capsys.readouterr().out
    for shape in ("1x4", "1:2x2"):
        assert launch("-j", shape, *given) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "plan.json" in said, said
    assert launch("-j", "1x2", "--gpu", "2", "--set", "train.device=auto", *given) == 2
    assert "plan.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("-j", "2:1x2"), "-j 2:1x2"),
        (("-j", "1x8", "--gpu", "4"), "gpu = 4"),
        (("--set", "train.device=cuda"), "--gpu 2"),
        (("--retries", "2", "--overwrite"), "--overwrite"),
        (("--env", "word"), "KEY=VALUE"),
        (("--gpu", "-1"), "--gpu -1"),
        (("-j", "1x8", "--dry-run"), "set data.lanes to 8"),
    ],
)
def test_what_cannot_run_is_one_line_and_code_2(folder, capsys, args, said):
    assert launch(*args) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error, error


@pytest.mark.parametrize(
    ("scheduler", "said"),
    [("slurm", "sbatch is not on the PATH"), pytest.param("kubernetes", "`queue`", marks=pytest.mark.long)],
)
def test_a_scheduler_that_is_not_set_up_is_named_with_code_2(folder, scheduler, said):
    """No traceback, and not 1, which is a bug's."""
    (folder / "bin").mkdir()
    done = program("mbcnet", "launch", "--config", "tiny.toml", "-s", scheduler, "-j", "1x1", cwd=folder, PATH="bin")
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_the_printed_forms_are_one_job(folder, capsys):
    made = {}
    for form in ("torchrun", "slurm", "k8s"):
        assert launch("-j", "2x2", "--gpu", "2", "--print", form) == 0
        made[form] = capsys.readouterr().out
    assert "$HEAD:29500" in made["torchrun"] and made["torchrun"].count("\n") == 1
    words = shlex.split(made["torchrun"])
    assert words[words.index("torchrun") :][1:5] == ["--nnodes", "2", "--nproc-per-node", "2"]
    assert subprocess.run(["bash", "-n"], input=made["slurm"], text=True, capture_output=True).stderr == ""
    for text in ("--nodes=2", "--gpus-per-node=2", "--signal=TERM@300", "scontrol requeue"):
        assert text in made["slurm"]
    for text in made.values():
        assert "launch.worker" in text and "tiny.toml" in text and "PYTHONSAFEPATH" in text


def test_a_command_over_ray_is_printed_as_one_job(folder, capsys):
    given = ("--hosts", "3", "--cpu", "4", "--", "schema", "fit", "s.toml", "logs/ds=*", "-o", "fitted")
    made = {}
    for form in ("slurm", "k8s"):
        assert cli.main(["launch", "ray-up", "--print", form, *given]) == 0
        made[form] = capsys.readouterr().out
    assert subprocess.run(["bash", "-n"], input=made["slurm"], text=True, capture_output=True).stderr == ""
    assert made["slurm"].splitlines()[-1] == "mbcnet schema fit s.toml 'logs/ds=*' -o fitted --engine ray"
    assert "#SBATCH --nodes=3" in made["slurm"] and "replicas: 2" in made["k8s"]
    for args, said in ((["--hosts", "0", "--print", "k8s"], "--hosts 0"), (["--print", "k8s", "--cpu", "-1"], "--cpu -1")):  # fmt: skip
        assert cli.main(["launch", "ray-up", *args, "--", "data", "check", "x"]) == 2
        assert said in capsys.readouterr().err


def test_exit_codes_are_the_trainers():
    ours = (job.CANNOT_WRITE, job.PREEMPTED, job.NON_FINITE, job.LOST_RANK)
    assert ours == (exits.CANNOT_WRITE, exits.PREEMPTED, exits.NON_FINITE, exits.LOST_RANK)
    assert (job.USER_MISTAKE, job.INTERRUPTED) == (2, 130)  # as test_cli.py has it
    assert cli.__name__ == worker.COMMAND_LINE
