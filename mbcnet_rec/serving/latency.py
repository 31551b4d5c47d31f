"""`mbcnet bench latency`: milliseconds of one request to an artifact, by rows and threads, beside other models on the same tables.

A request is columns of plain Python values, as an RPC hands them over; its answer is one probability a row. Its three parts are timed
apart: preprocessing, lookups, dense part. The models take turns, request by request, so that what slows the machine slows all of them.
Rivals are not trained: which weights they have changes no time.
"""

import dataclasses
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import torch
from tqdm import tqdm

from data.errors import InputError
from data.schema import Schema
from mbcnet_rec.config import RunConfig, load_config
from mbcnet_rec.model.models import ModelKind, needs_wide
from mbcnet_rec.model.widths import fit_widths
from mbcnet_rec.serving import loader as serving
from mbcnet_rec.serving.artifact import take_apart, untrained
from mbcnet_rec.serving.sample_requests import Requests, draw_requests, read_requests

WARM_UP = 3
Models = dict[str, serving.ServingModel]
CORES = len(os.sched_getaffinity(0))  # that this process may use


@dataclass(frozen=True)
class Contest:
    """What is timed."""

    rows: tuple[int, ...] = (1, 8, 64, 512)  # of a request
    threads: tuple[int, ...] = (1, 2, 4)  # of torch
    seconds: float = 5.0  # for each pair of rows and threads, all models together
    calls: int = 100  # of each model at least, for each such pair


@dataclass(frozen=True)
class Timing:
    """One line of the table; milliseconds. A percentile that the calls are too few for is None."""

    model: str
    threads: int
    rows: int
    p50: float
    p95: float | None
    p99: float | None
    preprocess: float
    tables: float
    dense: float
    calls: int


@dataclass(frozen=True)
class Artifact:
    """An exported model, opened, with what lies beside it."""

    folder: Path
    model: serving.ServingModel
    config: RunConfig
    vocabularies: Mapping[str, pa.Array]

    @property
    def schema(self) -> Schema:
        """Of the run."""
        return self.model.preprocess.schema


def run_latency(
    folders: Sequence[str],
    contest: Contest,
    *,
    beside: Sequence[str] = (),
    data: str = "",
    compiled: bool = False,
    as_json: bool = False,
) -> int:
    """Time artifacts, and models of the kinds `beside` on the first one's tables; print the table, or one JSON object.

    Requests are rows of the Parquet file `data`, or drawn from the schema. `compiled` also times what `mbcnet export` compiled.

    Raises:
        InputError: a folder is not an artifact, or the file has too few rows.
    """
    unknown = [kind for kind in beside if kind not in get_args(ModelKind)]
    if unknown:
        raise InputError(f"--beside {unknown[0]}: wanted some of {', '.join(get_args(ModelKind))}")
    artifacts = [open_artifact(Path(folder)) for folder in folders]
    models = contestants(artifacts, beside, compiled=compiled)
    first = artifacts[0]
    columns = list(dict.fromkeys(name for model in models.values() for name in model.preprocess.columns))
    requests = {
        rows: read_requests(data, columns, rows) if data else draw_requests(first.schema, first.vocabularies, rows)
        for rows in contest.rows
    }
    for name, model in models.items():
        try:
            model.predict(next(iter(requests.values()))[0])
        except ValueError as error:
            raise InputError(f"{name}: {error}; artifacts side by side need the same columns") from None
    timings = race(models, requests, contest)
    if as_json:
        latency = [dataclasses.asdict(timing) for timing in timings]
        print(json.dumps({"artefacts": list(folders), "cores": CORES, "latency": latency}))
    else:
        print("\n".join(latency_lines(folders, timings)))
    return 0


def open_artifact(folder: Path, *, compiled: bool = False) -> Artifact:
    """Load an artifact with the config and schema that lie in it.

    Raises:
        InputError: it is not an artifact, or damaged.
    """
    try:
        model = serving.load(folder, compiled=compiled)
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from None
    vocabularies = serving.load_vocabularies(folder, model.spec)
    return Artifact(folder, model, load_config(folder / "config.toml"), vocabularies)


def contestants(artifacts: Sequence[Artifact], beside: Sequence[str], *, compiled: bool) -> Models:
    """Name -> model: the artifacts by their kind, or by their folder where kinds repeat; then the rivals."""
    kinds = [artifact.model.spec["kind"] for artifact in artifacts]
    models = {}
    for artifact, kind in zip(artifacts, kinds, strict=True):
        name = kind if kinds.count(kind) == 1 else artifact.folder.name
        if name in models:
            raise InputError(f"{artifact.folder}: two artifacts of that name; rename one of the folders")
        models[name] = artifact.model
        if compiled:
            models[f"{name}, compiled"] = open_artifact(artifact.folder, compiled=True).model
    return models | {kind: rival(artifacts[0], kind) for kind in beside if kind not in kinds}


