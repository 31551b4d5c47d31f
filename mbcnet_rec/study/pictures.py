"""The pictures of a study: what each one reads from the runs, and how it is captioned; and what each part of an MBCnet costs (Table 8)."""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import torch
from scipy.special import softmax
from torch import nn
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from data.errors import InputError
from data.schema import load_schema
from mbcnet_rec.logs.metrics_log import read_metrics
from mbcnet_rec.model.mbcnet import BranchArch
from mbcnet_rec.model.models import model_layout
from mbcnet_rec.plugins import model_config
from mbcnet_rec.report import figures
from mbcnet_rec.report.page import Block, Picture, Table, Text
from mbcnet_rec.report.run_report import CURVES, plots_of
from mbcnet_rec.runtime.process import choose_device
from mbcnet_rec.study.probe import MISSING, Material, Probe, category_names, tsne_plane
from mbcnet_rec.study.studies import DENSITIES, GRID_ALPHA, GRID_BETA, MODELS, WORDS, density_name, grid_name
from mbcnet_rec.study.summary import best_reference, mean_and_sd

LATENT_ROWS = 200  # of each output on the plane
NEURONS = 30  # as many as Figure 6 shows
BEST_LEARNED = 10_000
MAX_CATEGORIES = 12
MIN_SECONDS = 0.2  # that each part is timed for
CAPTIONS: dict[str, str] = WORDS["captions"]
FORMULAS = {"efgc": "O(N_g L_EFGC d^2)", "cross": "O(L_CrossNet N_experts F d)", "deep": "O(L_Deep d^2)"}


def draw_all(material: Material) -> list[Block]:
    """Draw what the study asks for; a picture that this data cannot give becomes a line that says why."""
    blocks: list[Block] = []
    for name in material.study.pictures:
        try:
            blocks += DRAWERS[name](material)
        except InputError as error:
            blocks.append(Text(f"No picture of {name}: {error}"))
    return blocks


def _scores(material: Material) -> list[Block]:
    names = [each.name for each in material.study.variants if each.name in material.scores]
    if not names:
        raise InputError("no run has ended")
    picture = figures.scores_figure({name: list(material.scores[name].values()) for name in names})
    return [Picture("scores", picture, CAPTIONS["scores"])]


def _curves(name: str, curves: str, material: Material) -> list[Block]:
    """Metrics of the study's first variant, over all its seeds."""
    plots = plots_of([read_metrics(run.folder) for run in material.first], CURVES[curves])
    return [Picture(name, figures.curves_figure(plots), CAPTIONS[name])]


def _latents(material: Material) -> list[Block]:
    run, blocks = material.first[0], []
    for age, step in material.ages(run).items():
        probe = material.probe(run, step=step)
        names = [*probe.names, "fused"]
        latents = np.concatenate([probe.latents, probe.fused[None]])[:, :LATENT_ROWS]
        owner = np.repeat(np.arange(len(names)), latents.shape[1])
        plane = tsne_plane(latents.reshape(len(owner), -1))
        picture = figures.latents_figure(f"{age}, step {step:,}", plane, names, owner)
        shown = probe.labels[:LATENT_ROWS]
        facts = {"rows": len(shown), "clicked": int(shown.sum()), "age": age, "seed": run.seed}
        blocks.append(Picture("latents", picture, CAPTIONS["latents"].format(**facts)))
    return blocks


def _neurons(material: Material) -> list[Block]:
    probe = material.probe(material.first[0])
    outputs = softmax(probe.latents, axis=2).mean(axis=1)  # (K, d)
    width = outputs.shape[1]
    chosen = np.sort(np.random.default_rng(0).choice(width, min(NEURONS, width), replace=False))
    plot = {
        name: [list(zip(chosen, values[chosen], strict=True))]
        for name, values in zip(probe.names, outputs, strict=True)
    }
    title = "mean softmax of the neurons' outputs"
    picture = figures.curves_figure([(title, plot)], xlabel="neuron of the latent")
    agreement = np.corrcoef(outputs)
    shown = [figures.label(name) for name in probe.names]
    lines = [(f"{shown[i]} and {shown[j]}", f"{agreement[i, j]:.3f}") for i, j in combinations(range(len(shown)), 2)]
    table = Table(("branches", "correlation of the mean outputs"), tuple(lines))
    facts = {"width": width, "rows": len(probe.labels), "chosen": len(chosen), "seed": material.first[0].seed}
    return [Picture("neurons", picture, CAPTIONS["neurons"].format(**facts)), table]


def _categories(material: Material) -> list[Block]:
    schema, field = material.category_field()
    probe = material.probe(material.first[0], category=field.name)
    ids, counts, base, kept = best_learned(probe)
    names = category_names(schema, field, ids)
    picture = figures.categories_figure(names, dict(zip(probe.names, counts, strict=True)), base)
    caption = CAPTIONS["categories"] + (CAPTIONS["fewer"] if kept < BEST_LEARNED else "")
    facts = {"kept": kept, "rows": len(probe.labels), "field": field.name, "seed": material.first[0].seed}
    return [Picture("categories", picture, caption.format(**facts, wanted=BEST_LEARNED))]


