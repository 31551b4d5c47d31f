"""What a trained MBCnet computes on rows: latents, logits, and the category of each row; and latents laid out on a plane. One process.

And what the paper says of the branches' latents and losses (Figures 4 d, 6 and 7) as numbers, each with a p over seeds and one over test rows.

Shapes: S seeds, n rows, K branches, d latent width.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from scipy.special import softmax
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from data.errors import InputError
from data.reading.keys import read_vocabularies
from data.schema import Feature, Schema
from data.stream import Batch
from mbcnet_rec.checkpoints.run_folder import storage_of
from mbcnet_rec.checkpoints.storage import best_step, latest_step
from mbcnet_rec.config import RunConfig
from mbcnet_rec.model.kinds import dense_arch_of
from mbcnet_rec.run_training import open_splits
from mbcnet_rec.scoring.paired import Difference, mean_difference
from mbcnet_rec.scoring.trained_run import TrainedRun, opened_run
from mbcnet_rec.study.runs import Run
from mbcnet_rec.study.studies import WORDS, Measure, Study
from mbcnet_rec.study.summary import Compared, Scores, in_both

MISSING = -1  # the category of a row that has none
PCA_WIDTH = 30  # t-SNE works on that many leading components, as van der Maaten and Hinton (2008) do
PROBED_ROWS = 50_000
LEAST_EXPECTED = 5.0  # samples of a cell, from which on a chi-square test holds (Cochran)
Measured = tuple[Compared, str]  # the difference that a claim is about, and what it is in words


@dataclass(frozen=True)
class Probe:
    """A run's best weights on the rows of a split."""

    names: tuple[str, ...]  # of the K branches
    latents: np.ndarray  # (K, n, d) float32
    fused: np.ndarray  # (n, d) float32, what the fused logit is computed from
    logits: np.ndarray  # (n, 1 + K) float32, fused first
    labels: np.ndarray  # (n,) of 0 and 1
    categories: np.ndarray  # (n,) encoded ids of the category field, MISSING where there is none
    groups: np.ndarray | None = None  # (n,) ids of the rows that depend on each other

    def log_loss(self) -> np.ndarray:
        """Each row's log-loss by each output, in nats: (n, 1 + K)."""
        z = self.logits.astype(np.float64)
        return np.logaddexp(0.0, z) - self.labels[:, None] * z


def probe_run(folder: Path, split: str, max_rows: int = 0, category: str = "", step: int | None = None) -> Probe:
    """Run a trained MBCnet, its best checkpoint or that of `step`, over a split, to the batch that reaches `max_rows`; read a field's ids.

    InputError if there is no such run, split or field, or the model has no branches.
    """
    with opened_run(folder) as (run, process):
        run = run if step is None else replace(run, step=step)
        config, schema = run.config, run.schema
        schema.require_one_label("study")
        if not config.model.branch_names:
            raise InputError(f"{folder}: model.kind = {config.model.kind!r} has no branches; wanted a model with some")
        splits = open_splits(config.data, config.train.seed, schema, process)
        if split not in splits:
            raise InputError(f"{folder}: data.{split} is empty; name the files of that split")
        scorer, _ = run.scorer(process)
        seen: list[Any] = []  # latents (K, B, d), and what the fused logit is computed from, (B, d)
        arch = dense_arch_of(scorer.model)
        arch.fusion.register_forward_hook(lambda _module, args, output: seen.append((args[0], output)))
        scored = list(scorer.score(_with_categories(splits[split], category, max_rows)))
        notes, logits, labels, real = (np.concatenate(each) for each in zip(*scored, strict=True))
        latents, fused = (torch.cat(each, dim=-2).float().cpu().numpy() for each in zip(*seen, strict=True))
        categories, groups = notes[real].T
        names, groups = config.model.branch_names, groups if schema.group_column else None
        return Probe(names, latents[:, real], fused[real], logits, labels, categories, groups)


def _with_categories(batches: Iterable[Batch], category: str, max_rows: int) -> Iterator[tuple[Batch, np.ndarray]]:
    """Batches and the category and group of each row (B, 2), until there are enough rows."""
    rows = 0
    for batch in batches:
        ids = np.full(len(batch.labels), MISSING, np.int64)
        if category:
            bags = batch.sparse_features[category]  # of one id, or none
            ids[bags.lengths().numpy() > 0] = bags.values().numpy()
        rows += len(batch.labels)
        groups = ids if batch.group_ids is None else batch.group_ids.numpy()
        yield batch, np.stack([ids, groups], 1)
        if 0 < max_rows <= rows:
            return


