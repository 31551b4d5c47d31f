"""What a trained MBCnet computes on rows: latents, logits, and the category of each row; and latents laid out on a plane. One process.

Shapes: n rows, K branches, d latent width.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from data.errors import InputError
from data.reading.keys import read_vocabularies
from data.schema import Feature, Schema
from data.stream import Batch
from mbcnet_rec.model.kinds import dense_arch_of
from mbcnet_rec.run_training import open_splits
from mbcnet_rec.scoring.trained_run import opened_run

MISSING = -1  # the category of a row that has none
PCA_WIDTH = 30  # t-SNE works on that many leading components, as van der Maaten and Hinton (2008) do


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
    """Run a trained MBCnet over the valid or test split, and read the ids of a categorical field if one is named.

    With `max_rows` it stops after the batch that reaches them; `step` is of the checkpoint, by default the best. InputError if there is no
    such run, split or field, or the model has no branches.
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
        scored = list(scorer.score(_with_categories(splits[split].stream, category, max_rows)))
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
