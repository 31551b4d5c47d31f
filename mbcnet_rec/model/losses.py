"""The losses of MBCnet as pure functions of logits, latents and labels, and the two configs that choose among their readings.

Shapes: B batch, K branches, d latent width, P = K (K - 1) / 2 unordered pairs in lexicographic order (0,1),
(0,2), .., (K-2,K-1). Half precision is promoted to float32; float64 stays float64. Rows are selected by
multiplying with masks, never by boolean indexing: shapes stay static and nothing waits for the device.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from data.errors import InputError
from data.schema.bounds import Bounded, bounded

Scheme = Literal["strong_to_weak", "weak_to_strong", "no_discrimination"]
Norm = Literal["l2", "squared"]
DifferentiationKind = Literal["moderate", "max_difference", "min_difference"]
Threshold = float | Tensor | Literal["base_rate"]
MeanOverRanks = Callable[[Tensor], Tensor]

THRESHOLD = -math.log(0.5)  # the BCE of a prediction of one half (Eq. 10)


@dataclass(frozen=True)
class CoteachingConfig(Bounded):
    """Branch co-teaching.

    Attributes:
        weight: alpha of Eq. 17; 0 takes the term out of the objective.
        scheme: who teaches whom: strong_to_weak (the paper), weak_to_strong, no_discrimination (Table 5).
        threshold: BCE in nats below which a branch is strong on a sample and above which it is weak; or base_rate: the BCE of always
            predicting the batch's base rate. Where clicks are rare, hardly any row is a disagreement at -log 0.5.
        warmup_steps: training steps over which alpha grows linearly from 0; 0 is no warm-up.
        confidence: weigh each lesson by the teacher's margin 2 |p - 1/2|. Ours, after the paper's remark that
            losses are unreliable early in training.
    """

    weight: float = bounded(0.1, at_least=0)
    scheme: Scheme = "strong_to_weak"
    threshold: float | Literal["base_rate"] = bounded(THRESHOLD, at_least=0)
    warmup_steps: int = bounded(0, at_least=0)
    confidence: bool = False


@dataclass(frozen=True)
class DifferentiationConfig(Bounded):
    """Moderate differentiation, and the two extremes of Table 5.

    Attributes:
        weight: beta of Eq. 17; 0 takes the term and its transforms out of the objective.
        kind: moderate (the paper), min_difference (pull latents together: the distance without W) or
            max_difference (push them apart: minus that distance, without a bound). init and parametrization
            are of the first only.
        norm: l2 (Listing 1) or squared (Eq. 14).
        latents: raw, or unit: of length 1, so that no loss shrinks by shrinking them.
        init: of each transform W: a random orthogonal matrix or the identity.
        parametrization: soft (W is free, the loss pulls it towards orthogonal) or orthogonal (W is orthogonal
            by construction).
        warmup_steps: training steps over which beta grows linearly from 0; 0 is no warm-up.
    """

    weight: float = bounded(0.1, at_least=0)
    kind: DifferentiationKind = "moderate"
    norm: Norm = "l2"
    latents: Literal["raw", "unit"] = "raw"
    init: Literal["orthogonal", "identity"] = "orthogonal"
    parametrization: Literal["soft", "orthogonal"] = "soft"
    warmup_steps: int = bounded(0, at_least=0)


def identity(tensor: Tensor) -> Tensor:
    """Return the tensor: the mean over ranks of a single process."""
    return tensor


def branch_coteaching_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    scheme: Scheme = "strong_to_weak",
    threshold: Threshold = THRESHOLD,
    confidence: bool = False,
    weights: Tensor | None = None,
    mean_over_ranks: MeanOverRanks = identity,
) -> Tensor:
    """Let a branch that is right on a sample teach one that is wrong on it (Eq. 12 as Listing 1 writes it).

        L = 1/C sum_{i != j} sum_b I^{ij}_b (-SG(p^i_b) log p^j_b - (1 - SG(p^i_b)) log(1 - p^j_b)),   C = sum I

    the full BCE of student j against the soft label p^i = sigmoid(z^i) of teacher i; SG stops the gradient.
    Eq. 12 prints only the positive term -p^i log p^j. On a negative sample, where the strong teacher says p^i
    < 1/2 < p^j, that term's gradient in z^j, -p^i (1 - p^j), is negative: descent would raise z^j, away from
    the label. Listing 1's gradient p^j - p^i is positive and lowers it; that is what we compute. Each
    directed pair counts once.

    I^{ij} = 1 where BCE_i < threshold < BCE_j, strictly (strong_to_weak); where BCE_i > threshold > BCE_j
    (weak_to_strong); always, for i != j (no_discrimination). Without any such sample the loss and its
    gradient are exactly 0.

    Args:
        logits: (K, B) of the branches, without the fused one.
        labels: (B,) of 0 and 1.
        scheme: who teaches whom.
        threshold: in nats: a number, (B,), or base_rate (`base_rate_bce` of the rows of all ranks).
        confidence: multiply each term of the sum by the teacher's margin 2 |p^i - 1/2|, which is stopped too. C
            stays the number of terms, so a hesitant teacher teaches less, not merely less than others.
        weights: (B,); rows of weight 0 neither teach, learn nor count. Other values count as 1.
        mean_over_ranks: averages a scalar over data-parallel ranks. The local sum is divided by the mean of C
            over ranks, so that the average of the ranks' losses, and of their gradients, is that of one
            process with the whole batch.

    Returns:
        () loss.
    """
    z = at_least_float32(logits)
    if isinstance(threshold, str):
        threshold = base_rate_bce(labels, weights, mean_over_ranks)
    teaches = teaching_mask(z, labels, scheme, threshold, weights)  # (K teacher, K student, B)
    teacher = z.detach().unsqueeze(1)
    # sigmoid(-z) is 1 - p, and softplus(-z) is -log p, without the rounding of 1 - p near 1.
    guidance = torch.sigmoid(teacher) * F.softplus(-z) + torch.sigmoid(-teacher) * F.softplus(z)  # (K, K, B)
    count = mean_over_ranks(teaches.sum())
    if confidence:
        teaches = teaches * torch.tanh(teacher / 2).abs()  # 2 |sigmoid(z) - 1/2| = |tanh(z / 2)|
    return (teaches * guidance).sum() / torch.where(count > 0, count, 1.0)


@torch.no_grad()
def teaching_mask(
    logits: Tensor, labels: Tensor, scheme: Scheme, threshold: float | Tensor, weights: Tensor | None
) -> Tensor:
    """Say where branch i teaches branch j: I^{ij} of Eq. 10 and 11 as a (K, K, B) tensor of 0 and 1, without gradient."""
    strong, weak = strong_and_weak(logits, labels, threshold)
    if scheme == "strong_to_weak":
        mask = strong.unsqueeze(1) * weak.unsqueeze(0)
    elif scheme == "weak_to_strong":
        mask = weak.unsqueeze(1) * strong.unsqueeze(0)
    elif scheme == "no_discrimination":
        itself = torch.eye(len(strong), dtype=strong.dtype, device=strong.device)
        mask = (1.0 - itself).unsqueeze(2).expand(-1, -1, strong.shape[1])
    else:
        raise InputError(f"scheme = {scheme!r}: wanted strong_to_weak, weak_to_strong or no_discrimination")
    return mask if weights is None else mask * (weights > 0).to(mask.dtype)


def moderate_differentiation_loss(
    latents: Tensor, transforms: Tensor, *, norm: Norm = "l2", weights: Tensor | None = None
) -> Tensor:
    """Keep the latents of two branches within a (soft) rotation of each other (Eq. 14; Listing 1).

        L = mean_{(i,j), i != j} mean_b  || z^i W^ij - z^j || + || z^i W^ij (W^ij)^T - z^i ||,    W^ji = (W^ij)^T

    The second term pulls W towards orthogonal. Listing 1 takes the L2 norm of each row (l2), Eq. 14 its
    square (squared). Where a norm is exactly 0 its gradient is taken as 0.

    Args:
        latents: (K, B, d).
        transforms: (P, d, d): W^ij for each i < j in lexicographic order.
        norm: l2 or squared.
        weights: (B,) row weights; the mean is of weights * term.

    Returns:
        () loss; 0 for a single branch.
    """
    pairs = branch_pairs(len(latents))
    if len(transforms) != len(pairs):
        raise InputError(
            f"transforms: {len(transforms)} matrices; wanted {len(pairs)}, one for each pair of {len(latents)} branches"
        )
    if not pairs:
        return at_least_float32(latents).sum() * 0.0
    # the products below are part of the loss: full precision
    with torch.autocast(latents.device.type, enabled=False):
        z, w = at_least_float32(latents), at_least_float32(transforms)
        latent = z.unbind()
        ordered = [*pairs, *((j, i) for i, j in pairs)]
        # (2 P, B, d) each
        own, other = (torch.stack([latent[k] for k in side]) for side in zip(*ordered, strict=True))
        # z W W^T - z as z (W W^T - I), the small factor in float64: W starts orthogonal, so in float32 the
        # difference would be rounding noise, and the gradient of its norm the direction of that noise.
        maps = torch.cat([w, w.transpose(1, 2)])  # (2 P, d, d): W^ij, then W^ji
        exact, eye = maps.double(), torch.eye(w.shape[-1], dtype=torch.float64, device=w.device)
        there_and_back = (exact @ exact.transpose(1, 2) - eye).to(w.dtype)
        moved = torch.baddbmm(other, own, maps, beta=-1)  # z^i W^ij - z^j
        norms = row_norms(moved, norm) + row_norms(own @ there_and_back, norm)  # (2 P, B)
        return row_mean(norms.mean(0), weights)  # first over the K (K - 1) ordered pairs


def latent_distance(latents: Tensor, *, norm: Norm = "l2", weights: Tensor | None = None) -> Tensor:
    """Mean over pairs and rows of || z^i - z^j ||: "min difference" of Table 5, and "max difference" with a minus sign.

    The arguments are those of `moderate_differentiation_loss`. 0 for a single branch.
    """
    pairs = branch_pairs(len(latents))
    if not pairs:
        return at_least_float32(latents).sum() * 0.0
    z = at_least_float32(latents)
    z_i, z_j = (z[list(side)] for side in zip(*pairs, strict=True))  # (P, B, d) each
    return row_mean(row_norms(z_i - z_j, norm).mean(0), weights)


def row_norms(errors: Tensor, norm: Norm) -> Tensor:
    """Norm of each row, or its square: (..., d) -> (...)."""
    if norm == "squared":
        return errors.square().sum(-1)
    if norm != "l2":
        raise InputError(f"norm = {norm!r}: wanted l2 or squared; change the value")
    # vector_norm defines the gradient at 0 as 0; sqrt of a sum of squares would give NaN there.
    return torch.linalg.vector_norm(errors, dim=-1)


def row_mean(values: Tensor, weights: Tensor | None) -> Tensor:
    """mean_b weights_b values_b, with weights 1 where there are none: (..., B), (B,) -> (...)."""
    return (values if weights is None else values * weights).mean(-1)


def bce_with_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """-y log p - (1 - y) log(1 - p), p = sigmoid(z), of labels 0 and 1: log(1 + exp(-z)) or log(1 + exp(z)), exact for any z.

    (..., B), (B,) -> (..., B), float32 or float64.
    """
    z = at_least_float32(logits)
    return F.softplus((1.0 - 2.0 * labels.to(z.dtype)) * z)


def weighted_bce(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """mean_b weights_b BCE_b: (..., B), (B,), (B,) -> (...), float32 or float64."""
    return row_mean(bce_with_logits(logits, labels), weights)


@torch.no_grad()
def base_rate_bce(labels: Tensor, weights: Tensor | None = None, mean_over_ranks: MeanOverRanks = identity) -> Tensor:
    """BCE of always predicting r, the share of clicks among the rows: -log r where the label is 1, -log(1 - r) where it is 0, (B,).

    Rows of weight 0 do not count, other weights count as 1. Where all labels are one class, that is 0: no branch is strong.
    """
    y = at_least_float32(labels)
    real = torch.ones_like(y) if weights is None else (weights > 0).to(y.dtype)
    clicks, rows = mean_over_ranks(torch.stack([(y * real).sum(), real.sum()])).unbind()
    rate = clicks / rows.clamp(min=1e-6)
    return -torch.log(torch.where(y > 0.5, rate, 1.0 - rate))


def unit(latents: Tensor) -> Tensor:
    """Z / ||z|| of each row, and 0 with gradient 0 for a row of zeros: (..., d) -> (..., d), float32 or float64."""
    z = at_least_float32(latents)
    norms = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    return z / torch.where(norms > 0, norms, 1.0)


def strong_and_weak(logits: Tensor, labels: Tensor, threshold: float | Tensor) -> tuple[Tensor, Tensor]:
    """Where a branch is right and where it is wrong, as 0 and 1: BCE < threshold and BCE > threshold (Eq. 10), both (K, B).

    `threshold`: a number, or (B,).
    """
    losses = bce_with_logits(logits, labels)
    return (losses < threshold).to(losses.dtype), (losses > threshold).to(losses.dtype)


@torch.no_grad()
def disagreement_rates(
    logits: Tensor, labels: Tensor, threshold: Threshold = THRESHOLD, weights: Tensor | None = None
) -> Tensor:
    """Share of rows on which branch i is strong and branch j weak: (K, K), diagonal 0, no gradient; rows of weight 0 do not count."""
    if isinstance(threshold, str):
        threshold = base_rate_bce(labels, weights)
    strong, weak = strong_and_weak(logits, labels, threshold)
    real = torch.ones_like(strong[0]) if weights is None else (weights > 0).to(strong.dtype)  # (B,)
    # a product of (K, B) matrices: a quarter of the work of the mask (K, K, B), for a log
    return (strong * real) @ weak.t() / real.sum().clamp(min=1.0)


def branch_pairs(num_branches: int) -> list[tuple[int, int]]:
    """List the unordered pairs i < j in lexicographic order: (0, 1), (0, 2), (1, 2) for three branches."""
    return list(itertools.combinations(range(num_branches), 2))


def at_least_float32(tensor: Tensor) -> Tensor:
    """Promote half precision: BCE around the threshold and sums over a batch need more than 8 or 11 bits."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
