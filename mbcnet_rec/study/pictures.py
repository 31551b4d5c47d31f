"""The pictures of a study: what each one reads from the runs, and how it is captioned."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch

from data.errors import InputError
from data.schema import load_schema
from mbcnet_rec.config import RunConfig
from mbcnet_rec.report import figures
from mbcnet_rec.report.page import Block, Picture, Table, Text
from mbcnet_rec.serving.complexity import measure_parts
from mbcnet_rec.study.probe import MISSING, Probe, category_names, choose_category, neuron_outputs, probe_run
from mbcnet_rec.study.projection import tsne_plane
from mbcnet_rec.study.runs import Run, read_lines
from mbcnet_rec.study.studies import DENSITIES, GRID_ALPHA, GRID_BETA, MODELS, Study, density_name, grid_name
from mbcnet_rec.study.summary import Row, Scores

LATENT_ROWS = 500  # of each output on the plane
NEURONS = 30  # as many as Figure 6 shows
BEST_LEARNED = 10_000
MAX_CATEGORIES = 12
SHOWN_BRANCHES = ("fused", "efgc", "cross", "deep", "fm", "wide")


@dataclass(frozen=True)
class Material:
    """What pictures are made of.

    Attributes:
        study: the study that was run.
        config: the config that its variants start from.
        runs: the runs that ended.
        scores: variant -> seed -> metrics.
        rows: the rows of the study's table.
        category: the field of Figure 7; "": found by name.
    """

    study: Study
    config: RunConfig
    runs: Sequence[Run]
    scores: Mapping[str, Scores]
    rows: Sequence[Row]
    category: str = ""

    def of(self, variant: str) -> list[Run]:
        """The runs of a variant, by seed."""
        return sorted((run for run in self.runs if run.variant == variant), key=lambda run: run.seed)

    @property
    def first(self) -> list[Run]:
        """The runs of the study's first variant, by seed."""
        return self.of(self.study.variants[0].name)

    def probe(self, max_rows: int = 0, category: str = "") -> Probe:
        """What the first of these runs computes on the test rows, or on the validation rows where there are no others."""
        run = self.first[0]
        return probe_run(run.folder, "test" if run.config.data.test else "valid", max_rows, category)


def draw_all(material: Material) -> list[Block]:
    """Draw what the study asks for; a picture that this data cannot give becomes a line that says why."""
    blocks: list[Block] = []
    for name in material.study.pictures:
        try:
            blocks += DRAWERS[name](material)
        except InputError as error:
            blocks.append(Text(f"No picture of {name}: {error}"))
    return blocks


def line_curve(run: Run, split: str, key: str) -> list[tuple[float, float]]:
    """A metric of a run over steps."""
    lines = read_lines(run.folder, split)
    return [(line["step"], line[key]) for line in lines if line.get(key) is not None]


def outputs_of(runs: Sequence[Run]) -> list[str]:
    """Outputs that the runs logged, fused first."""
    keys = {key for run in runs for line in read_lines(run.folder, "train")[:1] for key in line}
    return [name for name in SHOWN_BRANCHES if name == "fused" or f"log_loss/{name}" in keys]


def _scores(material: Material) -> list[Block]:
    values = {
        metric: {name: [each[metric] for each in seeds.values()] for name, seeds in material.scores.items()}
        for metric in ("auc", "log_loss")
    }
    picture = figures.scores_figure(material.rows, values)
    return [
        Picture("scores", picture, "A dot is one seed, a bar their mean; the best row of each panel is red.")
    ]


def _branch_curves(material: Material) -> list[Block]:
    runs = material.first
    plots = []
    for title, split, metric in (
        ("train log-loss", "train", "log_loss"),
        ("validation log-loss", "valid", "log_loss"),
        ("validation AUC", "valid", "auc"),
    ):
        lines = {}
        for name in outputs_of(runs):
            key = metric if name == "fused" else f"{metric}/{name}"
            curves = [line_curve(run, split, key) for run in runs]
            lines[name] = [figures.smooth(curve) for curve in curves] if split == "train" else curves
        plots.append((title, lines))
    caption = "Figure 4 a to c: each branch and the fused output while training; thin lines are seeds."
    return [Picture("branch_curves", figures.curves_figure(plots), caption)]


