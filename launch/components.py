"""torchx components: `torchx run -s SCHEDULER mbcnet.train --config CONFIG -j 1x2 -- --set key=value`.

From a checkout `launch/components.py:train` may stand in place of `mbcnet.train`.

torchx executes this file's text inside one of its own modules, so nothing here may rely on `__file__` or on the names that
module has, and annotations must be real types (no `from __future__ import annotations`). Of each function's signature and
docstring it makes the command line and its help; what all components take is declared once, by `application`.
"""

from typing import Any

import torchx.specs as specs

from launch.application import application, job_component


@job_component
def train(*args: str, config: str, **job: Any) -> specs.AppDef:
    """Train a model: one process for each device, tables sharded over all of them.

    Args:
        args: further arguments of the trainer, after `--`; for example `-- --set train.max_steps=10`
        config: the run's TOML file
        job: what `application` takes
    """
    return application(["train", "--config", config, *args], **job)


@job_component
def evaluate(*args: str, run: str, **job: Any) -> specs.AppDef:
    """Evaluate a run's checkpoint on its test split.

    Args:
        args: further arguments of the evaluation, after `--`
        run: the run folder; the job need not have the shape with which it was trained
        job: what `application` takes
    """
    return application(["evaluate", run, *args], **job)


@job_component
def predict(*args: str, run: str, **job: Any) -> specs.AppDef:
    """Score rows with a run's checkpoint.

    Args:
        args: further arguments of the prediction, after `--`: input files, output
        run: the run folder; the job need not have the shape with which it was trained
        job: what `application` takes
    """
    return application(["predict", run, *args], **job)
