"""Writes a run's report.html from its metrics.jsonl, plan.json and config.toml; reads no weights and no data."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.errors import InputError
from mbcnet_rec.logs.metrics_log import METRICS, write_whole
from mbcnet_rec.report import figures
from mbcnet_rec.report.page import Block, Code, Heading, Picture, Table, Text, to_html

REPORT, CONFIG, PLAN = "report.html", "config.toml", "plan.json"
RELIABILITY = "reliability"
LARGEST = 10  # tables that are listed by name
Lines = Mapping[str, Sequence[Mapping[str, Any]]]  # split -> lines of metrics.jsonl
Plots = list[tuple[str, Mapping[str, Sequence[figures.Curve]]]]  # title, name of a line -> its curves


def write_run_report(folder: Path) -> Path:
    """Write RUN/report.html.

    Raises:
        InputError: it is not a run folder, or nothing has been logged yet.
    """
    if not (folder / METRICS).is_file():
        raise InputError(f"{folder}: no run folder (it has no {METRICS}); pass what `mbcnet train` wrote")
    lines: dict[str, list[dict[str, Any]]] = {}
    for text in (folder / METRICS).read_text().splitlines():
        line = json.loads(text)
        lines.setdefault(line["split"], []).append(line)
    if not lines:
        raise InputError(f"{folder}/{METRICS}: it is empty; wait for the first line, or train longer")
    config = (folder / CONFIG).read_text() if (folder / CONFIG).is_file() else ""
    plan = json.loads((folder / PLAN).read_text()) if (folder / PLAN).is_file() else {}
    blocks = [
        *result_blocks(lines),
        *curve_blocks(lines),
        *calibration_blocks(lines),
        *cooperation_blocks(lines),
        *speed_blocks(lines),
        *plan_blocks(plan),
        Heading("Again"),
        Code(f"mbcnet train --config {folder / CONFIG} --set train.out={folder}-again"),
        Code(config, "config.toml, every key resolved"),
    ]
    last = max(line["step"] for split in lines.values() for line in split)
    page = to_html(
        f"Run {folder.name}", f"{last:,} steps. Written from {METRICS}, {PLAN} and {CONFIG}.", blocks
    )
    write_whole(folder / REPORT, page)
    return folder / REPORT


def curve(lines: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """A metric over steps."""
    return [(line["step"], line[key]) for line in lines if line.get(key) is not None]


def outputs(lines: Lines) -> list[str]:
    """Outputs that were logged, fused first."""
    keys = {key for split in lines.values() for line in split[:1] for key in line}
    return ["fused", *sorted((key[4:] for key in keys if key.startswith("auc/")), key=_branch_order)]


def _branch_order(name: str) -> tuple[int, str]:
    known = list(figures.COLOURS)
    return (known.index(name) if name in known else len(known), name)


def result_blocks(lines: Lines) -> list[Block]:
    """The last test line, or the best validation."""
    split = "test" if lines.get("test") else "valid"
    scored = [line for line in lines.get(split, ()) if line.get("auc") is not None]
    if not scored:
        return [Heading("Result"), Text("No validation or test rows were scored.")]
    line = scored[-1] if split == "test" else max(scored, key=lambda each: each["auc"])
    rows = []
    for name in outputs(lines):
        ending = "" if name == "fused" else f"/{name}"
        values = [line.get(f"{metric}{ending}") for metric in ("auc", "log_loss", "ne", "calibration")]
        rows.append((figures.label(name), *("" if value is None else f"{value:.4f}" for value in values)))
    group = "" if line.get("gauc") is None else f" GAUC of the fused output {line['gauc']:.4f}."
    return [
        Heading("Result"),
        Text(f"{split} split, {line.get('rows', 0):,} rows, weights of step {line['step']:,}.{group}"),
        Table(("output", "AUC", "log-loss", "normalised entropy", "calibration"), tuple(rows), 0),
    ]


def _section(heading: str, plots: Plots, caption: str, columns: int = 0, text: str = "") -> list[Block]:
    """A section with one picture of all plots; nothing where there are none."""
    if not plots:
        return []
    picture = Picture(heading.lower(), figures.curves_figure(plots, columns), caption)
    return [Heading(heading), *([Text(text)] if text else []), picture]


def curve_blocks(lines: Lines) -> list[Block]:
    """Loss and AUC of every output over steps."""
    plots: Plots = []
    for title, split, metric in (
        ("train log-loss", "train", "log_loss"),
        ("validation log-loss", "valid", "log_loss"),
        ("validation AUC", "valid", "auc"),
    ):
        keys = {name: metric if name == "fused" else f"{metric}/{name}" for name in outputs(lines)}
        points = {name: curve(lines.get(split, ()), key) for name, key in keys.items()}
        found = {
            name: [figures.smooth(each) if split == "train" else each]
            for name, each in points.items()
            if each
        }
        if found:
            plots.append((title, found))
    caption = "The fused output serves. Train curves are means over neighbouring lines of the log."
    return _section("Curves", plots, caption)


def calibration_blocks(lines: Lines) -> list[Block]:
    """Predicted against observed rates of the last scored line that has them."""
    for split in ("test", "valid"):
        for line in reversed(lines.get(split, ())):
            if line.get(RELIABILITY):
                picture = figures.calibration_figure(line[RELIABILITY], f"{split}, step {line['step']:,}")
                caption = "Rows by rising prediction, in bins of equal size; bars are 95 % intervals of the observed rate (Wilson)."
                return [Heading("Calibration"), Picture("calibration", picture, caption)]
    return []


def cooperation_blocks(lines: Lines) -> list[Block]:
    """Disagreement, loss terms, transforms, latents and gradients by branch."""
    train = lines.get("train", ())
    plots = [
        plot
        for key in ("coteaching_loss", "differentiation_loss")
        for plot in _plots(train, {key.replace("coteaching", "co-teaching").replace("_", " "): key})
        if any(value for _, value in curve(train, key))
    ]
    for title, prefix in {
        "disagreement of directed pairs": "disagreement/",
        "||W - I||": "transform_distance/",
        "mean norm of the latents": "latent_norm/",
        "share of the gradient": "gradient_share/",
    }.items():
        keys = sorted({key for line in train for key in line if key.startswith(prefix)})
        found = {key.partition("/")[2]: [figures.smooth(curve(train, key))] for key in keys}
        if found:
            plots.append((title, found))
    caption = "A directed pair a>b disagrees on a row where a is right and b is wrong: there a teaches b."
    return _section("Branches", plots, caption, columns=2 if len(plots) in (2, 4) else 3)


def _plots(train: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> Plots:
    """One plot for each title -> key that was logged."""
    points = {(title, key): curve(train, key) for title, key in titles.items()}
    return [(title, {key: [figures.smooth(each)]}) for (title, key), each in points.items() if each]


def speed_blocks(lines: Lines) -> list[Block]:
    """Samples a second, and which share of the time training waited for input."""
    train = lines.get("train", ())
    titles = {
        "samples a second": "samples_per_second",
        "share of time waiting for input": "input_wait_share",
        "gradient norm, dense part": "grad_norm",
    }
    waits = sorted(value for _, value in curve(train, "input_wait_share"))
    speeds = sorted(value for _, value in curve(train, "samples_per_second"))
    text = (
        f"Median of the log's lines: {speeds[len(speeds) // 2]:,.0f} samples a second, "
        f"{waits[len(waits) // 2]:.1%} of the time spent waiting for input."
        if waits and speeds
        else ""
    )
    return _section("Speed", _plots(train, titles), "Over steps.", text=text)


def plan_blocks(plan: Mapping[str, Any]) -> list[Block]:
    """Where the tables live, by kind of sharding; the largest tables by name."""
    tables = plan.get("tables", {})
    if not tables:
        return []
    kinds: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for table in tables.values():
        kinds.setdefault((table["sharding_type"], table["compute_kernel"]), []).append(table)
    by_kind = tuple(
        (
            f"{sharding}, {kernel}",
            str(len(members)),
            f"{sum(each['num_embeddings'] for each in members):,}",
            f"{sum(each['num_embeddings'] * each['embedding_dim'] for each in members):,}",
        )
        for (sharding, kernel), members in sorted(kinds.items())
    )
    sizes = {name: table["num_embeddings"] * table["embedding_dim"] for name, table in tables.items()}
    by_size = tuple(
        (
            name,
            f"{table['num_embeddings']:,} x {table['embedding_dim']}",
            table["sharding_type"],
            ", ".join(map(str, table.get("ranks") or ())) or "all",
        )
        for name, table in sorted(tables.items(), key=lambda item: -sizes[item[0]])[:LARGEST]
    )
    return [
        Heading("Plan"),
        Text(f"{len(tables)} tables on {plan.get('world_size', 1)} ranks, {plan.get('device', '')}."),
        Table(("sharding, kernel", "tables", "rows", "weights"), by_kind),
        Table(("largest tables", "size", "sharding", "ranks"), by_size),
    ]