def _latents(material: Material) -> list[Block]:
    probe = material.probe(LATENT_ROWS)
    names = [*probe.names, "fused"]
    latents = np.concatenate([probe.latents, probe.fused[None]])[:, :LATENT_ROWS]
    owner = np.repeat(np.arange(len(names)), latents.shape[1])
    plane = tsne_plane(latents.reshape(len(owner), -1))
    shown = probe.labels[:LATENT_ROWS]
    caption = (
        f"Figure 4 d: t-SNE of the latents of {latents.shape[1]} held-out rows ({int(shown.sum())} of them clicked), seed "
        f"{material.first[0].seed}. Branches that keep apart have learned different things."
    )
    picture = figures.latents_figure([("latents of each branch, and fused", plane, names, owner)])
    return [Picture("latents", picture, caption)]


def _terms(material: Material) -> list[Block]:
    runs = material.first

    def smoothed(key: str) -> list[figures.Curve]:
        return [figures.smooth(line_curve(run, "train", key)) for run in runs]

    first = read_lines(runs[0].folder, "train")[:1]
    pairs = [key for key in (first[0] if first else {}) if key.startswith("transform_distance/")]
    plots: list[tuple[str, Mapping[str, Sequence[figures.Curve]]]] = [
        ("co-teaching loss", {"coteaching_loss": smoothed("coteaching_loss")}),
        ("moderate differentiation loss", {"differentiation_loss": smoothed("differentiation_loss")}),
        ("||W - I||", {key.partition("/")[2]: smoothed(key) for key in pairs}),
        ("validation AUC", {"fused": [line_curve(run, "valid", "auc") for run in runs]}),
    ]
    caption = "Figure 5: the two cooperation losses before their weights, the transforms' distance from the identity, and the AUC."
    return [Picture("terms", figures.curves_figure(plots, columns=2), caption)]


def _neurons(material: Material) -> list[Block]:
    probe = material.probe()
    outputs = neuron_outputs(probe)
    width = outputs.shape[1]
    chosen = np.sort(np.random.default_rng(0).choice(width, min(NEURONS, width), replace=False))
    picture = figures.neurons_figure(chosen.tolist(), dict(zip(probe.names, outputs[:, chosen], strict=True)))
    agreement = np.corrcoef(outputs)
    shown = [figures.label(name) for name in probe.names]
    lines = [
        (f"{shown[i]} and {shown[j]}", f"{agreement[i, j]:.3f}")
        for i, j in combinations(range(len(shown)), 2)
    ]
    table = Table(("branches", "correlation of the mean outputs"), tuple(lines))
    caption = (
        f"Figure 6 b: softmax over the {width} neurons of the latent, mean over {len(probe.labels):,} held-out rows, "
        f"{len(chosen)} neurons drawn at random, seed {material.first[0].seed}."
    )
    return [Picture("neurons", picture, caption), table]


def _categories(material: Material) -> list[Block]:
    schema = load_schema(material.first[0].config.schema)
    field = choose_category(schema, material.category)
    probe = material.probe(category=field.name)
    ids, counts, base, kept = best_learned(probe)
    names = category_names(schema, field, ids)
    picture = figures.categories_figure(names, dict(zip(probe.names, counts, strict=True)), base)
    share = f"the {kept:,} rows with the lowest log-loss of {len(probe.labels):,}"
    note = (
        ""
        if kept == BEST_LEARNED
        else f" The paper takes {BEST_LEARNED:,}; here that would be too large a part of the held-out rows, so a quarter is taken."
    )
    caption = f"Figure 7: {share}, by branch, counted by {field.name}, seed {material.first[0].seed}.{note}"
    return [Picture("categories", picture, caption)]


