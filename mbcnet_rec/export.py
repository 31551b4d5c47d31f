"""`mbcnet export`: a run's best checkpoint -> an artefact (artefact.py), compared with the float model on the test rows."""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data.arrow import Place, read_labels
from data.errors import InputError
from data.files import resolve_files
from data.selection import select_files
from data.storage import DataFile, open_parquet
from mbcnet_rec import serving
from mbcnet_rec.artefact import (
    LOADER,
    Exported,
    Weights,
    check_branches,
    load_weights,
    take_apart,
    with_rows,
    write_artefact,
)
from mbcnet_rec.build import quieten_libraries
from mbcnet_rec.trained import find_step, load_run
from mbcnet_rec.training.metrics import evaluate_predictions
from mbcnet_rec.training.process import joined_process
from mbcnet_rec.training.records import finite_or_none

CHECK = "check.json"
CHECK_ROWS = 1_000_000  # of the test split, scored by the artefact and by the float model


def run_export(
    run_folder: str,
    out: str,
    *,
    rows: str = "int8",
    branches: Sequence[str] = (),
    aot: bool = False,
    overwrite: bool = False,
    check_rows: int = CHECK_ROWS,
) -> int:
    """Export a run's best checkpoint, and compare the artefact with the float model on the test rows. In one process.

    Args:
        run_folder: that `mbcnet train` wrote.
        out: folder of the artefact.
        rows: fp32, fp16, int8 or int4.
        branches: to serve; none: all.
        aot: also compile the dense part.
        overwrite: replace an artefact in `out`.
        check_rows: of the test split that are scored by both at most.

    Raises:
        InputError: no such run, branches it has not, or `out` holds something else.
    """
    quieten_libraries()
    folder, target = Path(run_folder), Path(out)
    config = load_run(folder)
    check_branches(config, branches)
    _check_target(target, overwrite)
    if aot and shutil.which("g++") is None and shutil.which("clang++") is None:
        raise InputError(
            "--aot: no C++ compiler on this machine (g++ or clang++); install one, or leave it out"
        )
    with joined_process("cpu") as process:
        step = find_step(config, folder, process)
    weights = load_weights(config, folder, step)
    exported = take_apart(weights, rows, branches)
    exported.spec["step"] = step
    if target.exists():
        shutil.rmtree(target)
    write_artefact(exported, weights, target, aot=aot)
    of_float = with_rows(exported if not branches else take_apart(weights, "fp32"), weights, "fp32")
    served = serving.load(target, compiled=aot)
    report = size_report(target, of_float) | compare(served, of_float.model(), weights, check_rows)
    (target / CHECK).write_text(json.dumps(report, indent=1) + "\n")
    print("\n".join(_lines(target, exported.spec, report)))
    return 0


def _check_target(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / serving.MODEL).is_file():
        raise InputError(f"{out}: holds something that is no artefact; choose another --out")
    if not overwrite:
        raise InputError(
            f"{out}: holds an artefact already; replace it with --overwrite, or choose another --out"
        )


def size_report(out: Path, of_float: Exported) -> dict[str, int]:
    """Bytes of the artefact and of the same with float32 rows, and of each one's tables."""
    float_rows = sum(rows.numel() for rows in of_float.rows.values())
    own_rows = (out / serving.TABLES).stat().st_size
    total = sum(path.stat().st_size for path in out.iterdir())
    return {
        "bytes": total,
        "table_bytes": own_rows,
        "float_table_bytes": float_rows,
        "float_bytes": total - own_rows + float_rows,
    }


def compare(
    served: serving.ServingModel, of_float: serving.ServingModel, weights: Weights, limit: int
) -> dict[str, Any]:
    """Score test rows, else validation rows, by the artefact and by the float model with all its branches."""
    data = weights.config.data
    split = "test" if data.test else "valid" if data.valid else "train"
    files = select_files(resolve_files(getattr(data, split)), getattr(data, f"{split}_where"), weights.schema)
    logits: list[list[np.ndarray]] = [[], []]
    labels: list[np.ndarray] = []
    for rows in first_rows(files, [*served.preprocess.columns, weights.schema.label], limit):
        place = Place("test rows", 0)
        labels.append(
            read_labels(
                rows.column(rows.schema.names.index(weights.schema.label)), weights.schema.label, place
            )
        )
        for model, own in zip((served, of_float), logits, strict=True):
            own.append(model.logits(rows).numpy())
    y = np.concatenate(labels)
    found: dict[str, Any] = {"split": split, "rows": len(y)}
    for name, own in zip(("", "float_"), logits, strict=True):
        metrics = evaluate_predictions(np.concatenate(own)[:, None], y, ())
        found |= {f"{name}{key}": finite_or_none(metrics[key]) for key in ("auc", "log_loss")}
    p, q = (1 / (1 + np.exp(-np.concatenate(own).astype(np.float64))) for own in logits)
    return found | {"largest_probability_change": float(np.abs(p - q).max())}


def first_rows(files: Sequence[DataFile], columns: Sequence[str], limit: int) -> Iterator[pa.RecordBatch]:
    """Yield record batches of the files' first rows, `limit` in all at most."""
    left = limit
    for file in files:
        with open_parquet(file) as parquet:
            for rows in parquet.iter_batches(4096, columns=list(dict.fromkeys(columns)), use_threads=False):
                if left <= 0:
                    return
                yield rows.slice(0, left)
                left -= rows.num_rows


def _lines(out: Path, spec: dict[str, Any], report: dict[str, Any]) -> list[str]:
    branches = f", branches {' '.join(spec['branches'])}" if spec["branches"] else ""
    lines = [
        f"{out}: {spec['kind']}{branches}, rows {spec['rows']}, weights of step {spec['step']}",
        f"  size           {report['bytes'] / 1e6:.1f} MB, of float rows {report['float_bytes'] / 1e6:.1f} MB "
        f"(tables {report['table_bytes'] / 1e6:.1f} and {report['float_table_bytes'] / 1e6:.1f} MB)",
        f"  {report['split']}, {report['rows']:,} rows, against the float model",
    ]
    for key, words in (("auc", "AUC"), ("log_loss", "log-loss")):
        now, before = report[key], report[f"float_{key}"]
        if now is not None and before is not None:
            lines.append(f"  {words:<14} {now:.6f}, float {before:.6f}, change {now - before:+.1e}")
    lines.append(f"  probability    largest change {report['largest_probability_change']:.1e}")
    return [
        *lines,
        f"next: python {out}/{LOADER} {out} ROWS.parquet   (needs torch, fbgemm-gpu and pyarrow only)",
    ]
