"""The picture of a plan: ranks by table, as HTML that stands alone and as PNG. Imports no torch; matplotlib for the PNG only."""

import html
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from data.errors import InputError
from sharding.cost.assess import PARTS, Assessment
from sharding.cost.memory import gib
from sharding.plan.compare import place_text
from sharding.report.text import report_lines, table_totals

ROWS_SHOWN = 40  # tables with a row of their own, by time; the rest share one
PLAIN = FuncFormatter(lambda value, _: f"{value:.2g}")
PART_COLOURS = ("#9e9e9e", "#3b6fb6", "#e08a2e", "#c2513f", "#4f9a5b")


def heat(assessment: Assessment) -> tuple[list[str], np.ndarray]:
    """Row names and (tables, ranks) milliseconds: tables with most time first, all others summed in the last row."""
    size = len(assessment.ranks)
    grid = {}
    for name, costs in assessment.costs.items():
        row = np.zeros(size)
        for cost in costs:
            row[cost.rank] += 1e3 * cost.times.total
        grid[name] = row
    names = sorted(grid, key=lambda name: -float(grid[name].sum()))
    shown, rest = names[:ROWS_SHOWN], names[ROWS_SHOWN:]
    values = [grid[name] for name in shown]
    if rest:
        shown = [*shown, f"{len(rest)} other tables"]
        values.append(np.sum([grid[name] for name in rest], axis=0))
    return shown, np.array(values)


def write_png(assessment: Assessment, path: Path) -> None:
    """Draw the heat map over bars of each rank's time by part and of its memory.

    Raises:
        InputError: the path cannot be written.
    """
    matplotlib.rcParams["font.size"] = 9
    names, values = heat(assessment)
    ranks = len(assessment.ranks)
    width, height = min(20.0, max(11.0, 7.0 + 0.11 * ranks)), 4.8 + 0.19 * len(names)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True, height_ratios=[0.19 * len(names) + 0.6, 1.7, 1.2])
    grid, bars, memory = axes
    positive = values[values > 0]
    norm = (
        LogNorm(max(float(positive.min()), float(positive.max()) / 1e3), float(positive.max()))
        if positive.size
        else None
    )
    masked = np.ma.masked_less_equal(values, 0)
    image = grid.imshow(
        masked,
        aspect="auto",
        cmap="viridis_r",
        norm=norm,
        interpolation="nearest",
        extent=(-0.5, ranks - 0.5, len(names) - 0.5, -0.5),
    )
    grid.set_yticks(
        range(len(names)),
        [f"{name} ({_kind(assessment, name)})" if name in assessment.plan.tables else name for name in names],
    )
    grid.set_facecolor("#f4f4f4")
    local = assessment.plan.local_group_size
    if local > 1:
        for edge in range(local, ranks, local):
            for axis in axes:
                axis.axvline(edge - 0.5, color="#bbbbbb", linewidth=0.6)
    bar = figure.colorbar(
        image, ax=axes.tolist(), label="ms a step", pad=0.01, fraction=0.02, shrink=0.6, anchor=(0.0, 1.0)
    )
    bar.ax.yaxis.set_major_formatter(PLAIN)
    bar.ax.yaxis.set_minor_formatter(PLAIN)
    plan, path_ = assessment.plan, assessment.path
    grid.set_title(
        f"{len(plan.tables)} tables on {assessment.cluster}, {plan.batch_size_per_rank:,} rows a rank\nstep {1e3 * path_.step:.2f} ms at least, "
        f"{assessment.samples_per_second / 1e6:.2f} M samples/s at most, bound by {path_.bound_by}",
        loc="left",
    )
    _draw_times(bars, assessment)
    _draw_memory(memory, assessment)
    memory.xaxis.set_major_locator(MaxNLocator(integer=True))
    memory.set_xlabel("rank" + (" (grey lines: hosts)" if local > 1 and ranks > local else ""))
    try:
        figure.savefig(path, dpi=110, format="png")
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); choose another path with --png"
        ) from None


def _kind(assessment: Assessment, name: str) -> str:
    short = {
        "table_wise": "TW",
        "row_wise": "RW",
        "table_row_wise": "TWRW",
        "column_wise": "CW",
        "data_parallel": "DP",
    }
    return short[assessment.plan.tables[name].sharding_type]


def _draw_times(axis: "matplotlib.axes.Axes", assessment: Assessment) -> None:
    base = np.zeros(len(assessment.ranks))
    for index, part in enumerate(PARTS):
        if part == "input_dist":
            continue
        heights = np.array([1e3 * rank.times[index] for rank in assessment.ranks])
        axis.bar(range(len(base)), heights, bottom=base, color=PART_COLOURS[index], width=0.9, label=part)
        base += heights
    axis.axhline(
        1e3 * assessment.bound,
        color="black",
        linewidth=0.9,
        linestyle="--",
        label="lower bound of the busiest",
    )
    axis.set_ylabel("ms a step")
    axis.legend(loc="lower left", bbox_to_anchor=(0.0, 0.98), frameon=False, ncols=6, borderpad=0.1)


