"""torchx components: `torchx run -s SCHEDULER mbcnet.train --config CONFIG -j 1x2 -- --set key=value`.

From a checkout `launch/components.py:train` may stand in place of `mbcnet.train`.

torchx executes this file's text inside one of its own modules, so nothing here may rely on `__file__` or on the names that
module has, and annotations must be real types (no `from __future__ import annotations`). Of each function's docstring it
makes the command line's help.
"""

from typing import Dict, List, Optional

import torchx.specs as specs

from launch.application import Options, describe_application


def train(
    *args: str,
    config: str,
    j: str = "1x2",
    name: str = "",
    h: Optional[str] = None,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    image: str = "mbcnet-rec",
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    max_retries: int = 0,
) -> specs.AppDef:
    """Train a model: one process for each device, tables sharded over all of them.

    Args:
        args: further arguments of the trainer, after `--`; for example `-- --set train.max_steps=10`
        config: the run's TOML file
        j: hosts x processes on each host, 1x2 on a laptop, 16x8 on a cluster; 2:4x8 for 2 to 4 hosts that may come and go
        name: job name
        h: a named resource of torchx, aws_p4d.24xlarge for one, in place of cpu, gpu and memMB
        cpu: CPU cores of each host (ignored by local_cwd)
        gpu: GPUs of each host (ignored by local_cwd)
        memMB: memory of each host in MB (ignored by local_cwd)
        image: container image, for schedulers that use one
        env: further environment variables, K1=V1,K2=V2
        mounts: what to mount into the container, type=volume,src=CLAIM,dst=/runs or type=bind,src=/host,dst=/job[,readonly]
        max_retries: how often the scheduler restarts a failed job, which continues from its checkpoint
    """
    options = Options(j, name, h, cpu, gpu, memMB, image, env, mounts, max_retries)
    return describe_application("train", ["--config", config, *args], options)


def evaluate(
    *args: str,
    run: str,
    j: str = "1x2",
    name: str = "",
    h: Optional[str] = None,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    image: str = "mbcnet-rec",
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    max_retries: int = 0,
) -> specs.AppDef:
    """Evaluate a run's checkpoint on its test split.

    Args:
        args: further arguments of the evaluation, after `--`
        run: the run folder; the job need not have the shape with which it was trained
        j: hosts x processes on each host, 1x2 on a laptop, 16x8 on a cluster; 2:4x8 for 2 to 4 hosts that may come and go
        name: job name
        h: a named resource of torchx, aws_p4d.24xlarge for one, in place of cpu, gpu and memMB
        cpu: CPU cores of each host (ignored by local_cwd)
        gpu: GPUs of each host (ignored by local_cwd)
        memMB: memory of each host in MB (ignored by local_cwd)
        image: container image, for schedulers that use one
        env: further environment variables, K1=V1,K2=V2
        mounts: what to mount into the container, type=volume,src=CLAIM,dst=/runs or type=bind,src=/host,dst=/job[,readonly]
        max_retries: how often the scheduler restarts a failed job, which continues from its checkpoint
    """
    options = Options(j, name, h, cpu, gpu, memMB, image, env, mounts, max_retries)
    return describe_application("evaluate", [run, *args], options)


def predict(
    *args: str,
    run: str,
    j: str = "1x2",
    name: str = "",
    h: Optional[str] = None,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    image: str = "mbcnet-rec",
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    max_retries: int = 0,
) -> specs.AppDef:
    """Score rows with a run's checkpoint.

    Args:
        args: further arguments of the prediction, after `--`: input files, output
        run: the run folder; the job need not have the shape with which it was trained
        j: hosts x processes on each host, 1x2 on a laptop, 16x8 on a cluster; 2:4x8 for 2 to 4 hosts that may come and go
        name: job name
        h: a named resource of torchx, aws_p4d.24xlarge for one, in place of cpu, gpu and memMB
        cpu: CPU cores of each host (ignored by local_cwd)
        gpu: GPUs of each host (ignored by local_cwd)
        memMB: memory of each host in MB (ignored by local_cwd)
        image: container image, for schedulers that use one
        env: further environment variables, K1=V1,K2=V2
        mounts: what to mount into the container, type=volume,src=CLAIM,dst=/runs or type=bind,src=/host,dst=/job[,readonly]
        max_retries: how often the scheduler restarts a failed job, which continues from its checkpoint
    """
    options = Options(j, name, h, cpu, gpu, memMB, image, env, mounts, max_retries)
    return describe_application("predict", [run, *args], options)
