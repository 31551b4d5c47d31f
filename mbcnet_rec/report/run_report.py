"""Writes a run's report.html from its metrics.jsonl, plan.json and config.toml; reads no weights and no data."""

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median_high
from typing import Any

from data.errors import InputError
from data.whole_folder import write_whole
from mbcnet_rec.checkpoints.run_folder import CONFIG, PLAN
from mbcnet_rec.lineage import read_days
from mbcnet_rec.logs.metrics_log import METRICS, PROGRESSIVE, read_metrics
from mbcnet_rec.report import figures
from mbcnet_rec.report.page import Block, Code, Heading, Picture, Table, Text, shown, to_html, with_half
from mbcnet_rec.scoring.metrics import why_no_auc
from mbcnet_rec.scoring.ranking import title_of
from mbcnet_rec.scoring.tasks import LOWER

REPORT = "report.html"
IMPORTANCE = "importance.json"  # of `mbcnet importance`
RELIABILITY = "reliability"
MOST_IMPORTANT = 40  # fields of a picture
LARGEST = 10  # tables that are listed by name
_SHOWN = tomllib.loads(Path(__file__).with_name("run.toml").read_text(encoding="utf-8"))
CURVES, CAPTIONS, DAYS, IDS = (_SHOWN[name] for name in ("curves", "captions", "days", "ids"))
Lines = Mapping[str, Sequence[Mapping[str, Any]]]  # split -> lines of metrics.jsonl, by step
Plots = list[tuple[str, Mapping[str, Sequence[figures.Curve]]]]  # title, name of a line -> its curves


def write_run_report(folder: Path) -> Path:
    """Write RUN/report.html; InputError if it is not a run folder, or nothing has been logged yet."""
    lines = read_metrics(folder)
    if not lines:
        raise InputError(f"{folder}/{METRICS}: it is empty; wait for the first line, or train longer")
    days = read_days(folder)
    config = (folder / CONFIG).read_text(encoding="utf-8") if (folder / CONFIG).is_file() else ""
    plan = json.loads((folder / PLAN).read_text(encoding="utf-8")) if (folder / PLAN).is_file() else {}
    blocks = [
        *dead_blocks(lines),
        *result_blocks(lines, tomllib.loads(config).get("train", {}).get("early_stop", "auc")),
        *curve_blocks("Curves", lines, "learning"),
        *day_blocks(days),
        *id_blocks(days, lines),
        *calibration_blocks(lines),
        *importance_blocks(folder),
        *curve_blocks("Branches", lines, "cooperation"),
        *speed_blocks(lines),
        *plan_blocks(plan),
        Heading("Again"),
        Code(f"mbcnet train --config {folder / CONFIG} --set train.out={folder}-again"),
        Code(config, "config.toml, every key resolved"),
    ]
    last = max(line["step"] for split in lines.values() for line in split)
    page = to_html(f"Run {folder.name}", f"{last:,} steps. Written from {METRICS}, {PLAN} and {CONFIG}.", blocks)
    write_whole(folder / REPORT, page)
    return folder / REPORT


def logged(lines: Lines, split: str, key: str) -> list[tuple[float, float]]:
    """A metric over steps, where it is not null."""
    return [(line["step"], line[key]) for line in lines.get(split, ()) if line.get(key) is not None]


def plots_of(runs: Sequence[Lines], wanted: Sequence[Sequence[str]]) -> Plots:
    """Take each metric, of (title, split, metric), and what is logged below it, METRIC/BRANCH or METRIC/PAIR, from runs that differ in their seed only.

    What was not logged or is 0 throughout is left out.
    """
    plots: Plots = []
    for title, split, metric in wanted:
        found = {key for run in runs for line in run.get(split, ()) for key in line}
        keys = {key.partition("/")[2] or "fused": key for key in found if f"{key}/".startswith(f"{metric}/")}
        lines = {}
        for name in sorted(keys, key=branch_order):
            curves = [logged(run, split, keys[name]) for run in runs]
            lines[name] = [figures.smooth(each) for each in curves] if split == "train" else curves
        if any(value for curves in lines.values() for each in curves for _, value in each):
            plots.append((title, lines))
    return plots


def branch_order(name: str) -> tuple[int, str]:
    """Sorts outputs: fused first, then as the paper names them."""
    known = list(figures.COLOURS)
    return (known.index(name) if name in known else len(known), name)


def judged_line(lines: Lines, splits: Sequence[str] = ("test", "valid"), key: str = "auc") -> Mapping[str, Any] | None:
    """A run's last line of test rows, else its best validation by `key`, or the last where none has it; None where neither was scored."""
    better = min if key.partition("/")[0] in LOWER else max
    for split in splits:
        found = lines.get(split, ())
        scored = [line for line in found if line.get(key) is not None]
        if split == "valid" and scored:
            return better(scored, key=lambda line: line[key])
        if found:
            return found[-1]
    return None