def choose_category(schema: Schema, wanted: str) -> Feature:
    """Find the field whose ids are Figure 7's categories; unnamed, the first categorical one called so. InputError if there is none."""
    fields = [feature for feature in schema.sparse if feature.kind == "categorical"]
    for feature in fields:
        if feature.name == wanted or (not wanted and "categor" in feature.name.lower()):
            return feature
    names = ", ".join(feature.name for feature in fields[:12])
    told = f"--category {wanted}".rstrip()
    raise InputError(f"{told}: wanted a categorical field of schema {schema.name!r}; name one of: {names}")


def category_names(schema: Schema, feature: Feature, ids: np.ndarray) -> list[str]:
    """Write ids out: a vocabulary's values where the field has one, else the ids."""
    values: list[str] = []
    if feature.encoding == "vocabulary":
        values = [str(each) for each in read_vocabularies(schema)[feature.vocabulary].to_pylist()]
    special = {MISSING: "(missing)"} | ({0: "(missing)", 1: "(rare)"} if values else {})
    return [special.get(int(each), values[each - 2] if 2 <= each < len(values) + 2 else str(each)) for each in ids]


def tsne_plane(points: np.ndarray, seed: int = 0) -> np.ndarray:
    """Lay (n, d) points out in (n, 2): PCA to at most 30 components, then t-SNE. Equal for equal seeds."""
    if not np.ptp(points, axis=0).any():  # all points are one: PCA and t-SNE would divide by 0
        return np.zeros((len(points), 2), np.float32)
    width = min(PCA_WIDTH, *points.shape)
    reduced = PCA(width, random_state=seed).fit_transform(points)
    perplexity = min(30.0, max(2.0, (len(points) - 1) / 4))
    return TSNE(2, perplexity=perplexity, init="pca", max_iter=500, random_state=seed).fit_transform(reduced)


@dataclass(frozen=True)
class Material:
    """What pictures are made of."""

    study: Study
    config: RunConfig  # that the study's variants start from
    runs: Sequence[Run]  # those that ended
    scores: Mapping[str, Scores]  # variant -> seed -> metrics
    category: str = ""  # the field of Figure 7; "": found by name

    @property
    def first(self) -> list[Run]:
        """The runs of the study's first variant, by seed; InputError if none has ended."""
        runs = [run for run in self.runs if run.variant == self.study.variants[0].name]
        if not runs:
            raise InputError("no run of it has ended")
        return sorted(runs, key=lambda run: run.seed)

    def probe(self, run: Run, category: str = "", step: int | None = None) -> Probe:
        """What a run computes on the test rows, or on the validation rows where there are no others; on the first of them, if there are many."""
        return probe_run(run.folder, "test" if run.config.data.test else "valid", PROBED_ROWS, category, step)

    def ages(self, run: Run) -> dict[str, int]:
        """The steps of a run's early checkpoint, where it has one, and of its last."""
        storage, early = storage_of(run.config.train, run.folder), run.config.train.keep_step
        late = latest_step(storage) or 0
        return {"early": early, "late": late} if early < late and early in storage.steps() else {"late": late}

    def category_field(self) -> tuple[Schema, Feature]:
        """The schema that the first of these runs was trained with, and its field of Figure 7."""
        run = self.first[0]
        step = best_step(storage_of(run.config.train, run.folder))
        if step is None:
            raise InputError(f"{run.folder}: no whole checkpoint")
        schema = TrainedRun(run.config, run.folder, step).schema
        return schema, choose_category(schema, self.category)


def separation(latents: np.ndarray) -> np.ndarray:
    """Share of a row's latents that lie nearest to the centroid of their own branch, (K, n, d) -> (n,); 1 / K: branches cannot be told apart.

    Centroids are of every second row, and judge the others.
    """
    hits = np.empty(latents.shape[1])
    for half in (0, 1):
        centroids = latents[:, 1 - half :: 2].mean(1)
        distances = ((latents[:, half::2, None] - centroids) ** 2).sum(-1)  # (K, n / 2, K)
        hits[half::2] = (distances.argmin(-1) == np.arange(len(latents))[:, None]).mean(0)
    return hits