def best_learned(probe: Probe) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """The most frequent categories (C,), their counts among each branch's best-learned rows (K, C), those of a blind choice (C,), rows taken."""
    kept = min(BEST_LEARNED, max(1, len(probe.labels) // 4))
    known = probe.categories != MISSING
    values, sizes = np.unique(probe.categories[known], return_counts=True)
    order = np.argsort(-sizes)[:MAX_CATEGORIES]
    ids = values[order]
    best = np.argsort(probe.log_loss()[:, 1:], axis=0, kind="stable")[:kept]  # (kept, K)
    counts = (probe.categories[best][..., None] == ids).sum(0)
    return ids, counts, sizes[order] * kept / len(probe.labels), kept


def _density(material: Material) -> list[Block]:
    ours: dict[str, list[figures.Curve]] = {}
    paper: dict[str, list[figures.Curve]] = {}
    by_name = {variant.name: variant for variant in material.study.variants}
    for kind in ("dnn", "dcnv2", "mbcnet"):
        model = MODELS[kind].name
        rows = {percent: density_name(model, percent) for percent in DENSITIES}
        scores = {percent: material.scores.get(row, {}) for percent, row in rows.items()}
        ours[model] = [
            [(percent, own[seed]["auc"]) for percent, own in scores.items() if seed in own]
            for seed in sorted(set().union(*scores.values()))
        ]
        paper[model] = [[(percent, by_name[row].paper[0]) for percent, row in rows.items()]]
    picture = figures.curves_figure(
        [("test AUC here", ours), ("test AUC in the paper", paper)], xlabel="% of the positives of the training rows"
    )
    return [Picture("density", picture, CAPTIONS["density"])]


def _grid(material: Material) -> list[Block]:
    def cells(value: Callable[[Mapping[str, Any]], float]) -> np.ndarray:
        names = [[grid_name(alpha, beta) for beta in GRID_BETA] for alpha in GRID_ALPHA]
        found = [[[value(each) for each in material.scores.get(name, {}).values()] for name in row] for row in names]
        return np.array([[np.mean(each or [np.nan]) for each in row] for row in found])

    auc, dead = cells(lambda each: each["auc"]), cells(lambda each: bool(each.get("dead"))) > 0
    line = best_reference(material.study, material.scores)
    drawn = line in {each.name for each in material.study.rivals}
    level = mean_and_sd([each["auc"] for each in material.scores[line].values()])[0] if drawn else np.nan
    picture = figures.grid_figure(GRID_ALPHA, GRID_BETA, auc, dead, (line, level))
    return [Picture("grid", picture, CAPTIONS["grid"])]


def _complexity(material: Material) -> list[Block]:
    """Measure every branch, the shared top with the logits, and the whole dense part of the config's MBCnet on a batch; say what EFGC adds."""
    config = material.config.model.mbcnet
    device = choose_device(material.config.train.device, 0)
    rows = material.config.data.eval_batch_size or material.config.data.batch_size
    layout = model_layout(model_config(mbcnet=config), load_schema(material.config.schema))
    torch.manual_seed(0)
    arch = BranchArch(config, layout).to(device).eval()
    features = {name: torch.randn(rows, width, device=device) for name, width in layout.tensor_widths().items()}
    hidden = torch.randn(len(arch.branches) * rows, config.branch_dim, device=device)
    parts: dict[str, tuple[nn.Module, Any]] = {
        name: (branch, {group: features[own] for group, own in layout.reads(name).items()})
        for name, branch in arch.branches.items()
    }
    parts |= {"shared top, all branches": (arch.top, hidden), "whole dense part": (arch, features)}
    sizes = {name: sum(weights.numel() for weights in part.parameters()) for name, (part, _) in parts.items()}
    costs = {name: _cost(part, inputs) for name, (part, inputs) in parts.items()}
    lines = [
        (figures.label(name), FORMULAS.get(name, ""), f"{sizes[name]:,}", f"{flops / rows:,.0f}", f"{milliseconds:.2f}")
        for name, (flops, milliseconds) in costs.items()
    ]
    header = ("part", "time, by the paper", "parameters", "FLOPs a row", f"ms a batch of {rows:,}")
    text = CAPTIONS["complexity"].format(device=device.type, threads=torch.get_num_threads())
    if "efgc" in parts:
        rest, milliseconds = sizes["whole dense part"] - sizes["efgc"], costs["efgc"][1]
        text += CAPTIONS["efgc"].format(rest=rest, milliseconds=milliseconds)
    return [Text(text), Table(header, tuple(lines))]


def _cost(part: nn.Module, inputs: Any) -> tuple[float, float]:
    """FLOPs of a forward pass, and its median milliseconds."""
    with torch.inference_mode():
        with FlopCounterMode(display=False) as counter:
            part(inputs)
        names = {"part": part, "inputs": inputs}
        timer = Timer("part(inputs)", globals=names, num_threads=torch.get_num_threads())
        return counter.get_total_flops(), 1e3 * timer.blocked_autorange(min_run_time=MIN_SECONDS).median


DRAWERS: dict[str, Callable[[Material], list[Block]]] = {
    "scores": _scores,
    "branch_curves": partial(_curves, "branch_curves", "learning"),
    "latents": _latents,
    "terms": partial(_curves, "terms", "terms"),
    "neurons": _neurons,
    "categories": _categories,
    "density": _density,
    "grid": _grid,
    "complexity": _complexity,
}
