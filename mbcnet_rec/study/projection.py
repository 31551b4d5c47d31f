"""High-dimensional points on a plane: t-SNE, as in the paper's Figure 4 d."""

import numpy as np
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

PCA_WIDTH = 30  # t-SNE works on that many leading components, as van der Maaten and Hinton (2008) do


def tsne_plane(points: np.ndarray, seed: int = 0) -> np.ndarray:
    """Lay (n, d) points out in (n, 2): PCA to at most 30 components, then t-SNE. Equal for equal seeds."""
    if not np.ptp(points, axis=0).any():  # all points are one: PCA and t-SNE would divide by 0
        return np.zeros((len(points), 2), np.float32)
    width = min(PCA_WIDTH, *points.shape)
    reduced = PCA(width, random_state=seed).fit_transform(points)
    perplexity = min(30.0, max(2.0, (len(points) - 1) / 4))
    return TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(reduced)
