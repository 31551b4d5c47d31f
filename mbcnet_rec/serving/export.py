"""`mbcnet export`: a run's best checkpoint -> an artifact (artifact.py), compared with the float model on the test rows."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.errors import InputError
from data.reading.conditions import select_files
from data.reading.files import files_in_words, resolve_files
from data.reading.storage import is_uri
from data.whole_folder import earlier_summary, whole_folder, write_whole
from mbcnet_rec.logs.metrics_log import finite_or_none
from mbcnet_rec.logs.progress import RowBar
from mbcnet_rec.report.page import to_text
from mbcnet_rec.runtime.process import joined_process
from mbcnet_rec.scoring.chunks import labelled_rows
from mbcnet_rec.scoring.metrics import evaluate_predictions
from mbcnet_rec.scoring.predict import refuse_remote
from mbcnet_rec.scoring.tasks import by_task, joined
from mbcnet_rec.scoring.trained_run import find_best, load_run
from mbcnet_rec.serving import artifact
from mbcnet_rec.serving import loader as serving
from mbcnet_rec.serving.calibration import entropy_of, fit_calibration
from mbcnet_rec.serving.delta import write_delta
from mbcnet_rec.serving.latency import draw_requests

CHECK = "check.json"
CHECK_BATCH, ROWS_TO_COMPARE = 4096, 64
CHECK_ROWS = 1_000_000  # of the test split, scored by the artifact and by the float model


def run_export(
    run_folder: str,
    out: str,
    *,
    rows: str = "int8",
    branches: Sequence[str] = (),
    aot: bool | None = None,
    calibrate: str = "",
    triton: bool = False,
    overwrite: bool = False,
) -> int:
    """Export a run's best checkpoint, and compare the artifact with the float model on the test rows. In one process.

    Without branches all serve. `aot` compiles the dense part besides, for this machine's processor; None: where a C++ compiler is there.
    `calibrate`: isotonic or platt. With `triton` the artifact is a version in a model repository of Triton. InputError if there is no such
    run, it lacks a branch, or `out` holds something else.
    """
    refuse_remote(out)
    folder, target = Path(run_folder), Path(out)
    config = load_run(folder)
    artifact.check_branches(config, branches)
    if earlier_summary(target, serving.MODEL, "artifact") is not None and not overwrite:
        raise InputError(f"{target}: holds an artifact already; replace it with --overwrite, or choose another --out")
    if triton and not re.fullmatch(r"[1-9]\d*", target.absolute().name):
        raise InputError(f"--triton --out {out}: wanted REPOSITORY/MODEL/VERSION, the version a number such as 1")
    compiler = shutil.which("g++") or shutil.which("clang++")
    if aot and not compiler:
        raise InputError("--aot: no C++ compiler on this machine (g++ or clang++); install one, or leave it out")
    with joined_process("cpu") as process:
        run = find_best(config, folder, process)
    weights = artifact.load_weights(run)
    parts = artifact.take_apart(weights, branches)
    exported = artifact.with_rows(parts, weights, rows)
    exported.spec["step"] = run.step
    _calibrate(exported, calibrate, weights)
    wanted = bool(compiler) if aot is None else aot
    if wanted:
        print("compiling the dense part for this processor: a minute or so (--no-aot leaves it out)", flush=True)
    with whole_folder(target) as draft:  # a server that watches takes it with its check
        problem = artifact.write_artifact(exported, config, draft, aot=wanted)
        if triton:
            shutil.copyfile(Path(__file__).with_name("triton_model.py"), draft / "model.py")
        served = serving.load(draft)
        of_float = artifact.with_rows(artifact.take_apart(weights) if branches else parts, weights, "fp32")
        of_float.spec["calibration"] = exported.spec.get("calibration")
        report: dict[str, Any] = size_report(draft, of_float)
        if problem:
            report["not_compiled"] = problem
        elif wanted:
            request = draw_requests(weights.schema, exported.vocabularies, ROWS_TO_COMPARE)[0]
            compiled = serving.load(draft, compiled=True)
            report["compiled_change"] = float(np.abs(compiled.predict(request) - served.predict(request)).max())
        try:
            report |= compare(served, of_float.model(), weights)
        except (InputError, ValueError) as error:  # the artifact is whole; its rows may lie on another machine
            report["not_compared"] = str(error)
        (draft / CHECK).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if problem and aot:
        raise InputError(f"--aot: the compiler failed ({problem}); {target} is written without")
    if triton:
        model = target.absolute().parent
        facts = {"name": json.dumps(model.name), "tasks": len(exported.spec.get("tasks", "1"))}
        write_whole(model / "config.pbtxt", to_text("triton.pbtxt", **facts) + "\n")
    print(_told(target, exported.spec, report))
    return 0


def run_delta(run_folder: str, since: str, out: str, *, overwrite: bool = False) -> int:
    """Export what a run's best checkpoint changes of an artifact; InputError if either is missing, or `out` holds something else."""
    folder, parent, target = Path(run_folder), Path(since), Path(out)
    config = load_run(folder)
    before = artifact.open_artifact(parent)
    if is_uri(out) or (earlier_summary(target, serving.DELTA, "delta") is not None and not overwrite):
        raise InputError(f"--out {out}: wanted a new folder of this machine; replace a delta with --overwrite")
    with joined_process("cpu") as process:
        run = find_best(config, folder, process)
    weights = artifact.load_weights(run)
    exported = artifact.with_rows(artifact.take_apart(weights, before.spec["branches"]), weights, before.spec["rows"])
    exported.spec["step"] = run.step
    _calibrate(exported, (before.spec.get("calibration") or {"kind": ""})["kind"], weights)
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{target.name}.", dir=target.absolute().parent) as whole:
        artifact.write_artifact(exported, config, Path(whole) / "whole")
        report = write_delta(before, parent, Path(whole) / "whole", target)
    print(
        f"{target}: from step {before.spec['step']} to {run.step}, {report['rows']:,} of {report['all_rows']:,} rows of tables, {report['freed']:,} freed, "
        f"{report['bytes'] / 1e6:.1f} MB, the whole artifact {report['whole_bytes'] / 1e6:.1f} MB"
    )
    return 0


