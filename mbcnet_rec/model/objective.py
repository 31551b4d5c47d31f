"""Model and losses as one module: what the train pipeline calls.

Shapes: B batch, K branches, d latent width, P = K (K - 1) / 2 unordered pairs of branches.

Objective is traced with torch.fx (it contains the tables): its forward only reads attributes of the batch and
calls its two sub-modules. LossArch is a leaf of that trace.
"""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from mbcnet_rec.model.kinds import Model, ModelOutput
from mbcnet_rec.model.layers import without_autocast
from mbcnet_rec.model.losses import (
    CoteachingConfig,
    DifferentiationConfig,
    MeanOverRanks,
    at_least_float32,
    branch_coteaching_loss,
    branch_pairs,
    identity,
    latent_distance,
    moderate_differentiation_loss,
    unit,
    weighted_bce,
)

if TYPE_CHECKING:
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor


class Rows(Protocol):
    """What the objective reads of a batch."""

    dense_features: Tensor  # (B, D) float32
    sparse_features: "KeyedJaggedTensor"
    weighted_features: "KeyedJaggedTensor | None"
    labels: Tensor  # (B,) float32 of 0 and 1
    weights: Tensor  # (B,) float32, 0 for padding rows


class Outputs(NamedTuple):
    """What a step returns to the loop, all without gradient."""

    logits: Tensor  # (B, 1 + K), the fused one first
    labels: Tensor  # (B,)
    weights: Tensor  # (B,)
    # loss, bce, coteaching_loss, differentiation_loss: scalars, the last two before alpha and beta
    terms: dict[str, Tensor]
    # (P,): ||W^ij - I||_F (Figure 5 c), NaN if not measured; (0,) without transforms
    transform_distance: Tensor
    latent_norms: Tensor  # (K,): mean over rows of ||z^k||, NaN if not measured