def rival(artifact: Artifact, kind: str) -> serving.ServingModel:
    """Another model on an artifact's fields and tables."""
    model = dataclasses.replace(fit_widths(artifact.config.model), kind=kind)
    config = dataclasses.replace(artifact.config, model=model)
    if needs_wide(model) != needs_wide(artifact.config.model):
        raise InputError(
            f"--beside {kind}: it needs tables of one weight per id, or lacks those of the artifact; export it instead"
        )
    exported = take_apart(untrained(config, artifact.schema), vocabularies=artifact.vocabularies)
    rows = {pooling: tables.weights_host for pooling, tables in artifact.model.tables.items()}
    spec = exported.spec | {"rows": artifact.model.spec["rows"]}
    return dataclasses.replace(exported, spec=spec, rows=rows | artifact.model.id_rows).model()


def race(models: Models, requests: Mapping[int, Requests], contest: Contest) -> list[Timing]:
    """Time every model at all rows and threads."""
    before = torch.get_num_threads()
    timings = []
    total = len(contest.threads) * len(contest.rows)
    try:
        with tqdm(total=total, unit="cell", desc="latency", disable=None) as bar:
            for threads in contest.threads:
                torch.set_num_threads(threads)
                for rows in contest.rows:
                    for name, seconds in _take_turns(models, requests[rows], contest).items():
                        timings.append(timing_of(name, threads, rows, 1e3 * seconds))
                    bar.update()
    finally:
        torch.set_num_threads(before)
    return timings


def _take_turns(models: Models, requests: Requests, contest: Contest) -> dict[str, np.ndarray]:
    """Name -> (calls, 3) seconds of the parts."""
    found: dict[str, list[list[float]]] = {name: [] for name in models}
    for model in models.values():
        for request in requests[:WARM_UP]:
            model.predict(request)
    turns, end = list(models.items()), time.perf_counter() + contest.seconds
    call = 0
    while call < contest.calls or time.perf_counter() < end:
        for name, model in turns:
            found[name].append(_time_call(model, requests[call % len(requests)]))
        turns.append(turns.pop(0))  # who follows whom must not decide
        call += 1
    return {name: np.asarray(times) for name, times in found.items()}


@torch.inference_mode()
def _time_call(model: serving.ServingModel, request: Mapping[str, Any]) -> list[float]:
    start = time.perf_counter()
    inputs = model.preprocess(request)
    prepared = time.perf_counter()
    pooled = model.embed(inputs)
    embedded = time.perf_counter()
    torch.sigmoid(model.graph(pooled)).numpy()
    return [prepared - start, embedded - prepared, time.perf_counter() - embedded]


def timing_of(name: str, threads: int, rows: int, parts: np.ndarray) -> Timing:
    """Percentiles of whole calls and medians of their parts, (calls, 3) milliseconds."""
    calls = len(parts)
    p50, p95, p99 = np.percentile(parts.sum(axis=1), (50, 95, 99)).tolist()
    preprocess, tables, dense = np.median(parts, axis=0).tolist()
    p95, p99 = p95 if calls >= 20 else None, p99 if calls >= 100 else None
    return Timing(name, threads, rows, p50, p95, p99, preprocess, tables, dense, calls)


def latency_lines(folders: Sequence[str], timings: Sequence[Timing]) -> list[str]:
    """The table for people, and by how much the first model is slower than the second."""
    lines = [
        f"{', '.join(folders)}: one request, milliseconds; {CORES} cores",
        "",
        f"{'threads':>7}{'rows':>6}  {'model':<18}{'p50':>9}{'p95':>9}{'p99':>9}   "
        f"{'preprocess':>10}{'tables':>9}{'dense':>9}{'calls':>8}",
    ]
    for each in timings:
        tails = (each.p50, each.p95, each.p99)
        shown = "".join(f"{'-' if value is None else f'{value:.2f}':>9}" for value in tails)
        lines.append(
            f"{each.threads:>7}{each.rows:>6}  {each.model:<18}{shown}   {each.preprocess:>10.2f}{each.tables:>9.2f}"
            f"{each.dense:>9.2f}{each.calls:>8,}"
        )
    if max(each.threads for each in timings) > CORES:
        lines.append(f"more threads than the {CORES} cores: they wait for each other")
    fewest = min(each.threads for each in timings)
    medians = {(each.model, each.rows): each.p50 for each in timings if each.threads == fewest}
    first, *others = dict.fromkeys(each.model for each in timings)
    for other in others:
        gaps = (f"{medians[first, n] - medians[other, n]:+.2f} ms at {n} rows" for m, n in medians if m == first)
        lines.append(f"{first} over {other}, p50, {fewest} threads: {', '.join(gaps)}")
    return lines
