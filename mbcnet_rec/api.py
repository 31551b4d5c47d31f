"""The Python API: what the command line does, for a notebook or a program of one's own. No global state: runs do not know of each other."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import json as arrow_json

from data.errors import InputError
from data.reading.config import StreamOptions
from data.reading.files import resolve_files
from data.schema import Schema, load_schema
from data.stream import Batch, ParquetStream
from mbcnet_rec.build import build
from mbcnet_rec.config import RunConfig
from mbcnet_rec.cpu.fast_path import PlainPipeline
from mbcnet_rec.logs.metrics_log import METRICS
from mbcnet_rec.model.objective import Outputs
from mbcnet_rec.report.run_report import write_run_report
from mbcnet_rec.runtime.process import joined_process
from mbcnet_rec.scoring.evaluate import Question, score_rows, to_json
from mbcnet_rec.scoring.scorer import autocast_of
from mbcnet_rec.scoring.trained_run import find_best, load_run, opened_run
from mbcnet_rec.serving.artifact import load_weights, take_apart, with_rows
from mbcnet_rec.serving.loader import Rows, ServingModel
from mbcnet_rec.teachers import train_model
from mbcnet_rec.training.pipeline import CheckedStep


def train(config: RunConfig, *, resume: bool = False, overwrite: bool = False) -> "Run":
    """Train as `mbcnet train` does, in this process or as one rank where torchrun started it, and return the run.

    Args:
        config: of the run, from `load_config` or by hand.
        resume: continue from the run folder's latest checkpoint.
        overwrite: replace an earlier run of the same folder.

    Raises:
        InputError: the config, the schema, a row or the run folder is at fault.
        RunStoppedError: it ends before its last step, for instance by a loss that is not finite.
    """
    train_model(config, resume=resume, overwrite=overwrite, report=write_run_report)
    return Run(config.run_folder, config)


@dataclass(frozen=True)
class Run:
    """A run folder: its config, and its best checkpoint's scores of any rows."""

    folder: Path
    config: RunConfig

    @classmethod
    def load(cls, folder: str | Path) -> "Run":
        """Open the folder that `train` or `mbcnet train` has filled; InputError if it is none."""
        return cls(Path(folder), load_run(Path(folder)))

    def predict(self, rows: Rows) -> np.ndarray:
        """Click probabilities (n,) float32, of several tasks (n, T), of an Arrow table, a DataFrame or columns of values.

        Rows of tables are float32, in this process. ValueError if a column is missing, or a value is one that training would have refused.
        """
        return self._model.predict(rows)

    def evaluate(self, *data: str | Path, split: str = "test", by: Sequence[str] = ()) -> dict[str, Any]:
        """What `mbcnet evaluate --json` prints: each metric, its 95 % interval, and `slices` by the columns `by`; empty on further ranks.

        `data`: files, folders, globs or URIs, or the config's `split`. InputError if there are no rows, no such column, or a row is faulty.
        """
        question = Question(split, tuple(map(str, data)), by=tuple(by))
        with opened_run(self.folder) as (run, process):
            answers = score_rows(run, process, question)[0].answer(process)
        return {} if answers is None else to_json(answers)

    def metrics(self) -> pa.Table:
        """The lines of metrics.jsonl, in their order: `step`, `split` and a column for every metric, null where a line lacks it."""
        path = self.folder / METRICS
        if not path.is_file():
            raise InputError(f"{path}: no such file; train the run first")
        return arrow_json.read_json(path, arrow_json.ReadOptions(block_size=max(1, path.stat().st_size)))

    @cached_property
    def _model(self) -> ServingModel:
        with joined_process("cpu") as process:
            run = find_best(self.config, self.folder, process)
        weights = load_weights(run)
        return with_rows(take_apart(weights), weights, "fp32").model()


def stream(
    schema: Schema, files: str | Path | Sequence[str | Path], rank: int = 0, world_size: int = 1, **options: Any
) -> ParquetStream:
    """The batches of Parquet files, folders, globs or URIs for a loop of one's own; iterate it once for each epoch.

    Args:
        schema: from `load_schema`, fitted.
        files: where the rows are.
        rank: whose share of every batch to read.
        world_size: how many there are.
        options: of `data.reading.config.StreamOptions`: batch_size, order, seed and others.

    Raises:
        InputError: a path leads nowhere, or a file does not fit the schema.
    """
    paths = [files] if isinstance(files, str | Path) else files
    return ParquetStream(resolve_files([*map(str, paths)]), schema, StreamOptions(**options), rank, world_size)


@contextmanager
def train_step(config: RunConfig) -> Iterator[Callable[[Batch], Outputs]]:
    """Build and shard the model; gives a function that trains it on this rank's share of a batch and returns logits, loss and its terms.

    Every rank enters. `step.model` is the sharded objective. Nothing is written. InputError if config, schema and plan do not fit together.
    """
    with joined_process(config.train.device) as process:
        built = build(config, load_schema(config.schema), process)
        autocast = autocast_of(config.train.autocast, process.device)
        pipeline = PlainPipeline(CheckedStep(built.model, built.optimizer, autocast))

        def step(batch: Batch) -> Outputs:
            return pipeline.progress(iter([batch.to(process.device)]))

        step.model = built.model  # type: ignore[attr-defined]
        yield step