def nearer_to_cross(probe: Probe) -> np.ndarray:
    """By how much EFGC's neurons are nearer to the cross branch's than to the deep branch's, (n,): softmax outputs by total variation."""
    if missing := {"efgc", "cross", "deep"} - {*probe.names}:
        raise InputError(f"the model has no branch {min(missing)}")
    efgc, cross, deep = (softmax(probe.latents[probe.names.index(name)], axis=1) for name in ("efgc", "cross", "deep"))
    return 0.5 * (np.abs(efgc - deep) - np.abs(efgc - cross)).sum(1)


def dependence(losses: np.ndarray, categories: np.ndarray) -> tuple[float, float]:
    """Whether the branch of a row's lowest loss (n, K) depends on its category (n,), rare ones as one: chi-square above chance by row, and p."""
    known = categories != MISSING
    table = np.asarray(stats.contingency.crosstab(categories[known], losses[known].argmin(1))[1])
    rows = table.sum()
    rare = table.sum(1) * table.sum(0).min(initial=rows) < LEAST_EXPECTED * rows
    table = np.vstack([table[~rare], table[rare].sum(0)])
    table = table[table.sum(1) * table.sum(0).min(initial=rows) >= LEAST_EXPECTED * rows]
    if min(table.shape) < 2:
        raise InputError("one branch is best on all rows, or there are too few rows of each category")
    found = stats.chi2_contingency(table, correction=False)
    return float((found.statistic - found.dof) / rows), float(found.pvalue)


def over_seeds_and_rows(values: np.ndarray, groups: np.ndarray | None) -> Compared:
    """Compare with 0 what each seed says of each row, (S, n)."""
    return in_both(mean_difference(values.mean(1)), mean_difference(values.mean(0), groups))


def measure_separation(material: Material) -> Measured:
    """Figure 4 d: branches are more tangled early in training than at its end."""
    shares: dict[str, list[np.ndarray]] = {"early": [], "late": []}
    groups = None
    for run in material.first:
        steps = material.ages(run)
        if "early" not in steps:
            raise InputError(
                f"{run.folder} has no checkpoint of step {run.config.train.keep_step}, the first line of the log, beside a later one; "
                "set train.log_every lower, or train longer"
            )
        for age, step in steps.items():
            probe = material.probe(run, step=step)
            shares[age].append(separation(probe.latents))
            groups = probe.groups
    told = ", ".join(f"{age} {_with_interval(np.mean(each, axis=1))}" for age, each in shares.items())
    words = WORDS["measures"]["separation"].format(told=told)
    return over_seeds_and_rows(np.subtract(shares["late"], shares["early"]), groups), words


def measure_consistency(material: Material) -> Measured:
    """Figure 6: EFGC agrees more with the cross branch than with the deep branch."""
    probes = [material.probe(run) for run in material.first]
    values = np.stack([nearer_to_cross(each) for each in probes])
    return over_seeds_and_rows(values, probes[0].groups), WORDS["measures"]["consistency"]


def measure_dependence(material: Material) -> Measured:
    """Figure 7: which branch is best depends on the category. The p over seeds is that of the seed that says least."""
    _, field = material.category_field()
    probes = [material.probe(run, category=field.name) for run in material.first]
    found = [dependence(each.log_loss()[:, 1:], each.categories) for each in probes]
    least = max(p for _, p in found) if len(found) > 1 else math.nan
    seeds = Difference(float(np.mean([value for value, _ in found])), math.nan, math.nan, least)
    joint = replace(probes[0], logits=np.mean([each.logits for each in probes], axis=0))
    value, p = dependence(joint.log_loss()[:, 1:], joint.categories)
    words = WORDS["measures"]["dependence"].format(field=field.name)
    return in_both(seeds, Difference(value, math.nan, math.nan, p)), words


def measure_all(material: Material) -> tuple[dict[str, Compared], list[str]]:
    """What the study's claims are about beside AUC, where there are runs; and words on each: what it is, or why it is not there."""
    found, told = {}, []
    for claim in material.study.claims:
        if claim.measure and material.runs:
            try:
                found[claim.measure], words = MEASURES[claim.measure](material)
            except InputError as error:
                words = f"Not tested: {claim.text}. {error}"
            told.append(words)
    return found, told


MEASURES: dict[Measure, Callable[[Material], Measured]] = {
    "separation": measure_separation,
    "consistency": measure_consistency,
    "dependence": measure_dependence,
}


def _with_interval(values: np.ndarray) -> str:
    found = mean_difference(values)
    return f"{found.value:.3f}" + (f" [{found.low:.3f}, {found.high:.3f}]" if found.low == found.low else "")
