"""`mbcnet bench latency`: milliseconds of one request to an artifact, by rows and threads, beside other models on the same tables; and Table 8.

A request is columns of plain Python values, as an RPC hands them over; its answer is one probability a row. Its three parts are timed
apart: preprocessing, lookups, dense part. The models take turns, request by request, so that what slows the machine slows all of them.
Rivals are not trained: which weights they have changes no time.
"""

import dataclasses
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from tqdm import tqdm

from data.errors import InputError
from data.schema import Schema, load_schema
from mbcnet_rec.config import RunConfig, load_config
from mbcnet_rec.model.models import ModelConfig, ModelKind, needs_wide
from mbcnet_rec.model.zoo.dcnv2 import DCNv2Config
from mbcnet_rec.model.zoo.dnn import DNNConfig
from mbcnet_rec.serving import loader as serving
from mbcnet_rec.serving.artifact import take_apart, untrained
from mbcnet_rec.serving.complexity import Part, measure_parts
from mbcnet_rec.serving.sample_requests import Requests, draw_requests, read_requests

WARM_UP = 3
STEPS = ("preprocess", "tables", "dense")
PERCENTILES = {"p50": 1, "p95": 20, "p99": 100}  # and how many calls it takes to know it


@dataclass(frozen=True)
class Contest:
    """What is timed.

    Attributes:
        rows: of a request.
        threads: of torch.
        seconds: for each pair of rows and threads, all models together; but at least `calls` of each model.
        calls: see there.
    """

    rows: tuple[int, ...] = (1, 8, 64, 512)
    threads: tuple[int, ...] = (1, 2, 4)
    seconds: float = 5.0
    calls: int = 100


@dataclass(frozen=True)
class Timing:
    """One line of the table; milliseconds. A percentile that the calls are too few for is None."""

    model: str
    threads: int
    rows: int
    p50: float | None
    p95: float | None
    p99: float | None
    preprocess: float
    tables: float
    dense: float
    calls: int


@dataclass(frozen=True)
class Artifact:
    """An exported model, opened, with its config and schema."""

    folder: Path
    model: serving.ServingModel
    config: RunConfig
    schema: Schema


def run_latency(
    folders: Sequence[str],
    contest: Contest,
    *,
    beside: Sequence[str] = (),
    data: str = "",
    compiled: bool = False,
    as_json: bool = False,
) -> int:
    """Time artifacts and rivals, and print the tables.

    Args:
        folders: of artifacts.
        contest: rows, threads and time.
        beside: kinds of models to time besides, on the first artifact's tables.
        data: a Parquet file whose rows are the requests; none: drawn from the schema.
        compiled: also time the dense part that `mbcnet export` compiled.
        as_json: print one JSON object instead.

    Raises:
        InputError: a folder is not an artifact, or the file has too few rows.
    """
    unknown = [kind for kind in beside if kind not in get_args(ModelKind)]
    if unknown:
        raise InputError(f"--beside {unknown[0]}: wanted some of {', '.join(get_args(ModelKind))}")
    artifacts = [open_artifact(Path(folder)) for folder in folders]
    models = contestants(artifacts, beside, compiled=compiled)
    first = artifacts[0]
    vocabularies = serving.load_vocabularies(first.folder, first.model.spec)
    columns = list(dict.fromkeys(name for model in models.values() for name in model.preprocess.columns))
    requests = {
        rows: read_requests(data, columns, rows) if data else draw_requests(first.schema, vocabularies, rows)
        for rows in contest.rows
    }
    for name, model in models.items():
        try:
            model.predict(next(iter(requests.values()))[0])
        except ValueError as error:
            raise InputError(f"{name}: {error}; artifacts side by side need the same columns") from None
    timings = race(models, requests, contest)
    parts = table_8(first, contest)
    if as_json:
        print(json.dumps(report(folders, timings, parts)))
    else:
        print("\n".join([*latency_lines(folders, timings), *part_lines(parts)]))
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
    return Artifact(folder, model, load_config(folder / "config.toml"), load_schema(folder / "schema.toml"))


