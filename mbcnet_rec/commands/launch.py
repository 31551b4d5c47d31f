"""`mbcnet launch`: check that config, plan and job agree, then start the job through torchx, or print it for another launcher."""

import argparse
import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from data.errors import InputError
from data.schema import load_schema
from launch import scripts
from launch.job import Job, JobError, Shape, parse_shape
from sharding.plan.compare import check_plan
from sharding.plan.placement import read_plan

if TYPE_CHECKING:
    from mbcnet_rec.config import RunConfig

FORMATS = {"torchrun": scripts.torchrun_line, "slurm": scripts.sbatch_script, "k8s": scripts.kubernetes_yaml}
RAY_FORMATS = {"slurm": scripts.ray_script, "k8s": scripts.ray_job}


def ray_up(args: argparse.Namespace) -> int:
    """Print a job that starts Ray on its hosts and runs a command of `mbcnet` with --engine ray there: -- schema fit SCHEMA FILES -o FOLDER."""
    words = args.words if "--engine" in args.words else [*args.words, "--engine", "ray"]
    job = _job(args, words[0], words[1:], f"mbcnet-{words[0]}", Shape(args.hosts, args.hosts, 1))
    print(RAY_FORMATS[args.format](job).rstrip("\n"))
    return 0


def train(args: argparse.Namespace) -> int:
    """Check that config, plan and job agree, then start the job through torchx, or print it for another launcher."""
    if not args.config:
        raise InputError("mbcnet launch: --config is missing; name the run's TOML file")
    from mbcnet_rec.config import load_config  # imports torch

    config = load_config(args.config, args.overrides)
    try:
        job = _job(args, "train", _train_words(args), config.name, parse_shape(args.j))
        _check_plan(config, job)
        if args.format:
            print(FORMATS[args.format](job).rstrip("\n"))
            return 0
    except JobError as error:
        raise InputError(str(error)) from None
    words = _torchx_words(args, job)
    if args.dry_run:
        told = {"command": shlex.join(["mbcnet", *job.worker_args]), "next": shlex.join(words).rstrip(" -")}
        print(scripts.dry_run(job, config=config, scheduler=args.scheduler, cfg=args.cfg, **told), end="")
        return 0
    try:
        from torchx.cli.main import main  # after every mistake that is seen without it
    except ModuleNotFoundError as error:
        raise InputError(
            f"mbcnet launch: {error.name} is not installed; install requirements/cpu.txt or gpu.txt, or start the job without torchx: "
            "--print torchrun, slurm or k8s"
        ) from None

    main(words[1:])  # a job that fails ends this process with its code
    return 0


def _train_words(args: argparse.Namespace) -> list[str]:
    flags = [f"--{name}" for name in ("resume", "overwrite") if getattr(args, name)]
    flags += ["--continue", args.continues, "--data", *args.data] if args.continues else []
    flags += [f"--{name}" for name in ("again", "progressive") if getattr(args, name)]
    return ["--config", args.config, *(f"--set={each}" for each in args.overrides), *flags]


def _job(args: argparse.Namespace, command: str, words: list[str], name: str, shape: Shape) -> Job:
    given: dict[str, str] = {}
    for pair in args.env:
        key = pair.partition("=")[0]
        if pair.find("=") < 1:
            raise InputError(f"--env {pair}: wanted KEY=VALUE; write it so")
        if given.setdefault(key, pair) != pair:
            raise InputError(f"--env {pair}: --env {given[key]} is given before it; leave one out")
    return Job(
        command=command,
        args=tuple(words),
        shape=shape,
        name=args.name or name,
        image=args.image,
        cpu=args.cpu or 12 * args.gpu or 2,
        gpu=args.gpu,
        memory_mb=args.memory_mb or 131_072 * args.gpu or 8192,
        env=dict(pair.split("=", 1) for pair in args.env),
        retries=args.retries,
    )


def _check_plan(config: "RunConfig", job: Job) -> None:
    """Refuse a job on which the config or its plan cannot run: found here, not after an hour in a queue."""
    device = config.train.device
    if device == "cuda" and not job.gpu:
        raise InputError(f"train.device = 'cuda', but the job asks for no GPU; add --gpu {job.shape.processes}")
    lanes = config.data.lanes
    for size in job.shape.world_sizes:
        if lanes % size:
            raise InputError(
                f"data.lanes = {lanes}: -j {job.shape} may have {size} ranks; wanted a multiple of that; set data.lanes to "
                f"{math.lcm(*job.shape.world_sizes)}, and data.batch_size to a multiple of it"
            )
    if not config.sharding.plan:
        return
    plan = read_plan(Path(config.sharding.plan))
    if job.shape.elastic:
        raise InputError(
            f"{config.sharding.plan}: made for {plan.world_size} ranks, but -j {job.shape} may have {job.shape.world_sizes[0]} to "
            f"{job.shape.world_sizes[-1]}; use -j {plan.hosts}x{plan.local_world_size}, or leave sharding.plan empty"
        )
    from mbcnet_rec.model.models import schema_with_wide  # imports torch

    check_plan(
        plan,
        schema_with_wide(config.model, load_schema(config.schema)),
        optimizer=config.optim.embedding.name,
        world_size=job.shape.world_sizes[-1],
        local_world_size=job.shape.processes,
        device=("cuda" if job.gpu else "cpu") if device == "auto" else device,
        source=config.sharding.plan,
    )


def _torchx_words(args: argparse.Namespace, job: Job) -> list[str]:
    """The same job as a torchx command line."""
    options = {
        "--config": args.config, "-j": job.shape, "--name": job.name, "--cpu": job.cpu, "--gpu": job.gpu,
        "--memMB": job.memory_mb, "--image": job.image, "--mounts": args.mounts, "--max_retries": job.retries or "",
        "--env": ",".join(f"{key}={value}" for key, value in job.env.items()),
    }  # fmt: skip
    words = [word for name, value in options.items() if str(value) for word in (name, str(value))]
    given = ["-cfg", args.cfg] if args.cfg else []
    return ["torchx", "run", "-s", args.scheduler, *given, "mbcnet.train", *words, "--", *job.args[2:]]