def _draw_memory(axis: "matplotlib.axes.Axes", assessment: Assessment) -> None:
    on_gpu = assessment.cluster.device == "cuda"
    most = max(assessment.memory(rank)[0 if on_gpu else 1] for rank in assessment.ranks)
    scale, unit = (2.0**-30, "GiB") if most >= 0.1 * 2**30 else (2.0**-20, "MiB")
    rows = np.array([scale * (rank.bytes.rows + rank.bytes.state) for rank in assessment.ranks])
    used = np.array([scale * assessment.memory(rank)[0 if on_gpu else 1] for rank in assessment.ranks])
    axis.bar(range(len(rows)), used, color="#c9c9c9", width=0.9, label="with activations and dense part")
    axis.bar(
        range(len(rows)), np.minimum(rows, used), color="#6a51a3", width=0.9, label="rows and optimizer state"
    )
    limit = scale * (assessment.cluster.hbm_bytes if on_gpu else assessment.cluster.ddr_bytes)
    if limit < 4 * used.max():
        axis.axhline(
            limit, color="black", linewidth=0.9, linestyle="--", label=f"a rank's {limit:.0f} {unit}"
        )
    axis.set_ylabel(f"{'HBM' if on_gpu else 'DDR'} {unit}")
    axis.legend(loc="lower left", bbox_to_anchor=(0.0, 0.98), frameon=False, ncols=6, borderpad=0.1)


def write_html(assessment: Assessment, path: Path) -> None:
    """Write the report with a heat map whose cells say what they are when pointed at. One file, no network.

    Raises:
        InputError: the path cannot be written.
    """
    names, values = heat(assessment)
    largest = float(values.max()) if values.size else 1.0
    rows = []
    for name, row in zip(names, values, strict=True):
        place = place_text(assessment.plan.tables[name]) if name in assessment.plan.tables else ""
        cells = "".join(_cell(name, rank, float(value), largest) for rank, value in enumerate(row))
        rows.append(
            f'<tr><th title="{html.escape(place)}">{html.escape(name)}</th>{cells}<td class=n>{row.sum():.2f}</td></tr>'
        )
    memory = [sum(assessment.memory(rank)) for rank in assessment.ranks]
    top = max(memory)
    foot = "".join(
        f'<td title="rank {rank}: {gib(size)}" style="background:rgba(106,81,163,{0.1 + 0.9 * size / top:.3f})"></td>'
        for rank, size in enumerate(memory)
    )
    total = "".join(
        _cell("all tables", rank.rank, 1e3 * rank.times.total, 1e3 * assessment.busiest.times.total)
        for rank in assessment.ranks
    )
    text = html.escape("\n".join(report_lines(assessment, full=True)))
    totals = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(place_text(assessment.plan.tables[name]))}</td><td class=n>{size.rows + size.state:,}</td>"
        f"<td class=n>{1e3 * times.total:.3f}</td></tr>"
        for name, (size, times) in table_totals(assessment).items()
    )
    page = _PAGE.format(
        title=html.escape(f"Sharding plan: {len(assessment.plan.tables)} tables on {assessment.cluster}"),
        summary=html.escape(
            f"step {1e3 * assessment.path.step:.2f} ms at least, {assessment.samples_per_second:,.0f} samples a second at most, bound by "
            f"{assessment.path.bound_by}; busiest rank {100 * assessment.over_bound:.1f} % above the lower bound"
        ),
        rows="".join(rows),
        total=total,
        memory=foot,
        tables=totals,
        report=text,
    )
    try:
        path.write_text(page)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); choose another path with --html"
        ) from None


def _cell(name: str, rank: int, value: float, largest: float) -> str:
    if value <= 0:
        return "<td></td>"
    strength = 0.12 + 0.88 * (value / largest) ** 0.5
    return f'<td title="{html.escape(name)}, rank {rank}: {value:.3f} ms" style="background:rgba(33,102,172,{strength:.3f})"></td>'


_PAGE = """<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>
<style>body{{font:14px/1.4 system-ui,sans-serif;margin:24px;color:#222}}h1{{font-size:20px}}table.heat{{border-collapse:collapse}}
table.heat td{{min-width:7px;height:15px;border:1px solid #fff;background:#f3f3f3;padding:0}}table.heat th{{text-align:right;font-weight:normal;
font-size:12px;padding:0 8px;white-space:nowrap}}td.n{{text-align:right;padding:0 8px!important;background:none!important;font-size:12px}}
table.list td,table.list th{{padding:1px 10px;border-bottom:1px solid #eee;text-align:left}}pre{{background:#f7f7f7;padding:12px;overflow-x:auto}}.scroll{{overflow-x:auto}}</style>
<h1>{title}</h1><p>{summary}</p><p>Rows are tables, columns are ranks; colour is time of a step, point at a cell to read it.</p>
<div class=scroll><table class=heat>{rows}<tr><th><b>all tables</b></th>{total}<td class=n>ms</td></tr>
<tr><th><b>memory</b></th>{memory}<td></td></tr></table></div>
<h2>Tables</h2><table class=list><tr><th>table<th>place<th>bytes with state<th>ms of the slowest shard</tr>{tables}</table>
<h2>Report</h2><pre>{report}</pre></html>
"""