def contestants(
    artifacts: Sequence[Artifact], beside: Sequence[str], *, compiled: bool
) -> dict[str, serving.ServingModel]:
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
    config = dataclasses.replace(
        artifact.config, model=dataclasses.replace(rival_config(artifact.config.model), kind=kind)
    )
    if needs_wide(config.model) != needs_wide(artifact.config.model):
        config_tables = "needs tables of one weight per id"
        raise InputError(
            f"--beside {kind}: it {config_tables}, or lacks those of the artifact; export it instead"
        )
    vocabularies = serving.load_vocabularies(artifact.folder, artifact.model.spec)
    exported = take_apart(untrained(config, artifact.schema), vocabularies=vocabularies)
    spec = exported.spec | {"rows": artifact.model.spec["rows"]}
    rows = {pooling: tables.weights_host for pooling, tables in artifact.model.tables.items()}
    rows |= artifact.model.id_rows
    return serving.ServingModel(spec, artifact.schema, rows, exported.dense, vocabularies)


def rival_config(model: ModelConfig) -> ModelConfig:
    """DCNv2 and DNN of the MBCnet's own widths, where the run's config does not describe them.

    DCNv2 is the paper's online base: MBCnet's cross and deep branch, without the EFGC branch.
    """
    own, deep = model.mbcnet, model.mbcnet.deep.hidden
    dcnv2 = dataclasses.replace(model.dcnv2, cross=own.cross, hidden=deep)
    dnn = dataclasses.replace(model.dnn, hidden=(*deep, *own.top))
    return dataclasses.replace(
        model,
        dcnv2=dcnv2 if model.dcnv2 == DCNv2Config() else model.dcnv2,
        dnn=dnn if model.dnn == DNNConfig() else model.dnn,
    )


def race(
    models: Mapping[str, serving.ServingModel], requests: Mapping[int, Requests], contest: Contest
) -> list[Timing]:
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
                        timings.append(_timing(name, threads, rows, 1e3 * seconds))
                    bar.update()
    finally:
        torch.set_num_threads(before)
    return timings


def _take_turns(
    models: Mapping[str, serving.ServingModel], requests: Requests, contest: Contest
) -> dict[str, np.ndarray]:
    """Name -> (calls, 3) seconds of the parts."""
    found: dict[str, list[list[float]]] = {name: [] for name in models}
    for model in models.values():
        for request in requests[:WARM_UP]:
            model.predict(request)
    end, call = time.perf_counter() + contest.seconds, 0
    while call < contest.calls or time.perf_counter() < end:
        for name, model in _rotated(models, call):
            found[name].append(_time_call(model, requests[call % len(requests)]))
        call += 1
    return {name: np.asarray(times) for name, times in found.items()}


def _rotated(
    models: Mapping[str, serving.ServingModel], call: int
) -> Iterator[tuple[str, serving.ServingModel]]:
    """The models from another start each time: who follows whom must not decide."""
    items = list(models.items())
    start = call % len(items)
    yield from items[start:]
    yield from items[:start]


@torch.inference_mode()
def _time_call(model: serving.ServingModel, request: Mapping[str, Any]) -> list[float]:
    start = time.perf_counter()
    inputs = model.preprocess(request)
    prepared = time.perf_counter()
    pooled = model.embed(inputs)
    embedded = time.perf_counter()
    torch.sigmoid(model.graph(pooled)).numpy()
    return [prepared - start, embedded - prepared, time.perf_counter() - embedded]


def _timing(name: str, threads: int, rows: int, parts: np.ndarray) -> Timing:
    whole, calls = parts.sum(axis=1), len(parts)
    tails = {
        key: float(np.percentile(whole, int(key[1:]))) if calls >= least else None
        for key, least in PERCENTILES.items()
    }
    medians = dict(zip(STEPS, np.median(parts, axis=0).tolist(), strict=True))
    return Timing(model=name, threads=threads, rows=rows, calls=calls, **tails, **medians)