def best_learned(probe: Probe) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Count the categories of each branch's best-learned rows.

    Returns:
        The most frequent categories (C,), counts (K, C), counts expected of a blind choice (C,), rows taken.
    """
    kept = min(BEST_LEARNED, max(1, len(probe.labels) // 4))
    known = probe.categories != MISSING
    values, sizes = np.unique(probe.categories[known], return_counts=True)
    order = np.argsort(-sizes)[:MAX_CATEGORIES]
    ids = values[order]
    losses = probe.log_loss()[:, 1:]
    counts = np.stack(
        [
            (probe.categories[np.argsort(losses[:, branch], kind="stable")[:kept], None] == ids).sum(0)
            for branch in range(losses.shape[1])
        ]
    )
    return ids, counts, sizes[order] * kept / len(probe.labels), kept


def _density(material: Material) -> list[Block]:
    ours, paper = {}, {}
    by_name = {variant.name: variant for variant in material.study.variants}
    for kind in ("dnn", "dcnv2", "mbcnet"):
        model = MODELS[kind].name
        rows = [density_name(model, percent) for percent in DENSITIES]
        ours[model] = [[each["auc"] for each in material.scores.get(row, {}).values()] for row in rows]
        paper[model] = [by_name[row].paper[0] for row in rows]
    caption = "Table 7: a share of the positives of the training rows is left out; validation and test rows stay. Bars: one sd."
    return [Picture("density", figures.density_figure(DENSITIES, ours, paper), caption)]


def _grid(material: Material) -> list[Block]:
    def mean_auc(row: str) -> float:
        return float(np.mean([each["auc"] for each in material.scores.get(row, {}).values()] or [np.nan]))

    auc = np.array([[mean_auc(grid_name(alpha, beta)) for beta in GRID_BETA] for alpha in GRID_ALPHA])
    picture = figures.grid_figure(GRID_ALPHA, GRID_BETA, auc)
    return [Picture("grid", picture, "Figure 9: the paper uses 0.1 for both.")]


def _complexity(material: Material) -> list[Block]:
    config = material.config
    chosen, has_gpu = config.train.device, torch.cuda.is_available()
    device = torch.device("cuda" if chosen == "cuda" or (chosen == "auto" and has_gpu) else "cpu")
    rows = config.data.eval_batch_size or config.data.batch_size
    parts = measure_parts(config.model.mbcnet, load_schema(config.schema), rows, device)
    lines = [
        (figures.label(part.name), part.complexity, f"{part.parameters:,}", f"{part.flops:,.0f}", f"{part.milliseconds:.2f}")
        for part in parts
    ]  # fmt: skip
    header = ("part", "time, by the paper", "parameters", "FLOPs a row", f"ms a batch of {rows:,}")
    whole = parts[-1]
    efgc = next((part for part in parts if part.name == "efgc"), None)
    more = (
        f" Without EFGC the dense part would have {whole.parameters - efgc.parameters:,} parameters; the branch adds "
        f"{efgc.milliseconds:.2f} ms to a batch. The paper: 2.2 million parameters and 1 ms."
        if efgc
        else ""
    )
    caption = f"Table 8, measured: dense part only, {device.type}, {torch.get_num_threads()} threads, without the tables.{more}"
    picture = figures.complexity_figure([part.as_dict() for part in parts])
    return [Table(header, tuple(lines)), Picture("complexity", picture, caption)]


DRAWERS: dict[str, Callable[[Material], list[Block]]] = {
    "scores": _scores,
    "branch_curves": _branch_curves,
    "latents": _latents,
    "terms": _terms,
    "neurons": _neurons,
    "categories": _categories,
    "density": _density,
    "grid": _grid,
    "complexity": _complexity,
}
