"""Pictures of studies and runs: each function takes numbers and returns a PNG. No file is read here.

A branch has one colour in all pictures; the fused output is black.
"""

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

if TYPE_CHECKING:  # its SciPy is slow to import, and the report of a run has no use for it
    from mbcnet_rec.study.summary import Row

COLOURS = {  # Okabe and Ito's, told apart by colour-blind readers too
    "fused": "#111111",
    "efgc": "#0072B2",
    "cross": "#E69F00",
    "deep": "#009E73",
    "fm": "#CC79A7",
    "wide": "#56B4E9",
}
LABELS = {"fused": "fused", "efgc": "EFGC", "cross": "CrossNet", "deep": "Deep", "fm": "FM", "wide": "Wide"}
CYCLE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#F0E442")
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.edgecolor": "#888888",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "legend.frameon": False,
    "figure.dpi": 130,
    "savefig.facecolor": "white",
}
plt.rcParams.update(STYLE)
WIDTH = 9.5  # inches
Curve = Sequence[tuple[float, float]]  # (step, value)


def colour(name: str) -> str:
    """The colour of an output."""
    return COLOURS.get(name, "#777777")


def label(name: str) -> str:
    """The name of an output as the paper writes it."""
    return LABELS.get(name, name)


def png(figure: Figure) -> bytes:
    """Draw a figure and let go of it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight")
    plt.close(figure)
    return buffer.getvalue()


def panels(count: int, height: float = 2.9, columns: int = 0) -> tuple[Figure, list[Axes]]:
    """A row, or rows, of empty panels."""
    columns = columns or count
    rows = math.ceil(count / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(WIDTH, height * rows), squeeze=False, constrained_layout=True
    )
    flat = list(axes.ravel())
    for spare in flat[count:]:
        spare.set_visible(False)
    return figure, flat[:count]


def scores_figure(rows: "Sequence[Row]", values: Mapping[str, Mapping[str, Sequence[float]]]) -> bytes:
    """A dot for each seed, a bar for the mean: AUC and log-loss of each row.

    Args:
        rows: of the table, from top to bottom.
        values: metric -> row -> one value a seed.
    """
    figure, axes = panels(2, height=max(2.2, 0.34 * len(rows) + 0.9))
    for axis, (metric, title) in zip(
        axes, (("auc", "AUC, higher is better"), ("log_loss", "log-loss, lower is better")), strict=True
    ):
        best = (max if metric == "auc" else min)(
            (row for row in rows if row.seeds), key=lambda row: getattr(row, metric)[0], default=None
        )
        means = [getattr(row, metric)[0] for row in rows if row.seeds]
        low, high = readable_range(means)
        for place, row in enumerate(rows):
            seeds = values[metric].get(row.name, ())
            if not seeds:
                continue
            mean = getattr(row, metric)[0]
            if not low <= mean <= high:  # at the edge, in words: its dots would press all others into a line
                right = mean > high
                axis.annotate(
                    f"{mean:.4g} ▸" if right else f"◂ {mean:.4g}",
                    (1.0 if right else 0.0, place),
                    xycoords=axis.get_yaxis_transform(),
                    ha="right" if right else "left",
                    va="center",
                    fontsize=9,
                    color="#555555",
                )
                continue
            tone = "#D55E00" if row is best else "#0072B2"
            axis.scatter(seeds, [place] * len(seeds), s=14, color=tone, alpha=0.45, linewidths=0, zorder=3)
            axis.plot([mean] * 2, [place - 0.28, place + 0.28], color=tone, lw=2.4, zorder=4)
        axis.set_title(title)
        axis.set_yticks(range(len(rows)), [row.name for row in rows] if axis is axes[0] else [""] * len(rows))
        axis.set_ylim(len(rows) - 0.5, -0.5)
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


def curves_figure(
    plots: Sequence[tuple[str, Mapping[str, Sequence[Curve]]]], columns: int = 0, xlabel: str = "step"
) -> bytes:
    """Curves over steps: thin for each seed, thick for their mean where all seeds have the step.

    Args:
        plots: title and, for each line's name, a curve of each seed.
        columns: panels in a row; 0: all.
        xlabel: of every panel.
    """
    figure, axes = panels(len(plots), columns=columns)
    alike = len({tuple(lines) for _, lines in plots}) == 1  # then one legend below serves all panels
    for axis, (title, lines) in zip(axes, plots, strict=True):
        for number, (name, curves) in enumerate(lines.items()):
            tone = COLOURS.get(name, CYCLE[number % len(CYCLE)])
            front = 5 if name == "fused" else 3
            for curve in curves:
                if len(curves) > 1 and curve:
                    axis.plot(*zip(*curve, strict=True), color=tone, lw=0.6, alpha=0.3, zorder=2)
            mean = mean_curve(curves)
            if mean:
                mark = "o" if len(mean) < 3 else ""
                axis.plot(
                    *zip(*mean, strict=True),
                    color=tone,
                    lw=1.9,
                    marker=mark,
                    ms=4,
                    label=label(name),
                    zorder=front,
                )
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


def latents_figure(planes: Sequence[tuple[str, np.ndarray, list[str], np.ndarray]]) -> bytes:
    """Points of a plane, coloured by output.

    Args:
        planes: title, points (n, 2), the outputs' names, and each point's index among them (n,).
    """
    figure, axes = panels(len(planes), height=4.2)
    for axis, (title, points, names, owner) in zip(axes, planes, strict=True):
        order = np.random.default_rng(0).permutation(len(points))  # so that no output lies on top
        axis.scatter(
            points[order, 0],
            points[order, 1],
            s=7,
            c=[colour(names[int(index)]) for index in owner[order]],
            alpha=0.55,
            linewidths=0,
        )
        for name in names:
            axis.scatter([], [], s=26, color=colour(name), label=label(name))
        axis.set_title(title)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.grid(visible=False)
        axis.spines[:].set_visible(False)
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.02), ncols=len(names))
    return png(figure)


def neurons_figure(neurons: Sequence[int], outputs: Mapping[str, np.ndarray]) -> bytes:
    """Mean softmax of each neuron's output, by branch (Figure 6 b)."""
    figure, (axis,) = panels(1, height=3.2)
    places = np.arange(len(neurons))
    for name, values in outputs.items():
        axis.plot(places, values, color=colour(name), lw=1.3, marker="o", ms=4.5, label=label(name))
    axis.set_xticks(places, [str(each) for each in neurons], fontsize=7)
    axis.set_xlabel("neuron of the latent")
    axis.set_title("mean softmax of the neurons' outputs")
    axis.legend(ncols=len(outputs), fontsize=8)
    return png(figure)


