"""`mbcnet bench latency`: milliseconds of one request to an artifact, by rows and threads, beside other models on the same tables.

A request is columns of plain Python values, as an RPC hands them over; its answer is one probability a row. Its three parts are timed
apart: preprocessing, lookups, dense part. The models take turns, request by request, so that what slows the machine slows all of them.
Rivals are not trained: which weights they have changes no time.
"""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from tqdm import tqdm

from data.errors import InputError
from data.schema import Feature, Schema
from mbcnet_rec.config import RunConfig, load_config
from mbcnet_rec.model.models import fit_widths, needs_wide
from mbcnet_rec.report.page import Table, text_table
from mbcnet_rec.serving import loader as serving
from mbcnet_rec.serving.artifact import open_artifact, take_apart, untrained
from sharding.plan.constraints import ShardingConfig
from sharding.search.candidates import pooling_factor

NUM_REQUESTS = 8  # different ones, in turn: the same one again would find all its rows in the cache
Requests = list[dict[str, list[Any]]]


def draw_requests(schema: Schema, vocabularies: Mapping[str, pa.Array], rows: int) -> Requests:
    """Draw requests: ids evenly over each table, which is the worst for caches; lists of the schema's mean length."""
    rng = np.random.default_rng(rows)
    requests: Requests = [{} for _ in range(NUM_REQUESTS)]
    for request in requests:
        drawn: dict[str, np.ndarray] = {}  # lengths of lists; fields beside a sequence have its own
        for feature in schema.features:
            lengths = rng.poisson(pooling_factor(feature, ShardingConfig()), rows)
            lengths = drawn.setdefault(feature.beside or feature.name, lengths)
            request.update(_draw(feature, schema, vocabularies, lengths, rng))
    return requests


def _draw(
    feature: Feature,
    schema: Schema,
    vocabularies: Mapping[str, pa.Array],
    lengths: np.ndarray,
    rng: np.random.Generator,
) -> dict[str, list[Any]]:
    rows = len(lengths)
    if feature.is_cross:
        return {}
    if feature.kind == "numeric":
        return {feature.source_column: rng.gamma(2.0, 10.0, rows).tolist()}
    if feature.kind == "vector":
        return {feature.source_column: rng.normal(size=(rows, feature.width)).tolist()}
    if feature.encoding == "gap":
        return {feature.source_column: [sorted(rng.gamma(2.0, 10.0, length), reverse=True) for length in lengths]}
    known = vocabularies[feature.vocabulary].to_pylist() if feature.encoding == "vocabulary" else None
    limit = len(known) if known is not None else schema.table_of[feature.name].num_embeddings

    def values(count: int) -> list[Any]:
        ids = rng.integers(0, max(limit, 1), count).tolist()
        return [known[place] for place in ids] if known else ids

    if feature.kind == "categorical":
        return {feature.source_column: values(rows)}
    drawn = {feature.source_column: [values(length) for length in lengths]}
    if feature.is_weighted:
        drawn[feature.weights] = [rng.random(length).tolist() for length in lengths]
    return drawn


WARM_UP = 3
Models = dict[str, serving.ServingModel]
CORES = len(os.sched_getaffinity(0))  # that this process may use


class Contest(NamedTuple):
    """What is timed."""

    rows: tuple[int, ...] = (1, 8, 64, 512)  # of a request
    threads: tuple[int, ...] = (1, 2, 4)  # of torch
    seconds: float = 5.0  # for each pair of rows and threads, all models together
    calls: int = 100  # of each model at least, for each such pair
    clock: Callable[[], float] = time.perf_counter


class Timing(NamedTuple):
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


def run_latency(
    folders: Sequence[str],
    contest: Contest,
    *,
    beside: Sequence[str] = (),
    compiled: bool = False,
    as_json: bool = False,
) -> int:
    """Time artifacts, and models of the kinds `beside` on the first one's tables; print a table or JSON. InputError if one is no artifact."""
    models = contestants([Path(folder) for folder in folders], beside, compiled=compiled)
    first = next(iter(models.values()))
    requests = {rows: draw_requests(first.preprocess.schema, first.vocabularies, rows) for rows in contest.rows}
    for name, model in models.items():
        try:
            model.predict(next(iter(requests.values()))[0])
        except ValueError as error:
            raise InputError(f"{name}: {error}; artifacts side by side need the same columns") from None
    timings = race(models, requests, contest)
    if as_json:
        latency = [timing._asdict() for timing in timings]
        print(json.dumps({"artefacts": list(folders), "cores": CORES, "latency": latency}))
    else:
        print("\n".join(latency_lines(folders, timings)))
    return 0


