"""Pictures of studies and runs: each function takes numbers and returns a PNG.

A branch has one colour in all pictures; the fused output is black.
"""

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

COLOURS = {  # Okabe and Ito's, told apart by colour-blind readers too
    "fused": "#111111",
    "efgc": "#0072B2",
    "cross": "#E69F00",
    "deep": "#009E73",
    "fm": "#CC79A7",
    "wide": "#56B4E9",
}
LABELS = {"fused": "fused", "efgc": "EFGC", "cross": "CrossNet", "deep": "Deep", "fm": "FM", "wide": "Wide"}
OTHER_COLOUR = "#777777"  # of outputs that the paper does not have
CYCLE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#F0E442")
plt.style.use(Path(__file__).with_name("figures.mplstyle"))
WIDTH = 9.5  # inches
FEW = 5  # points of a curve, up to which each one is marked
Curve = Sequence[tuple[float, float]]  # (step, value)


def label(name: str) -> str:
    """The name of an output as the paper writes it."""
    return LABELS.get(name, name)


def png(figure: Figure) -> bytes:
    """Draw a figure and let go of it."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a box then; tables have the name
        figure.savefig(buffer, format="png", bbox_inches="tight")
    plt.close(figure)
    return buffer.getvalue()


def panels(count: int, height: float = 2.9) -> tuple[Figure, list[Axes]]:
    """Rows of empty panels, at most three in a row."""
    columns = 2 if count == 4 else min(count, 3)
    rows = math.ceil(count / columns)
    size = (WIDTH, height * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, constrained_layout=True)
    flat = list(axes.ravel())
    for spare in flat[count:]:
        spare.set_visible(False)
    return figure, flat[:count]


def intervals_figure(differences: Mapping[str, tuple[Sequence[float], bool]]) -> bytes:
    """Names from top to bottom with `differences`: value, low and high of its 95 % interval, and whether it is significant, and so red."""
    figure, (axis,) = panels(1, height=max(1.6, 0.28 * len(differences) + 0.8))
    for place, ((value, low, high), is_significant) in enumerate(differences.values()):
        tone = "#D55E00" if is_significant else "#0072B2"
        axis.plot([low, high], [place, place], color=tone, lw=1.6, zorder=3)
        axis.scatter([value], [place], s=22, color=tone, zorder=4)
    axis.axvline(0.0, color="#888888", lw=1.0)
    axis.set_yticks(range(len(differences)), [name.replace("$", r"\$") for name in differences])
    axis.set_ylim(len(differences) - 0.5, -0.5)
    axis.grid(axis="y", visible=False)
    return png(figure)


def scores_figure(scores: Mapping[str, Sequence[Mapping[str, float]]]) -> bytes:
    """A dot for each seed, a bar for the mean: AUC and log-loss. `scores`: row, from top to bottom -> metrics of each seed."""
    figure, axes = panels(2, height=max(2.2, 0.34 * len(scores) + 0.9))
    for axis, metric, title, better in (
        (axes[0], "auc", "AUC, higher is better", max),
        (axes[1], "log_loss", "log-loss, lower is better", min),
    ):
        seeds = {name: [each[metric] for each in runs] for name, runs in scores.items() if runs}
        means = {name: float(np.mean(values)) for name, values in seeds.items()}
        best = better(means, key=means.__getitem__, default="")
        low, high = readable_range(list(means.values()))
        for place, name in enumerate(scores):
            if name not in means:
                continue
            mean = means[name]
            if low <= mean <= high:
                tone = "#D55E00" if name == best else "#0072B2"
                dots = [place] * len(seeds[name])
                axis.scatter(seeds[name], dots, s=14, color=tone, alpha=0.45, linewidths=0, zorder=3)
                axis.plot([mean] * 2, [place - 0.28, place + 0.28], color=tone, lw=2.4, zorder=4)
            else:  # at the edge, in words: its dots would press all others into a line
                side, text = ("right", f"{mean:.4g} ▸") if mean > high else ("left", f"◂ {mean:.4g}")
                edge = (float(side == "right"), place)
                across = axis.get_yaxis_transform()
                axis.annotate(text, edge, xycoords=across, ha=side, va="center", color="#555555")
        axis.set_title(title)
        axis.set_yticks(range(len(scores)), list(scores) if axis is axes[0] else [""] * len(scores))
        axis.set_ylim(len(scores) - 0.5, -0.5)
        axis.grid(axis="y", visible=False)
        axis.xaxis.set_major_locator(MaxNLocator(5))
    return png(figure)


def readable_range(means: Sequence[float]) -> tuple[float, float]:
    """From where to where rows are drawn: five quartile ranges beyond the middle half, so that one that diverged hides no other."""
    if len(means) < 4:
        return -math.inf, math.inf
    lower, upper = np.nanquantile(means, (0.25, 0.75))
    reach = 5 * float(upper - lower) or math.inf
    return float(lower) - reach, float(upper) + reach


def curves_figure(plots: Sequence[tuple[str, Mapping[str, Sequence[Curve]]]], xlabel: str = "step") -> bytes:
    """Plots, each a title and a curve for each seed of each line's name: thin, and thick for their mean where all seeds have the step."""
    figure, axes = panels(len(plots))
    alike = len({tuple(lines) for _, lines in plots}) == 1  # then one legend below serves all panels
    for axis, (title, lines) in zip(axes, plots, strict=True):
        for number, (name, curves) in enumerate(lines.items()):
            tone = COLOURS.get(name, CYCLE[number % len(CYCLE)])
            front = 5 if name == "fused" else 3
            for curve in curves:
                if len(curves) > 1 and curve:
                    axis.plot(*zip(*curve, strict=True), color=tone, lw=0.6, alpha=0.3, zorder=2)
            if mean := mean_curve(curves):
                mark = "o" if len(mean) <= FEW else ""
                style = {"color": tone, "lw": 1.9, "marker": mark, "ms": 4, "label": label(name)}
                axis.plot(*zip(*mean, strict=True), zorder=front, **style)
        axis.set_title(title)
        axis.set_xlabel(xlabel)
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if len(lines) > 1 and not alike:
            axis.legend(fontsize=7.5)
    handles, names = axes[0].get_legend_handles_labels()
    if alike and len(names) > 1:
        figure.legend(handles, names, loc="outside lower center", ncols=len(names), fontsize=8)
    return png(figure)