def categories_figure(names: Sequence[str], counts: Mapping[str, np.ndarray], base: np.ndarray) -> bytes:
    """How often each category is among the samples that a branch learned best (Figure 7).

    Args:
        names: of the categories.
        counts: branch -> samples of each category.
        base: samples expected if the choice were blind to categories.
    """
    figure, (axis,) = panels(1, height=3.6)
    width = 0.8 / len(counts)
    places = np.arange(len(names))
    for number, (name, values) in enumerate(counts.items()):
        axis.bar(
            places + (number - (len(counts) - 1) / 2) * width,
            values,
            width,
            color=colour(name),
            label=label(name),
        )
    axis.hlines(base, places - 0.45, places + 0.45, color="#111111", lw=1.2, label="if blind to categories")
    axis.set_xticks(places, list(names), rotation=35, ha="right")
    axis.set_ylabel("samples")
    axis.set_title("categories of the samples that each branch learned best")
    axis.grid(axis="x", visible=False)
    axis.legend(ncols=len(counts) + 1, fontsize=8, loc="upper right")
    return png(figure)


def density_figure(
    percents: Sequence[int],
    ours: Mapping[str, Sequence[Sequence[float]]],
    paper: Mapping[str, Sequence[float]],
) -> bytes:
    """AUC over density (Table 7): ours with a bar of one standard deviation, and the paper's.

    Args:
        percents: of the positives.
        ours: model -> for each density one value a seed.
        paper: model -> for each density.
    """
    figure, axes = panels(2, height=3.3)
    for number, (name, seeds) in enumerate(ours.items()):
        shown = [(x, np.mean(v), np.std(v)) for x, v in zip(percents, seeds, strict=True) if len(v)]
        if shown:
            x, mean, sd = zip(*shown, strict=True)
            axes[0].errorbar(
                x, mean, sd, color=CYCLE[number], marker="o", ms=4, lw=1.7, capsize=3, label=name
            )
    for number, (name, values) in enumerate(paper.items()):
        axes[1].plot(percents, values, color=CYCLE[number], marker="o", ms=4, lw=1.7, label=name)
    for axis, title in zip(axes, ("test AUC here", "test AUC in the paper"), strict=True):
        axis.set_title(title)
        axis.set_xticks(list(percents))
        axis.set_xlabel("% of the positives of the training rows")
        axis.legend()
    return png(figure)