class Objective(nn.Module):
    """Batch -> (loss, Outputs).

    Args:
        model: with or without branches; the cooperation losses take two or more.
        coteaching, differentiation: of the cooperation losses.
        mean_over_ranks: averages a scalar over data-parallel ranks; see branch_coteaching_loss.
        terms: name -> what it adds to the loss, see LossKind.
    """

    def __init__(
        self,
        model: Model,
        coteaching: CoteachingConfig = CoteachingConfig(),  # noqa: B008 (frozen)
        differentiation: DifferentiationConfig = DifferentiationConfig(),  # noqa: B008 (frozen)
        mean_over_ranks: MeanOverRanks = identity,
        terms: Mapping[str, Callable[..., Tensor]] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        latent_dim = getattr(model.dense_arch, "latent_dim", 0)
        transforms = build_transforms(len(model.branch_names), latent_dim, differentiation)
        self.losses = LossArch(coteaching, differentiation, transforms, mean_over_ranks, terms)

    def forward(self, batch: Rows) -> tuple[Tensor, Outputs]:
        """Compute the loss of one batch."""
        output = self.model(batch.dense_features, batch.sparse_features, batch.weighted_features)
        return self.losses(output, batch.labels, batch.weights)


class LossArch(nn.Module):
    """L = BCE(fused) + sum_k BCE(branch k) + alpha L_BCT + beta L_MDR (Eq. 16 and 17), in float32 also under autocast.

    Attributes:
        transforms: W of each pair of branches, or None: no differentiation, or one of the kinds without W.
        measures: whether forward passes compute what only the log needs, `transform_distance` and `latent_norms`. The trainer
            asks for it in the steps that end with a line of the log: in every step it is 1 % of a small model's time.
        step: forward passes in training mode so far.
    """

    step: Tensor

    def __init__(
        self,
        coteaching: CoteachingConfig,
        differentiation: DifferentiationConfig,
        transforms: "Transforms | None",
        mean_over_ranks: MeanOverRanks = identity,
        terms: Mapping[str, Callable[..., Tensor]] | None = None,
    ) -> None:
        super().__init__()
        self._terms = terms or {}
        self.measures = True
        self.coteaching = coteaching
        self.differentiation = differentiation
        self.transforms = transforms
        # in a tuple, or a callable nn.Module would become a sub-module
        self.mean_over_ranks = (mean_over_ranks,)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self, output: ModelOutput, labels: Tensor, weights: Tensor) -> tuple[Tensor, Outputs]:
        """Map a model's output, labels (B,) and the weights (B,) of rows in every mean to () loss and what to log.

        Rows of weight 0 do not exist for the co-teaching. A cooperation loss that is not part of the objective is 0.
        """
        with without_autocast(labels.device.type):
            fused = output.fused_logits.unsqueeze(0)
            parts = torch.cat([fused, output.branch_logits]) if len(output.branch_logits) else fused
            logits = at_least_float32(parts)  # (1 + K, B)
            bce = weighted_bce(logits, labels, weights).sum()
            coteaching = self.coteaching_loss(logits[1:], labels, weights)
            matrices = None if self.transforms is None else self.transforms()
            differentiation = self.differentiation_loss(output.latents, matrices, weights)
            loss = bce + warm(self.coteaching, self.step) * coteaching
            loss = loss + warm(self.differentiation, self.step) * differentiation
            others = {
                name: term(output, labels, weights, self.mean_over_ranks[0]) for name, term in self._terms.items()
            }
            loss = sum(others.values(), loss)
            norms, distance = self.measured(output.latents, matrices, weights)
        if self.training:
            self.step.add_(1)
        terms = {"loss": loss, "bce": bce, "coteaching_loss": coteaching, "differentiation_loss": differentiation}
        detached = {name: term.detach() for name, term in (terms | others).items()}
        return loss, Outputs(logits.detach().t(), labels, weights, detached, distance, norms)

    def measured(self, latents: Tensor, matrices: Tensor | None, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Norms of latents (K,) and distances of transforms (P,), or NaN."""
        norms = weights.new_full((len(latents),), math.nan)
        distance = weights.new_full((0 if matrices is None else len(matrices),), math.nan)
        if self.measures and len(latents):
            norms = latent_norms(latents, weights)
            if matrices is not None:
                distance = distance_from_identity(matrices)
        return norms, distance

    def coteaching_loss(self, branch_logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """L_BCT of branch logits (K, B) and labels (B,), before alpha; 0 where it is not part of the objective."""
        config = self.coteaching
        if len(branch_logits) < 2 or config.weight == 0:
            return weights.new_zeros(())
        return branch_coteaching_loss(
            branch_logits,
            labels,
            scheme=config.scheme,
            threshold=config.threshold,
            confidence=config.confidence,
            weights=weights,
            mean_over_ranks=self.mean_over_ranks[0],
        )

    def differentiation_loss(self, latents: Tensor, matrices: Tensor | None, weights: Tensor) -> Tensor:
        """L_MDR of latents (K, B, d), before beta; 0 where it is not part of the objective."""
        config = self.differentiation
        if len(latents) < 2 or config.weight == 0:
            return weights.new_zeros(())
        if config.latents == "unit":
            latents = unit(latents)
        if matrices is not None:
            return moderate_differentiation_loss(latents, matrices, norm=config.norm, weights=weights)
        sign = -1.0 if config.kind == "max_difference" else 1.0
        return sign * latent_distance(latents, norm=config.norm, weights=weights)


class Transforms(nn.Module):
    """The (P, d, d) matrices W^ij of each pair i < j of branches, free or orthogonal by construction; W^ji is the transpose (Eq. 13)."""

    def __init__(self, num_pairs: int, latent_dim: int, config: DifferentiationConfig) -> None:
        super().__init__()
        matrices = torch.eye(latent_dim).repeat(num_pairs, 1, 1)
        if config.init == "orthogonal":
            # one by one: orthogonal_ of the whole tensor would make its P rows of d * d orthogonal instead
            for matrix in matrices:
                nn.init.orthogonal_(matrix)
        self.weight = nn.Parameter(matrices)
        if config.parametrization == "orthogonal":
            orthogonal(self, "weight")

    def forward(self) -> Tensor:
        """Return (P, d, d)."""
        return self.weight


def build_transforms(num_branches: int, latent_dim: int, config: DifferentiationConfig) -> Transforms | None:
    """Build the transforms, or None where nothing would train them: DistributedDataParallel waits for every gradient."""
    num_pairs = len(branch_pairs(num_branches))
    trained = num_pairs and config.weight > 0 and config.kind == "moderate"
    return Transforms(num_pairs, latent_dim, config) if trained else None


def latent_norms(latents: Tensor, weights: Tensor) -> Tensor:
    """Mean over rows of ||z^k||, for each branch k: (K, B, d), (B,) -> (K,), without gradient."""
    norms = torch.linalg.vector_norm(at_least_float32(latents.detach()), dim=2)  # (K, B)
    return norms @ weights.to(norms.dtype) / max(1, len(weights))


def warm(config: CoteachingConfig | DifferentiationConfig, step: Tensor) -> Tensor | float:
    """Grow a loss weight linearly from 0 at step 0 to its full value at step `warmup_steps`: () on the step's device, or a number."""
    if config.warmup_steps == 0:
        return config.weight
    return config.weight * (step / config.warmup_steps).clamp(max=1.0)


def distance_from_identity(matrices: Tensor) -> Tensor:
    """||W - I||_F of each of (P, d, d), without gradient (Figure 5 c)."""
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    return torch.linalg.matrix_norm(matrices.detach() - eye)