def mean_curve(curves: Sequence[Curve]) -> list[tuple[float, float]]:
    """Mean over curves at the steps that all of them have."""
    if not curves:
        return []
    by_step = [dict(curve) for curve in curves]
    shared = sorted(set.intersection(*(set(each) for each in by_step)))
    return [(step, float(np.mean([each[step] for each in by_step]))) for step in shared]


def smooth(curve: Curve, lines: int = 60) -> list[tuple[float, float]]:
    """Means of neighbouring points, so that about `lines` points are left."""
    size = max(1, len(curve) // lines)
    kept = [curve[start : start + size] for start in range(0, len(curve), size)]
    return [(part[-1][0], float(np.mean([value for _, value in part]))) for part in kept]


def latents_figure(title: str, points: np.ndarray, names: Sequence[str], owner: np.ndarray) -> bytes:
    """Points of a plane (n, 2), coloured by output; `owner` (n,) is each point's index among `names`."""
    figure, (axis,) = panels(1, height=4.2)
    order = np.random.default_rng(0).permutation(len(points))  # so that no output lies on top
    colours = [COLOURS.get(name, OTHER_COLOUR) for name in names]
    tones = [colours[index] for index in owner[order]]
    axis.scatter(*points[order].T, s=7, c=tones, alpha=0.55, linewidths=0)
    for name, tone in zip(names, colours, strict=True):
        axis.scatter([], [], s=26, color=tone, label=label(name))
    axis.set_title(title)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.grid(visible=False)
    axis.spines[:].set_visible(False)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.02), ncols=len(names))
    return png(figure)


