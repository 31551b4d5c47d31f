"""`mbcnet evaluate`: a run's best checkpoint on its test rows, at any world size."""

import json
from pathlib import Path
from typing import Any

from data.errors import InputError
from data.schema import load_schema
from mbcnet_rec.build import build, quieten_libraries
from mbcnet_rec.config import RunConfig, load_config
from mbcnet_rec.train import CONFIG, best_step, known_best, metrics_table, open_streams, refuse_together
from mbcnet_rec.training import checkpoint
from mbcnet_rec.training.loop import CHECKPOINTS, autocast_of, evaluate_stream, load_model
from mbcnet_rec.training.process import Process, broadcast_value, joined_process
from mbcnet_rec.training.records import METRICS, finite_or_none


def load_run(folder: Path) -> RunConfig:
    """Read the resolved config of a run folder.

    Raises:
        InputError: it is no run folder.
    """
    if not (folder / CONFIG).is_file():
        raise InputError(
            f"{folder}: no run folder (it has no {CONFIG}); pass what `mbcnet train` wrote, such as runs/NAME"
        )
    return load_config(folder / CONFIG)


def run_evaluation(run_folder: str, split: str = "test") -> int:
    """Score a run's best checkpoint and compare with what training logged.

    Args:
        run_folder: that `mbcnet train` wrote.
        split: train, valid or test.

    Raises:
        InputError: no such run, no checkpoint, or no rows.
    """
    quieten_libraries()
    folder = Path(run_folder)
    config = load_run(folder)
    schema = load_schema(config.schema)
    with joined_process(config.train.device) as process:
        step = broadcast_value(best_step(folder) if process.is_first else None, process)
        refuse_together("" if step is not None else f"{folder}: no whole checkpoint; train it first", process)
        assert step is not None
        metrics = evaluate_run(config, folder, step, process, split)
        if process.is_first:
            print(f"{folder}: {split}, {metrics['rows']:,} rows, weights of step {step}")
            print("\n".join(metrics_table(metrics, known_best(schema, split, metrics["rows"]))))
            print(compare_with_log(folder, split, step, metrics))
            print(json.dumps({key: finite_or_none(value) for key, value in metrics.items()}))
    return 0


def evaluate_run(config: RunConfig, folder: Path, step: int, process: Process, split: str) -> dict[str, Any]:
    """Build the run's model on this world size, load a checkpoint and score a split.

    Raises:
        InputError: the config names no rows of that split, or the checkpoint is damaged.
    """
    schema = load_schema(config.schema)
    streams = open_streams(config.data, config.train.seed, schema, process)
    if split not in streams:
        raise InputError(f"{folder}/{CONFIG}: data.{split} is empty; name the files of that split")
    built = build(config, schema, process)
    load_model(checkpoint.step_folder(folder / CHECKPOINTS, step), built)
    stream = streams[split]()
    return evaluate_stream(built, stream, process, autocast_of(config.train.autocast, process.device))


def compare_with_log(folder: Path, split: str, step: int, metrics: dict[str, Any]) -> str:
    """Say how far the metrics are from those that training logged for the same rows and step."""
    logged: dict[str, Any] = {}
    for line in (folder / METRICS).read_text().splitlines():
        entry = json.loads(line)
        if entry["split"] == split and entry["step"] == step:
            logged = entry
    shared = [key for key, value in logged.items() if key in metrics and isinstance(value, float)]
    if not shared:
        return f"training logged no {split} metrics of step {step} to compare with"
    gap = max(abs(logged[key] - metrics[key]) for key in shared)
    return f"largest difference from what training logged: {gap:.1e}"