def contestants(folders: Sequence[Path], beside: Sequence[str], *, compiled: bool) -> Models:
    """Name -> model: the artifacts by their kind, or by their folder where kinds repeat; then the rivals."""
    artifacts = [open_artifact(folder) for folder in folders]
    kinds = [artifact.spec["kind"] for artifact in artifacts]
    models: Models = {}
    for folder, artifact, kind in zip(folders, artifacts, kinds, strict=True):
        name = kind if kinds.count(kind) == 1 else folder.name
        if name in models:
            raise InputError(f"{folder}: two artifacts of that name; rename one of the folders")
        models[name] = artifact
        if compiled:
            models[f"{name}, compiled"] = open_artifact(folder, compiled=True)
    if not beside:  # the config of a plug-in's artifact loads its code
        return models
    config = load_config(folders[0] / "config.toml")
    if unknown := [kind for kind in beside if kind not in config.model.kinds]:
        raise InputError(f"--beside {unknown[0]}: wanted some of {', '.join(config.model.kinds)}")
    return models | {kind: rival(artifacts[0], config, kind) for kind in beside if kind not in kinds}


def rival(artifact: serving.ServingModel, config: RunConfig, kind: str) -> serving.ServingModel:
    """Another model on the fields and tables of an artifact of this config."""
    model = dataclasses.replace(fit_widths(config.model), kind=kind)
    if needs_wide(model) != needs_wide(config.model):
        raise InputError(
            f"--beside {kind}: needs tables of one weight per id, or lacks the artifact's; export it instead"
        )
    weights = untrained(dataclasses.replace(config, model=model), artifact.preprocess.schema)
    exported = take_apart(weights, vocabularies=artifact.vocabularies)
    rows = {pooling: tables.weights_host for pooling, tables in artifact.tables.items()}
    spec = exported.spec | {"rows": artifact.spec["rows"]}
    return dataclasses.replace(exported, spec=spec, rows=rows | artifact.id_rows).model()


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
                        p50, p95, p99 = (1e3 * np.percentile(seconds.sum(axis=1), (50, 95, 99))).tolist()
                        preprocess, tables, dense = (1e3 * np.median(seconds, axis=0)).tolist()
                        calls = len(seconds)
                        p95, p99 = p95 if calls >= 20 else None, p99 if calls >= 100 else None
                        timings.append(Timing(name, threads, rows, p50, p95, p99, preprocess, tables, dense, calls))
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
            found[name].append(_time_call(model, requests[call % len(requests)], contest.clock))
        turns.append(turns.pop(0))  # who follows whom must not decide
        call += 1
    return {name: np.asarray(times) for name, times in found.items()}


@torch.inference_mode()
def _time_call(model: serving.ServingModel, request: Mapping[str, Any], clock: Callable[[], float]) -> list[float]:
    start = clock()
    inputs = model.preprocess(request)
    prepared = clock()
    pooled = model.embed(inputs)
    embedded = clock()
    torch.sigmoid(model.graph(pooled)).numpy()
    return [prepared - start, embedded - prepared, clock() - embedded]


def latency_lines(folders: Sequence[str], timings: Sequence[Timing]) -> list[str]:
    """The table for people, and by how much the first model is slower than the second."""
    cells = [[f"{each:.2f}" if isinstance(each, float) else str(each or "-") for each in timing] for timing in timings]
    table = Table(Timing._fields, tuple(map(tuple, cells)))
    lines = [f"{', '.join(folders)}: one request, milliseconds; {CORES} cores", "", text_table(table)]
    if max(each.threads for each in timings) > CORES:
        lines.append(f"more threads than the {CORES} cores: they wait for each other")
    fewest = min(each.threads for each in timings)
    medians = {(each.model, each.rows): each.p50 for each in timings if each.threads == fewest}
    first, *others = dict.fromkeys(each.model for each in timings)
    for other in others:
        gaps = (f"{medians[first, n] - medians[other, n]:+.2f} ms at {n} rows" for m, n in medians if m == first)
        lines.append(f"{first} over {other}, p50, {fewest} threads: {', '.join(gaps)}")
    return lines