def categories_figure(names: Sequence[str], counts: Mapping[str, np.ndarray], base: np.ndarray) -> bytes:
    """`counts`, branch -> how often each category is among the samples it learned best (Figure 7); `base`: expected of a blind choice."""
    figure, (axis,) = panels(1, height=3.6)
    width = 0.8 / len(counts)
    places = np.arange(len(names))
    for number, (name, values) in enumerate(counts.items()):
        left = places + (number - (len(counts) - 1) / 2) * width
        axis.bar(left, values, width, color=COLOURS.get(name, OTHER_COLOUR), label=label(name))
    axis.hlines(base, places - 0.45, places + 0.45, color="#111111", lw=1.2, label="if blind to categories")
    axis.set_xticks(places, list(names), rotation=35, ha="right")
    axis.set_ylabel("samples")
    axis.set_title("categories of the samples that each branch learned best")
    axis.grid(axis="x", visible=False)
    axis.legend(ncols=len(counts) + 1, fontsize=8, loc="upper right")
    return png(figure)


def grid_figure(
    alphas: Sequence[float], betas: Sequence[float], auc: np.ndarray, dead: np.ndarray, line: tuple[str, float]
) -> bytes:
    """Mean AUC over beta, a curve for each alpha, and another model's as a line (Figure 9).

    auc: (alphas, betas), NaN where not run; `dead`: likewise, cells that get a cross; `line`: the model and its AUC.
    """
    figure, (axis,) = panels(1, height=3.6)
    places = np.arange(len(betas))
    # where crosses stand, since an AUC of one half would press the curves into a line
    bottom = axis.get_xaxis_transform()
    for number, (alpha, tone, own, gone) in enumerate(zip(alphas, CYCLE, auc, dead, strict=False)):
        axis.plot(places, np.where(gone, np.nan, own), color=tone, marker="o", ms=4, label=f"alpha {alpha:g}")
        across = places[gone] + 0.06 * (number - (len(alphas) - 1) / 2)
        axis.scatter(across, np.full(len(across), 0.03), s=60, color=tone, marker="x", transform=bottom)
    if dead.any():
        axis.scatter([], [], s=60, color="#111111", marker="x", label="dead")
    if np.isfinite(line[1]):
        axis.axhline(line[1], color="#111111", ls="--", lw=1.4, label=f"{line[0]} {line[1]:.4f}")
    axis.set_xticks(places, [f"{each:g}" for each in betas])
    axis.set(title="mean test AUC", xlabel="beta, weight of moderate differentiation", xlim=(-0.3, len(betas) - 0.7))
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return png(figure)


def calibration_figure(bins: Sequence[Sequence[float]], title: str) -> bytes:
    """Observed against predicted click rate, with 95 % intervals (binomial, by Wilson). Bins: mean prediction, observed rate, rows."""
    figure, axes = panels(2, height=3.1)
    predicted, observed, rows = (np.asarray(column, np.float64) for column in zip(*bins, strict=True))
    z = 1.96
    centre = (observed + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z * np.sqrt(observed * (1 - observed) / rows + z * z / (4 * rows * rows)) / (1 + z * z / rows)
    around = np.maximum(0, [observed - (centre - half), centre + half - observed])
    limit = float(max(predicted.max(), (centre + half).max())) * 1.05
    places = np.arange(1, len(rows) + 1)
    style = {"color": "#0072B2", "marker": "o", "ms": 4, "elinewidth": 1.2, "capsize": 2.5}
    axes[0].plot([0, limit], [0, limit], color="#999999", lw=1, ls="--", label="perfect")
    axes[0].errorbar(predicted, observed, around, lw=1.2, label="fused", **style)
    axes[0].legend()
    axes[1].axhline(0, color="#999999", lw=1, ls="--")
    axes[1].errorbar(places, observed - predicted, around, lw=0, **style)
    axes[1].xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes[0].set(title=title, xlabel="mean predicted rate", ylabel="observed rate")
    about = f"bin, by rising prediction, about {int(np.median(rows)):,} rows each"
    axes[1].set(title="error of each bin", xlabel=about, ylabel="observed - predicted")
    return png(figure)
