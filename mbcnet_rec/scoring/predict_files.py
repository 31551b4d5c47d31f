"""`mbcnet predict --engine`: each input file is a task of workers that hold the weights, of a run or of an artifact.

A worker scores all of a file, alone and in batches of its own size, into one output file that appears when it is whole: the bytes do not
depend on who scored what, and a prediction that was killed goes on with the files that are missing. What the output folder may hold, and
what is left of an earlier prediction, is as predict.py says.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch

from data.engine import Engine, meet, run_tasks
from data.errors import InputError
from data.reading.decode import RowReader
from data.reading.encode import Encoder
from mbcnet_rec.logs.progress import RowBar
from mbcnet_rec.runtime.lock import locked
from mbcnet_rec.runtime.process import CPU, Process
from mbcnet_rec.runtime.ranks import alone
from mbcnet_rec.scoring import predict
from mbcnet_rec.scoring.chunks import require_finite, score_chunks
from mbcnet_rec.scoring.tasks import output_names
from mbcnet_rec.scoring.trained_run import find_best, load_run, opened_run
from mbcnet_rec.serving import loader
from mbcnet_rec.serving.artifact import open_artifact

BATCH_ROWS = 4096  # that an artifact scores at a time
_HELD = ExitStack()  # what this process has opened for its tasks


class FileTask(NamedTuple):
    """What one task scores."""

    weights: str  # a run folder or an artifact
    job: predict.Job  # of this file alone


class Loaded(NamedTuple):
    """Weights in a worker."""

    digest: str
    encoder: Encoder
    write: Callable[[predict.Job, RowReader], None]  # scores a file into its place


def predict_files(
    folder: str, data: Sequence[str], out: str, engine: Engine, *, keep: Sequence[str] = (), overwrite: bool = False
) -> int:
    """Score Parquet files with a run's best checkpoint or an artifact into the folder `out`, over an engine; see run_prediction."""
    predict.refuse_remote(out)
    weights = describe_weights(Path(folder))
    job, files = predict.plan_prediction(weights, data, out, keep, sys.maxsize)
    number_of = {job.target(chunk.file): chunk.file for chunk in job.chunks if chunk.num_rows}
    tasks = {path: FileTask(folder, job.of(number)) for path, number in number_of.items()}

    def is_done(path: Path) -> bool:
        return job.is_done(number_of[path])

    with locked(job.out, "predict") if engine.is_first else nullcontext():
        left: list[str] = []
        if engine.is_first:
            left, changed = predict.what_is_replaced(job, overwrite)
            predict.begin(job, changed)
        meet(engine, job.out / predict.CHUNKS)
        todo = sum(task.job.num_rows for path, task in tasks.items() if not is_done(path))
        try:
            with RowBar("predict", job.num_rows, shown=engine.is_first) as bar:
                for path in run_tasks(engine, score_file, tasks, last=True, is_done=is_done, held=True):
                    bar.update(tasks[path].job.num_rows)
        finally:
            load_weights.cache_clear()
            _HELD.close()
        meet(engine, job.out / predict.CHUNKS)
        if engine.is_first:
            predict.join_chunks(job, range(len(files)))  # those without rows
            print(predict.finish(job, left, weights.words, files, scored=todo))
    return 0


def describe_weights(folder: Path) -> predict.Weights:
    """What a prediction must know of a run folder or an artifact."""
    if (folder / loader.MODEL).is_file():
        model = open_artifact(folder, verify=False)
        branches = model.branches if model.branch_graph else ()
        outputs = output_names(model.tasks, branches)
        return predict.Weights(model.preprocess.schema, outputs, model.digest, 3, f"weights of {folder}")
    return predict.weights_of(find_best(load_run(folder), folder, Process(0, 1, 0, 1, CPU)))


def score_file(task: FileTask) -> None:
    """Score a file into its place."""
    with alone():
        held = load_weights(task.weights)
        (output,) = task.job.outputs
        if held.digest != output.facts["weights"]:
            raise InputError(f"{task.weights}: has other weights than when the prediction began; start it again")
        held.write(task.job, RowReader([output.source], held.encoder, extra=predict.kept_of(task.job)))


@cache
def load_weights(folder: str) -> Loaded:
    """Load a run's best checkpoint or an artifact, once for each process."""
    if (Path(folder) / loader.MODEL).is_file():
        return _load_artifact(Path(folder))
    run, process = _HELD.enter_context(opened_run(Path(folder)))
    scorer, batch_rows = run.scorer(process)

    def write(job: predict.Job, reader: RowReader) -> None:
        scored = score_chunks(scorer, reader, [job.chunks], process, batch_rows)
        predict.write_chunks(job, scored, lambda chunk: job.target(0))

    return Loaded(run.digest(), Encoder(run.schema, has_labels=False), write)


def _load_artifact(folder: Path) -> Loaded:
    model = open_artifact(folder)
    graph = model.branch_graph or (lambda x: model.graph(x).reshape(len(x), -1))

    def score(job: predict.Job, reader: RowReader) -> Iterator[tuple[pa.RecordBatch, np.ndarray]]:
        for group in job.chunks[0].row_groups:
            first_row = 0
            for columns, rows in reader.scan(group, BATCH_ROWS):
                with torch.inference_mode():
                    logits = graph(model.embed(model.preprocess.inputs(columns)))
                require_finite(logits.numpy(), reader.name(group), first_row)
                first_row += rows.num_rows
                yield rows, model.probabilities(logits)

    def write(job: predict.Job, reader: RowReader) -> None:
        predict.write_chunk(job, job.chunks[0], score(job, reader), job.target(0))

    return Loaded(model.digest, model.preprocess.encoder, write)