def importance_blocks(folder: Path) -> list[Block]:
    """What `mbcnet importance` found, if it was asked."""
    if not (folder / IMPORTANCE).is_file():
        return []
    found = json.loads((folder / IMPORTANCE).read_text(encoding="utf-8"))
    blocks: list[Block] = [Heading("Importance")]
    for kind in ("groups", "fields"):
        if found[kind]:
            header, rows = importance_cells(kind, found[kind], MOST_IMPORTANT)
            drawn = {name: (found[kind][name]["auc"], found[kind][name]["auc"][1] > 0) for name, *_ in rows}
            caption = CAPTIONS["importance"].format(**found | {"kind": kind[:-1]})
            blocks += [Picture(f"AUC lost by {kind}", figures.intervals_figure(drawn), caption), Table(header, rows)]
    return blocks


def importance_cells(
    kind: str, lost: Mapping[str, Mapping[str, Sequence[float]]], most: int
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Header and rows of a table: what is lost by each of the `most` worst; of groups also what the EFGC branch loses. +- is half an interval."""
    metrics = {"auc": "AUC lost", "log_loss": "log-loss"}
    if kind == "groups" and all("auc/efgc" in each for each in lost.values()):
        metrics["auc/efgc"] = "AUC lost by EFGC"
    worst = sorted(lost, key=lambda name: -lost[name]["auc"][0])[:most]
    rows = [(name, *(with_half(lost[name][key][0], lost[name][key][2], "+.5f") for key in metrics)) for name in worst]
    return (kind, *metrics.values()), tuple(rows)


def dead_blocks(lines: Lines) -> list[Block]:
    """A warning where an output died while training."""
    found = [line for line in lines.get("train", ()) if line.get("dead")]
    if not found:
        return []
    names = ", ".join(figures.label(name) for name in found[-1]["dead"])
    still = "to the end" if found[-1] is lines["train"][-1] else f"up to step {found[-1]['step']:,}"
    words = "Its latents are 0, or its logit is the same for all rows."
    return [Text(f"Dead from step {found[0]['step']:,} {still}: {names}. {words}")]


def result_blocks(lines: Lines, key: str) -> list[Block]:
    """The last test line, or the best validation by `key`, or the last day as it was scored before it was trained."""
    line = judged_line(lines, ("test", "valid", PROGRESSIVE), key)
    if line is None:
        return [Heading("Result"), Text("No validation or test rows were scored.")]
    branches = sorted((key[4:] for key in line if key.startswith("auc/")), key=branch_order)
    rows = []
    fused = () if any(f"rows/{name}" in line for name in branches) else (("fused", ""),)  # of one label
    for name, ending in (*fused, *((name, f"/{name}") for name in branches)):
        values = [line.get(metric + ending) for metric in ("auc", "log_loss", "ne", "calibration")]
        rows.append((figures.label(name), *map(shown, values)))
    reason = why_no_auc(line)
    told = "" if line.get("gauc") is None else f" GAUC of the fused output {line['gauc']:.4f}."
    titles = {key: title_of(key) for key in line if line[key] is not None and ("/" in key) != bool(fused)}
    ranks = [f"{title} {line[key]:.4f}" for key, title in titles.items() if title]
    told += f" Inside groups: {', '.join(ranks)}." if ranks else ""
    told += f" AUC is not defined: {reason}." if reason else ""
    return [
        Heading("Result"),
        Text(f"{line['split']} split, {line.get('rows', 0):,} rows, weights of step {line['step']:,}.{told}"),
        Table(("output", "AUC", "log-loss", "normalised entropy", "calibration"), tuple(rows), 0),
    ]


def curve_blocks(heading: str, lines: Lines, curves: str) -> list[Block]:
    """A section with one picture of all plots; nothing where there are none."""
    plots = plots_of([lines], CURVES[curves])
    if not plots:
        return []
    return [Heading(heading), Picture(heading.lower(), figures.curves_figure(plots), CAPTIONS[curves])]


def day_blocks(days: Sequence[Mapping[str, Any]]) -> list[Block]:
    """What each day was and how it was scored before it was trained, where a run has several."""
    if len(days) < 2:
        return []
    scored = [(number, day["progressive"]) for number, day in enumerate(days, 1) if day.get("progressive")]
    plots = day_plots(scored)
    rows = []
    for day in days:
        values = [day.get("label_rate"), *(day.get("progressive", {}).get(key) for key in DAYS)]
        alarms = "; ".join(day.get("alarms", ()))
        rows.append((day["name"], f"{day.get('rows', 0):,}", *map(shown, values), alarms))
    return [
        Heading("Days"),
        *([Picture("days", figures.curves_figure(plots, "day"), CAPTIONS["days"])] if plots else []),
        Table(("day", "rows", "label rate", *DAYS.values(), "alarms"), tuple(rows)),
    ]


def day_plots(scored: Sequence[tuple[int, Mapping[str, Any]]]) -> Plots:
    """The curves of days, (number, metrics), of the fused output; of several labels one for each."""
    plots: Plots = []
    tasks = sorted({key[5:] for _, each in scored for key in each if key.startswith("rows/")})  # none of one label
    for key, title in DAYS.items():
        keys = {task: f"{key}/{task}" for task in tasks} or {"fused": key}
        curves = {
            name: [[(float(number), each[own]) for number, each in scored if each.get(own) is not None]]
            for name, own in keys.items()
        }
        plots += [(title, curves)] if any(curve for (curve,) in curves.values()) else []
    return plots


def id_blocks(days: Sequence[Mapping[str, Any]], lines: Lines) -> list[Block]:
    """For each table or field the ids that got rows and lost them on the last day that tells, which share collides, and which was new."""
    found: dict[str, float] = {}
    for day in days:
        found |= {f"{what}/{name}": n for name, each in day.get("growth", {}).items() for what, n in each.items()}
        found |= {key.replace("unseen/", "new/"): value for key, value in day.get("profile", {}).items()}
    for line in (*lines.get("train", ()), *lines.get("ids", ())):
        found |= line
    names = dict.fromkeys(name for kind, _, name in (key.partition("/") for key in found) if kind in IDS)
    rows = []
    for name in names:
        values = [found.get(f"{kind}/{name}") for kind in IDS]
        cells = ("" if n is None else f"{n:.2%}" if isinstance(n, float) else f"{n:,}" for n in values)
        rows += [(name, *cells)] if any(values) else []
    return [Heading("Ids"), Table(("table or field", *IDS.values()), tuple(rows))] if rows else []


def calibration_blocks(lines: Lines) -> list[Block]:
    """Predicted against observed rates of the last scored line that has them."""
    scored = (line for split in ("test", "valid") for line in reversed(lines.get(split, ())) if line.get(RELIABILITY))
    if (line := next(scored, None)) is None:
        return []
    found = {key.partition("/")[2]: key for key in line if key.startswith(f"{RELIABILITY}/")} or {"": RELIABILITY}
    pictures: list[Block] = []
    for task, key in found.items():
        if line[key]:
            title = f"{task} {line['split']}, step {line['step']:,}".strip()
            picture = figures.calibration_figure(line[key], title)
            pictures.append(Picture(f"calibration {task}".strip(), picture, CAPTIONS["calibration"]))
    return [Heading("Calibration"), *pictures]


def speed_blocks(lines: Lines) -> list[Block]:
    """Samples a second, and which share of the time training waited for input."""
    blocks = curve_blocks("Speed", lines, "speed")
    speeds, waits = ([value for _, value in logged(lines, "train", key)] for _, _, key in CURVES["speed"][:2])
    if speeds and waits:
        text = (
            f"Median of the log's lines: {median_high(speeds):,.0f} samples a second, "
            f"{median_high(waits):.1%} of the time spent waiting for input."
        )
        blocks.insert(1, Text(text))
    return blocks


def plan_blocks(plan: Mapping[str, Any]) -> list[Block]:
    """Where the tables live, by kind of sharding; the largest tables by name."""
    tables = plan.get("tables", {})
    if not tables:
        return []
    rows_of = {name: table["num_embeddings"] for name, table in tables.items()}
    sizes = {name: rows_of[name] * table["embedding_dim"] for name, table in tables.items()}
    kinds: dict[str, list[str]] = {}
    for name, table in tables.items():
        kinds.setdefault(f"{table['sharding_type']}, {table['compute_kernel']}", []).append(name)
    by_kind = []
    for kind, names in sorted(kinds.items()):
        sums = (sum(each[name] for name in names) for each in (rows_of, sizes))
        by_kind.append((kind, str(len(names)), *(f"{each:,}" for each in sums)))
    by_size = []
    for name in sorted(tables, key=lambda name: -sizes[name])[:LARGEST]:
        table = tables[name]
        size = f"{rows_of[name]:,} x {table['embedding_dim']}"
        by_size.append((name, size, table["sharding_type"], ", ".join(map(str, table.get("ranks") or ())) or "all"))
    return [
        Heading("Plan"),
        Text(f"{len(tables)} tables on {plan.get('world_size', 1)} ranks, {plan.get('device', '')}."),
        Table(("sharding, kernel", "tables", "rows", "weights"), tuple(by_kind)),
        Table(("largest tables", "size", "sharding", "ranks"), tuple(by_size)),
    ]