def table_8(artifact: Artifact, contest: Contest) -> dict[int, list[Part]]:
    """Rows of a batch -> the parts of the artifact's MBCnet, as the paper's Table 8 lists them; nothing for other models."""
    if artifact.config.model.kind != "mbcnet":
        return {}
    served = dataclasses.replace(
        artifact.config.model.mbcnet, branches=tuple(artifact.model.spec["branches"])
    )
    ends = sorted({min(contest.rows), max(contest.rows)})
    before = torch.get_num_threads()
    torch.set_num_threads(min(contest.threads))
    try:
        return {rows: measure_parts(served, artifact.schema, rows, torch.device("cpu")) for rows in ends}
    finally:
        torch.set_num_threads(before)


def report(
    folders: Sequence[str], timings: Sequence[Timing], parts: Mapping[int, Sequence[Part]]
) -> dict[str, Any]:
    """Everything as one JSON object; times in milliseconds."""
    return {
        "artefacts": list(folders),
        "cores": num_cores(),
        "latency": [dataclasses.asdict(timing) for timing in timings],
        "parts": {
            str(rows): [each.as_dict() | {"complexity": each.complexity} for each in entries]
            for rows, entries in parts.items()
        },
    }


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def latency_lines(folders: Sequence[str], timings: Sequence[Timing]) -> list[str]:
    """The table for people, and by how much the first model is slower than the second."""
    cores = num_cores()
    lines = [
        f"{', '.join(folders)}: one request, milliseconds; {cores} cores",
        "",
        f"{'threads':>7}{'rows':>6}  {'model':<18}{'p50':>9}{'p95':>9}{'p99':>9}   "
        f"{'preprocess':>10}{'tables':>9}{'dense':>9}{'calls':>8}",
    ]
    last = None
    for each in timings:
        place = (each.threads, each.rows)
        head = f"{each.threads:>7}{each.rows:>6}" if place != last else " " * 13
        tails = "".join(
            f"{'-' if value is None else f'{value:.2f}':>9}" for value in (each.p50, each.p95, each.p99)
        )
        lines.append(
            f"{head}  {each.model:<18}{tails}   {each.preprocess:>10.2f}{each.tables:>9.2f}{each.dense:>9.2f}"
            f"{each.calls:>8,}"
        )
        last = place
    names = list(dict.fromkeys(each.model for each in timings))
    if max(each.threads for each in timings) > cores:
        lines.append(f"more threads than the {cores} cores: they wait for each other")
    if len(names) > 1:
        lines += ["", *_difference_lines(names, timings)]
    return lines


def _difference_lines(names: Sequence[str], timings: Sequence[Timing]) -> list[str]:
    """The first model's median against each other's, at the fewest threads."""
    fewest = min(each.threads for each in timings)
    medians = {(each.model, each.rows): each.p50 for each in timings if each.threads == fewest}
    rows = sorted({each.rows for each in timings})
    words = "thread" if fewest == 1 else "threads"
    return [
        f"{names[0]} over {other}, p50, {fewest} {words}: "
        + ", ".join(
            f"{(medians[names[0], number] or 0) - (medians[other, number] or 0):+.2f} ms at {number} rows"
            for number in rows
        )
        for other in names[1:]
    ]


def part_lines(parts: Mapping[int, Sequence[Part]]) -> list[str]:
    """Table 8 of the paper: each part's own forward pass."""
    if not parts:
        return []
    heads = "".join(f"{f'ms, {rows} rows':>14}" for rows in parts)
    lines = [
        "",
        "Table 8: forward pass of each part by itself, in float32",
        f"  {'part':<26}{'complexity':<28}{'parameters':>12}{'MFLOP a row':>13}{heads}",
    ]
    for same in zip(*parts.values(), strict=True):
        times = "".join(f"{part.milliseconds:>14.2f}" for part in same)
        lines.append(
            f"  {same[0].name:<26}{same[0].complexity:<28}{same[0].parameters:>12,}{same[0].flops / 1e6:>13.2f}{times}"
        )
    return lines