def size_report(out: Path, of_float: artifact.Exported) -> dict[str, Any]:
    """Bytes of the artifact and of the same with float32 rows, and of each one's tables."""
    float_rows = sum(rows.nbytes for rows in of_float.rows.values())
    own_rows = (out / serving.TABLES).stat().st_size
    total = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return {
        "bytes": total,
        "table_bytes": own_rows,
        "float_table_bytes": float_rows,
        "float_bytes": total - own_rows + float_rows,
    }


def _calibrate(exported: artifact.Exported, kind: str, weights: artifact.Weights) -> None:
    """Fit on validation rows, as they will be served."""
    if kind:
        weights.schema.require_one_label(f"--calibrate {kind}")
        if not weights.config.data.valid:
            raise InputError(f"--calibrate {kind}: the run has no data.valid to fit it on; leave it out")
        (logits,), labels, _ = score_split((exported.model(),), weights, "valid")
        exported.spec["calibration"] = fit_calibration(kind, logits.numpy(), labels)


def score_split(
    models: Sequence[serving.ServingModel], weights: artifact.Weights, split: str
) -> tuple[list[Tensor], np.ndarray, dict[str, Any]]:
    """Each model's fused logits, what its tasks learn or the labels, `rows`, `taken` and a `sample`; InputError if rows are missing or faulty."""
    data, schema = weights.config.data, weights.schema
    where = getattr(data, f"{split}_where")
    files = select_files(resolve_files(getattr(data, split)), where, schema)
    reader, chunks = labelled_rows(files, schema, data.eval_options(where), schema.field_columns)
    logits: list[list[Tensor]] = [[] for _ in models]
    labels: list[np.ndarray] = []
    left = min(CHECK_ROWS, sum(chunk.num_rows for chunk in chunks))
    row_groups = (group for chunk in chunks for group in chunk.row_groups)
    batches = (batch for group in row_groups for batch in reader.scan(group, CHECK_BATCH))
    sample: dict[str, Any] = {}
    with RowBar(split, left) as bar:
        for columns, raw in batches:
            sample = sample or raw.slice(0, 1).to_pydict()
            inputs, rows = models[0].preprocess.inputs(columns), min(left, columns.num_rows)
            labels.append(columns.labels[:rows])
            for model, own in zip(models, logits, strict=True):
                own.append(model.score(inputs)[:rows])
            left -= rows
            bar.update(rows)
            if not left:
                break
    y, targets = np.concatenate(labels), getattr(weights.arch, "targets", None)
    y = y if targets is None else targets(torch.from_numpy(y)).numpy()
    sample = json.loads(json.dumps(sample, default=str), parse_constant=lambda _: None)
    return [torch.cat(own) for own in logits], y, {"rows": len(y), "taken": files_in_words(files), "sample": sample}


def compare(served: serving.ServingModel, of_float: serving.ServingModel, weights: artifact.Weights) -> dict[str, Any]:
    """Score test rows, else validation rows, by the artifact and the float model with all branches; InputError if rows are missing or faulty."""
    data = weights.config.data
    split = "test" if data.test else "valid" if data.valid else "train"
    logits, y, found = score_split((served, of_float), weights, split)
    found["split"] = split
    for name, own in zip(("", "float_"), logits, strict=True):
        parts = by_task(served.tasks, own.numpy().reshape(len(own), -1), y)
        metrics = joined({part.task: evaluate_predictions(part.logits, part.labels, ()) for part in parts})
        kept = [key for key in metrics if key.startswith(("auc", "log_loss"))]
        found |= {f"{name}{key}": finite_or_none(metrics[key]) for key in kept}
    p, q = (served.probabilities(own).astype(np.float64) for own in logits)
    if served.spec.get("calibration"):
        raw = evaluate_predictions(logits[0].numpy()[:, None], y, ())["ne"]
        found |= {"ne_before": finite_or_none(raw), "ne_after": finite_or_none(entropy_of(p, y))}
    first = p.reshape(len(p), -1)[:, 0]  # what `mbcnet serve` compares traffic with
    found |= {"mean_score": float(first.mean()), "score_deviation": float(first.std())}
    return found | {"largest_probability_change": float(np.abs(p - q).max())}


def _told(out: Path, spec: dict[str, Any], report: dict[str, Any]) -> str:
    metrics = []
    for task in (f"/{each}" for each in spec["tasks"]) if "tasks" in spec else ("",):
        for key, words in ((f"auc{task}", f"AUC{task}"), (f"log_loss{task}", f"log-loss{task}")):
            pair = report.get(key), report.get(f"float_{key}")
            metrics += [(words, *pair)] if None not in pair else []
    return to_text(
        "export.txt",
        out=out,
        spec=spec,
        report=report,
        metrics=metrics,
        compiled=serving.COMPILED,
        loader=artifact.LOADER,
    )