def grid_figure(alphas: Sequence[float], betas: Sequence[float], auc: np.ndarray) -> bytes:
    """Mean AUC over (alpha, beta) as a heat map (Figure 9). auc: (alphas, betas), NaN where not run."""
    figure, (axis,) = panels(1, height=3.6)
    figure.set_figwidth(5.6)
    image = axis.imshow(auc, cmap="viridis", aspect="auto", origin="lower")
    middle = np.nanmin(auc) + 0.55 * (np.nanmax(auc) - np.nanmin(auc)) if np.isfinite(auc).any() else 0
    for i, j in np.ndindex(*auc.shape):
        if np.isfinite(auc[i, j]):
            tone = "black" if auc[i, j] > middle else "white"
            axis.text(j, i, f"{auc[i, j]:.4f}", ha="center", va="center", color=tone, fontsize=8.5)
    axis.set_xticks(range(len(betas)), [f"{each:g}" for each in betas])
    axis.set_yticks(range(len(alphas)), [f"{each:g}" for each in alphas])
    axis.set_xlabel("beta, weight of moderate differentiation")
    axis.set_ylabel("alpha, weight of co-teaching")
    axis.set_title("mean test AUC")
    axis.grid(visible=False)
    figure.colorbar(image, ax=axis, shrink=0.9)
    return png(figure)


def complexity_figure(parts: Sequence[dict[str, Any]]) -> bytes:
    """Parameters, FLOPs and latency of each part side by side (Table 8). parts: name, parameters, flops, milliseconds."""
    figure, axes = panels(3, height=max(2.2, 0.34 * len(parts) + 0.8))
    for axis, (key, title, scale) in zip(
        axes,
        (
            ("parameters", "parameters, millions", 1e6),
            ("flops", "forward FLOPs a row, millions", 1e6),
            ("milliseconds", "forward latency, ms a batch", 1.0),
        ),
        strict=True,
    ):
        values = [part[key] / scale for part in parts]
        tones = [colour(part["name"]) if part["name"] in COLOURS else "#999999" for part in parts]
        axis.barh(range(len(parts)), values, color=tones, height=0.62)
        for place, value in enumerate(values):
            axis.text(value, place, f" {value:.3g}", va="center", fontsize=8)
        axis.set_xlim(0, max(values) * 1.25 or 1)
        names = [label(part["name"]) for part in parts] if axis is axes[0] else [""] * len(parts)
        axis.set_yticks(range(len(parts)), names)
        axis.invert_yaxis()
        axis.set_title(title)
        axis.grid(axis="y", visible=False)
    return png(figure)


def calibration_figure(bins: Sequence[Sequence[float]], title: str) -> bytes:
    """Observed against predicted click rate, with 95 % intervals, and the rows of each bin (binomial, by Wilson).

    Args:
        bins: mean prediction, observed rate, rows.
        title: of the panel.
    """
    figure, (axis, share) = panels(2, height=3.1)
    predicted, observed, rows = (np.asarray(column, np.float64) for column in zip(*bins, strict=True))
    z = 1.96
    centre = (observed + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z * np.sqrt(observed * (1 - observed) / rows + z * z / (4 * rows * rows)) / (1 + z * z / rows)
    below, above = np.maximum(0, observed - (centre - half)), np.maximum(0, centre + half - observed)
    limit = float(max(predicted.max(), (centre + half).max())) * 1.05
    axis.plot([0, limit], [0, limit], color="#999999", lw=1, ls="--", label="perfect")
    axis.errorbar(
        predicted,
        observed,
        [below, above],
        color="#0072B2",
        marker="o",
        ms=4,
        lw=1.2,
        capsize=2.5,
        label="fused",
    )
    axis.set_xlabel("mean predicted rate")
    axis.set_ylabel("observed rate")
    axis.set_title(title)
    axis.legend()
    excess = observed - predicted
    share.axhline(0, color="#999999", lw=1, ls="--")
    share.errorbar(
        np.arange(1, len(rows) + 1),
        excess,
        [below, above],
        color="#0072B2",
        marker="o",
        ms=4,
        lw=0,
        elinewidth=1.2,
        capsize=2.5,
    )
    share.set_xlabel(f"bin, by rising prediction, about {int(np.median(rows)):,} rows each")
    share.set_ylabel("observed - predicted")
    share.set_title("error of each bin")
    share.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    return png(figure)
